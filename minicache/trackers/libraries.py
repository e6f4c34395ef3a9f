"""The tracking libraries: a class each, and TRACKERS, the one list of their names. A library is imported when its run starts."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from minicache.disk import read_json, write_json
from minicache.errors import ConfigError, OutputError
from minicache.json_lines import to_json
from minicache.text import one_line
from minicache.trackers.base import Silent, points_before

LONGEST_ID = 256


@dataclass(frozen=True)
class RunName:
    """What a tracking library needs to know of a run before it starts.

    directory: the run directory, where a library's own files and `trackers.json` go. project, name: how the run is listed.
    resumed_at: the next step of a run that goes on from a checkpoint; None for a new run.
    """

    directory: Path
    project: str
    name: str
    resumed_at: int | None = None


class Library(Silent):
    """The base of the libraries below. It keeps the library's own id for the run, and knows which points the library lacks.

    package: what must be installed. extra: minicache's that installs it, None if there is none. help: the product's name.
    advice: what to do if it does not start. name: its key in TRACKERS.

    A kill rarely comes just after a checkpoint: either the library has points that the resumed run computes again, or it lost
    points in a buffer that are in metrics.jsonl. The former are not sent again, the latter are sent at the start.
    """

    package: ClassVar[str]
    extra: ClassVar[str | None] = None
    help: ClassVar[str]
    advice: ClassVar[str]

    def __init__(self, name: str, run: RunName) -> None:
        self.name, self.run = name, run
        self.file = run.directory / "trackers.json"
        self.error: BaseException | None = None
        self.next_step = 0

    def write(self, step: int, metrics: dict[str, float]) -> None:
        raise NotImplementedError

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if step >= self.next_step:
            self.write(step, metrics)

    def catch_up(self, next_step: int) -> None:
        """Send the points of metrics.jsonl that the library lacks. Its next point is that of `next_step`."""
        self.next_step = next_step
        if self.run.resumed_at is not None:
            for step, metrics in points_before(self.run.resumed_at, self.run.directory / "metrics.jsonl"):
                self.log(step, metrics)

    def known_id(self) -> str | None:
        """The library's id for a run that goes on; None for a new run. Raises ConfigError: trackers.json holds something else."""
        own: Any = self._ids().get(self.name) if self.run.resumed_at is not None else None
        if own is not None and not _is_id(own):
            raise ConfigError(
                f"{self.file}: {self.name}: expected the id of a run, got {str(own)[:40]!r}; remove the file"
            )
        return None if own is None else str(own)

    def remember_id(self, own_id: str) -> None:
        """Keep the library's id for this run in trackers.json, for the time the run goes on."""
        write_json(self.file, {**self._ids(), self.name: own_id})

    def _ids(self) -> dict[str, str]:
        try:
            return read_json(self.file)
        except OutputError as error:
            raise ConfigError(f"{error}; remove it and the trackers begin new runs") from error

    def fail(self, error: BaseException) -> None:
        self.error = error


def _is_id(value: object) -> bool:
    """Whether a value can be the id of a run, which libraries put into addresses and names of files."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_ID and value.isprintable() and not {*value} & {*"/\\"}


class Wandb(Library):
    """Weights & Biases. WANDB_* variables and a `wandb init` folder have the last word."""

    package = extra = "wandb"
    help = "Weights & Biases"
    advice = "`wandb login` logs in, WANDB_MODE=offline needs no network"

    def start(self, title: str, facts: dict[str, Any]) -> None:
        import wandb

        # from variables and settings files
        given = wandb.setup().settings
        if given.mode in ("online", "shared", "run") and not wandb.login(prompt=False):
            raise ConnectionError("nobody is logged in")
        known, settings = given.run_id or self.known_id(), wandb.Settings()
        if "WANDB_CONSOLE" not in os.environ:
            # else it records every frame of the progress display
            settings.console = "off"
        if "WANDB_FINISH_TIMEOUT" not in os.environ:
            # seconds; without a network the end would wait for hours
            settings.finish_timeout = 300
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
        self.remember_id(self.writer.id)
        # offline, the run's earlier points are in another file, which only the server puts together with this one
        unseen = known is not None and self.writer.offline
        self.catch_up((self.run.resumed_at or 0) if unseen else self.writer.step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(metrics, step=step)

    def close(self) -> None:
        # wandb's own numbers
        failed = 255 if isinstance(self.error, KeyboardInterrupt) else 1
        self.writer.finish(exit_code=failed if self.error else 0)


class SwanLab(Library):
    """SwanLab. SWANLAB_* variables and its settings files have the last word.

    It skips points that it has, also points of an earlier file of the run when both are synchronized: so it is sent all of them.
    """

    package = extra = "swanlab"
    help = "SwanLab"
    advice = "`swanlab login` logs in, SWANLAB_MODE=offline needs no network"

    def start(self, title: str, facts: dict[str, Any]) -> None:
        import swanlab

        given = swanlab.Settings()
        # a question would wait behind the progress display
        own: dict[str, Any] = {"interactive": False}
        if "SWANLAB_TERMINAL_PROXY_TYPE" not in os.environ:
            # else it records every frame of the progress display
            own["terminal"] = {"proxy_type": "none"}
        known, on_interrupt = given.run.id or self.known_id(), signal.getsignal(signal.SIGINT)
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
            # SwanLab's handler ends the run at once; the training's ends it after saving
            signal.signal(signal.SIGINT, on_interrupt)
        self.remember_id(self.writer.id)
        self.catch_up(0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(metrics, step=step)

    def close(self) -> None:
        if self.error is None:
            self.writer.finish()
        else:
            state = "aborted" if isinstance(self.error, KeyboardInterrupt) else "crashed"
            self.writer.finish(state=state, error=one_line(self.error))


class TensorBoard(Library):
    """Event files in the run directory. The writer of a resumed run voids the points at and after its first step."""

    package = extra = "tensorboard"
    help = "TensorBoard"
    advice = "metrics.jsonl is written without it too"

    def start(self, title: str, facts: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        directory = self.run.directory / "tensorboard"
        known = directory.exists()
        self.writer = SummaryWriter(str(directory), purge_step=self.run.resumed_at if known else None)
        options = to_json(facts, indent=4)
        # indented, it is code in Markdown
        as_code = "    " + options.replace("\n", "\n    ")
        self.writer.add_text("config", as_code, self.run.resumed_at or 0)
        self.catch_up((self.run.resumed_at or 0) if known else 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        # else a kill loses two minutes, and a resumed run does not send those that come before its checkpoint
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Trackio(Library):
    """Trackio. It finds runs by name, so the name gets a random ending. TRACKIO_* variables say where runs are stored."""

    package = extra = "trackio"
    help = "Trackio"
    advice = "without TRACKIO_SPACE_ID and TRACKIO_SERVER_URL it needs no network"

    def start(self, title: str, facts: dict[str, Any]) -> None:
        import trackio

        name = self.known_id() or f"{self.run.name}-{os.urandom(3).hex()}"
        self.writer = trackio.init(self.run.project, name, config=facts, resume="allow", embed=False)
        self.remember_id(name)
        self.catch_up(self.writer._next_step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self.writer.log(metrics, step=step)

    def close(self) -> None:
        import trackio

        # the run's own finish() leaves it to be finished again, on stdout, when the process ends
        trackio.finish()


TRACKERS: dict[str, type[Library]] = {
    "wandb": Wandb,
    "swanlab": SwanLab,
    "tensorboard": TensorBoard,
    "trackio": Trackio,
}
