"""A request to stop that comes where no step is taken: in a validation, and while the policy is saved. Nothing is lost."""

import signal
from pathlib import Path
from typing import Any

import pytest

import minicache.stages.train
import minicache.training.loop
from minicache.options.validation import ValidationOptions
from minicache.training import checkpoints
from minicache.training.run_directory import read_record
from tests.training.test_resume import assert_same_run
from tests.training.test_resume import run as train_run

loop: Any = minicache.training.loop
stage: Any = minicache.stages.train
OPTIONS: dict[str, Any] = {"epochs": 2, "validation": ValidationOptions(holdout=0.4, eval_every=1)}


@pytest.mark.parametrize("which", [1, 2, -1])
def test_in_a_validation(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: int) -> None:
    """It ends half-way, the steps are saved, and the run that goes on validates again. -1: the last one."""
    validations, real = list[int](), loop.evaluate_policy

    def counted(*given: Any, **more: Any) -> Any:
        validations.append(1)
        return real(*given, **more)

    monkeypatch.setattr(loop, "evaluate_policy", counted)
    train_run(ref_cache, tmp_path / "whole", **OPTIONS)
    assert len(validations) > 3
    due = len(validations) if which < 0 else which + 1
    validations.clear()

    def asked(*given: Any, **more: Any) -> Any:
        validations.append(1)
        if len(validations) == due:
            signal.raise_signal(signal.SIGTERM)
        found = real(*given, **more)
        assert len(validations) != due, "went on to its end"
        return found

    monkeypatch.setattr(loop, "evaluate_policy", asked)
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt, match=r"the state after \d+ steps is saved; the same command with --resume"):
        train_run(ref_cache, out, **OPTIONS)
    assert checkpoints.steps(out)
    monkeypatch.setattr(loop, "evaluate_policy", real)
    train_run(ref_cache, out, resume=True, **OPTIONS)
    assert_same_run(tmp_path / "whole", out)


def test_while_the_policy_is_saved(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint holds the last steps: it is saved first."""
    real = stage.save_policy

    def asked(*given: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(*given)

    monkeypatch.setattr(stage, "save_policy", asked)
    with pytest.raises(KeyboardInterrupt, match="the run is finished: its policy is in"):
        train_run(ref_cache, tmp_path / "run", epochs=1)
    record = read_record(tmp_path / "run")
    assert record and record.outcome and (tmp_path / "run" / "model" / "config.json").is_file()
