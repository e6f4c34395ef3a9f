"""A run directory: `run.json` with every option as used, and where its model lies. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache.disk import written_whole
from minicache.errors import OutputError


def run_facts(run: str | Path) -> dict[str, Any]:
    """What run.json says of a run directory; nothing for anything else."""
    return read_json(Path(run) / "run.json")


def read_json(file: Path) -> dict[str, Any]:
    """What a file says that this program wrote; nothing where there is none. Raises OutputError: it cannot be read."""
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise OutputError(f"{file}: cannot be read: {error}") from error


def run_behind(policy: str) -> dict[str, Any]:
    """What run.json says of the run that a policy is of: the run itself, its model/ or one of its checkpoints."""
    path = Path(policy).absolute()
    places = [path, path.parent] if path.name == "model" else [path]
    above = [place.parents[1] for place in places if place.parent.name == "checkpoints"]
    return next(filter(None, map(run_facts, [*places, *above])), {})


def write_facts(run: Path, facts: dict[str, Any]) -> None:
    """Raises OutputError: the disk is full or cannot be written; what was there stays."""
    write_json(run / "run.json", facts)


def write_json(file: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all; paths as text. Raises OutputError: the disk is full or cannot be written; what was there stays."""
    with written_whole(file) as draft:
        draft.write_text(json.dumps(facts, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


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
