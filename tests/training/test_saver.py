"""A checkpoint is there whole or not at all, also while it replaces an older one of the same step; leftovers are removed."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache import disk
from minicache.training import checkpoints
from minicache.training.checkpoints import OPTIMIZER, STATE, Saver
from tests.conftest import one_process


class Killed(BaseException):
    """Ends a call as a kill would."""


def save(run: Path, content: str) -> None:
    """Save a checkpoint of step 3 whose model is one file."""

    def write_model(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(content)

    saver = Saver(run, one_process(), background=False)
    saver.save(3, {}, {"w": torch.ones(2)}, write_model, lambda steps: steps)


def is_whole(checkpoint: Path) -> bool:
    return (
        (checkpoint / "model" / "weights").is_file()
        and (checkpoint / STATE).is_file()
        and (checkpoint / OPTIMIZER).is_dir()
    )


def test_a_checkpoint_replaces_an_older_one_of_its_step(tmp_path: Path) -> None:
    for content in ("first", "second"):
        save(tmp_path, content)
        assert (checkpoints.place(tmp_path, 3) / "model" / "weights").read_text() == content
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_no_thread_waits_for_a_gpu_that_is_not_its_process_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in the background lies in the CPU's memory; torch's loader that copies ahead asks for GPU 0's stream."""
    asked: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: asked.append("stream"))
    state = {"w": torch.arange(12.0).view(3, 4), "step": torch.tensor(7)}
    saver = Saver(tmp_path, one_process(), background=True)
    saver.save(3, {}, state, lambda folder: folder.mkdir(), lambda steps: steps)
    # the next step of training
    kept = {name: each.clone() for name, each in state.items()}
    state["w"].zero_()
    saver.wait()
    found = {name: torch.zeros_like(each) for name, each in kept.items()}
    checkpoints.load_optimizer(tmp_path, 3, found, one_process())
    assert asked == [] and all(torch.equal(found[name], each) for name, each in kept.items())


def half_removed(folder: Path, **options: Any) -> None:
    for file in [file for file in folder.rglob("*") if file.is_file()][:1]:
        file.unlink()
    raise Killed


@pytest.mark.parametrize("kill", ["while the old one is removed", "before the new one is renamed"])
def test_a_kill_while_it_is_replaced_leaves_a_whole_one_or_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill: str
) -> None:
    save(tmp_path, "first")

    def killed(*arguments: Any) -> None:
        raise Killed

    dying: dict[str, tuple[Any, str, Callable[..., None]]] = {
        "while the old one is removed": (shutil, "rmtree", half_removed),
        "before the new one is renamed": (disk, "publish_folder", killed),
    }
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*dying[kill])
        save(tmp_path, "second")
    assert all(is_whole(checkpoints.place(tmp_path, step)) for step in checkpoints.steps(tmp_path))
    save(tmp_path, "third")
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_leftovers_of_this_and_earlier_versions_are_removed(tmp_path: Path) -> None:
    for name in (".step-000001.saving", ".step-000002.gone", ".step-000003.01234567-1-01234567-01234567.draft"):
        (tmp_path / "checkpoints" / name / "model").mkdir(parents=True)
    save(tmp_path, "first")
    assert [entry.name for entry in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]
