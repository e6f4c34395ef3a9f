"""The load-balancing loss against the originals' own numbers, plain sums token by token, and transformers'."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minicache.models import balance, load_model
from tests.conftest import tiny_llama

MIXTURES = ["minimind2-2504-moe", "minimind2-2510-moe", "minimind3-moe"]


@pytest.fixture(scope="session")
def fixtures(shared: Path) -> Path:
    return shared / "fixtures" / "minimind"


def mixture(fixtures: Path, name: str) -> torch.nn.Module:
    return load_model(str(fixtures / f"{name}.pth")).model


def rows(lengths: tuple[int, ...], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids padded at the right, and which of them are real: both (R, L)."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.randint(3, 500, mask.shape, generator=torch.Generator().manual_seed(seed)) * mask, mask


def sequences(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
    """What `Routing.loss` takes, of rows that are a sequence each."""
    return mask.flatten().nonzero()[:, 0], mask.nonzero()[:, 0], len(mask)


def balance_of(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    with balance.recording(model) as routing:
        model(ids)
    return routing.loss(*sequences(mask))


@pytest.mark.parametrize("name", MIXTURES)
def test_the_original_balance_loss(fixtures: Path, name: str) -> None:
    expected = np.load(fixtures / f"{name}.npz")
    ids = torch.from_numpy(expected["input_ids"])
    found = balance_of(mixture(fixtures, name), ids, torch.ones_like(ids, dtype=torch.bool))
    assert found.shape == (2,) and found.dtype == torch.float32
    assert found.mean().item() == pytest.approx(expected["aux_loss"].item(), rel=1e-4)


def plain_balance(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> float:
    """Of all real tokens together, one after the other in float64, the router applied by hand."""
    seen: list[torch.Tensor] = []
    config, total = model.config, 0.0
    coefficient, slots = {"2504": (0.1, 2), "2510": (0.1, 2), "3": (5e-4, 1)}[config.minimind]
    gates = [part for name, part in model.named_modules() if name.endswith(("router", "mlp.gate"))]
    hooks = [gate.register_forward_pre_hook(lambda gate, inputs: seen.append(inputs[0])) for gate in gates]
    model(ids)
    for hook in hooks:
        hook.remove()
    assert len(gates) == 2
    for gate, hidden in zip(gates, seen, strict=True):
        scores = (hidden.double() @ gate.weight.double().T).softmax(-1).view(*ids.shape, -1)[mask].tolist()
        for expert in range(4):
            picked = sum(expert in sorted(range(4), key=token.__getitem__)[-slots:] for token in scores)
            mean = sum(token[expert] for token in scores) / len(scores)
            total += coefficient * 4 * picked / (len(scores) * slots) * mean
    return total


@pytest.mark.parametrize("name", MIXTURES)
def test_padding_takes_no_part(fixtures: Path, name: str) -> None:
    model, (ids, mask) = mixture(fixtures, name), rows((13, 29, 1))
    found = balance_of(model, ids, mask)
    if name.startswith("minimind3"):
        expected = [plain_balance(model, ids, mask)] * 3
    else:
        expected = [plain_balance(model, ids[row : row + 1], mask[row : row + 1]) for row in range(3)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("within", [True, False])
def test_gradients_are_the_same_under_checkpointing(fixtures: Path, name: str, within: bool) -> None:
    """Backward inside the recording, when recomputed layers are heard again, and after it, when they are not."""
    grads = []
    for checkpointed in (False, True):
        model, (ids, mask) = mixture(fixtures, name).requires_grad_(True).train(), rows((13, 29))
        if checkpointed:
            for layer in model.model.layers:
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        with balance.recording(model) as routing:
            logits = model(ids, use_cache=False).logits
            if within:
                (routing.loss(*sequences(mask)).sum() + logits.mean()).backward()
        if not within:
            (routing.loss(*sequences(mask)).sum() + logits.mean()).backward()
        grads.append({key: value.grad for key, value in model.named_parameters()})
    router = next(key for key in grads[0] if key.endswith(("router.weight", "mlp.gate.weight")))
    assert grads[0][router].abs().max() > 0
    assert all(torch.allclose(grads[0][key], grads[1][key], rtol=1e-5, atol=1e-8) for key in grads[0])


@pytest.mark.parametrize("name", MIXTURES)
def test_scores_are_float32_under_autocast(fixtures: Path, name: str) -> None:
    model, (ids, mask) = mixture(fixtures, name), rows((13, 29))
    with torch.autocast("cpu", torch.bfloat16):
        found = balance_of(model, ids, mask)
    assert found.dtype == torch.float32
    assert torch.allclose(found, balance_of(model, ids, mask), rtol=0.05)


def tiny_mixtral(output_router_logits: bool) -> torch.nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 500, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.3}
    asked = {"output_router_logits": output_router_logits, "router_aux_loss_coef": 0.02}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, **asked)).eval()


def test_another_family_has_transformers_own_loss_if_it_asks() -> None:
    model, (ids, mask) = tiny_mixtral(True), rows((13, 29))
    expected = 0.02 * model(ids, attention_mask=mask.long()).aux_loss
    assert balance_of(model, ids, mask).tolist() == pytest.approx([expected.item()] * 2, rel=1e-4)


def test_who_has_a_balance_loss(fixtures: Path) -> None:
    assert all(balance.has_balance(mixture(fixtures, name)) for name in MIXTURES)
    assert not balance.has_balance(mixture(fixtures, "minimind3-dense"))
    assert not balance.has_balance(tiny_mixtral(False))
    assert not balance.has_balance(tiny_llama())


def test_tokens_that_go_to_all_experts_are_balanced(fixtures: Path) -> None:
    model, (ids, mask) = load_model(f"{fixtures / 'minimind2-2510-moe.pth'}:experts_per_token=4").model, rows((5, 9))
    assert balance_of(model, ids, mask).tolist() == pytest.approx([0.1 * 2] * 2)


def test_nothing_of_the_recording_stays(fixtures: Path) -> None:
    model, (ids, mask) = mixture(fixtures, "minimind3-moe"), rows((5,))
    first = balance_of(model, ids, mask)
    assert not any(part._forward_hooks for part in model.modules())
    assert torch.equal(balance_of(model, ids, mask), first)
