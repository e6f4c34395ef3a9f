"""The files of a policy and of a reference cache that go to others, without what names the machine. No torch."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicache.cache.manifest import ATTRIBUTE, Manifest
from minicache.cache.places.place import ROOT
from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheDamaged, OutputError
from minicache.exchange.hub import Content
from minicache.reports.public import hub_id, public_log, public_name

Files = dict[str, Content]
# A cache's files: the list of refused rows, claims and drafts stay.
OF_A_CACHE = re.compile(
    r"zarr\.json|(pairs|ref|ledger)(/[a-z_]+)?/zarr\.json|(pairs|ref|ledger)/[a-z_]+/c/[0-9/]+|tokenizer/.+"
)
# A model's files. No other suffix is of a model as `train` and `export` write it; optimizers' states are .bin, .pt, .distcp.
OF_A_MODEL = re.compile(r".+\.(json|safetensors|jinja|txt|model|tiktoken|py)|LICENSE[^/]*|NOTICE[^/]*")
WEIGHTS = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json|adapter_config\.json"
)
NEVER = re.compile(r"(.*/)?(optimizer|scheduler|rng_state|trainer_state|training_args)[^/]*|(.*/)?checkpoint[^/]*/.*")
# Entries of a model's JSON files that name where it came from.
NAMES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
MOST_TEXT = 2**26  # bytes


@dataclass(frozen=True)
class Parcel:
    """What is sent. card: its text. last: the file that makes the others a whole. readable: what others can then read.

    learned: whether a policy is another than the model it started from.
    """

    files: Files
    card: str
    last: str
    readable: str
    message: str
    notes: list[str] = field(default_factory=list)
    learned: bool = True


def cache_files(cache: ReferenceCache, folder: Path, model: str | None) -> Files:
    """The files of a complete cache in a directory, by name. model: the Hub's name of the reference.

    Raises:
        CacheDamaged: one of them is a link.
    """
    files: Files = {name: file for name, file in _below(folder, CacheDamaged) if OF_A_CACHE.fullmatch(name)}
    group = json.loads((folder / ROOT).read_text(encoding="utf-8"))
    stored = Manifest(cache.identity, public_log(cache.log, model)).to_attributes()
    group["attributes"] = {**group.get("attributes", {}), ATTRIBUTE: stored[ATTRIBUTE]}
    files[ROOT] = json.dumps(group, indent=2, ensure_ascii=True).encode()
    return files


def model_files(folder: Path, base: str | None) -> tuple[Files, list[str]]:
    """The files of a model's directory by name, and the names of those that are left out. base: the Hub's name of its base.

    Raises:
        OutputError: one of them is a link.
    """
    files: Files = {}
    left_out = []
    for name, file in _below(folder, OutputError):
        if name == "README.md":
            continue
        if NEVER.fullmatch(name) or not OF_A_MODEL.fullmatch(name):
            left_out.append(name)
            continue
        files[name] = _without_paths(file, base) or file if file.suffix == ".json" and "/" not in name else file
    return files, left_out


def replaced_by_model(before: Iterable[str], files: Mapping[str, Content]) -> list[str]:
    """Weights of an earlier model that these files would leave beside the new ones."""
    return sorted(name for name in before if WEIGHTS.fullmatch(name) and name not in files)


def replaced_by_cache(before: Iterable[str], files: Mapping[str, Content]) -> list[str]:
    """Chunks and tokenizer files of an earlier cache."""
    return sorted(name for name in before if OF_A_CACHE.fullmatch(name) and name not in files)


def machine_paths(files: Mapping[str, Content], source: Path) -> list[str]:
    """The names of text files in which a directory of this machine is named: the user's own, or that of what is sent."""
    needles = {str(Path.home()), str(source.resolve()), str(source.resolve().parent)} - {"/", "."}
    found = []
    for name, content in files.items():
        if not name.endswith((".json", ".jsonl", ".jinja", ".txt", ".py")):
            continue
        if isinstance(content, Path) and content.stat().st_size > MOST_TEXT:
            continue
        text = (content.read_bytes() if isinstance(content, Path) else content).decode(errors="replace")
        if any(f"{needle}{end}" in text for needle in needles for end in ("/", "\\", '"')):
            found.append(name)
    return found


def _below(folder: Path, refusal: type[CacheDamaged] | type[OutputError]) -> list[tuple[str, Path]]:
    """The files below a directory by name, sorted."""
    found = []
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_symlink():
            raise refusal(
                f"{file}: expected a file, got a link; what it leads to may not be meant for others: put the file there"
            )
        if file.is_file():
            found.append((name, file))
    return found


def _without_paths(file: Path, base: str | None) -> bytes | None:
    """The JSON of a model's file in which the names of models are public; None if nothing has to be replaced."""
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OutputError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        return None
    named = {name: content[name] for name in NAMES if isinstance(content.get(name), str) and content[name]}
    public = {name: base or hub_id(value) or public_name(value) for name, value in named.items()}
    if public == named:
        return None
    return json.dumps({**content, **public}, indent=2, ensure_ascii=False).encode() + b"\n"
