"""Comparing two run directories on disk, and what a run may not lose."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicache.training import checkpoints
from minicache.training.shard_index import INDEX, read_index

# Of JSON that holds times, memory and places: what is compared is what it says besides.
TIMED = {
    *("tokens_per_second", "memory_gb", "seconds", "total_seconds", "eval_seconds"),
    *("reference_pairs_per_second", "seconds_not_spent", "stage_one_seconds", "out", "created"),
    # how the call that is recorded went on
    "resume",
    # of a generator that each process seeds by chance where no option draws: what draws seeds it by --seed
    "rng",
}
Done = Mapping[Any, object]


def plain(value: Any) -> Any:
    """JSON, or the state of a checkpoint, without what measures time and names places; tensors as lists."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name not in TIMED}
    if isinstance(value, Tensor):
        return [str(value.dtype), value.tolist()]
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value


def said_in(file: Path) -> object:
    """What a file holds but for times and places."""
    if file.suffix == ".png":
        return "a picture of what is compared"
    if file.name == INDEX:
        index = read_index(file)
        return index.state_dict_metadata, index.storage_data
    if file.name == checkpoints.STATE:
        return plain(torch.load(file, weights_only=True))
    if file.suffix == ".json" and not file.name.startswith("tokenizer"):
        return plain(json.loads(file.read_bytes()))
    if file.name == "metrics.jsonl":
        return [plain(json.loads(line)) for line in file.read_bytes().splitlines()]
    return file.read_bytes()


def files(place: Path) -> dict[Path, Path]:
    """All files below a place by their path from there; a file alone by no path."""
    found = [place] if place.is_file() else [file for file in sorted(place.rglob("*")) if file.is_file()]
    return {file.relative_to(place): file for file in found}


def assert_same_files(left: Path, right: Path) -> None:
    """The same files, each with the same bytes; JSON, metrics and states but for times and places."""
    a, b = files(left), files(right)
    assert a.keys() == b.keys(), sorted(map(str, a.keys() ^ b.keys()))
    different = [where for name in a for where in differences(said_in(a[name]), said_in(b[name]), str(name))]
    assert not different, different[:20]


def differences(left: object, right: object, where: str) -> list[str]:
    """Where two values differ, in words."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return [each for name in left for each in differences(left[name], right[name], f"{where}: {name}")]
    return [] if left == right else [f"{where}: {str(left)[:60]} ≠ {str(right)[:60]}"]


def done_steps(run: Path, name: str = "") -> Done:
    """What no later call may lose: the steps up to the newest checkpoint, or all of a finished run, with their logged lines; and
    that checkpoint's files, for as long as it is there."""
    there, record = checkpoints.steps(run)[-1:], run / "run.json"
    facts = json.loads(record.read_bytes()) if record.exists() else {}
    outcome = facts.get("outcome") or {}
    reached = max([0, *there, *([outcome["progress"]["step"]] if outcome else [])])
    done: dict[Any, object] = {(name, "step", step): True for step in range(1, reached + 1)}
    for step in there:
        held = files(checkpoints.place(run, step))
        done[name, "checkpoint", step] = {path: file.read_bytes() for path, file in held.items()}
    journal = run / "metrics.jsonl"
    for line in journal.read_bytes().splitlines() if journal.exists() else ():
        found = re.match(rb'\{"step": (\d+)', line)
        if found and int(found[1]) < reached:
            done[name, "line", int(found[1])] = line
    return done


def gone(before: Done, now: Done) -> list[Any]:
    """What was done and is no more, or is another now. A checkpoint may go when there is a newer one: its step is still done."""
    return [key for key, value in before.items() if now.get(key, value if "checkpoint" in key else None) != value]
