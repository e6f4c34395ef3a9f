"""Checkpoints of a run: `checkpoints/step-000500/` with the policy as a model directory, `optimizer/`, and `state.pt`.

`optimizer/` is a checkpoint of torch.distributed: every process writes its part, and any number of processes, with the model whole
or in shards, reads what it needs. A checkpoint appears whole or not at all: it is written to a draft beside its place, flushed to
disk, and renamed.
"""

import errno
import logging
import os
import pickle
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from minicache.disk import make_folder, move, remove_folder, replace_folder, require_file
from minicache.drafts import draft_of
from minicache.errors import OutputError
from minicache.failures import system_error, writing
from minicache.processes.world import World, patient_group
from minicache.strict import read_as
from minicache.training.progress import Progress
from minicache.training.shard_index import IndexedReader

log = logging.getLogger(__name__)

STATE, OPTIMIZER = "state.pt", "optimizer"
# The entries of a state and their types.
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
# Errors of the machine: a checkpoint that it does not let this process read is not a damaged one.
NOT_ITS_FAULT = (
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ESTALE,
    errno.ETIMEDOUT,
)


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

    In the background, the tensors are first copied to the CPU's memory, then written while training goes on. At most one
    checkpoint is under way; the next waits for it.
    """

    def __init__(self, run: Path, world: World, background: bool) -> None:
        self.run, self.world = run, world
        self.thread = ThreadPoolExecutor(1) if background else None
        # A group of its own: the background's messages must not mix with those of training.
        self.group = patient_group() if background and world.size > 1 else world.patient
        self.under_way: Future[None] | None = None
        _allow_one_process()
        if world.is_main:
            # Drafts of calls that were killed, this version's and earlier ones'. The lock of the run excludes other processes.
            for leftover in (run / "checkpoints").glob(".step-*"):
                shutil.rmtree(leftover, ignore_errors=True)

    def save(
        self,
        step: int,
        state: dict[str, Any],
        optimizer: dict[str, torch.Tensor],
        write_model: Callable[[Path], None],
        keep: Callable[[list[int]], Iterable[int]],
    ) -> None:
        """Write the checkpoint of a step, then remove all checkpoints but those that `keep` returns of the existing steps.

        state: values that `torch.load(weights_only=True)` reads back; rank 0's is saved. optimizer: tensors by name, in a model
        of shards each process's own. write_model: writes the policy to a directory, called on rank 0; in the background it must
        not read what training changes.

        Raises:
            OutputError: the disk is full or cannot be written; no trace of this checkpoint remains. In the background the next
                call raises it, or `wait`.
        """
        self.world.each(self.wait)
        started, final = time.monotonic(), place(self.run, step)
        draft = self.world.first(lambda: _new_draft(final))
        options: dict[str, Any] = {"checkpoint_id": draft / OPTIMIZER, "no_dist": self.world.size == 1}

        def finish(written: Future[Any] | None) -> None:
            with writing(final), _removed_on_failure(draft):
                if written:
                    written.result()
                if self.world.is_main:
                    write_model(draft / "model")
                    torch.save(state, draft / STATE)
                    size = sum(file.stat().st_size for file in draft.rglob("*") if file.is_file())
                    replace_folder(draft, final)
                    prune(self.run, keep(steps(self.run)))
                    log.debug("checkpoint of step %d: %d bytes, %.1f s", step, size, time.monotonic() - started)

        if self.thread:
            # The copies lie in the CPU's memory: a writer that copies ahead would wait for GPU 0, in a thread that knows no other.
            writer, stager = (
                _writer(draft / OPTIMIZER, per_thread_copy_ahead=0),
                DefaultStager(StagingOptions(*[False] * 4)),
            )
            written: Any = async_save(
                optimizer, storage_writer=writer, async_stager=stager, process_group=self.group, **options
            )
            self.under_way = self.thread.submit(finish, written)
            return
        with writing(final), _removed_on_failure(draft):
            save(optimizer, storage_writer=_writer(draft / OPTIMIZER), process_group=self.group, **options)
        self.world.each(lambda: finish(None))

    def wait(self) -> None:
        """Wait until no checkpoint is under way. Raises OutputError: the last one could not be written."""
        if self.under_way:
            pending, self.under_way = self.under_way, None
            pending.result()


class _Files(FileSystem):
    """torch's file system, with renames that wait for other programs."""

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        move(Path(path), Path(new_path))


def _writer(folder: Path, **options: Any) -> FileSystemWriter:
    writer = FileSystemWriter(folder, **options)
    writer.fs = _Files()
    return writer


def _new_draft(final: Path) -> Path:
    """An empty directory beside the checkpoint's place, into which all ranks write. Raises OutputError."""
    with writing(final):
        make_folder(final.parent)
        draft = draft_of(final)
        draft.mkdir()
        return draft


@contextmanager
def _removed_on_failure(draft: Path) -> Iterator[None]:
    """Remove the draft if the block fails. Turns the errors of torch's writers into OSError."""
    try:
        yield
    except BaseException as error:
        # while what filled the disk is there
        is_torch = isinstance(error, RuntimeError | CheckpointException)
        found = system_error(_behind(error), draft.parent) if is_torch else None
        shutil.rmtree(draft, ignore_errors=True)
        if found:
            raise found from error
        raise


def _behind(error: BaseException) -> BaseException:
    """The first of the errors that torch collects from its ranks; any other as it is."""
    failures = error.failures.values() if isinstance(error, CheckpointException) else ()
    return next((each[0] for each in failures), error)


def load(run: Path, step: int) -> dict[str, Any]:
    """The state of a checkpoint: tensors and plain values. Reading it executes nothing.

    Raises:
        OutputError: it cannot be read.
    """
    file = place(run, step) / STATE
    started = time.monotonic()
    try:
        require_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"expected entries by name, got {type(state).__name__}")
        for name, kind in ENTRIES.items():
            if name not in state or not isinstance(state[name], kind):
                raise ValueError(f"{name}: expected a {kind}, got {type(state.get(name)).__name__}")
        if progress_of(state).step != step:
            raise ValueError(f"progress.step: expected {step}, got {progress_of(state).step}")
    # Damaged bytes make torch raise nearly every kind of exception.
    except Exception as error:
        raise unreadable(file, error) from error
    log.debug("state of step %d read from %s: %.1f s", step, file, time.monotonic() - started)
    return state


def progress_of(state: dict[str, Any]) -> Progress:
    """The progress that a state holds. Raises ValueError, TypeError: its entry is not one."""
    progress: Progress = read_as(Progress, state["progress"], "progress", skip_unknown=True)
    return progress


def load_optimizer(run: Path, step: int, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Read the optimizer's state into these tensors, or into this process's shards of them.

    Raises:
        OutputError: it cannot be read, or is of another optimizer.
    """
    folder = place(run, step) / OPTIMIZER
    started = time.monotonic()
    try:
        _allow_one_process()
        load_distributed(
            tensors, storage_reader=IndexedReader(folder), process_group=world.patient, no_dist=world.size == 1
        )
    except (OSError, RuntimeError, ValueError, EOFError, CheckpointException, pickle.UnpicklingError) as error:
        raise unreadable(folder, error) from error
    log.debug("%d tensors of the optimizer read from %s: %.1f s", len(tensors), folder, time.monotonic() - started)


def _allow_one_process() -> None:
    """Silence torch's warning about checkpoints of a single process. Not for one block only: it also comes from torch's threads."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def unreadable(what: Path, error: BaseException) -> OutputError:
    """The error for a checkpoint, or a file of it, that cannot be read. Only of a damaged one it says to remove it."""
    error = _behind(error)
    if isinstance(error, OSError) and error.errno in NOT_ITS_FAULT:
        return OutputError(
            f"{what}: the checkpoint cannot be read now: {error.strerror}; nothing says that it is damaged: try again"
        )
    line = " ".join(str(error).split())[-200:]
    return OutputError(
        f"{what}: the checkpoint cannot be read ({line}); remove its directory to resume from an earlier one"
    )


def prune(run: Path, keep: Iterable[int]) -> None:
    """Remove all checkpoints but those of these steps."""
    for step in set(steps(run)) - set(keep):
        try:
            remove_folder(place(run, step))
        except PermissionError as error:
            # On Windows a file of it may be open, also in this process, which maps the weights that it resumed from.
            log.debug("%s stays for now: %s", place(run, step), error)
