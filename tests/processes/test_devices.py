"""Which device a process takes, and what is done where a device lacks something. The devices are fakes: this needs only a CPU."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from minicache.errors import ConfigError
from minicache.options.train import LossOptions
from minicache.processes import devices
from minicache.scoring import batch as batches
from minicache.scoring import budget, scorer
from minicache.scoring.dtype import resolve_dtype
from minicache.scoring.kernels import Spans
from minicache.scoring.scorer import Scorer
from minicache.stages.evaluate import evaluate
from minicache.stages.train import train
from minicache.training import metrics
from minicache.training.losses import Objective
from minicache.training.validation import pair_logps, references_of
from tests.conftest import Cli, one_process, tiny_llama

See = Callable[..., list[torch.device]]
CUDA, MPS, XPU = torch.device("cuda", 0), torch.device("mps", 0), torch.device("xpu", 0)


@pytest.fixture
def see(monkeypatch: pytest.MonkeyPatch) -> See:
    """Let torch report so many devices of a kind; returns the list of those that are made current."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)

    def report(kind: str, count: int = 1) -> list[torch.device]:
        current: list[torch.device] = []
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: torch.device(kind))
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
        monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
        return current

    return report


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
@pytest.mark.parametrize("asked", ["auto", "KIND", "KIND:1"])
def test_the_accelerator_that_torch_reports_is_taken_and_made_current(see: See, kind: str, asked: str) -> None:
    current = see(kind, 2)
    chosen = devices.choose(asked.replace("KIND", kind))
    assert chosen == torch.device(kind, 1 if ":" in asked else 0) and current == [chosen]


def test_each_process_of_a_machine_takes_its_own(see: See) -> None:
    see("cuda", 2)
    assert [devices.choose("auto", rank, 4).index for rank in (0, 1)] == [0, 1]
    with pytest.raises(ConfigError, match=r"process 3 on this machine.* cuda:0, cuda:1.* at most 2 of them"):
        devices.choose("auto", 2, 4)


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "MINIDPO_NPROC"])
def test_one_visible_device_is_each_tasks_own_unless_a_launcher_shows_all_the_same(
    see: See, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    """A batch system may show each of its tasks one device, which all of them see as number 0."""
    see("cuda", 1)
    assert devices.choose("auto", 3, 4) == CUDA
    monkeypatch.setenv(launcher, "1")
    assert devices.choose("auto", 0, 4) == CUDA
    with pytest.raises(ConfigError, match="at most 1 of them"):
        devices.choose("auto", 3, 4)


@pytest.mark.parametrize(
    ("kind", "asked", "processes", "said"),
    [
        ("cuda", "mps", 1, "torch sees no mps here; expected one of: cpu, cuda:0"),
        ("cuda", "cuda:1", 1, "no such device here; expected one of: cpu, cuda:0"),
        ("cuda", "cuda:0", 2, "2 processes need one each; expected cuda"),
        ("cuda", "gpu", 1, "expected auto, cuda, mps, xpu, npu or cpu"),
        ("cuda", "cpu:1", 1, "expected auto, cuda, mps, xpu, npu or cpu"),
        ("cuda", "npu", 1, "pip install torch_npu"),
        ("mps", "auto", 2, "expected one process, or --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_one_line(see: See, kind: str, asked: str, processes: int, said: str) -> None:
    current = see(kind)
    with pytest.raises(ConfigError, match=said):
        devices.choose(asked, 0, processes)
    assert not current


def test_the_cpu_is_taken_where_it_is_asked_for_or_where_there_is_nothing_else(
    see: See, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = see("cuda")
    assert devices.choose("cpu", 5, 8) == devices.CPU and not current
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    assert devices.choose("auto") == devices.CPU


def test_the_collectives_of_a_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    assert devices.backends(devices.CPU) == "gloo"
    monkeypatch.setattr(torch.distributed, "is_backend_available", lambda name: name == "xccl")
    assert devices.backends(XPU) == "cpu:gloo,xpu:xccl"
    with pytest.raises(ConfigError, match=r"this torch has no NCCL \(on Windows"):
        devices.backends(CUDA)


@pytest.mark.parametrize("command", ["precompute-ref", "train", "sweep", "evaluate", "compare", "inspect-cache"])
def test_a_command_says_in_one_line_that_there_is_no_such_device(
    cli: Cli, ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, command: str
) -> None:
    cache = ("--ref-cache", ref_cache)
    arguments: dict[str, tuple[object, ...]] = {
        "precompute-ref": ("--model", model_dir, "--data", data_file, "--ref-cache", tmp_path / "new"),
        "train": (*cache, "--out", tmp_path / "new"),
        "sweep": (*cache, "--out", tmp_path / "new", "--beta", "0.1,0.2", "--holdout", "0.2"),
        "evaluate": ("--policy", model_dir, *cache),
        "compare": ("--policy", model_dir, "--reference", model_dir, "--prompt", "why"),
        "inspect-cache": (ref_cache, "--verify", "--model", model_dir),
    }
    code, _, stderr = cli(command, *arguments[command], "--device", "xpu")
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert code == 1 and "--device xpu: torch sees no xpu here; expected one of: cpu" in line
    assert not list(tmp_path.iterdir())


def test_the_device_is_asked_again_by_a_resumed_run(cli: Cli, ref_cache: Path, tmp_path: Path) -> None:
    """It is no option of the run: another machine may have another one."""
    options = ("--out", tmp_path / "run", "--device", "cpu")
    assert cli("train", "--ref-cache", ref_cache, "--max-steps", 1, *options)[0] == 0
    assert cli("train", "--resume", *options)[0] == 0
    assert "no xpu here" in cli("train", "--resume", "--out", tmp_path / "run", "--device", "xpu")[2]


def test_a_device_where_nothing_is_computed_is_refused(cli: Cli, ref_cache: Path, tmp_path: Path) -> None:
    assert "--device: is where --model computes" in cli("inspect-cache", ref_cache, "--device", "cpu")[2]
    arguments = ("export", "--ref-cache", ref_cache, "--out", tmp_path / "table.jsonl", "--device", "cpu")
    assert "without computing" in cli(*arguments)[2]


# --- what devices lack ---


@pytest.mark.parametrize(("sharded", "chosen"), [(False, "float16"), (True, "float32")])
def test_a_gpu_without_bfloat16_takes_another_precision_and_says_so(
    monkeypatch: pytest.MonkeyPatch, sharded: bool, chosen: str
) -> None:
    """A T4 or a V100; float16 does not go with shards."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    notes: list[str] = []
    assert resolve_dtype("auto", CUDA, notes.append, sharded) == chosen
    assert notes == [f"--dtype auto is {chosen} here: cuda:0 has no bfloat16"]
    with pytest.raises(ConfigError, match="choose float16 or float32"):
        resolve_dtype("bfloat16", CUDA, notes.append)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert resolve_dtype("auto", CUDA, notes.append) == "bfloat16" and len(notes) == 1
    assert resolve_dtype("auto", MPS, notes.append) == "float32"


def test_a_macs_gpu_has_what_metal_recommends_and_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 10_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 4_000)
    assert budget.free_bytes(MPS) == 6_000
    monkeypatch.setattr(budget, "free_bytes_here", lambda: 500.0)
    assert budget.free_bytes(MPS) == 500


def test_tables_of_sizes_have_an_entry_for_every_kind() -> None:
    sizes = {"cpu": 1, "cuda": 2}
    found = {kind: devices.by_kind(sizes, torch.device(kind)) for kind in ("cpu", "cuda", "xpu", "mps")}
    assert found == {"cpu": 1, "cuda": 2, "xpu": 2, "mps": 1}


@pytest.fixture
def no_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (devices, batches, metrics):
        monkeypatch.setattr(module, "has_float64", lambda device: False)


class OnlyFloat32(TorchDispatchMode):
    """Computes nothing in float64, as mps."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_iter(result):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"Cannot convert a MPS Tensor to float64 dtype: {func}")
        return result


def steady(found: dict[str, float]) -> dict[str, float]:
    """Without what counts signs of rounding errors, where policy and reference are the same model."""
    return {name: value for name, value in found.items() if name != "rewards/accuracy"}


@pytest.mark.parametrize("logps", ["mean", "sum"])
@pytest.mark.parametrize("options", [LossOptions(), LossOptions(wpo=True), LossOptions(ld_alpha=0.5)], ids=str)
def test_a_step_needs_no_float64(
    request: pytest.FixtureRequest, model_dir: Path, data_file: Path, tmp_path: Path, logps: str, options: LossOptions
) -> None:
    from minicache.cache.reader import ReferenceCache
    from tests.conftest import precompute_into

    cached = ReferenceCache(precompute_into(tmp_path / "cache", model_dir, data_file, per_token=True)).contents.load()
    scorer_, objective = Scorer(tiny_llama(), "float32", "packed"), Objective.parse("sigmoid", logps, 0.1, options)
    pairs = np.arange(8)
    batch = scorer_.batch(cached.table, pairs, partial(references_of, cached, options))

    def step() -> dict[str, float]:
        scores = scorer_(batch, distribution=True)
        found = pair_logps(scores, batch, objective)
        losses = objective(found, 10.0)
        losses.sum().backward()
        rows = metrics.pair_metrics(losses, found, 0.1, scores)
        return steady(dict(zip(metrics.NAMES, rows.double().sum(1).tolist()[: len(metrics.NAMES)], strict=True)))

    wide = step()
    gradient = torch.cat([parameter.grad.flatten() for parameter in scorer_.parameters() if parameter.grad is not None])
    scorer_.zero_grad()
    with pytest.raises(TypeError, match="float64"), OnlyFloat32():
        scorer_(batch)
    request.getfixturevalue("no_float64")
    with OnlyFloat32():
        scores = scorer_(batch, distribution=True)
        found = pair_logps(scores, batch, objective)
        losses = objective(found, 10.0)
        losses.sum().backward()
        metrics.pair_metrics(losses, found, 0.1, scores)
    narrow_gradient = torch.cat([each.grad.flatten() for each in scorer_.parameters() if each.grad is not None])
    assert torch.allclose(gradient, narrow_gradient, atol=1e-6 * float(gradient.abs().max()))
    assert step() == pytest.approx(wide, rel=2e-6, abs=1e-5)


def test_sums_in_float32_lose_nothing_but_their_last_digit(no_float64: None) -> None:
    """Of 3,000 logprobs, added in one order after another: index_add on a GPU has none of its own."""
    generator = torch.Generator().manual_seed(1)
    values = -3 * torch.rand(3000, generator=generator).sqrt()
    names = ("input_ids", "sources", "targets", "places", "position_ids", "members", "read", "readers", "distinct")
    unread: dict[str, Any] = dict.fromkeys(names, torch.zeros(0, dtype=torch.int64))
    owners, counts = torch.zeros(3000, dtype=torch.int64), torch.tensor([3000, 0])
    made = batches.Batch(pairs=1, mask=None, boundaries=None, owners=owners, counts=counts, **unread)
    for _ in range(20):
        found = made.sum_members(values[torch.randperm(3000, generator=generator)])
        assert found.dtype == torch.float32
        assert abs(float(found[0, 0]) - float(values.double().sum())) <= 2**-12, "half of the last digit of -5968.7"
    assert float(found[0, 1]) == 0


def test_a_run_without_float64_has_the_same_curve(
    cli: Cli, ref_cache: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    from minicache.options.others import EvaluateConfig
    from minicache.options.train import TrainConfig
    from minicache.trackers import Silent
    from tests.training.test_resume import lines

    def curve(name: str) -> list[dict[str, float]]:
        options: dict[str, Any] = {"lr": 1e-3, "batch_size": 8, "log_every": 2, "epochs": 2}
        train(TrainConfig(ref_cache, tmp_path / name, save_every=3, **options), one_process(), Silent())
        found = evaluate(EvaluateConfig(str(tmp_path / name), ref_cache), one_process(), Silent())
        first, *others = lines(tmp_path / name)
        return [steady(first), *others, found.metrics]

    wide = curve("wide")
    request.getfixturevalue("no_float64")
    for before, after in zip(wide, curve("narrow"), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-5)


def test_spans_stay_on_the_cpu_where_attention_walks_over_them(monkeypatch: pytest.MonkeyPatch) -> None:
    from minicache.pairs import PairTable
    from tests.scoring.test_scoring import random_pairs

    made = Scorer(tiny_llama(), "float32", "packed")
    batch = made.batch(PairTable.from_pairs(random_pairs(3), "int32"), np.arange(3))
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.is_meta and moved.mask is not None and not moved.mask.is_meta
    assert isinstance(made.inputs_of(batch)["attention_mask"], Spans)
    monkeypatch.setattr(scorer, "attention_kernels", lambda device: ("flex",))
    assert not isinstance(made.inputs_of(batch)["attention_mask"], Spans)


def test_flex_attention_needs_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    devices.has_flex.cache_clear()
    for has, expected in ((False, []), (True, ["cuda", "xpu"])):
        monkeypatch.setattr(devices, "has_triton", lambda has=has: has)
        assert [k for k in ("cpu", "cuda", "xpu", "mps") if devices.has_flex(torch.device(k))] == expected
        devices.has_flex.cache_clear()


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    yield
    devices.has_flex.cache_clear()
