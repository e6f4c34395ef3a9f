"""The load-balancing loss against the references of MiniMind's generations, and transformers'."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minicache.models import balance, load_model
from tests.conftest import tiny_llama
from tests.references.checkpoints import MIXTURES, draw, reference_of
from tests.references.formulas import State

ROUTERS = ("router.weight", "mlp.gate.weight")
WEIGHT = 0.03


def mixture(checkpoints: Path, name: str) -> torch.nn.Module:
    return load_model(str(checkpoints / f"{name}.pth")).model


def rows(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids padded at the right, and which of them are real: both (R, L)."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(3, 400, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask, mask


def sequences(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What `Routing.loss` takes, of rows that are a sequence each."""
    return mask.flatten().nonzero()[:, 0], mask.nonzero()[:, 0], len(mask)


def loss_of(model: torch.nn.Module, routing: balance.Routing, mask: torch.Tensor) -> torch.Tensor:
    """(R,): the loss of rows that are a step of their own."""
    read, readers, count = sequences(mask)
    if not balance.balances_steps(model):
        return routing.loss(read, readers, count)
    load = routing.load(read)
    return load.loss(load).expand(count)


def balance_of(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with balance.recording(model, WEIGHT) as routing:
        model(ids)
    return loss_of(model, routing, mask)


def reference_balance(name: str, state: State, ids: torch.Tensor, lengths: tuple[int, ...]) -> torch.Tensor:
    """Of the first `lengths` tokens of each row of ids (R, L), computed row by row without padding. Returns: (R,) float64."""
    reference = reference_of(name)
    computed = [reference.compute(state, ids[row : row + 1, :length]).scores for row, length in enumerate(lengths)]
    if name.startswith("minimind3"):  # all tokens in one
        computed = [[torch.cat(layer, 1) for layer in zip(*computed, strict=True)]] * len(lengths)
    losses = [reference.balance_loss(scores, reference.DEFAULTS.experts_per_token, WEIGHT) for scores in computed]
    return torch.cat(losses)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("lengths", [(29, 29), (13, 29, 1)], ids=["full rows", "padded rows"])
def test_the_balance_loss_is_that_of_the_reference(checkpoints: Path, name: str, lengths: tuple[int, ...]) -> None:
    ids, mask = rows(lengths)
    found = balance_of(mixture(checkpoints, name), ids, mask)
    assert found.shape == (len(lengths),) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(reference_balance(name, draw(name), ids, lengths).tolist(), rel=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_its_gradient_is_that_of_the_reference(checkpoints: Path, name: str) -> None:
    lengths = (13, 29)
    ids, mask = rows(lengths)
    model = mixture(checkpoints, name).requires_grad_(True)
    balance_of(model, ids, mask).sum().backward()
    state = {key: value.double().requires_grad_(True) for key, value in draw(name).items()}
    reference_balance(name, state, ids, lengths).sum().backward()
    found = [value.grad for key, value in model.named_parameters() if key.endswith(ROUTERS)]
    expected = [value.grad for key, value in state.items() if key.endswith(".gate.weight")]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours is not None and theirs is not None
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("within", [True, False])
def test_gradients_are_the_same_under_checkpointing(checkpoints: Path, name: str, within: bool) -> None:
    """Backward inside the recording, when recomputed layers are heard again, and after it, when they are not."""
    grads = []
    for checkpointed in (False, True):
        model, (ids, mask) = mixture(checkpoints, name).requires_grad_(True).train(), rows((13, 29))
        if checkpointed:
            for layer in model.get_submodule("model.layers").children():
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        with balance.recording(model, WEIGHT) as routing:
            logits = model(ids, use_cache=False).logits
            if within:
                (loss_of(model, routing, mask).sum() + logits.mean()).backward()
        if not within:
            (loss_of(model, routing, mask).sum() + logits.mean()).backward()
        grads.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    router = next(key for key in grads[0] if key.endswith(ROUTERS))
    assert grads[0][router].abs().max() > 0
    assert all(torch.allclose(grads[0][key], grads[1][key], rtol=1e-5, atol=1e-8) for key in grads[0])
    assert grads[0].keys() == grads[1].keys()


@pytest.mark.parametrize("name", MIXTURES)
def test_scores_are_float32_under_autocast(checkpoints: Path, name: str) -> None:
    model, (ids, mask) = mixture(checkpoints, name), rows((13, 29))
    with torch.autocast("cpu", torch.bfloat16):
        found = balance_of(model, ids, mask)
    assert found.dtype == torch.float32
    assert torch.allclose(found, balance_of(model, ids, mask), rtol=0.05)


def tiny_mixtral(output_router_logits: bool) -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "initializer_range": 0.3,
    }
    asked: dict[str, Any] = {"output_router_logits": output_router_logits, "router_aux_loss_coef": 0.02}
    model: torch.nn.Module = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **asked)).eval()
    return model


def test_another_family_has_transformers_own_loss_if_it_asks() -> None:
    model, (ids, mask) = tiny_mixtral(True), rows((13, 29))
    expected = WEIGHT * model(ids, attention_mask=mask.long()).aux_loss
    assert balance_of(model, ids, mask).tolist() == pytest.approx([expected.item()] * 2, rel=1e-4)


@pytest.mark.parametrize("name", ["minimind3-moe", "mixtral"])
def test_parts_of_a_step_have_the_loss_and_the_gradient_of_the_whole(checkpoints: Path, name: str) -> None:
    """Each token's gradient needs the choices of all tokens of the step, also of those in other passes."""
    model = tiny_mixtral(True) if name == "mixtral" else mixture(checkpoints, name)
    ids, mask = rows((13, 29, 7))

    def load(some: slice) -> balance.Load:
        with balance.recording(model, WEIGHT) as routing:
            model(ids[some])
        return routing.load(mask[some].flatten().nonzero()[:, 0])

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        model.requires_grad_(True).zero_grad()
        loss.backward()
        return [each.grad for each in model.parameters() if each.grad is not None]

    model.requires_grad_(True)
    whole, parts = load(slice(3)), [load(slice(1)), load(slice(1, 3))]
    step = parts[0].detached() + parts[1].detached() + parts[1].detached(counts=False)
    assert sum(part.loss(step).item() for part in parts) == pytest.approx(whole.loss(whole).item(), rel=1e-5)
    expected = gradients(whole.loss(whole.detached()))
    found = gradients(parts[0].loss(step) + parts[1].loss(step))
    alone = gradients(
        sum((part.loss(part.detached()) / 2 for part in (load(slice(1)), load(slice(1, 3)))), torch.zeros(()))
    )
    norm = torch.cat([each.flatten() for each in expected]).norm()
    differences = [
        torch.cat([(a - b).flatten() for a, b in zip(each, expected, strict=True)]).norm() for each in (found, alone)
    ]
    assert differences[0] < 1e-4 * norm < 1e-2 * norm < differences[1]


def test_who_has_a_balance_loss(checkpoints: Path) -> None:
    own = {name: balance.own_weight(mixture(checkpoints, name)) for name in MIXTURES}
    assert own == {"minimind2-2504-moe": 0.0, "minimind2-2510-moe": 0.01, "minimind3-moe": 5e-4}
    assert balance.own_weight(tiny_mixtral(True)) == 0.02 and balance.own_weight(tiny_mixtral(False)) == 0
    assert balance.own_weight(tiny_llama()) == balance.own_weight(mixture(checkpoints, "minimind3-dense")) == 0
    mixtures = [mixture(checkpoints, name) for name in MIXTURES] + [tiny_mixtral(False)]
    assert all(map(balance.has_routers, mixtures))
    assert not balance.has_routers(tiny_llama()) and not balance.has_routers(mixture(checkpoints, "minimind3-dense"))


def test_tokens_that_go_to_all_experts_are_balanced(checkpoints: Path) -> None:
    model, (ids, mask) = load_model(f"{checkpoints / 'minimind2-2510-moe.pth'}:experts_per_token=4").model, rows((5, 9))
    assert balance_of(model, ids, mask).tolist() == pytest.approx([WEIGHT * 2] * 2)


def test_nothing_of_the_recording_stays(checkpoints: Path) -> None:
    model, (ids, mask) = mixture(checkpoints, "minimind3-moe"), rows((5,))
    first = balance_of(model, ids, mask)
    assert not any(part._forward_hooks for part in model.modules())
    assert torch.equal(balance_of(model, ids, mask), first)
