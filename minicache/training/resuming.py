"""Finding an earlier run to resume."""

import logging
import os
from dataclasses import dataclass, replace

from minicache.errors import ConfigError, OutputError
from minicache.options.declare import flag
from minicache.options.dictionaries import flat
from minicache.options.train import MOVABLE, TrainConfig
from minicache.options.unused import why_unread
from minicache.training import checkpoints
from minicache.training.run_directory import RECORD, RunRecord, is_unused, read_record

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Begun:
    """A run that was begun before. step: of the checkpoint to resume from; None: without one it begins again."""

    record: RunRecord
    step: int | None


def find_begun(config: TrainConfig) -> Begun | None:
    """The run at --out to resume; None to begin one.

    Raises:
        OutputError: there is a run or something else at --out already. ConfigError: the run there was started with other options.
    """
    out = config.out
    if not (out / RECORD).is_file():
        if out.exists() and not is_unused(out):
            raise OutputError(f"{out}: exists already, and is no run; name another --out or remove it")
        return None
    # torchrun restarts a failed run with the same command.
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
    if not config.resume and not restarted:
        raise OutputError(f"{out}: exists already; --resume goes on with it, or name another --out")
    record = read_record(out)
    if record is None:
        raise OutputError(f"{out}: exists already, and its {RECORD} says nothing; name another --out or remove it")
    _check_same_options(as_begun(config, record), record)
    done = checkpoints.steps(out)
    log.debug("%s: resuming, checkpoints after the steps %s", out, done)
    return Begun(record, done[-1] if done else None)


def as_begun(config: TrainConfig, record: RunRecord) -> TrainConfig:
    """The config with what it leaves open as the run has it."""
    balance = record.options.get("balance") if config.balance is None else config.balance
    beta = record.options["beta"] if config.beta is None else config.beta
    return replace(config, balance=balance, beta=beta)


def _check_same_options(config: TrainConfig, record: RunRecord) -> None:
    """Raises ConfigError: an option differs from the run's, and may not change when it is resumed.

    One that the run does not read may: 0.1.0 accepted such options and kept them in run.json.
    """
    for name, value in flat(config).items():
        before = record.options.get(name)
        if name not in MOVABLE and value != before and not why_unread(config, name):
            raise ConfigError(
                f"{config.out}: {flag(name)}: this run was started with {before}, asked for {value}; a resumed run "
                "keeps its options: ask for the same, or name another --out"
            )
