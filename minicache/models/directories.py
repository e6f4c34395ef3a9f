"""Why a directory cannot be loaded: which of its files is broken or missing. Looked for only after a library failed on it."""

import json
import re
from pathlib import Path

from minicache.data.tokenizer_files import is_tokenizer_file, tokenizer_files
from minicache.disk import MOST_WHOLE
from minicache.errors import ModelError
from minicache.models.file_kinds import AGAIN, is_safetensors, other_kind, require_torch_file
from minicache.text import one_line

SMALL = {".json", ".jinja", ".txt"}  # files that libraries read whole
MOST_HEADER = 100_000_000  # bytes, safetensors' own bound
# Pickled weights and JSON files that transformers and peft read, beside a tokenizer's; a directory may hold others.
PICKLED = re.compile(r"(pytorch_model|adapter_model)[\w.-]*\.bin")
SETTINGS = re.compile(r"(config|generation_config|adapter_config|[\w.-]+\.index)\.json")


def broken_file(directory: Path) -> str | None:
    """A line on the first broken file of a model, an adapter or a tokenizer, by its bytes; None: all look whole."""
    for file in sorted(directory.iterdir()):
        if file.is_file() and (problem := _problem(file)):
            return f"{file}: {problem}"
    return None


def require_plain_files(directory: Path) -> None:
    """Raises ModelError: a pipe or a device, on which a library would wait for ever, or settings that would take all memory."""
    for file in directory.iterdir():
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ModelError(f"{file}: a pipe or a device; expected a file")
        if file.suffix in SMALL and file.is_file() and (size := file.stat().st_size) > MOST_WHOLE:
            raise ModelError(f"{file}: has {size:,} bytes; expected {MOST_WHOLE:,} at most")


def missing_file(directory: Path, tokenizer: bool) -> str | None:
    """A line on what a directory lacks to be a tokenizer's, or a model's; None: nothing is missing."""
    if tokenizer:
        if any(name.endswith((".json", ".model", ".tiktoken", ".txt")) for name in tokenizer_files(directory)):
            return None
        return f"{directory}: no tokenizer in it (tokenizer.json, tokenizer.model, vocab.json); add --tokenizer DIR"
    if (directory / "config.json").exists():
        return None
    inner = sorted(str(each.parent) for each in directory.glob("*/config.json"))
    hint = f"; did you mean {inner[0]}?" if inner else ""
    kind = "a run's directory" if (directory / "run.json").exists() else "no config.json in it"
    return f"{directory}: {kind}; expected a model's directory{hint}"


def _problem(file: Path) -> str | None:
    """What is wrong with a file, and what to do; None: nothing that its first bytes and its length tell."""
    is_json = file.suffix == ".json" and (SETTINGS.fullmatch(file.name) or is_tokenizer_file(file.name))
    if not (is_json or file.suffix == ".safetensors" or PICKLED.fullmatch(file.name)):
        return None
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(1024)
        if file.suffix == ".bin":
            return _of_torch(file, head, size)
        return other_kind(head, size) or (_of_json(file) if is_json else _of_safetensors(file, size))
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"


def _of_torch(file: Path, head: bytes, size: int) -> str | None:
    if is_safetensors(head, size):
        return f"a safetensors file; rename it to {file.stem.replace('pytorch_', '')}.safetensors"
    try:
        require_torch_file(file)
    except ModelError as error:
        return str(error).removeprefix(f"{file}: ")
    return None


def _of_safetensors(file: Path, size: int) -> str | None:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        try:
            header = json.loads(stream.read(length) if length < min(size, MOST_HEADER) else b"")
            ends = (int(entry["data_offsets"][1]) for name, entry in header.items() if name != "__metadata__")
            whole = 8 + length + max(ends, default=0)
        # a file of another kind, or a damaged header
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError):
            return f"not a safetensors file, or a damaged one; {AGAIN}"
    return None if whole == size else f"{size:,} bytes, where its header says {whole:,}: cut off or damaged; {AGAIN}"


def _of_json(file: Path) -> str | None:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        return f"cannot be read as JSON: {one_line(error, 100)}; {AGAIN}"
    if not file.name.endswith(".index.json"):
        return None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        return f"has no weight_map that names files; {AGAIN}"
    gone = sorted({str(each) for each in names.values() if not (file.parent / str(each)).is_file()})
    return f"names {gone[0]}, which is not beside it; {AGAIN}" if gone else None
