"""Ways to compute the same steps: half precision, compiled, with less memory, in two processes, with mixtures of experts."""

import json
import math
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from minicache.cache.reader import ReferenceCache
from minicache.errors import ConfigError, ModelError
from minicache.models import balance, load_model
from minicache.options.catalog import LAYOUTS
from minicache.options.train import LoraOptions, TrainConfig
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training.optim import load_state
from minicache.training.order import Mixture, global_batches
from minicache.training.snapshot import save
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl

MIXTURES = ["minimind2-2504-moe", "minimind3-moe"]
BALANCE = 0.1
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "max_steps": 4,
    "lr": 1e-3,
    "log_every": 1,
    "save_every": 0,
    "tokens_per_micro_batch": 200,
}
SETTINGS |= {"beta": 0.1, "balance": BALANCE}


def run(ref_cache: Path, out: Path, **options: Any) -> TrainReport:
    return train(TrainConfig(ref_cache, out, **{**SETTINGS, **options}), one_process(), Silent())


def curve(out: Path, name: str = "loss") -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()])


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory: pytest.TempPathFactory, checkpoints: Path, tokenizer_dir: Path) -> dict[str, Path]:
    """Caches of mixtures of experts, 8 pairs each."""
    directory = tmp_path_factory.mktemp("mixtures")
    data = write_jsonl(directory / "pairs.jsonl", make_rows(8))
    files = {name: checkpoints / f"{name}.pth" for name in MIXTURES}
    tokenizer = str(tokenizer_dir)
    return {name: precompute_into(directory / name, file, data, tokenizer=tokenizer) for name, file in files.items()}


# --- mixtures of experts ---


@pytest.mark.parametrize("name", MIXTURES)
def test_the_balance_loss_is_logged_and_stays_sane(mixtures: dict[str, Path], tmp_path: Path, name: str) -> None:
    run(mixtures[name], tmp_path / "run", max_steps=12, lr=3e-3)
    aux, loss = curve(tmp_path / "run", "aux_loss"), curve(tmp_path / "run")
    # of two layers, every expert chosen as often; picks are counted apart where a token has several
    even = 2 * BALANCE
    assert (aux > 0.5 * even).all() and (aux < 8 * even).all() and aux[-4:].mean() < aux[:4].mean() * 1.1
    assert loss[0] == pytest.approx(math.log(2), abs=1e-6)  # the metric is the preference loss alone


@pytest.mark.parametrize("name", MIXTURES)
def test_the_balance_loss_is_the_same_in_every_layout(mixtures: dict[str, Path], tmp_path: Path, name: str) -> None:
    """A token that both sides share is balanced once, also where it lies in two rows."""
    for layout in LAYOUTS:
        run(mixtures[name], tmp_path / layout, max_steps=1, layout=layout, tokens_per_micro_batch=4096)
    (first, *others) = (curve(tmp_path / layout, "aux_loss")[0] for layout in LAYOUTS)
    assert others == pytest.approx([first] * len(others), rel=1e-5)


def test_a_dense_model_has_none(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "run", max_steps=1)
    assert "aux_loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_the_balance_loss_is_part_of_the_gradient(mixtures: dict[str, Path], tmp_path: Path) -> None:
    """Of 2504, whose sequences are balanced each for itself: plain sums over single answers give the same norm and mean."""
    cache = mixtures["minimind2-2504-moe"]
    run(cache, tmp_path / "run", max_steps=1)
    table = ReferenceCache(cache).load().table
    batch = next(global_batches(Mixture.of([np.arange(len(table))]), 4, seed=42))
    norms, total_aux = {}, 0.0
    for with_aux in (True, False):
        model = load_model(ReferenceCache(cache).log.model).model.float().requires_grad_(True)
        total = torch.zeros(())
        for index in batch:
            means, penalties = [], []
            for side in (0, 1):
                ids, mask = (torch.from_numpy(values.astype(np.int64)) for values in table[int(index)].side(side))
                with balance.recording(model, BALANCE) as routing:
                    logits = model(ids[None]).logits[0, :-1]
                logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
                means.append(logps[mask[1:].bool()].mean())
                penalties.append(routing.loss(torch.arange(len(ids)), torch.zeros(len(ids), dtype=torch.int64), 1)[0])
            margin = (means[0] - means[1]) - (means[0] - means[1]).detach()  # the reference is the policy itself
            total = total + (-logsigmoid(0.1 * margin) + with_aux * sum(penalties) / 2) / 4
            total_aux += with_aux * sum(penalty.item() for penalty in penalties) / 8
        total.backward()
        gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
        norms[with_aux] = torch.cat(gradients).norm().item()
    assert curve(tmp_path / "run", "grad_norm")[0] == pytest.approx(norms[True], rel=1e-4)
    assert curve(tmp_path / "run", "aux_loss")[0] == pytest.approx(total_aux, rel=1e-5)
    assert abs(norms[True] - norms[False]) > 1e-2 * norms[True]


@pytest.mark.parametrize("name", MIXTURES)
def test_micro_batches_of_any_size_have_one_balance(mixtures: dict[str, Path], tmp_path: Path, name: str) -> None:
    for slots in (100, 300, 4096):
        run(mixtures[name], tmp_path / str(slots), tokens_per_micro_batch=slots)
    for metric in ("loss", "rewards/margin", "aux_loss", "grad_norm"):
        (whole, *others) = (curve(tmp_path / str(slots), metric) for slots in (4096, 300, 100))
        assert all(np.abs(other - whole).max() < 1e-5 for other in others), metric


# --- the same numbers with less memory, compiled, in half precision ---


@pytest.mark.parametrize("name", ["dense", *MIXTURES])
@pytest.mark.parametrize("rank", [0, 2])
def test_activation_checkpointing_changes_no_number(
    ref_cache: Path, mixtures: dict[str, Path], tmp_path: Path, name: str, rank: int
) -> None:
    cache, options = mixtures.get(name, ref_cache), {"lora": LoraOptions(lora_rank=rank), "max_steps": 3}
    run(cache, tmp_path / "plain", **options)
    run(cache, tmp_path / "less", activation_checkpointing=True, **options)
    with pytest.MonkeyPatch.context() as patch:
        # of two
        patch.setattr("minicache.stages.train.layers_that_fit", lambda *_: 1)
        run(cache, tmp_path / "selective", selective_checkpointing=True, **options)
    for metric in ("loss", "grad_norm", "logps/chosen", *(["aux_loss"] if name != "dense" else [])):
        plain = curve(tmp_path / "plain", metric)
        for out in ("less", "selective"):
            assert np.allclose(plain, curve(tmp_path / out, metric), rtol=1e-6, atol=1e-6), metric


def test_one_kind_of_checkpointing_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--selective-checkpointing: expected it or --activation-checkpointing"):
        TrainConfig(tmp_path, tmp_path / "run", activation_checkpointing=True, selective_checkpointing=True)


@pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself
@pytest.mark.parametrize(("name", "rank"), [("dense", 2), pytest.param("minimind3-moe", 0, marks=pytest.mark.slow)])
def test_compiled_steps_are_those_of_eager_ones(
    ref_cache: Path, mixtures: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, rank: int
) -> None:
    """What is traced: hooks on routers, adapters, checkpointed layers, and each batch's own shape. The C++ that Inductor would
    make of it takes a minute of a slow core to compile."""
    cache, options = mixtures.get(name, ref_cache), {"lora": LoraOptions(lora_rank=rank)}
    run(cache, tmp_path / "eager", **options)
    torch._dynamo.reset()
    compiles: list[torch.nn.Module] = []
    original = torch.nn.Module.compile

    def tracing(module: torch.nn.Module, **given: Any) -> None:
        compiles.append(module)
        original(module, backend="eager", **given)

    monkeypatch.setattr(torch.nn.Module, "compile", tracing)
    run(cache, tmp_path / "compiled", compile=True, activation_checkpointing=rank > 0, **options)
    assert {type(module).__name__[-12:] for module in compiles} == {"DecoderLayer"}
    for metric in ("loss", "grad_norm", "logps/rejected"):
        left, right = (curve(tmp_path / out, metric) for out in ("eager", "compiled"))
        assert np.allclose(left, right, rtol=1e-4, atol=1e-4), metric
    torch._dynamo.reset()


def test_float16_trains_with_a_scaled_loss(model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, dtype="float16")
    run(cache, tmp_path / "run", dtype="float16", max_steps=10, batch_size=8)
    run(cache, tmp_path / "full", dtype="float32", max_steps=10, batch_size=8)
    losses = curve(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(2), abs=5e-3) and losses[-1] < 0.68
    assert np.abs(losses - curve(tmp_path / "full")).max() < 2e-2
    assert (curve(tmp_path / "run", "grad_scale") >= 1).all()


def test_float16_that_diverges_says_so(ref_cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="the run has diverged; expected finite numbers"):
        run(ref_cache, tmp_path / "run", dtype="float16", lr=1e30, max_steps=30, warmup=0.0)


@pytest.mark.parametrize("rank", [0, 4])
def test_8_bit_adamw_trains(ref_cache: Path, tmp_path: Path, rank: int) -> None:
    options = {"max_steps": 10, "batch_size": 8, "lr": 1e-2 if rank else 1e-3, "lora": LoraOptions(lora_rank=rank)}
    run(ref_cache, tmp_path / "plain", **options)
    run(ref_cache, tmp_path / "small", optimizer="adamw-8bit", **options)
    plain, small = curve(tmp_path / "plain"), curve(tmp_path / "small")
    assert small[-1] < small[0] - 0.5 * (plain[0] - plain[-1])


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_a_resumed_paged_optimizer_is_paged(monkeypatch: pytest.MonkeyPatch) -> None:
    """bitsandbytes reads a state into the device's own memory, which is not where it has made it."""
    library = pytest.importorskip("bitsandbytes.optim")
    pages: list[torch.Tensor] = []

    def page(self: Any, parameter: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        pages.append(torch.zeros_like(parameter, dtype=dtype))
        return pages[-1]

    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(80, 80)), torch.nn.Parameter(torch.randn(5))]
    made = [library.PagedAdamW8bit([torch.nn.Parameter(each.detach().clone()) for each in weights]) for _ in range(2)]

    def step(optimizer: Any) -> None:
        numbers = torch.Generator().manual_seed(1)
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad = torch.randn(parameter.shape, generator=numbers)
        optimizer.step()

    step(made[0])
    with BytesIO() as file:
        torch.save(made[0].state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
    with monkeypatch.context() as patch:
        patch.setattr(library.PagedAdamW8bit, "get_state_buffer", page)
        load_state(made[1], state)
    held = [made[1].state[each][name] for each in made[1].param_groups[0]["params"] for name in ("state1", "state2")]
    assert len(held) == len(pages) == 4 and all(a is b for a, b in zip(held, pages, strict=True))
    for ours, due in zip(made[1].param_groups[0]["params"], made[0].param_groups[0]["params"], strict=True):
        ours.data.copy_(due.data)
    for each in made:
        step(each)
    for ours, due in zip(made[1].param_groups[0]["params"], made[0].param_groups[0]["params"], strict=True):
        assert torch.equal(ours, due)
    next(iter(state["state"].values()))["__bnb_optimizer_quant_state__"]["state1"] = torch.zeros(1, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"state1: expected the shape \(80, 80\), got \(1,\)"):
        load_state(made[1], state)


def test_what_a_mode_needs_is_asked_for_before_the_run_is_made(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="paged-adamw-8bit: frees a GPU's memory, and there is no GPU; expected"):
            run(ref_cache, tmp_path / "run", optimizer="paged-adamw-8bit")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ConfigError, match=r"--optimizer adamw-8bit: .* pip install 'minidpo\[8bit\]'"):
        run(ref_cache, tmp_path / "run", optimizer="adamw-8bit")
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'minidpo\[lora\]'"):
        run(ref_cache, tmp_path / "run", lora=LoraOptions(lora_rank=1))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="--compile: expected a C"):
        run(ref_cache, tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


# --- clipping ---


def test_no_clipping_is_a_norm_of_0(ref_cache: Path, tmp_path: Path) -> None:
    """The norm is logged all the same, and the gradients are those that a norm never reached leaves as they are."""
    for name, most in (("none", 0.0), ("far", 1e30), ("near", 1e-3)):
        # without Adam's momentum a step would not depend on the gradient's size at all
        run(ref_cache, tmp_path / name, max_grad_norm=most, max_steps=6)
    assert (curve(tmp_path / "none", "grad_norm") > 0.01).all()
    for name in ("loss", "grad_norm", "logps/chosen"):
        assert np.array_equal(curve(tmp_path / "none", name), curve(tmp_path / "far", name))
        assert not np.array_equal(curve(tmp_path / "none", name), curve(tmp_path / "near", name))


# --- the weight of the balance loss ---


def first_aux(out: Path) -> float | None:
    line: dict[str, float] = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    return line.get("aux_loss")


def test_the_weight_is_the_options_and_the_run_records_it(mixtures: dict[str, Path], tmp_path: Path) -> None:
    cache = mixtures["minimind3-moe"]
    for weight in (None, 0.0, 0.02, 0.04):
        run(cache, tmp_path / str(weight), max_steps=1, balance=weight)
    assert first_aux(tmp_path / "0.0") is None
    doubled, single = first_aux(tmp_path / "0.04"), first_aux(tmp_path / "0.02")
    assert doubled and single and doubled == pytest.approx(2 * single, rel=1e-5)
    own = first_aux(tmp_path / "None")
    assert own and own == pytest.approx(single * 5e-4 / 0.02, rel=1e-5)
    recorded = {
        name: json.loads((tmp_path / name / "run.json").read_text())["balance"] for name in ("None", "0.0", "0.02")
    }
    assert recorded == {"None": 5e-4, "0.0": 0.0, "0.02": 0.02}


def test_a_weight_for_a_model_without_experts_is_noted(ref_cache: Path, tmp_path: Path) -> None:
    said: list[str] = []

    class Listener(Silent):
        def note(self, text: str) -> None:
            said.append(text)

    for weight in (0.0, 0.5):
        options: dict[str, Any] = {**SETTINGS, "balance": weight, "max_steps": 1}
        config = TrainConfig(ref_cache, tmp_path / str(weight), **options)
        train(config, one_process(), Listener())
    assert [text for text in said if "--balance" in text] == [
        "--balance 0.5: not used, the model has no experts whose routers transformers records"
    ]


def test_a_run_of_before_goes_on_with_the_weight_that_it_had(
    checkpoints: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.1.0 added 0.1 times the balance to 2504's and 2510's mixtures, and recorded no weight."""
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(8))
    cache = precompute_into(
        tmp_path / "cache", checkpoints / "minimind2-2510-moe.pth", data, tokenizer=str(tokenizer_dir)
    )
    options: dict[str, Any] = {"lora": LoraOptions(lora_rank=2), "save_every": 2}
    run(cache, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("minicache.training.loop._save_if_asked_to_stop", stop_after_two)
        run(cache, tmp_path / "run", **options)
    file = tmp_path / "run" / "run.json"
    facts = json.loads(file.read_text())
    assert facts.pop("balance") == BALANCE
    file.write_text(json.dumps(facts))
    run(cache, tmp_path / "run", resume=True, **{**options, "balance": None})
    for metric in ("loss", "aux_loss"):
        assert np.array_equal(curve(tmp_path / "run", metric), curve(tmp_path / "whole", metric))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_weight_that_was_left_to_the_model_is_the_run_s_when_it_goes_on(
    checkpoints: Path, tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """run.json has what the model's config said. A sweep, or torchrun after a restart, repeats the command without --resume."""
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(8))
    cache = precompute_into(tmp_path / "cache", checkpoints / "minimind3-moe.pth", data, tokenizer=str(tokenizer_dir))
    options: dict[str, Any] = {"balance": BALANCE if recorded else None, "save_every": 2}
    run(cache, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        patch.setattr("minicache.training.loop._save_if_asked_to_stop", stop_after_two)
        run(cache, tmp_path / "run", **options)
    for _ in range(2):
        run(cache, tmp_path / "run", resume=True, **{**options, "balance": None})
    for metric in ("loss", "aux_loss"):
        assert np.array_equal(curve(tmp_path / "run", metric), curve(tmp_path / "whole", metric))
    with pytest.raises(ConfigError, match=r"--balance: this run was started with .*, asked for 0\.7"):
        run(cache, tmp_path / "run", resume=True, **{**options, "balance": 0.7})


def stop_after_two(run: Any, training: Any, stop: Any) -> None:
    """Ends a run after its second step, which is saved."""
    if training.progress.step == 2:
        save(run, training)
        training.saver.wait()
        raise KeyboardInterrupt
