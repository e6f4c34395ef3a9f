"""A run directory: `run.json` with every option and result of a run, and the place of its model. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_type_hints

from minicache.disk import read_json, write_json
from minicache.drafts import drafts
from minicache.errors import ConfigError, ModelError, OutputError
from minicache.options.dictionaries import flat, require_types
from minicache.options.train import TrainConfig
from minicache.options.where import Where, split_weight
from minicache.strict import read_as
from minicache.text import listed
from minicache.training.progress import Outcome

RECORD, LOCK, CHECKPOINTS = "run.json", ".lock", "checkpoints"
NEEDED = ("ref_cache", "out")
# Options that 0.1.0 did not have: they are written only where they say something.
LATER = (
    *("columns", "ignore_fields", "row_pairs", "base_4bit", "base_8bit"),
    *("lora_rslora", "lora_dora", "lora_dropout", "continue_adapter", "weights", "selective_checkpointing"),
    *("balance", "decay_norms"),
)
# The defaults of the options. A record that lacks an option is of an earlier version, which behaved as by the default.
_PLAIN = TrainConfig(ref_cache="cache", out=Path("run")).settled()
DEFAULTS = {name: value for name, value in flat(_PLAIN).items() if name not in NEEDED}


@dataclass(frozen=True)
class RunRecord:
    """The content of run.json.

    options: value of every option by name, and entries that this version does not know. started_from: the model that training
    started from; stored_dtype: the precision in which its weights are stored. handshake: the largest difference that the
    handshake found, nats per token. steps, pairs, held_out: optimizer steps of the whole run, pairs of an epoch, pairs to
    validate on. processes, device, layout_used, token_budget: what the machine decided. outcome: of a finished run. failed: why
    a sweep recorded the run as failed. date, template_args: what the chat template was given, as in the cache's identity; None
    where there is nothing. quantization: in which the base was held, as in the cache's identity; None for weights as stored.
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
    date: str | None = None
    template_args: str | None = None
    quantization: str | None = None

    @property
    def ref_cache(self) -> Where:
        """The cache that the run was trained on; of several the first: all of them hold one reference."""
        named = self.options["ref_cache"]
        place, _ = split_weight(named if isinstance(named, str) else named[0])
        return place

    @property
    def flat(self) -> dict[str, Any]:
        """The record as the file holds it."""
        found = {name: value for name, value in asdict(self).items() if name != "options" and value is not None}
        # 0.1.0 did not have it
        progress = (found.get("outcome") or {}).get("progress", {})
        for name in ("held_out", "stopped"):
            if progress.get(name) is None:
                progress.pop(name, None)
        options = {name: value for name, value in self.options.items() if name not in LATER or value != DEFAULTS[name]}
        return {**options, **found}


FOUND = {name: hint for name, hint in get_type_hints(RunRecord).items() if name != "options"}


def run_facts(run: str | Path) -> dict[str, Any]:
    """The entries of run.json as they are, perhaps not all of them; {} where there is no run.json.

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
    """The record of a run directory; None where there is no run.json.

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
        if "ref_cache" not in options:
            raise ValueError("ref_cache: missing")
        options |= {name: value for name, value in DEFAULTS.items() if name not in options}
        record: RunRecord = read_as(RunRecord, {"options": options, **found}, RECORD, skip_unknown=True)
        _require_shown(record)
    except (ConfigError, ValueError, TypeError) as error:
        model = f"; its model is in {run}/model" if "outcome" in facts else ""
        raise OutputError(f"{file}: not as `train` writes it ({error}){model}") from error
    return record


def _require_shown(record: RunRecord) -> None:
    """Raises ValueError: the metrics of a finished run lack one that is shown of every run."""
    progress = asdict(record.outcome.progress) if record.outcome else {}
    for name, needed in (("first", {"loss"}), ("last", {"loss"}), ("validation", {"loss", "rewards/accuracy", "kl"})):
        found = progress.get(name)
        if found is not None and (missing := sorted(needed - found.keys())):
            raise ValueError(f"outcome.progress.{name}: expected {listed(missing)} in it")


def write_record(run: Path, record: RunRecord) -> None:
    """Write run.json. Raises OutputError: the disk is full or cannot be written; the old run.json stays."""
    # Left by calls that were killed: only one process writes it.
    for leftover in drafts(run, RECORD):
        leftover.unlink(missing_ok=True)
    write_json(run / RECORD, record.flat)


def run_of(policy: str) -> RunRecord | None:
    """The record of the run whose result a policy is: a run directory, or its model/; None for others."""
    return next(filter(None, map(read_record, _places(policy))), None)


def run_behind(policy: str) -> RunRecord | None:
    """As `run_of`, also of one of the run's checkpoints."""
    above = [place.parents[1] for place in _places(policy) if place.parent.name == CHECKPOINTS]
    return run_of(policy) or next(filter(None, map(read_record, above)), None)


def _places(policy: str) -> list[Path]:
    """Where the record lies, if the policy is a run's, or the model of a checkpoint."""
    path = Path(policy).absolute()
    return [path, path.parent] if path.name == "model" else [path]


def is_unused(run: Path) -> bool:
    """Whether a directory is empty, or was made by a call that was killed before it wrote run.json."""
    return run.is_dir() and set(run.iterdir()) <= {*drafts(run, RECORD), run / LOCK}


def holds_model(run: Path) -> bool:
    """Whether there is a model in the directory of a run or a checkpoint."""
    return any((run / "model" / name).is_file() for name in ("config.json", "adapter_config.json"))


def policy_source(policy: str) -> str:
    """The model directory of a run or a checkpoint; any other name as it is.

    Raises:
        OutputError: a run directory without a model yet.
    """
    path = Path(policy)
    if holds_model(path):
        return str(path / "model")
    if (path / RECORD).is_file():
        raise OutputError(
            f"{policy}: this run has no model yet; wait for its end, go on with it by `minidpo train --resume` if it has ended, "
            "or name one of its checkpoints/"
        )
    if path.parent.name == CHECKPOINTS and (path.parents[1] / RECORD).is_file() and not path.exists():
        there = sorted(each.name for each in path.parent.glob("step-*"))
        raise OutputError(f"{policy}: no such checkpoint, or no longer (--keep-last); there {_are(there)}")
    return policy


def _are(names: list[str]) -> str:
    return f"{'are' if len(names) > 1 else 'is'} {listed(names)}" if names else "are none"


@contextmanager
def reading(policy: str) -> Iterator[str]:
    """The model directory of a policy, as `policy_source`, for a block that reads it while its run may be under way.

    Raises:
        ModelError: the block failed, as the run has removed or replaced the directory meanwhile. Any error of the block otherwise.
    """
    before = {str(place): _stamp(place) for place in (Path(policy) / "model", Path(policy))}
    source = policy_source(policy)
    try:
        yield source
    except Exception as error:
        # a disk that refuses what is made of the policy has nothing to do with it
        if isinstance(error, OutputError) or before.get(source) == _stamp(Path(source)):
            raise
        is_checkpoint = Path(policy).absolute().parent.name == CHECKPOINTS
        what = "removed this checkpoint (--keep-last)" if is_checkpoint else "replaced its model"
        advice = "name a newer one, or copy one first" if is_checkpoint else "run the same command again"
        raise ModelError(f"{policy}: its run has {what} while it was read; {advice}") from error


def _stamp(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another one at the same place; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def final_beta(beta: float, beta_end: float | None) -> float:
    """The beta that a run ends at. All its policies are validated with it: losses at different betas cannot be compared."""
    return beta if beta_end is None else beta_end
