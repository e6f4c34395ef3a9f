"""Checkpoints: a run that was interrupted anywhere and resumed is, bit for bit, the run that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicache.errors import CacheMismatch, ConfigError, OutputError
from minicache.options.train import LoraOptions, LossOptions, TrainConfig, ValidationOptions
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training import checkpoints
from minicache.training import step as loop
from minicache.training.validation import pair_logps
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl

SETTINGS: dict[str, Any] = {
    "batch_size": 8,
    "epochs": 3,
    "lr": 1e-3,
    "log_every": 2,
    "tokens_per_micro_batch": 70,
    "save_every": 4,
    "beta": 0.1,
}


class Killed(BaseException):
    """Ends a run as a kill would: nothing may catch it."""


def run(ref_cache: Path, out: Path, **options: Any) -> TrainReport:
    return train(TrainConfig(ref_cache, out, **{**SETTINGS, **options}), one_process(), Silent())


def lines(out: Path) -> list[dict[str, Any]]:
    """Of metrics.jsonl, without what measures time and memory."""
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("tokens_per_second", "memory_gb")} for line in read]


def weights(out: Path) -> dict[str, torch.Tensor]:
    (file,) = (out / "model").glob("*.safetensors")
    return load_file(file)


def assert_same_run(left: Path, right: Path) -> None:
    assert lines(left) == lines(right)
    a, b = weights(left), weights(right)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def killed_at(monkeypatch: pytest.MonkeyPatch, micro_batch: int, ref_cache: Path, out: Path, **options: Any) -> None:
    """The run, ended before the backward pass of the given micro-batch, counted over all steps."""
    calls = iter(range(10**6))

    def dying(*arguments: Any) -> Any:
        if next(calls) == micro_batch:
            raise Killed
        return pair_logps(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "pair_logps", dying)
        with pytest.raises(Killed):
            run(ref_cache, out, **options)


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "beta and schedule": {"beta_end": 0.5, "schedule": "linear", "warmup": 3},
    "lora": {"lora": LoraOptions(lora_rank=2), "lr": 1e-2},
    "validation": {"validation": ValidationOptions(holdout=0.2, eval_every=3)},
    "8-bit": {"optimizer": "adamw-8bit"},
    "float16": {"dtype": "float16"},
}


# the others do all that these do
LONG = {"plain", "beta and schedule", "8-bit", "float16"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in VARIANTS])
def test_a_run_killed_within_an_accumulation_resumes_bit_for_bit(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    options = VARIANTS[name]
    run(ref_cache, tmp_path / "whole", **options)
    for micro_batch in (41, 3, 60):  # in the step after a checkpoint, before there is any, far beyond one
        out = tmp_path / f"killed-{micro_batch}"
        killed_at(monkeypatch, micro_batch, ref_cache, out, **options)
        assert not (out / "model").exists()
        run(ref_cache, out, resume=True, **options)
        assert_same_run(tmp_path / "whole", out)


def test_it_resumes_at_any_step(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(ref_cache, tmp_path / "whole", save_every=1, keep_last=99)
    assert checkpoints.steps(tmp_path / "whole") == list(range(1, 15))
    for step in (1, 6, 14):  # not an end of an epoch (5 steps), nor of a log line
        out = tmp_path / f"from-{step}"
        killed_at(monkeypatch, 70, ref_cache, out, save_every=1, keep_last=99)
        checkpoints.prune(out, [step])
        if checkpoints.steps(out):
            run(ref_cache, out, resume=True)
            assert_same_run(tmp_path / "whole", out)


def test_the_command_goes_on_with_the_runs_own_options(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    """A real SIGINT to a real process: 130, the state saved, and `--resume --out` alone goes on."""
    arguments = ["--batch-size", "8", "--lr", "1e-3", "--log-every", "2", "--beta", "0.3"]
    arguments += ["--tokens-per-micro-batch", "70", "--epochs", "3"]
    command = [sys.executable, "-m", "minicache", "train", "--ref-cache", str(ref_cache), *arguments]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "stopped"), "--epochs", "400"],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    journal = tmp_path / "stopped" / "metrics.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 3:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume goes on" in " ".join(stderr.split())
    (stopped_at,) = checkpoints.steps(tmp_path / "stopped")

    code, _, stderr = cli("train", "--out", tmp_path / "stopped", "--resume", "--beta", "0.2")
    assert code == 1 and "--beta: this run was started with 0.3, asked for 0.2" in " ".join(stderr.split())
    facts = json.loads((tmp_path / "stopped" / "run.json").read_text())
    facts |= {"epochs": None, "steps": 15}
    state = checkpoints.load(tmp_path / "stopped", stopped_at)
    assert state["progress"]["step"] == stopped_at and facts["beta"] == 0.3


def test_sigterm_saves_too_and_two_processes_agree(ref_cache: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minicache", "train", "--ref-cache", str(ref_cache), "--batch-size", "8"]
    command += ["--log-every", "1", "--epochs", "400", "--out", str(tmp_path / "run"), "--nproc", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = tmp_path / "run" / "metrics.jsonl"
    while not journal.exists() or len(journal.read_text().splitlines()) < 3:
        time.sleep(0.05)
        assert process.poll() is None, process.communicate()[1]
    os.kill(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    (step,) = checkpoints.steps(tmp_path / "run")
    assert checkpoints.load(tmp_path / "run", step)["progress"]["step"] == step >= 3


def test_a_finished_run_has_nothing_to_resume(ref_cache: Path, tmp_path: Path) -> None:
    first = run(ref_cache, tmp_path / "run", epochs=1)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    again = run(ref_cache, tmp_path / "run", epochs=1, resume=True)
    assert again == first and (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_run_without_a_checkpoint_begins_again(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, 10, ref_cache, tmp_path / "run", save_every=0)
    assert checkpoints.steps(tmp_path / "run") == []
    with pytest.raises(OutputError, match="--resume goes on with it"):
        run(ref_cache, tmp_path / "run", save_every=0)
    run(ref_cache, tmp_path / "run", save_every=0, resume=True)
    run(ref_cache, tmp_path / "new", save_every=0, resume=True)  # nothing there yet: it simply begins
    assert_same_run(tmp_path / "run", tmp_path / "new")


@pytest.mark.parametrize(
    "change",
    [{"lr": 2e-3}, {"seed": 1}, {"loss_options": LossOptions(wpo=True)}, {"lora": LoraOptions(lora_rank=1)}],
)
def test_a_resumed_run_keeps_its_options(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    killed_at(monkeypatch, 41, ref_cache, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"--[a-z-]+: this run was started with .*, asked for"):
        run(ref_cache, tmp_path / "run", resume=True, **change)


def test_another_cache_is_refused(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, 41, ref_cache, tmp_path / "run")
    more = write_jsonl(tmp_path / "more.jsonl", make_rows(3, seed=5))
    grown = precompute_into(tmp_path / "grown", model_dir, data_file, more)
    with pytest.raises(CacheMismatch, match=r"43 pairs.* this run began with 40"):
        run(grown, tmp_path / "run", resume=True)


def test_old_checkpoints_go_and_a_broken_one_is_named(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, 70, ref_cache, tmp_path / "run", save_every=2, keep_last=2)
    (older, newest) = checkpoints.steps(tmp_path / "run")
    assert newest == older + 2
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))
    file = checkpoints.place(tmp_path / "run", newest) / "state.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(OutputError, match=rf"step-{newest:06d}/state.pt: .* remove its directory"):
        run(ref_cache, tmp_path / "run", save_every=2, keep_last=2, resume=True)
