"""Sweeps: the same runs as `train` makes one by one, with everything read once; what is left of them; how they compare."""

import inspect
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicache.commands import sweep as cli_sweep
from minicache.commands.train import train as train_command
from minicache.errors import ConfigError
from minicache.options.dictionaries import fill
from minicache.options.loss import BETAS
from minicache.options.sweep import SWEPT, SweepConfig, sweep_config
from minicache.options.train import TrainConfig
from minicache.reports.sweep import SweepReport
from minicache.stages import sweep as stage
from minicache.stages.sweep import sweep
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training.lock import RunLock
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl

TIMES = ("tokens_per_second", "memory_gb")
FIXED = {"batch_size": ["8"], "max_steps": 4, "holdout": 0.25, "log_every": 1, "tokens_per_micro_batch": 2048}


class Listener(Silent):
    """Notes what it is told, and once interrupts a run as Ctrl-C would."""

    def __init__(self, interrupt_at: int | None = None) -> None:
        self.notes: list[str] = []
        self.interrupt_at = interrupt_at

    def note(self, text: str) -> None:
        self.notes.append(text)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step == self.interrupt_at and "loss" in metrics:
            self.interrupt_at = None
            signal.raise_signal(signal.SIGINT)


def config(ref_cache: Path, out: Path, **options: Any) -> SweepConfig:
    return sweep_config({"ref_cache": ref_cache, "out": out, **FIXED, **options}, {})


def run(ref_cache: Path, out: Path, listener: Silent | None = None, **options: Any) -> SweepReport:
    return sweep(config(ref_cache, out, **options), one_process(), listener or Silent())


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


def assert_same_run(left: Path, right: Path) -> None:
    """Metrics equal but for the time they took, and the weights that were saved bit for bit."""
    assert json.dumps(lines(left)) == json.dumps(lines(right))
    (file,) = (left / "model").glob("*.safetensors")
    mine, other = load_file(file), load_file(right / "model" / file.name)
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_each_run_is_the_run_that_train_makes_and_everything_is_read_once(
    ref_cache: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="the lora extra is not installed")
    other = precompute_into(tmp_path / "eval", model_dir, write_jsonl(tmp_path / "e.jsonl", make_rows(12, seed=5)))
    read: list[str] = []
    for name in ("load_pairs", "load_model"):
        original = getattr(stage, name)

        def reading(*given: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            read.append(name)
            return original(*given)

        monkeypatch.setattr(stage, name, reading)
    options: dict[str, Any] = {"lr": ["1e-3,1e-2"], "lora_rank": ["0,2"], "holdout": 0.0, "eval_cache": other}
    report = run(ref_cache, tmp_path / "sweep", **options)
    assert sorted(read) == ["load_model", "load_pairs", "load_pairs"]  # pairs to train on, and to validate on
    assert [result.state for result in report.runs] == ["done"] * 4
    for lr in ("0.001", "0.01"):
        for rank in (0, 2):
            alone = tmp_path / f"alone-{lr}-{rank}"
            given = {**FIXED, "batch_size": 8, "holdout": 0.0, "eval_cache": other, "lr": float(lr), "lora_rank": rank}
            train(fill(TrainConfig, {"ref_cache": ref_cache, "out": alone, **given}), one_process(), Silent())
            assert_same_run(tmp_path / "sweep" / f"lr-{lr}_lora-rank-{rank}", alone)


def test_the_best_on_held_out_pairs_comes_first_and_the_passes_saved_are_counted(
    ref_cache: Path, tmp_path: Path
) -> None:
    report = run(ref_cache, tmp_path / "sweep", lr=["1e-3,1e-2"], beta=["0.1,0.5"])
    accuracies = [result.held_out["rewards/accuracy"] for result in report.runs if result.held_out]
    assert len(accuracies) == 4 and accuracies == sorted(accuracies, reverse=True)
    for result in report.runs:
        facts = json.loads((tmp_path / "sweep" / result.name / "run.json").read_text())
        assert result.held_out == facts["outcome"]["progress"]["validation"]
        assert result.options == {name: facts[name] for name in ("beta", "lr")}
    assert report.reference_passes == 4 * 4 * 8  # runs, steps, pairs a step: an epoch of 30 has no smaller batch yet
    assert report.cached_pairs == 40 and report.reference_pairs_per_second > 0
    assert report.seconds_not_spent == pytest.approx(report.reference_passes / report.reference_pairs_per_second)


def test_a_finished_sweep_is_told_again_and_a_larger_grid_does_only_what_is_new(
    ref_cache: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sweep"
    first = run(ref_cache, out, lr=["1e-3,1e-2"])
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*.jsonl")}
    assert run(ref_cache, out, lr=["1e-3,1e-2"]) == first
    report = run(ref_cache, out, lr=["1e-3,1e-2,3e-3"])
    assert [result.state for result in report.runs] == ["done"] * 3
    assert {file: file.stat().st_mtime_ns for file in before} == before
    with pytest.raises(ConfigError, match="--max-steps: this run was started with 4, asked for 6"):
        run(ref_cache, out, lr=["1e-3,1e-2"], max_steps=6)


def test_an_interrupted_sweep_goes_on_where_it_stopped(ref_cache: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "sweep"
    run(ref_cache, whole, lr=["1e-3,1e-2"])
    with pytest.raises(KeyboardInterrupt, match=r"lr-0.001: the state is saved; the same command goes on"):
        run(ref_cache, out, Listener(interrupt_at=1), lr=["1e-3,1e-2"])
    assert not (out / "lr-0.01").exists() and not list(out.rglob(".lock"))
    report = run(ref_cache, out, lr=["1e-3,1e-2"])
    assert [result.state for result in report.runs] == ["done"] * 2
    for name in ("lr-0.001", "lr-0.01"):
        assert_same_run(out / name, whole / name)


def test_a_run_that_diverges_is_recorded_and_the_next_begins(ref_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    report = run(ref_cache, out, lr=["1e30,1e-3"], max_grad_norm=1e30)
    done, failed = report.runs
    assert (done.name, done.state, failed.name, failed.state) == ("lr-0.001", "done", "lr-1e+30", "failed")
    assert failed.problem and "diverged" in failed.problem
    assert json.loads((out / "sweep.json").read_text())["runs"][1]["problem"] == failed.problem
    listener, metrics = Listener(), out / "lr-1e+30" / "metrics.jsonl"
    before = metrics.stat().st_mtime_ns
    assert run(ref_cache, out, listener, lr=["1e30,1e-3"], max_grad_norm=1e30) == report
    assert metrics.stat().st_mtime_ns == before
    assert any(note.startswith("it failed before: step") for note in listener.notes)


def test_shards_divide_the_runs_among_them(ref_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    options: dict[str, Any] = {"lr": ["1e-3,1e-2,3e-3"]}
    half = run(ref_cache, out, shard="2/2", **options)
    assert [(result.name, result.state) for result in half.runs] == [
        ("lr-0.01", "done"),
        ("lr-0.001", "not begun"),
        ("lr-0.003", "not begun"),
    ]
    listener = Listener()
    (out / "lr-0.003").mkdir()
    with RunLock(out / "lr-0.003") as lock:
        assert lock.take()  # as another job would that is at work on it
        report = run(ref_cache, out, listener, shard="1/2", **options)
    assert {result.name: result.state for result in report.runs}["lr-0.003"] == "not begun"
    assert "lr-0.003: another process is at work on it; left to that process" in listener.notes
    assert {result.state for result in run(ref_cache, out, shard="1/2", **options).runs} == {"done"}


@pytest.mark.slow
def test_two_processes_make_the_same_runs(ref_cache: Path, tmp_path: Path) -> None:
    run(ref_cache, tmp_path / "one", lr=["1e-3,1e-2"])
    command = [
        sys.executable,
        "-m",
        "minicache",
        "sweep",
        "--ref-cache",
        ref_cache,
        "--out",
        tmp_path / "two",
        "--nproc",
        "2",
    ]
    command += [
        "--lr",
        "1e-3,1e-2",
        "--batch-size",
        "8",
        "--max-steps",
        "4",
        "--holdout",
        "0.25",
        "--log-every",
        "1",
        "--json",
    ]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert {result["state"] for result in json.loads(done.stdout)["runs"]} == {"done"}
    for name in ("lr-0.001", "lr-0.01"):
        for one, two in zip(lines(tmp_path / "one" / name), lines(tmp_path / "two" / name), strict=True):
            assert one == pytest.approx(two, rel=1e-4, abs=1e-5)


@pytest.mark.slow
def test_without_matplotlib_there_is_a_note_and_no_picture(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "matplotlib", None)
        listener = Listener()
        run(ref_cache, tmp_path / "sweep", listener, lr=["1e-3"])
    assert any("pip install 'minidpo[plot]'" in note for note in listener.notes)
    assert not (tmp_path / "sweep" / "sweep.png").exists()
    pytest.importorskip("matplotlib", reason="the plot extra is not installed")
    run(ref_cache, tmp_path / "sweep", lr=["1e-3,1e-2"], loss=["sigmoid:0.5,hinge:0.5", "ipo"])
    assert (tmp_path / "sweep" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_beta_that_is_left_open_is_the_default_and_of_a_sweep_that_was_begun_the_begun_runs(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def betas(out: Path) -> list[float]:
        return [
            json.loads((run.config.out / "run.json").read_text())["beta"]
            for run in config(ref_cache, out, **options).runs
        ]

    options: dict[str, Any] = {"logps": ["mean,sum"], "lr": ["1e-3,1e-2"]}
    monkeypatch.setitem(BETAS, "mean", 0.3)  # another release's
    with pytest.raises(KeyboardInterrupt):
        run(ref_cache, tmp_path / "begun", Listener(interrupt_at=2), **options)
    monkeypatch.undo()
    run(ref_cache, tmp_path / "begun", **options)
    assert betas(tmp_path / "begun") == [0.3, 0.3, 0.1, 0.1]
    run(ref_cache, tmp_path / "new", **options)
    assert betas(tmp_path / "new") == [5.0, 5.0, 0.1, 0.1]


# --- what is asked for ---


def test_a_grid_is_every_combination_and_a_colon_makes_a_mixture(tmp_path: Path) -> None:
    made = config(Path("c"), tmp_path, loss=["sigmoid:0.8,hinge:0.2", "ipo,hinge"], beta=["0.05, 0.3"])
    assert [(run.config.loss, run.config.beta) for run in made.runs] == [
        (loss, beta) for loss in ("sigmoid:0.8,hinge:0.2", "ipo", "hinge") for beta in (0.05, 0.3)
    ]
    assert made.runs[0].name == "loss-sigmoid-0.8+hinge-0.2_beta-0.05"
    assert made.runs[0].config.out == tmp_path / made.runs[0].name and made.runs[0].config.batch_size == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": ["1e-3,fast"]}, "--lr: expected numbers separated by commas, got 1e-3,fast"),
        ({"lora_rank": ["4,8.5"]}, "--lora-rank: expected whole numbers separated by commas, got 4,8.5"),
        ({"lr": ["1e-3,0.001"]}, "lr-0.001 would be made twice"),
        ({"lr": ["1e-3,-1"]}, "--lr: expected a number above 0, got -1"),
        ({"lr": ["1e-3"], "shard": "3/2"}, "--shard: expected K/N"),
        ({"lr": ["1e-3"], "holdout": 0.0}, "none of them trains on; expected --holdout 0.05 or --eval-cache"),
        ({"batch_size": None}, "expected values of at least one of --loss, --logps, --beta"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        config(Path("c"), tmp_path, **options)


def test_a_loss_that_cannot_judge_held_out_pairs_is_refused_before_the_first_run(
    ref_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="--loss aot: sorts over a training batch"):
        run(ref_cache, tmp_path / "sweep", loss=["sigmoid,aot"])
    assert not (tmp_path / "sweep").exists()


def test_the_command_has_every_option_of_train_but_resume() -> None:
    ours, theirs = (inspect.signature(each).parameters for each in (cli_sweep.sweep, train_command))
    assert ours.keys() - theirs.keys() == {"shard", "_json"}
    assert theirs.keys() - ours.keys() == {"resume"}
    assert theirs.keys() >= SWEPT.keys()


def test_the_command_shows_a_table_and_what_was_not_run(cli: Cli, ref_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    options = ("--ref-cache", ref_cache, "--out", out, "--holdout", "0.25", "--max-steps", "2", "--lr", "1e-3,1e-2")
    code, shown, _ = cli("sweep", *options, "--loss", "ipo")
    assert code == 0 and "2 of 2 runs" in shown and "reference passes not run" in " ".join(shown.split())
    assert [line.split()[0] for line in shown.splitlines() if "of 2 " in line][:2] != []
    code, shown, _ = cli("sweep", *options, "--loss", "ipo", "--json")
    assert code == 0 and json.loads(shown) == json.loads((out / "sweep.json").read_text())
    code, _, told = cli("sweep", "--ref-cache", ref_cache, "--out", out, "--beta", "0.1,0.2")
    assert code == 1 and "expected --holdout 0.05 or --eval-cache" in " ".join(told.split())
