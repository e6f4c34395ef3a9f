"""A run directory: `run.json` with every option as used, and where its model lies. No torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from minicache.disk import read_json, write_json
from minicache.errors import ConfigError, OutputError
from minicache.options.dictionaries import flat, require_types
from minicache.options.train import TrainConfig
from minicache.strict import read_as
from minicache.training.progress import Outcome

RECORD, LOCK = "run.json", ".lock"
NEEDED = ("ref_cache", "out")
# Of the options; one that a run's record lacks is younger than the run, which was made as by its default.
DEFAULTS = {name: value for name, value in flat(TrainConfig("cache", Path("run"))).items() if name not in NEEDED}


@dataclass(frozen=True)
class RunRecord:
    """What run.json says of a run.

    options: all of them as used, by name; entries that this version does not know are kept there too. started_from: the model.
    stored_dtype: the precision its weights were stored in. handshake: the largest difference it found, nats a token. steps, pairs,
    held_out: optimizer steps of the whole run, pairs of an epoch, pairs validated on. processes, device, layout_used,
    token_budget: what followed from the machine. outcome: of a finished run. failed: why a sweep gave it up.
    """

    options: dict[str, Any]
    started_from: str
    stored_dtype: str
    handshake: float
    steps: int
    pairs: int
    held_out: int
    processes: int
    device: str
    layout_used: str
    token_budget: int
    outcome: Outcome | None = None
    failed: str | None = None

    @property
    def flat(self) -> dict[str, Any]:
        """As the file holds it."""
        found = {name: value for name, value in asdict(self).items() if name != "options" and value is not None}
        return {**self.options, **found}


FOUND = {name: hint for name, hint in get_type_hints(RunRecord).items() if name != "options"}


def run_facts(run: str | Path) -> dict[str, Any]:
    """run.json of a run directory as it is, which may lack entries; nothing for anything else.

    Raises:
        OutputError: it cannot be read, or an entry is not what `train` writes.
    """
    file = Path(run) / RECORD
    facts = read_json(file)
    try:
        for name in FOUND.keys() & facts.keys():
            read_as(FOUND[name], facts[name], name, skip_unknown=True)
    except (ValueError, TypeError) as error:
        raise OutputError(f"{file}: {error}; not as `train` writes it") from error
    return facts


def read_record(run: str | Path) -> RunRecord | None:
    """What run.json says of a run directory; None for anything else.

    Raises:
        OutputError: it cannot be read, or is not what `train` writes.
    """
    file = Path(run) / RECORD
    facts = read_json(file)
    if not facts:
        return None
    options = {name: value for name, value in facts.items() if name not in FOUND}
    found = {name: value for name, value in facts.items() if name in FOUND}
    try:
        require_types(TrainConfig, options)
        options |= {name: value for name, value in DEFAULTS.items() if name not in options}
        return read_as(RunRecord, {"options": options, **found}, RECORD, skip_unknown=True)
    except (ConfigError, ValueError, TypeError) as error:
        model = f"; its model is in {run}/model" if "outcome" in facts else ""
        raise OutputError(f"{file}: not as `train` writes it ({error}){model}") from error


def write_record(run: Path, record: RunRecord) -> None:
    """Raises OutputError: the disk is full or cannot be written; what was there stays."""
    for leftover in _drafts(run):  # of calls that were killed
        leftover.unlink(missing_ok=True)
    write_json(run / RECORD, record.flat)


def run_behind(policy: str) -> RunRecord | None:
    """The run that a policy is of: the run directory itself, its model/ or one of its checkpoints."""
    path = Path(policy).absolute()
    places = [path, path.parent] if path.name == "model" else [path]
    above = [place.parents[1] for place in places if place.parent.name == "checkpoints"]
    return next(filter(None, map(read_record, [*places, *above])), None)


def is_unused(run: Path) -> bool:
    """Whether it is an empty directory, or was made by a call that was killed before it could write run.json."""
    return run.is_dir() and set(run.iterdir()) <= {*_drafts(run), run / LOCK}


def _drafts(run: Path) -> list[Path]:
    return list(run.glob(f".{RECORD}.*.draft"))


def policy_source(policy: str) -> str:
    """The model of a run directory or of one of its checkpoints, or the name as it is.

    Raises:
        OutputError: a run directory without a model yet.
    """
    path = Path(policy)
    model = path / "model"
    if any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(model)
    if (path / RECORD).is_file():
        raise OutputError(
            f"{policy}: this run has no model yet; go on with it by `minidpo train --resume`, or name one of its checkpoints/"
        )
    return policy


def final_beta(beta: float, beta_end: float | None) -> float:
    """The beta that a run ends at, by which all its policies are judged: losses at one beta can be compared."""
    return beta if beta_end is None else beta_end
