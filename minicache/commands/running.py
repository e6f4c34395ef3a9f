"""Shared parts of all commands: the consoles, running a stage in as many processes as asked for, errors of one line."""

import errno
import logging
import os
import platform
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from getpass import getuser
from importlib import import_module
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import typer
from rich.console import Console

from minicache.errors import (
    CacheMismatch,
    ConfigError,
    MinicacheError,
    ProcessLost,
    in_words,
    is_lost_peer,
    said_by_network,
)
from minicache.failures import of_the_machine
from minicache.json_lines import to_json
from minicache.options.declare import flag
from minicache.options.dictionaries import flat
from minicache.processes.signals import Interruptible, Postponed
from minicache.screen.console import SafeConsole
from minicache.screen.diff import differences_table
from minicache.screen.live import Screen
from minicache.screen.results import show_error
from minicache.trackers import Silent

# Reports go to stdout, progress and errors to stderr.
out, err = SafeConsole(), SafeConsole(stderr=True)
COMPILED = "TORCHINDUCTOR_CACHE_DIR"
LONGEST_SHOWN = 60  # characters of a name in its error
log = logging.getLogger(__name__)
# Loggers that warn wherever torchao is installed, which transformers imports: of kernels for other machines, of its own code.
QUIETED = ("torchao", "torch.utils._pytree")
# Variables that torch's allocator reads, its current name first.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")


class Indented(logging.Formatter):
    """Log lines in which what follows a line break is indented: no message looks like another entry."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record).replace("\n", "\n    ")


def log_everything() -> None:
    """Log what the program does to stderr, with the time and the rank."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Indented(f"%(asctime)s %(levelname)s rank {os.environ.get('RANK', 0)} %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("minicache").setLevel(logging.DEBUG)


def run_stage(
    name: str, config: Any, nproc: int, show: Callable[[Console, Any], object] | None, device: str = "auto"
) -> Any:
    """Run a stage in `nproc` processes, show its report on rank 0, and return it.

    name: of the stage's module in stages/ and of the function in it; "module.function" if they differ. device: as --device.
    """
    if nproc > 1 and "WORLD_SIZE" not in os.environ:
        from minicache.processes.launch import launch

        raise typer.Exit(launch(nproc, sys.argv[1:]))
    _let_segments_grow()
    _compile_apart_from_others()
    for each in QUIETED:
        logging.getLogger(each).setLevel(logging.ERROR)
    # Hides the progress bars of transformers, which would disturb ours.
    os.environ.setdefault("TQDM_DISABLE", "1")
    screen_ = Screen(err)
    screen_.begin("starting", None)
    module, _, function = name.partition(".")
    with Postponed():
        from minicache.processes.world import join_world, leave_world

        stage = getattr(import_module(f"minicache.stages.{module}"), function or module)
    world = join_world(device)
    with screen_ if world.is_main else Silent() as tracker:
        if world.size > 1:
            world.agree(lambda: _settings(config))
        report = stage(config, world, tracker)
    if world.is_main and show:
        show(out, report)
    leave_world()
    return report


def _settings(config: Any) -> dict[str, Any]:
    """The options that all processes must be given alike. What lies at a place may have another one on each machine."""
    values = {flag(name): str(value) for name, value in flat(config).items()}
    return {name: value for name, value in values.items() if "/" not in value and os.sep not in value}


def _let_segments_grow() -> None:
    """Let torch's allocator grow its segments of a GPU's memory, so that batches of many sizes leave no holes between them.

    torch reads the variable when it is imported. What the user has set stays. Windows has no such segments, and in WSL2, whose
    kernel has Microsoft's name, drivers before R615 fail at the first one.
    Source: pytorch.org/docs/stable/notes/cuda.html, "Optimizing memory usage with PYTORCH_ALLOC_CONF";
    github.com/pytorch/pytorch/issues/192330.
    """
    is_windows = sys.platform == "win32" or "microsoft" in platform.release().lower()
    if not is_windows and not any(name in os.environ for name in ALLOCATOR):
        os.environ[ALLOCATOR[0]] = "expandable_segments:True"


def _compile_apart_from_others() -> None:
    """Keep torch's compiler from running what another user of this machine has put into its directory.

    It reads pickles there, and the directory has a name that everybody knows, in a directory in which everybody may write. One
    that is not this user's alone is left for one in the home directory. What the user has set stays.
    """
    if not hasattr(os, "getuid") or COMPILED in os.environ:
        return
    # as torch._inductor.runtime.cache_dir_utils names it
    with suppress(OSError, KeyError):
        info = (Path(gettempdir()) / f"torchinductor_{getuser()}").lstat()
        if info.st_uid != os.getuid() or info.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            os.environ[COMPILED] = str(Path.home() / ".cache" / "minidpo" / "torchinductor")


@contextmanager
def errors_as_one_line(interrupted: str = "nothing was written") -> Iterator[None]:
    """Turn a user's error into one red line and exit code 1, an interruption into a yellow line and exit code 130.

    A table of differing fields follows where identities differ. Any other exception is a bug and shows its traceback.

    interrupted: the text of the yellow line, unless the stage raised KeyboardInterrupt with a text of its own.
    """
    asked = Interruptible()
    try:
        with asked, _errors_of_libraries():
            yield
    except MinicacheError as error:
        log.debug("the traceback behind the error", exc_info=True)
        if isinstance(error, ProcessLost) and asked.since is not None:
            _show_interruption("another process of this run has left first; what was saved stays")
            raise typer.Exit(130) from error
        if not is_first() or (isinstance(error, ProcessLost) and "WORLD_SIZE" in os.environ):
            # Rank 0 reports an error that all ranks have, and whoever has failed first its own; the launcher ends the other ranks
            # while they sleep here.
            time.sleep(3)
        show_error(err, str(error))
        if isinstance(error, CacheMismatch) and error.differences:
            err.print(differences_table(error.differences, error.sides))
        raise typer.Exit(1) from error
    except KeyboardInterrupt as interruption:
        _show_interruption(str(interruption) or interrupted)
        raise typer.Exit(130) from None


def is_first() -> bool:
    """Whether this is the process that speaks for all, so far as its variables say."""
    return os.environ.get("RANK", "0") == "0"


def note(lines: Iterable[str]) -> None:
    """Show lines before a command begins, once for all its processes."""
    if is_first():
        for line in lines:
            err.print(f"  {line}", highlight=False, soft_wrap=True)


def _show_interruption(text: str) -> None:
    """All ranks were interrupted; one of them reports it."""
    if is_first():
        err.print(f"interrupted; {text}", style="yellow")


@contextmanager
def _errors_of_libraries() -> Iterator[None]:
    """Turn network errors into ProcessLost, full memory into FullMemory, names that no file has into ConfigError, from anywhere."""
    try:
        yield
    except Exception as error:
        full = in_words(error)
        if full and full is not error:
            raise full from error
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            name = str(error.filename)
            shown = name if len(name) <= LONGEST_SHOWN else f"{name[:LONGEST_SHOWN]}…"
            raise ConfigError(f"{shown}: a name longer than the file system allows; most allow 255 bytes") from error
        if isinstance(error, ValueError) and "embedded null" in str(error):
            raise ConfigError(
                "a name holds U+0000, which no file's name does; look for \\u0000 in what the command reads"
            ) from error
        if isinstance(error, OSError) and (line := of_the_machine(error)):
            raise line from error
        if isinstance(error, MinicacheError) or not (isinstance(error, RuntimeError) and is_lost_peer(error)):
            raise
        raise ProcessLost(
            f"process {os.environ.get('RANK', 0)}: another process of this run has ended or cannot be reached; what was saved "
            f"stays, and the same command goes on with it (train: with --resume). The network said: {said_by_network(error)}"
        ) from error


def print_json(console: Console, report: Any) -> None:
    """Print a report as JSON: dataclasses as objects, other values as text."""

    def plain(value: Any) -> Any:
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    # where a character could not be printed, the escapes of JSON say which one it is
    ascii_only = not (getattr(console.file, "encoding", None) or "utf-8").lower().startswith("utf")
    console.out(to_json(report, indent=2, ensure_ascii=ascii_only, default=plain), highlight=False)
