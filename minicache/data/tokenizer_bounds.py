"""What a tokenizer's files must not hold: over it the tokenizers library, native code, ends the process or takes all memory."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from minicache.disk import require_file
from minicache.errors import ModelError

# Sixty times the largest vocabulary in use. The library makes tables as long as the largest id.
MOST_IDS = 2**24
# Four times that vocabulary. Beside a tiktoken vocabulary transformers makes up a token for each id below an added one.
MOST_ADDED = 2**20
# How many tokens transformers makes up: of T5, Pegasus, XGLM and Mistral.
MADE_UP = ("extra_ids", "offset", "num_madeup_words", "default_num_special_tokens")
# How many times as long as before a text may become. A text takes some twenty bytes a character while it is changed.
MOST_GROWTH = 256
# Steps that make a text longer, by about so much at most. Precompiled is a normal form of Unicode, in which one character may
# become eighteen; no tokenizer in use has more than one.
GROWTH = {"ByteLevel": 2, "BPEDecoder": 2, "CTC": 2, "Precompiled": 16}
# The lists of steps in a step, by its kind.
LISTS = ("normalizers", "pretokenizers", "decoders")
# The beginning of a vocabulary of tiktoken: lines of base64 and rank.
RANKS = re.compile(rb"\s*([A-Za-z0-9+/=]+[ \t]+[+_\d]+\s|$)")


def require_bounded_files(directory: Path) -> None:
    """As `require_bounded`, for the files of a model's directory. What cannot be read is left to the library, which says so.

    Raises:
        ModelError: as there, or an id or a number of tokens is beyond bounds in a file beside tokenizer.json.
    """
    config = _json(directory / "tokenizer_config.json")
    config = config if isinstance(config, dict) else {}
    named = config.get("fast_tokenizer_files")
    others = [directory / name for name in named if isinstance(name, str)] if isinstance(named, list) else []
    for file in sorted({*directory.glob("tokenizer*.json"), *others}):
        require_bounded(file, _json(file))
    for name, most in (("vocab.json", MOST_IDS), ("added_tokens.json", MOST_ADDED)):
        _require_ids(directory / name, _items(_json(directory / name)), most)
    added = ((token, _number(text)) for text, token in _items(config.get("added_tokens_decoder")))
    _require_ids(directory / "tokenizer_config.json", added, MOST_ADDED)
    _require_made_up(directory / "tokenizer_config.json", config)
    tekken = _json(directory / "tekken.json")
    _require_made_up(directory / "tekken.json", tekken.get("config") if isinstance(tekken, dict) else None)
    for file in sorted((*directory.glob("*.model"), *directory.glob("*.tiktoken"))):
        _require_ids(file, _ranks(file), MOST_IDS)


def require_bounded(file: Path, content: Any) -> None:
    """Check what tokenizer.json holds.

    Raises:
        ModelError: an id is beyond MOST_IDS, a merge lacks the prefix that the library cuts off from it, a text would grow beyond
            MOST_GROWTH, or be cut into pieces of nothing.
    """
    if not isinstance(content, dict):
        return
    _require_growth(file, "normalizer and pre-tokenizer", [content.get("normalizer"), content.get("pre_tokenizer")])
    _require_growth(file, "decoder", [content.get("decoder")])
    for step in _steps([content.get("pre_tokenizer")]):
        if step.get("type") == "FixedLength" and step.get("length") == 0:
            raise ModelError(f"{file}: the pre-tokenizer cuts texts into pieces of 0 characters; expected 1 or more")
    if isinstance(model := content.get("model"), dict):
        _require_ids(file, _items(model.get("vocab")), MOST_IDS)
        _require_prefix(file, model.get("continuing_subword_prefix"), model.get("merges"))


def _require_ids(file: Path, ids: Iterable[tuple[Any, Any]], most: int) -> None:
    """Raises ModelError: a token's id is `most` or more."""
    for token, number in ids:
        if isinstance(number, int) and number >= most:
            raise ModelError(
                f"{file}: the token {str(token)[:40]!r} has the id {number:,}; expected ids below {most:,}"
            )


def _require_made_up(file: Path, settings: Any) -> None:
    """Raises ModelError: a setting asks for more than MOST_ADDED tokens."""
    for name, count in _items(settings):
        if name in MADE_UP and isinstance(count, int) and count > MOST_ADDED:
            raise ModelError(f"{file}: {name} is {count:,}; expected {MOST_ADDED:,} or fewer")


def _require_prefix(file: Path, prefix: Any, merges: Any) -> None:
    """Raises ModelError: the second part of a merge does not begin with the prefix."""
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


def _require_growth(file: Path, what: str, roots: list[Any]) -> None:
    """Raises ModelError: the steps, one after the other, would make a text too long."""
    growth = 1.0
    for step in _steps(roots):
        growth *= _growth(step)
        if growth > MOST_GROWTH:
            raise ModelError(
                f"{file}: its {what} may make a text more than {MOST_GROWTH} times as long; expected fewer steps that do so"
            )


def _growth(step: dict[str, Any]) -> float:
    """How many times as long a text may become by one step; 1 for one that makes it shorter."""
    content, pattern = step.get("content"), step.get("pattern")
    # the library takes a Replace also without its type
    if not isinstance(content, str) or not isinstance(pattern, dict):
        return GROWTH.get(str(step.get("type")), 1)
    text = pattern.get("String")
    # what matches nothing, as a regular expression may, matches before each character
    return max(len(content) / len(text), 1) if isinstance(text, str) and text else 1 + len(content)


def _steps(roots: list[Any]) -> Iterator[dict[str, Any]]:
    """All steps of normalizers and their like, those in a Sequence too. They may lie deeper than Python can call itself."""
    left = list(roots)
    while left:
        step = left.pop()
        if isinstance(step, dict):
            yield step
            left += [inner for name in LISTS if isinstance(step.get(name), list) for inner in step[name]]


def _json(file: Path) -> Any:
    try:
        # the settings may name any place, as a pipe, which would be waited for
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None


def _items(value: Any) -> Iterable[tuple[Any, Any]]:
    return value.items() if isinstance(value, dict) else ()


def _number(text: str | bytes) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _ranks(file: Path) -> Iterator[tuple[str, int | None]]:
    """Tokens and ranks of a vocabulary of tiktoken; nothing of one of SentencePiece, which is binary."""
    try:
        require_file(file)
        with file.open("rb") as stream:
            content = stream.read() if RANKS.match(stream.peek(4096)) else b""
    except OSError:
        return
    for line in content.splitlines():
        parts = line.split()
        if len(parts) == 2:
            yield parts[0].decode("latin-1"), _number(parts[1])
