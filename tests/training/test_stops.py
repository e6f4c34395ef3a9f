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


FINAL = {
    "best checkpoint": ("save", OPTIONS),
    "kl": ("evaluate_policy", {**OPTIONS, "max_kl": 1e-9, "on_max_kl": "stop"}),
}


@pytest.mark.parametrize("case", FINAL)
def test_in_the_last_validation_of_all(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    """While its checkpoint is saved: its line is not lost. Of a run that --max-kl ended: it stays ended."""
    name, options = FINAL[case]
    options = {**options, "validation": ValidationOptions(eval_cache=ref_cache, eval_every=1000), "log_every": 1}
    whole = train_run(ref_cache, tmp_path / "whole", **options)
    real = getattr(loop, name)

    def asked(*given: Any, **more: Any) -> Any:
        run, training = given[:2] if name == "save" else (None, None)
        if run is None or training.progress.step == run.steps:
            signal.raise_signal(signal.SIGTERM)
        return real(*given, **more)

    def last(*given: Any) -> Any:
        """The second: the first is before the first step."""
        with monkeypatch.context() as patch:
            if given[1].progress.step:
                patch.setattr(loop, name, asked)
            return validate(*given)

    validate = loop._validate
    monkeypatch.setattr(loop, "_validate", last)
    with pytest.raises(KeyboardInterrupt, match=r"the state after \d+ steps is saved"):
        train_run(ref_cache, tmp_path / "run", **options)
    monkeypatch.setattr(loop, "_validate", validate)
    resumed = train_run(ref_cache, tmp_path / "run", resume=True, **options)
    assert (resumed.stopped, resumed.model_step) == (whole.stopped, whole.model_step)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def test_a_checkpoint_that_is_there_is_not_written_again(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stop that comes while it is saved costs no second one, and no moment without any."""
    saved, real = list[int](), loop.save

    def asked(run: Any, training: Any) -> None:
        saved.append(training.progress.step)
        signal.raise_signal(signal.SIGTERM)
        real(run, training)

    monkeypatch.setattr(loop, "save", asked)
    with pytest.raises(KeyboardInterrupt, match="the state after 0 steps is saved"):
        train_run(ref_cache, tmp_path / "run", **OPTIONS)
    assert saved == [0]


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
