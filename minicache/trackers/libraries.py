"""The tracking libraries: each is imported when its run starts, and hears `start`, `log` and how it ended."""

import json
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicache.errors import ConfigError
from minicache.trackers.base import Silent, Tracker, points_before


@dataclass(frozen=True)
class RunName:
    """What a tracking library is told about a run before it starts.

    directory: the run directory, where a library's own files and `trackers.json` go; project, name: how the run is listed.
    resumed_at: the first step that comes now, where a run goes on from a checkpoint; None where it is new.
    """

    directory: Path
    project: str
    name: str
    resumed_at: int | None = None


class _Library(Silent):
    """The base of the libraries below: the library's own id for the run, which points it lacks, how the run ended.

    A kill and a checkpoint rarely fall together: a library has points that a resumed run computes again, or it lost some in a
    buffer that were in metrics.jsonl already. The former are not told twice, the latter are told at the start.
    """

    def __init__(self, run: RunName) -> None:
        self.run = run
        self.file = run.directory / "trackers.json"
        self.error: BaseException | None = None
        self.next_step = 0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.next_step:
            self.write(step, metrics)

    def catch_up(self, next_step: int) -> None:
        """Tell what metrics.jsonl has and the library, whose next point is that of `next_step`, has not."""
        self.next_step = next_step
        if self.run.resumed_at is not None:
            for step, metrics in points_before(self.run.resumed_at, self.run.directory / "metrics.jsonl"):
                self.log(step, metrics)

    def known_id(self, library: str) -> str | None:
        """The id under which a run that goes on is known to the library."""
        return self._ids().get(library) if self.run.resumed_at is not None else None

    def remember_id(self, library: str, own_id: str) -> None:
        self.file.write_text(json.dumps({**self._ids(), library: own_id}, indent=2) + "\n", encoding="utf-8")

    def _ids(self) -> dict[str, str]:
        try:
            return json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(
                f"{self.file}: expected the runs' ids as JSON, got something else; remove it and the trackers begin new runs"
            ) from error

    def fail(self, error: BaseException) -> None:
        self.error = error


class Wandb(_Library):
    """Weights & Biases. WANDB_* variables and a `wandb init` folder have the last word."""

    def start(self, title: str, facts: dict[str, Any]) -> None:
        import wandb

        given = wandb.setup().settings  # from variables and settings files
        if given.mode in ("online", "shared", "run") and not wandb.login(prompt=False):
            raise ConnectionError("nobody is logged in")
        known, settings = given.run_id or self.known_id("wandb"), wandb.Settings()
        if "WANDB_CONSOLE" not in os.environ:
            settings.console = "off"  # else it records every frame of the progress display
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            settings.finish_timeout = 300  # seconds; with the network gone the end would wait for hours
        self.writer = wandb.init(
            project=given.project or self.run.project,
            name=given.run_name or self.run.name,
            dir=None if "WANDB_DIR" in os.environ else self.run.directory,
            id=known,
            resume=given.resume or ("allow" if self.run.resumed_at is not None else None),
            config=facts,
            reinit="create_new",
            settings=settings,
        )
        self.remember_id("wandb", self.writer.id)
        unseen = known is not None and self.writer.offline  # the server knows what the file of an earlier life holds
        self.catch_up((self.run.resumed_at or 0) if unseen else self.writer.step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(metrics, step=step)

    def close(self) -> None:
        failed = 255 if isinstance(self.error, KeyboardInterrupt) else 1  # wandb's own numbers
        self.writer.finish(exit_code=failed if self.error else 0)


class SwanLab(_Library):
    """SwanLab. SWANLAB_* variables and its settings files have the last word.

    It skips points that it has, also those of an earlier life's file when both are synchronized: so it is told all of them.
    """

    def start(self, title: str, facts: dict[str, Any]) -> None:
        import swanlab

        given = swanlab.Settings()
        own: dict[str, Any] = {"interactive": False}  # a question would wait behind the progress display
        if "SWANLAB_TERMINAL_PROXY_TYPE" not in os.environ:
            own["terminal"] = {"proxy_type": "none"}  # else it records every frame of the progress display
        known, on_interrupt = given.run.id or self.known_id("swanlab"), signal.getsignal(signal.SIGINT)
        self.writer = swanlab.init(
            project=given.project.name or self.run.project,
            name=given.experiment.name or self.run.name,
            log_dir=str(self.run.directory / "swanlog" if given.log_dir == Path.cwd() / "swanlog" else given.log_dir),
            id=known,
            resume="allow" if known else None,
            config=facts,
            settings=swanlab.Settings(**own),
        )
        if signal.getsignal(signal.SIGINT) is not on_interrupt:
            signal.signal(
                signal.SIGINT, on_interrupt
            )  # its own ends the run at once; the training ends it, when it has saved
        self.remember_id("swanlab", self.writer.id)
        self.catch_up(0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(metrics, step=step)

    def close(self) -> None:
        if self.error is None:
            self.writer.finish()
        else:
            state = "aborted" if isinstance(self.error, KeyboardInterrupt) else "crashed"
            self.writer.finish(state=state, error=one_line(self.error))


class TensorBoard(_Library):
    """Event files in the run directory; a resumed run's writer voids what lies at or after its first step."""

    def start(self, title: str, facts: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = self.run.directory / "tensorboard"
        known = directory.exists()
        self.writer = SummaryWriter(str(directory), purge_step=self.run.resumed_at if known else None)
        options = json.dumps(facts, indent=4, ensure_ascii=False)
        as_code = "    " + options.replace("\n", "\n    ")  # Markdown's
        self.writer.add_text("config", as_code, self.run.resumed_at or 0)
        self.catch_up((self.run.resumed_at or 0) if known else 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # else a kill loses two minutes, which a later checkpoint does not repeat

    def close(self) -> None:
        self.writer.close()


class Trackio(_Library):
    """Trackio. Its runs are found by name, so the name gets an ending of its own; TRACKIO_* variables say where they go."""

    def start(self, title: str, facts: dict[str, Any]) -> None:
        import trackio

        name = self.known_id("trackio") or f"{self.run.name}-{secrets.token_hex(3)}"
        self.writer = trackio.init(self.run.project, name, config=facts, resume="allow", embed=False)
        self.remember_id("trackio", name)
        self.catch_up(self.writer._next_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(metrics, step=step)

    def close(self) -> None:
        import trackio

        trackio.finish()  # the run's own finish() leaves it to be finished again, on stdout, when the process ends


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


TRACKERS: dict[str, Callable[[RunName], Tracker]] = {
    "wandb": Wandb,
    "swanlab": SwanLab,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}
