"""What a tokenizer's files must not hold: over it the tokenizers library, native code, ends the process or takes all memory."""

import json
from pathlib import Path
from typing import Any

from minicache.errors import ModelError

# Sixty times the largest vocabulary in use. The library makes tables as long as the largest id.
MOST_IDS = 2**24


def require_bounded_files(directory: Path) -> None:
    """As `require_bounded`, for the files of a model's directory. What cannot be read is left to the library, which says so.

    Raises:
        ModelError: as there.
    """
    for name in ("tokenizer.json", "vocab.json"):
        file = directory / name
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        require_bounded(file, content if name == "tokenizer.json" else {"model": {"vocab": content}})


def require_bounded(file: Path, content: Any) -> None:
    """Check what tokenizer.json holds.

    Raises:
        ModelError: an id is beyond MOST_IDS, or a merge lacks the prefix that the library cuts off from it.
    """
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        return
    vocabulary = model.get("vocab")
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and number >= MOST_IDS:
            raise ModelError(f"{file}: the token {token[:40]!r} has the id {number:,}; expected ids below {MOST_IDS:,}")
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if not (prefix and isinstance(prefix, str) and isinstance(merges, list)):
        return
    for merge in merges:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        second = parts[-1] if isinstance(parts, list) and parts else None
        if not (isinstance(second, str) and second.startswith(prefix)):
            raise ModelError(
                f"{file}: the merge {str(merge)[:40]!r} does not go on with the prefix {prefix[:40]!r}; expected all to do so, "
                'or "continuing_subword_prefix": null'
            )
