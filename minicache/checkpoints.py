"""Checkpoints of a run: `checkpoints/step-000500/` with the policy as a model directory and `state.pt` with everything else.

A checkpoint appears whole or not at all: it is made beside its place, flushed to disk, and renamed.
"""

import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from minicache.disk import flush_to_disk, writing
from minicache.errors import OutputError

STATE = "state.pt"
NAME = re.compile(r"step-(\d{6,})")


def place(run: Path, step: int) -> Path:
    """Of the checkpoint after so many optimizer steps."""
    return run / "checkpoints" / f"step-{step:06d}"


def steps(run: Path) -> list[int]:
    """Of which there are checkpoints, in ascending order."""
    folder = run / "checkpoints"
    names = [NAME.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1]) for name in names if name)


def save(run: Path, step: int, state: dict[str, Any], write_model: Callable[[Path], None]) -> None:
    """state: what `torch.load(weights_only=True)` reads back. write_model: writes the policy to a directory.

    Raises:
        OutputError: the disk is full or cannot be written; no trace of this checkpoint remains.
    """
    final = place(run, step)
    draft = final.with_name(f".{final.name}.saving")
    try:
        with writing(final):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write_model(draft / "model")
            try:
                torch.save(state, draft / STATE)
            except RuntimeError as error:  # torch's own writer, of a full disk
                raise OSError(str(error)) from error
            flush_to_disk([*draft.rglob("*"), draft])
            shutil.rmtree(final, ignore_errors=True)
            draft.replace(final)
            flush_to_disk([final.parent])
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def load(run: Path, step: int) -> dict[str, Any]:
    """Raises OutputError: it cannot be read."""
    file = place(run, step) / STATE
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        line = " ".join(str(error).split())[:200]
        raise OutputError(
            f"{file}: the checkpoint cannot be read ({line}); remove its directory to resume from an earlier one"
        ) from error


def prune(run: Path, keep: Iterable[int]) -> None:
    """Remove all checkpoints but these."""
    for step in set(steps(run)) - set(keep):
        gone = place(run, step).rename(place(run, step).with_name(f".step-{step:06d}.gone"))
        shutil.rmtree(gone, ignore_errors=True)
