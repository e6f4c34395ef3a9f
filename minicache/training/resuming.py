"""Where a run goes on."""

import os

from minicache.errors import ConfigError, OutputError
from minicache.options.declare import flag as option
from minicache.options.dictionaries import flat
from minicache.options.train import MOVABLE, TrainConfig
from minicache.training import checkpoints
from minicache.training.run_directory import is_unused, run_facts

# --- before anything is loaded ---


def resume_at(config: TrainConfig) -> int | None:
    """The step of the checkpoint to go on from; None to begin.

    Raises:
        OutputError: there is a run or something else at --out already. ConfigError: the run there was started with other options.
    """
    facts = run_facts(config.out)
    if not facts and config.out.exists() and not is_unused(config.out):
        raise OutputError(f"{config.out}: exists already, and is no run; name another --out or remove it")
    if not facts:
        return None
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0  # by torchrun, with the same command
    if not config.resume and not restarted:
        raise OutputError(f"{config.out}: exists already; --resume goes on with it, or name another --out")
    for name, value in flat(config).items():
        if name not in MOVABLE and value != facts.get(name):
            raise ConfigError(
                f"{config.out}: {option(name)}: this run was started with {facts.get(name)}, asked for {value}; a resumed run "
                "keeps its options: ask for the same, or name another --out"
            )
    done = checkpoints.steps(config.out)
    return done[-1] if done else None
