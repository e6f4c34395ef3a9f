"""A run directory: `run.json` with every option as used, and where its model lies. No torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache.disk import read_json, write_json
from minicache.errors import OutputError

FOUND = {"started_from": str, "stored_dtype": str, "steps": int, "token_budget": int, "outcome": dict}


def run_facts(run: str | Path) -> dict[str, Any]:
    """What run.json says of a run directory; nothing for anything else.

    Raises:
        OutputError: it cannot be read, or is not what `train` writes.
    """
    file = Path(run) / "run.json"
    facts = read_json(file)
    for name, kind in FOUND.items():
        if name in facts and type(facts[name]) is not kind:
            raise OutputError(f"{file}: {name!r} is {str(facts[name])[:40]!r}, which `train` never writes there")
    return facts


def run_behind(policy: str) -> dict[str, Any]:
    """What run.json says of the run that a policy is of: the run itself, its model/ or one of its checkpoints."""
    path = Path(policy).absolute()
    places = [path, path.parent] if path.name == "model" else [path]
    above = [place.parents[1] for place in places if place.parent.name == "checkpoints"]
    return next(filter(None, map(run_facts, [*places, *above])), {})


def write_facts(run: Path, facts: dict[str, Any]) -> None:
    """Raises OutputError: the disk is full or cannot be written; what was there stays."""
    for leftover in _drafts(run):  # of calls that were killed
        leftover.unlink(missing_ok=True)
    write_json(run / "run.json", facts)


def is_unused(run: Path) -> bool:
    """Whether it is an empty directory, or was made by a call that was killed before it could write run.json."""
    return run.is_dir() and set(run.iterdir()) <= set(_drafts(run))


def _drafts(run: Path) -> list[Path]:
    return list(run.glob(".run.json.*.draft"))


def policy_source(policy: str) -> str:
    """The model of a run directory or of one of its checkpoints, or the name as it is.

    Raises:
        OutputError: a run directory without a model yet.
    """
    path = Path(policy)
    model = path / "model"
    if any((model / name).is_file() for name in ("config.json", "adapter_config.json")):
        return str(model)
    if (path / "run.json").is_file():
        raise OutputError(
            f"{policy}: this run has no model yet; go on with it by `minidpo train --resume`, or name one of its checkpoints/"
        )
    return policy


def starts_at_ln_2(facts: Mapping[str, Any]) -> bool:
    """Whether a run's loss is ln 2 where policy and reference agree: the sigmoid loss with nothing beside it."""
    return facts.get("loss") == "sigmoid" and not facts.get("sft_weight") and not facts.get("wpo")
