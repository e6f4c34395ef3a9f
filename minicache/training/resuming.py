"""Where a run goes on."""

import os
from dataclasses import dataclass

from minicache.errors import ConfigError, OutputError
from minicache.options.declare import flag as option
from minicache.options.dictionaries import flat
from minicache.options.train import MOVABLE, TrainConfig
from minicache.training import checkpoints
from minicache.training.run_directory import RECORD, RunRecord, is_unused, read_record


@dataclass(frozen=True)
class Begun:
    """A run that was begun before. step: of the checkpoint to go on from; None: there is none, it begins again."""

    record: RunRecord
    step: int | None


def find_begun(config: TrainConfig) -> Begun | None:
    """The run at --out to go on with; None to begin one.

    Raises:
        OutputError: there is a run or something else at --out already. ConfigError: the run there was started with other options.
    """
    out = config.out
    if not (out / RECORD).is_file():
        if out.exists() and not is_unused(out):
            raise OutputError(f"{out}: exists already, and is no run; name another --out or remove it")
        return None
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, with the same command
    if not config.resume and not restarted:
        raise OutputError(f"{out}: exists already; --resume goes on with it, or name another --out")
    record = read_record(out)
    if record is None:
        raise OutputError(f"{out}: exists already, and its {RECORD} says nothing; name another --out or remove it")
    _check_same_options(config, record)
    done = checkpoints.steps(out)
    return Begun(record, done[-1] if done else None)


def _check_same_options(config: TrainConfig, record: RunRecord) -> None:
    for name, value in flat(config).items():
        before = record.options.get(name)
        if name not in MOVABLE and value != before:
            raise ConfigError(
                f"{config.out}: {option(name)}: this run was started with {before}, asked for {value}; a resumed run "
                "keeps its options: ask for the same, or name another --out"
            )
