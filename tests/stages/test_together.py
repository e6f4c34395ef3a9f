"""What one process finds when another works at the same place at the same moment: one line that names it, or a correct result."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from minicache.errors import MinicacheError, ModelError, RunBusy
from minicache.training.run_directory import RECORD, policy_source, reading
from tests.conftest import Cli
from tests.training.test_resume import run as train_run


@pytest.fixture(scope="module")
def done(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with checkpoints. Copy it before changing it."""
    out = tmp_path_factory.mktemp("done") / "run"
    train_run(ref_cache, out, epochs=1, save_every=2)
    return out


def test_a_run_that_another_process_has_made_meanwhile_is_not_overwritten(
    done: Path, ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has begun and ended between this one's first look and its first write."""
    from minicache.stages import train as stage

    out = tmp_path / "run"

    def meanwhile(*arguments: Any) -> float:
        shutil.copytree(done, out)
        return 0.0

    monkeypatch.setattr(stage, "handshake", meanwhile)
    with pytest.raises(RunBusy, match="another process has begun a run there meanwhile"):
        train_run(ref_cache, out)
    for name in (RECORD, "metrics.jsonl", "model/model.safetensors"):
        assert (out / name).read_bytes() == (done / name).read_bytes()


# --- reading a policy of a run that is under way ---

READERS: dict[str, Callable[[Path, Path, Path], tuple[object, ...]]] = {
    "evaluate": lambda policy, cache, out: ("evaluate", "--policy", policy, "--ref-cache", cache),
    "export": lambda policy, cache, out: ("export", "--policy", policy, "--out", out),
    "compare": lambda policy, cache, out: ("compare", "--policy", policy, "--prompt", "why", "--max-new-tokens", 1),
}


@pytest.mark.parametrize("command", READERS)
@pytest.mark.parametrize("what", ["checkpoint", "model"])
def test_a_policy_that_its_run_takes_away_while_it_is_read(
    done: Path, ref_cache: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str, what: str
) -> None:
    import minicache.stages.compare
    import minicache.stages.evaluate
    import minicache.stages.export

    run = shutil.copytree(done, tmp_path / "run")
    policy = run if what == "model" else min((run / "checkpoints").iterdir())
    stage: Any = getattr(minicache.stages, command)
    real = stage.load_model

    def taken_away(source: str, *arguments: Any) -> Any:
        if source == str(policy / "model"):
            shutil.rmtree(source)
        return real(source, *arguments)

    monkeypatch.setattr(stage, "load_model", taken_away)
    code, _, stderr = cli(*READERS[command](policy, ref_cache, tmp_path / "out"))
    expected = "replaced its model" if what == "model" else "removed this checkpoint (--keep-last)"
    assert code == 1 and f"error: {policy}: its run has {expected} while it was read; " in stderr
    assert not (tmp_path / "out").exists()


def test_a_policy_that_stays_keeps_its_own_error(done: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^broken$"), reading(str(done)) as source:
        assert source == str(done / "model")
        raise ModelError("broken")


def test_a_checkpoint_that_is_gone_is_named_with_those_that_are_there(done: Path) -> None:
    there = sorted(each.name for each in (done / "checkpoints").iterdir())
    with pytest.raises(MinicacheError, match=r"no such checkpoint, or no longer \(--keep-last\)") as error:
        policy_source(str(done / "checkpoints" / "step-000001"))
    assert there and all(name in str(error.value) for name in there)


def test_a_run_without_a_line_yet_is_named_as_such(done: Path, tmp_path: Path, cli: Cli) -> None:
    """The record is written before the first line of metrics."""
    (tmp_path / "run").mkdir()
    shutil.copy(done / RECORD, tmp_path / "run" / RECORD)
    for command in ("report", "plot"):
        code, _, stderr = cli(command, tmp_path / "run")
        assert code == 1 and "the run has only begun: wait for its first line" in stderr


def test_a_report_while_a_line_is_being_written(done: Path, tmp_path: Path, cli: Cli) -> None:
    run = shutil.copytree(done, tmp_path / "run")
    lines = (run / "metrics.jsonl").read_bytes()
    half = json.dumps({"step": 10**6, "loss": 0.5})[:-9].encode()
    (run / "metrics.jsonl").write_bytes(lines + half)
    assert cli("report", run)[0] == 0 and cli("plot", run)[0] == 0
    assert (run / "metrics.jsonl").read_bytes() == lines + half, "readers write nothing there"
