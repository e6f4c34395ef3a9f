"""Options that the user gives and that nothing would read: they are refused by name."""

from collections.abc import Callable, Collection, Mapping

from minicache.errors import ConfigError
from minicache.options.catalog import DIVERGENCES, LOSSES, SCHEDULES
from minicache.options.declare import flag, options_of
from minicache.options.objective import parse_loss
from minicache.options.train import LossOptions, TrainConfig

FLAGS = {item.name: declared.shown or flag(item.name) for item, declared in options_of(TrainConfig)}
DEFAULTS = {item.name: item.default for item, _ in options_of(TrainConfig)}
OF_SOME_LOSSES = sorted({name for entry in LOSSES.values() for name in entry.reads})


def _read_by_loss(config: TrainConfig, name: str) -> str | None:
    losses = parse_loss(config.loss)
    if not any(name in LOSSES[each].reads for each in losses):
        readers = ", ".join(each for each, entry in LOSSES.items() if name in entry.reads)
        return f"--loss {config.loss} does not read it; expected {readers}"
    divergence = config.loss_options.f_divergence
    if name == "f_alpha" and name not in DIVERGENCES[divergence].reads:
        return f"--f-divergence {divergence} does not read it; expected alpha"
    return None


def _read_by_schedule(config: TrainConfig, name: str) -> str | None:
    if name in SCHEDULES[config.schedule].reads:
        return None
    readers = ", ".join(each for each, entry in SCHEDULES.items() if name in entry.reads)
    return f"--schedule {config.schedule} does not read it; expected {readers}"


def _read_with_data(config: TrainConfig, name: str) -> str | None:
    return None if config.data else "is about the rows of --data; expected both, got it alone"


def _read_without_lora(config: TrainConfig, name: str) -> str | None:
    given = "--lora-rank" if config.lora.lora_rank else "--continue-adapter"
    return f"adapters are saved as they were trained; expected it without {given}" if config.lora.wanted else None


def _read_without_init_from(config: TrainConfig, name: str) -> str | None:
    return "the run starts from --init-from; expected one of the two" if config.init_from else None


def _read_with_decay(config: TrainConfig, name: str) -> str | None:
    return None if config.weight_decay else "is about --weight-decay; expected both, got it alone"


# Option -> a function that returns why a run would not read it, or None.
RULES: Mapping[str, Callable[[TrainConfig, str], str | None]] = {
    **dict.fromkeys((item.name for item, _ in options_of(LossOptions) if item.name in OF_SOME_LOSSES), _read_by_loss),
    "min_lr": _read_by_schedule,
    "decay_norms": _read_with_decay,
    **dict.fromkeys(("format", "columns", "ignore_fields", "row_pairs"), _read_with_data),
    "save_dtype": _read_without_lora,
    "model": _read_without_init_from,
}


def why_unread(config: TrainConfig, name: str) -> str | None:
    """Why a run with this config would not read the option with this name; None if it would."""
    return RULES[name](config, name) if name in RULES else None


def unread(config: TrainConfig, names: Collection[str]) -> list[str]:
    """A line for each of these options of a recipe that a run with this config would not read."""
    reasons = ((name, why_unread(config, name)) for name in names)
    return [f"{FLAGS[name]} of the recipe is not used: {why.partition(';')[0]}" for name, why in reasons if why]


def require_read(config: TrainConfig, given: Collection[str]) -> None:
    """Check that a run reads each given option that differs from its default.

    given: names of the options on the command line. Those in a run.json of an earlier release are not checked, so that it resumes.

    Raises:
        ConfigError: an option would not be read.
    """
    values = {item.name: None for item, _ in options_of(TrainConfig)}
    for group in (config, config.loss_options, config.lora):
        values |= {name: getattr(group, name) for name in values if hasattr(group, name)}
    for name in given:
        if values.get(name) != DEFAULTS.get(name) and (why := why_unread(config, name)):
            raise ConfigError(f"{FLAGS[name]}: {why}, or leave {FLAGS[name]} out")
