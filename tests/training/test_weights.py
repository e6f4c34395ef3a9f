"""--weights bfloat16: weights, gradients and state in six bytes a weight, which learn what float32 ones do."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from minicache.errors import ConfigError
from minicache.models import load_model
from minicache.models.precision import hold_for
from minicache.options import catalog
from minicache.options.train import LoraOptions, TrainConfig
from minicache.processes.world import World
from minicache.scoring.counting import counted_pass
from minicache.scoring.memory import How, need_of
from minicache.scoring.scorer import Scorer
from minicache.training import optim
from minicache.training.checks import require
from minicache.training.optim import clip, make_optimizer, rounding_of
from tests.conftest import precompute_into, tiny_llama
from tests.models.test_precision import bytes_of, table
from tests.processes.test_parallel import run_world
from tests.training.test_resume import SETTINGS, assert_same_run, killed_at, lines, run, weights

CPU = torch.device("cpu")
OURS: dict[str, Any] = {"weights": "bfloat16", "dtype": "bfloat16"}
needs_torchao = pytest.mark.skipif(find_spec("torchao") is None, reason="needs torchao")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, data_file: Path) -> Path:
    """Of a tied model that is stored in bfloat16, and scored in it."""
    model: Any = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    directory = tmp_path_factory.mktemp("half")
    model.to(torch.bfloat16).save_pretrained(directory / "model")
    for file in tokenizer_dir.iterdir():
        (directory / "model" / file.name).write_bytes(file.read_bytes())
    return precompute_into(directory / "cache", directory / "model", data_file, dtype="bfloat16")


def held(trained: str = "bfloat16", tied: bool = False, width: int = 32) -> Any:
    model: Any = tiny_llama(width=width)
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    return hold_for(model.to(torch.bfloat16).requires_grad_(True), CPU, "bfloat16", trained)


# --- what is held ---


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_are_bfloat16_and_all_else_is_float32(tied: bool) -> None:
    model = held(tied=tied)
    for name, each in model.named_parameters():
        assert each.dtype == (torch.bfloat16 if each.ndim == 2 else torch.float32), name
    assert {each.dtype for each in held("float32", tied).parameters()} == {torch.float32}


@pytest.mark.parametrize("tied", [False, True])
def test_the_first_pass_is_that_of_float32_weights(tied: bool) -> None:
    """Scores bit for bit; gradients are the same numbers, rounded once."""
    found = {}
    for trained in ("float32", "bfloat16"):
        scorer = Scorer(held(trained, tied), "bfloat16")
        scores = scorer(scorer.layout.make(table(), np.arange(4)), distribution=True)
        scores.logp_sum.sum().backward()
        found[trained] = (scores, {name: each.grad for name, each in scorer.named_parameters()})
    wide, narrow = found["float32"], found["bfloat16"]
    assert torch.equal(wide[0].token_logps, narrow[0].token_logps)
    assert torch.equal(wide[0].entropy, narrow[0].entropy)
    for name, gradient in narrow[1].items():
        assert gradient is not None and gradient.dtype == (torch.bfloat16 if gradient.ndim == 2 else torch.float32)
        # a tied table adds two gradients, each rounded
        torch.testing.assert_close(
            gradient.float(), wide[1][name], rtol=2**-7, atol=2**-7 * float(gradient.abs().max())
        )


def test_a_frequent_token_gets_its_whole_gradient() -> None:
    """In bfloat16, 256 + 1 is 256: the sum over a token that comes 3,000 times would end there."""
    model = held()
    model.model.embed_tokens(torch.full((1, 3000), 7)).sum().backward()
    gradient = model.model.embed_tokens.weight.grad
    assert (gradient[7] == 3008).all() and gradient.abs().sum() == gradient[
        7
    ].abs().sum()  # bfloat16's number next to 3,000


# --- the update ---


def stepped(weights: str, steps: int, lr: float, seed: int = 0) -> torch.Tensor:
    """The mean change of weights of 0.1 whose gradient is always 1. weights: "plain" for AdamW that rounds to the nearest."""
    start = torch.full((64, 256), 0.1)
    model = nn.Linear(256, 64, bias=False)
    model.weight.data = start if weights == "float32" else start.bfloat16()
    begun = model.weight.detach().double().mean()
    optimizer = make_optimizer(model, "adamw", lr, 0.0, "float32" if weights == "plain" else weights)
    for step in range(steps):
        model.weight.grad = torch.ones_like(model.weight)
        with rounding_of(seed, step):
            optimizer.step()
    return model.weight.detach().double().mean() - begun


@needs_torchao
def test_small_updates_are_lost_in_plain_bfloat16_and_kept_by_ours() -> None:
    """16,384 weights of 0.1, between whose neighbours 2.4e-4 or 4.9e-4 lie, and 100 updates of 1e-6."""
    assert stepped("plain", 100, 1e-6) == 0
    assert stepped("float32", 100, 1e-6) == pytest.approx(-1e-4, rel=1e-2)
    # one in 5 or so has moved by a whole distance
    assert stepped("bfloat16", 100, 1e-6) == pytest.approx(-1e-4, rel=0.1)


@needs_torchao
def test_the_chance_is_that_of_seed_and_step() -> None:
    torch.manual_seed(1)
    first = stepped("bfloat16", 3, 1e-5)
    torch.manual_seed(2)
    assert stepped("bfloat16", 3, 1e-5) == first != stepped("bfloat16", 3, 1e-5, seed=1)


def test_the_norm_of_gradients_in_half_precision_is_that_of_their_numbers() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(30, 40).bfloat16(), torch.randn(50)]
    expected = torch.cat([each.double().flatten() for each in gradients]).norm()
    for most, scale in ((1e9, 1.0), (1.0, 1 / float(expected))):
        parameters = [nn.Parameter(torch.zeros_like(each)) for each in gradients]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        assert float(clip(torch.optim.SGD(parameters, 1.0), most)) == pytest.approx(float(expected), rel=1e-6)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, (gradient.float() * scale).to(gradient.dtype))


def without_a_compiler(function: Any, **options: Any) -> Any:
    def run(*arguments: Any) -> Any:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    return run


@pytest.mark.parametrize(
    ("kind", "triton", "compiler", "fuses", "noted"),
    [
        ("cuda", True, lambda function, **options: function, True, False),
        ("cuda", True, without_a_compiler, False, True),
        ("cuda", False, without_a_compiler, False, True),
        ("cpu", True, without_a_compiler, False, False),
    ],
    ids=["all there", "no compiler", "no Triton", "a CPU"],
)
def test_the_update_is_compiled_only_where_torch_compiles(
    kind: str, triton: bool, compiler: Any, fuses: bool, noted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones, notes = torch.ones, list[str]()
    monkeypatch.setattr(torch, "ones", lambda size, device=None: ones(size))
    monkeypatch.setattr(torch, "compile", compiler)
    monkeypatch.setattr(optim, "has_triton", lambda: triton)
    optim.can_fuse.cache_clear()
    world = World(0, 1, torch.device(kind))
    assert optim.agreed_fusing("bfloat16", world, notes.append) == fuses
    assert [each.startswith("--weights bfloat16: the update runs uncompiled") for each in notes] == [True] * noted
    assert not optim.agreed_fusing("float32", world, notes.append)
    optim.can_fuse.cache_clear()


def test_one_process_that_cannot_compile_lets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled and not, chance falls on other weights, and processes would drift apart."""
    world = World(0, 2, torch.device("cuda"))
    monkeypatch.setattr(World, "together", lambda self, work: [work(), False])
    monkeypatch.setattr(optim, "can_fuse", lambda device: True)
    assert not optim.agreed_fusing("bfloat16", world, lambda line: None)


# --- a run ---


@needs_torchao
def test_the_curve_is_that_of_float32_weights(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 steps at a rate at which plain bfloat16 stands still. Passes in bfloat16 would not see all that float32 weights learn."""
    settings: dict[str, Any] = {
        "lr": 2e-5,
        "epochs": 12,
        "log_every": 1,
        "logps": "sum",
        "tokens_per_micro_batch": 2000,
    }
    run(cache, tmp_path / "float32", **settings, dtype="float32")
    run(cache, tmp_path / "ours", **settings, **OURS)
    monkeypatch.setattr(optim, "rounding_adamw", lambda groups, lr: torch.optim.AdamW(groups, lr=lr, fused=True))
    run(cache, tmp_path / "plain", **settings, **OURS)
    margins = {
        name: np.array([line["rewards/margin"] for line in lines(tmp_path / name)])
        for name in ("float32", "ours", "plain")
    }
    end = margins["float32"][-10:].mean()
    off = {name: abs(margins[name][-10:].mean() / end - 1) for name in ("ours", "plain")}
    assert off["ours"] < 0.2 and off["plain"] > 0.7, (end, off)
    # of a model that is stored in bfloat16 the policy begins as the reference, to the bit
    assert lines(tmp_path / "ours")[0]["rewards/margin"] == 0


@needs_torchao
@pytest.mark.parametrize("options", [pytest.param({}, marks=pytest.mark.slow), {"async_save": True}], ids=["", "async"])
def test_a_killed_run_resumes_bit_for_bit(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    run(cache, tmp_path / "whole", **OURS)
    killed_at(monkeypatch, 41, cache, tmp_path / "killed", **OURS, **options)
    run(cache, tmp_path / "killed", resume=True, **OURS, **options)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    assert json.loads((tmp_path / "whole" / "run.json").read_text())["weights"] == "bfloat16"


@needs_torchao
def test_the_policy_is_saved_as_asked(cache: Path, tmp_path: Path) -> None:
    source = cache.parent / "model" / "model.safetensors"
    before = source.read_bytes()
    for dtype in ("float32", "bfloat16"):
        run(cache, tmp_path / dtype, **OURS, epochs=1, save_dtype=dtype)
    # its weights are those of a mapped file, and change in place
    assert source.read_bytes() == before
    wide, narrow = weights(tmp_path / "float32"), weights(tmp_path / "bfloat16")
    for name, each in wide.items():
        assert narrow[name].dtype == torch.bfloat16 and each.dtype == torch.float32
        assert torch.equal(each.bfloat16(), narrow[name])
        assert torch.equal(each, narrow[name].float()) or each.ndim == 1, name
    assert load_model(str(tmp_path / "float32" / "model")).model.model.norm.weight.dtype == torch.float32  # type: ignore[union-attr]


def test_what_does_not_go_with_it_is_named(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ConfigError, match=match):
            run(cache, tmp_path / "run", **{"weights": "bfloat16", **options})

    refused("--weights bfloat16: with passes in float32; expected --dtype bfloat16")
    refused("--weights bfloat16: with passes in float16; expected --dtype bfloat16", dtype="float16")
    refused("--weights bfloat16: is about training all weights; adapters", lora=LoraOptions(lora_rank=2))
    refused("--optimizer adamw-8bit: does not round stochastically", optimizer="adamw-8bit", dtype="bfloat16")
    monkeypatch.setattr(optim, "find_spec", lambda name: None)
    refused(r"--weights bfloat16: needs another package: pip install 'minidpo\[torchao\]'", dtype="bfloat16")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@needs_torchao
def test_two_processes_end_with_the_same_weights(cache: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {**SETTINGS, **OURS, "ref_cache": str(cache), "lr": 1e-5}
    jobs = [
        ("weights", {**options, "out": str(tmp_path / "none")}),
        ("train", {**options, "out": str(tmp_path / "two")}),
    ]
    run_world(2, jobs, tmp_path / "world")
    run(cache, tmp_path / "one", **{**OURS, "lr": 1e-5})
    one, two = lines(tmp_path / "one"), lines(tmp_path / "two")
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], abs=0.02)


def test_shards_are_refused() -> None:
    with pytest.raises(ConfigError, match="--weights bfloat16: not with --parallel fsdp; expected --parallel ddp"):
        require(TrainConfig("cache", Path("run"), **OURS, parallel="fsdp"), CPU, processes=2)


# --- memory ---


@needs_torchao
def test_it_takes_six_bytes_a_weight_and_is_counted_so() -> None:
    model = held(tied=True, width=128)
    scorer = Scorer(model, "bfloat16")
    one, two = (scorer.layout.make(table(), np.arange(count)) for count in (1, 2))
    need = need_of(scorer, counted_pass(scorer, one, two, How(training=True)), "adamw")
    count = sum(each.numel() for each in model.parameters())
    assert need.weights == bytes_of(model)
    assert need.gradients == need.weights
    optimizer = make_optimizer(model, "adamw", 1e-6, 0.0, "bfloat16")
    for each in model.parameters():
        each.grad = torch.zeros_like(each)
    with rounding_of(0, 0):
        optimizer.step()
    real = 0
    for state in optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            real += (
                sum(each.nbytes for each in (moment.codes, moment.scale)) if hasattr(moment, "codes") else moment.nbytes
            )
    # norms have theirs as they are
    assert need.optimizer == pytest.approx(real, rel=0.02)
    assert need.weights + need.gradients + need.optimizer < 6.2 * count


# --- the update on the CPU ---


class Pretended(str):
    """torchao asks for "cuda" or "xpu" and then for streams of that name in torch; here these are a namespace of the test."""

    def __eq__(self, other: object) -> bool:
        return other == "cuda" or str.__eq__(self, other)

    __hash__ = str.__hash__


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lets torchao's optimizer run on this CPU, its copies in order. Returns what waited for a stream."""
    pytest.importorskip("torchao")
    waited: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            waited.append("stream")

        def wait_stream(self, other: object) -> None:
            pass

        def record_event(self) -> "Stream":
            return self

    place = SimpleNamespace(Stream=Stream, current_stream=lambda: None, stream=lambda stream: nullcontext())
    monkeypatch.setattr(torch, "pretended", place, raising=False)
    monkeypatch.setattr("torchao.optim.cpu_offload.get_available_devices", lambda: [Pretended("pretended")])
    # page-locked memory needs a GPU
    empty_like = torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *arguments, pin_memory=False, **more: empty_like(*arguments, **more)
    )
    for entries in catalog.WEIGHTS.values():
        monkeypatch.setitem(entries, "adamw-cpu", replace(entries["adamw-cpu"], gpu_only=False))
    return waited


@pytest.fixture(scope="module")
def wide_cache(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path, data_file: Path) -> Path:
    """Of a model some of whose matrices are large enough for torchao to move them (4,096 numbers)."""
    directory = tmp_path_factory.mktemp("wide")
    model: Any = tiny_llama(width=64)
    model.to(torch.bfloat16).save_pretrained(directory / "model")
    for file in tokenizer_dir.iterdir():
        (directory / "model" / file.name).write_bytes(file.read_bytes())
    return precompute_into(directory / "cache", directory / "model", data_file, dtype="bfloat16")


@pytest.mark.parametrize("options", [{"dtype": "float32"}, OURS], ids=["float32", "bfloat16"])
def test_the_update_on_the_cpu_is_that_on_the_device(
    wide_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streams: list[str], options: dict[str, Any]
) -> None:
    """Over micro-batches, with clipping, and killed and resumed on the way."""
    more: dict[str, Any] = {**options, "epochs": 1, "lr": 1e-4, "max_grad_norm": 0.01, "save_every": 2}
    run(wide_cache, tmp_path / "device", **more)
    more |= {"optimizer": "adamw-cpu"}
    run(wide_cache, tmp_path / "cpu", **more)
    killed_at(monkeypatch, 30, wide_cache, tmp_path / "killed", **more)
    run(wide_cache, tmp_path / "killed", **more, resume=True)
    assert_same_run(tmp_path / "cpu", tmp_path / "killed")
    assert streams
    device, cpu = weights(tmp_path / "device"), weights(tmp_path / "cpu")
    if options["dtype"] == "float32":
        assert [line["loss"] for line in lines(tmp_path / "device")] == pytest.approx(
            [line["loss"] for line in lines(tmp_path / "cpu")], abs=1e-6
        )
        # its norm adds in another order, and Adam divides by a gradient's own size
        assert all((device[name] - cpu[name]).abs().mean() < 1e-6 for name in device)
    else:
        # chance falls on other weights, because they are updated in another order
        assert all((device[name] - cpu[name]).abs().max() < 0.02 for name in device)


def test_a_weight_without_a_gradient_counts_as_zero_on_the_cpu(streams: list[str]) -> None:
    """torchao keeps a gradient for each weight there: of an earlier step, or what its memory held before."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    optimizer: Any = make_optimizer(model, "adamw-cpu", 1e-3, 0.0)
    assert set(optimizer.param_d2h_map) == {model[0].weight, model[1].weight}
    for host in optimizer.param_d2h_map.values():
        host.grad.fill_(torch.nan)
    before = model[1].weight.detach().clone()
    for used in (model[0], model, model[0]):
        used(torch.randn(3, 64)).square().mean().backward()
        gradients = [each.grad for each in model.parameters() if each.grad is not None]
        expected = torch.cat([each.double().flatten() for each in gradients]).norm()
        assert float(clip(optimizer, 1e9)) == pytest.approx(float(expected), rel=1e-5)
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(model[1].weight, before) == (used is model[0])
        before = model[1].weight.detach().clone()


def test_where_the_update_cannot_be_on_the_cpu(cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    asked = TrainConfig(cache, tmp_path / "run", optimizer="adamw-cpu")
    with pytest.raises(ConfigError, match="--optimizer adamw-cpu: frees a GPU's memory, and there is no GPU; expected"):
        run(cache, tmp_path / "run", optimizer="adamw-cpu")
    with pytest.raises(ConfigError, match="--optimizer adamw-cpu: not with 2 processes; expected adamw"):
        require(asked, torch.device("cuda"), processes=2)
    with pytest.raises(ConfigError, match="--optimizer adamw-cpu: not with --dtype float16; expected adamw"):
        require(replace(asked, dtype="float16"), torch.device("cuda"), processes=1)


def test_commands_show_nothing_of_what_the_library_says_of_other_machines(
    model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    """transformers imports it wherever it is installed, for every model."""
    pytest.importorskip("torchao")
    options = ["--model", str(model_dir), "--data", str(data_file), "--ref-cache", str(tmp_path / "cache")]
    command = [sys.executable, "-m", "minicache", "precompute-ref", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torchao" not in done.stderr and "_pytree" not in done.stderr
