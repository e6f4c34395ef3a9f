"""One run at a time in a run directory. No torch."""

import os
from pathlib import Path
from types import TracebackType

from minicache.cache.places.claims import FileClaim
from minicache.errors import RunBusy
from minicache.training.run_directory import LOCK, RECORD, is_unused


class RunLock:
    """A run directory and rank 0's hold on it, which ends with the process, however that ends."""

    def __init__(self, out: Path) -> None:
        self.out, self.is_held = out, False
        self._claim = FileClaim(out / LOCK)

    def take(self) -> bool:
        """Whether no other process is at work there. Where there is nothing to write to yet, or no run, nothing is held."""
        is_run = (self.out / RECORD).is_file() or is_unused(self.out)
        if not is_run or not os.access(self.out, os.W_OK):
            return True
        self.is_held = self._claim.take(alone=True)
        return self.is_held

    def require(self) -> None:
        """Raises RunBusy: another process is at work there."""
        if not self.take():
            raise RunBusy(
                f"{self.out}: another process is at work on this run; wait until it has ended, or name another --out"
            )

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.is_held:
            self._claim.remove()
            self.is_held = False
