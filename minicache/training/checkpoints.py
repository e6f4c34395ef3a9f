"""Checkpoints of a run: `checkpoints/step-000500/` with the policy as a model directory, `optimizer/`, and `state.pt`.

`optimizer/` is torch's distributed checkpoint: every process writes its part, and any number of processes, with the model whole
or in shards, reads what it needs. A checkpoint appears whole or not at all: it is made beside its place, flushed to disk, and
renamed.
"""

import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException

from minicache.disk import flush_to_disk, writing
from minicache.errors import OutputError
from minicache.processes.world import World
from minicache.strict import read_as
from minicache.training.progress import Progress
from minicache.training.shard_index import IndexedReader

STATE, OPTIMIZER = "state.pt", "optimizer"
# What a state holds.
ENTRIES: dict[str, Any] = {
    "optimizer": dict | None,
    "scaler": dict,
    "progress": dict,
    "means": torch.Tensor,
    "rng": torch.Tensor,
    "cache": str,
    "pairs": int,
    "training": str,
    "held_out": str | None,
}
NAME = re.compile(r"step-(\d{6,})")


def place(run: Path, step: int) -> Path:
    """The directory of the checkpoint after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:06d}"


def steps(run: Path) -> list[int]:
    """The steps after which there are checkpoints, in ascending order."""
    folder = run / "checkpoints"
    names = [NAME.fullmatch(entry.name) for entry in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1]) for name in names if name)


class Saver:
    """Writes the checkpoints of a run; all processes save together.

    In the background: what is saved is copied to the CPU's memory first, and written while training goes on. One is under way at
    a time; the next waits for it.
    """

    def __init__(self, run: Path, world: World, background: bool) -> None:
        self.run, self.world = run, world
        self.thread = ThreadPoolExecutor(1) if background else None
        # processes agree about a checkpoint among themselves, beside what training says at the same time
        self.group = dist.new_group(backend="gloo") if background and world.size > 1 else None
        self.under_way: Future[None] | None = None
        _one_process_is_no_mistake()
        if world.is_main:
            for leftover in [
                *(run / "checkpoints").glob(".step-*.gone"),
                *(run / "checkpoints").glob(".step-*.saving"),
            ]:
                shutil.rmtree(leftover, ignore_errors=True)  # of a call that was killed

    def save(
        self,
        step: int,
        state: dict[str, Any],
        optimizer: dict[str, torch.Tensor],
        write_model: Callable[[Path], None],
        keep: Callable[[list[int]], Iterable[int]],
    ) -> None:
        """state: what `torch.load(weights_only=True)` reads back; rank 0's counts. keep: of the steps there are, those to stay.

        optimizer: its tensors by name, of shards each process's own. write_model: writes the policy to a directory, called on
        rank 0; in the background it must not read what training changes.

        Raises:
            OutputError: the disk is full or cannot be written; no trace of this checkpoint remains. In the background the next
                call tells, or `wait`.
        """
        self.wait()
        final = place(self.run, step)
        draft = final.with_name(f".{final.name}.saving")
        if self.world.is_main:
            with writing(final):
                shutil.rmtree(draft, ignore_errors=True)
                draft.mkdir(parents=True)
        self.world.barrier()
        options: dict[str, Any] = {"checkpoint_id": draft / OPTIMIZER, "no_dist": self.world.size == 1}

        def finish(written: Future[Any] | None) -> None:
            with writing(final), _removed_on_failure(draft):
                if written:
                    written.result()
                if self.world.is_main:
                    write_model(draft / "model")
                    torch.save(state, draft / STATE)
                    flush_to_disk([*draft.rglob("*"), draft])
                    shutil.rmtree(final, ignore_errors=True)
                    draft.replace(final)
                    flush_to_disk([final.parent])
                    prune(self.run, keep(steps(self.run)))

        if self.thread:
            written: Any = dcp.async_save(optimizer, process_group=self.group, **options)
            self.under_way = self.thread.submit(finish, written)
            return
        with writing(final), _removed_on_failure(draft):
            dcp.save(optimizer, **options)
        finish(None)
        self.world.barrier()

    def wait(self) -> None:
        """Until nothing is under way. Raises OutputError: what was could not be written."""
        if self.under_way:
            pending, self.under_way = self.under_way, None
            pending.result()


@contextmanager
def _removed_on_failure(draft: Path) -> Iterator[None]:
    """What torch's own writers raise of a full disk becomes an OSError; no half checkpoint stays."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(draft, ignore_errors=True)
        if isinstance(error, RuntimeError | CheckpointException):
            raise OSError(" ".join(str(error).split())[-300:]) from error
        raise


def load(run: Path, step: int) -> dict[str, Any]:
    """The state that was saved: tensors and plain values, nothing that runs.

    Raises:
        OutputError: it cannot be read.
    """
    file = place(run, step) / STATE
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"expected entries by name, got {type(state).__name__}")
        for name, kind in ENTRIES.items():
            if name not in state or not isinstance(state[name], kind):
                raise ValueError(f"{name}: expected a {kind}, got {type(state.get(name)).__name__}")
        if progress_of(state).step != step:
            raise ValueError(f"progress.step: expected {step}, got {progress_of(state).step}")
    except (OSError, RuntimeError, ValueError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise unreadable(file, error) from error
    return state


def progress_of(state: dict[str, Any]) -> Progress:
    return read_as(Progress, state["progress"], "progress", skip_unknown=True)


def load_optimizer(run: Path, step: int, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Read the optimizer's state into these tensors, or this process's shards of them.

    Raises:
        OutputError: it cannot be read, or is of another optimizer.
    """
    folder = place(run, step) / OPTIMIZER
    try:
        _one_process_is_no_mistake()
        dcp.load(tensors, storage_reader=IndexedReader(folder), no_dist=world.size == 1)
    except (OSError, RuntimeError, ValueError, EOFError, CheckpointException, pickle.UnpicklingError) as error:
        raise unreadable(folder, error) from error


def _one_process_is_no_mistake() -> None:
    """torch warns of it in every call; for good, because it does so in threads of its own too."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def unreadable(what: Path, error: BaseException) -> OutputError:
    line = " ".join(str(error).split())[-200:]
    return OutputError(
        f"{what}: the checkpoint cannot be read ({line}); remove its directory to resume from an earlier one"
    )


def prune(run: Path, keep: Iterable[int]) -> None:
    """Remove all checkpoints but these."""
    for step in set(steps(run)) - set(keep):
        gone = place(run, step).rename(place(run, step).with_name(f".step-{step:06d}.gone"))
        shutil.rmtree(gone, ignore_errors=True)
