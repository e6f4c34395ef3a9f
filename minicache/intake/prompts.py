"""The prompts of `compare`: from the command line, from a file, or of a cache's pairs. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.data.files import read_rows
from minicache.data.formats import to_prompt
from minicache.data.records import Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheMismatch, DataError, RowRefused
from minicache.options.others import CompareConfig
from minicache.options.where import Where
from minicache.pairs import CHOSEN, EncodedPair, Ints

ROWS = {".jsonl", ".json", ".ndjson", ".parquet"}  # anything else is plain text, one prompt a line
DEFAULT_PAIRS = 16

Asked = tuple[str, tuple[Turn, ...]]  # where it stands, its turns


@dataclass(frozen=True)
class Prompt:
    """A prompt. text: as a person reads it. turns: () if it came as tokens. ids: (n,) what the models are given."""

    text: str
    turns: tuple[Turn, ...]
    ids: Ints


def read_prompts(config: CompareConfig, tokenizer: ChatTokenizer) -> list[Prompt]:
    """All prompts asked for: texts first, then the file's, then the cache's.

    Raises:
        DataError: a file or a row of it holds no prompt. CacheError: the cache cannot be read or has another tokenizer.
    """
    asked: list[Asked] = [("--prompt", (Turn("user", text),)) for text in config.prompt]
    asked += list(_of_file(config.prompts)) if config.prompts else []
    prompts = [_render(place, turns, config.system, tokenizer) for place, turns in asked]
    return prompts + (_of_cache(config.ref_cache, config.pairs, tokenizer) if config.ref_cache else [])


def _of_file(file: Path) -> Iterator[Asked]:
    rows = read_rows(str(file)) if ROWS & set(file.suffixes) else _lines(file)
    for number, row in rows:
        place = f"--prompts {file}, line {number}"
        try:
            if isinstance(row, RowRefused):
                raise row
            yield place, to_prompt(row)
        except RowRefused as refusal:
            raise DataError(f"{place}: {refusal}") from refusal


def _lines(file: Path) -> Iterator[tuple[int, object]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {file}: cannot be read: {error}") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"--prompts {file}: expected one prompt a line, found none")
    yield from found


def _render(place: str, turns: tuple[Turn, ...], system: str | None, tokenizer: ChatTokenizer) -> Prompt:
    if system and all(turn.role != "system" for turn in turns):
        turns = (Turn("system", system), *turns)
    try:
        text = tokenizer.render(tokenizer.special_text.hide(turns), open_answer=True)
        if tokenizer.special_text.is_in(text):
            tokenizer.special_text.require_plain(text)
    except RowRefused as refusal:
        raise DataError(f"{place}: {refusal}") from refusal
    ((ids, _),) = tokenizer.encode([text], hides=True)
    if not len(ids):
        raise DataError(f"{place}: gives no token; expected some text")
    one = len(turns) == 1
    return Prompt(turns[0].content if one else "\n\n".join(f"{t.role}: {t.content}" for t in turns), turns, ids)


def _of_cache(path: Where, pairs: int | None, tokenizer: ChatTokenizer) -> list[Prompt]:
    cache = ReferenceCache(path)
    if tokenizer.digest != cache.identity.tokenizer:
        raise CacheMismatch(f"{path}: was made with another tokenizer than the policy's; name a cache of its family")
    cache.check_complete()
    total = cache.log.pairs
    chosen = np.linspace(0, total - 1, min(pairs or DEFAULT_PAIRS, total)).round().astype(int)
    prompts = []
    for index in chosen.tolist():
        ids = prompt_ids(cache.blocks.pair(index)[0])
        if not len(ids):
            raise DataError(f"{path}, pair {index}: its prompt was cut away by --max-length; take fewer --pairs")
        prompts.append(Prompt(tokenizer.decode(ids), (), ids))
    return prompts


def prompt_ids(pair: EncodedPair) -> Ints:
    """(n,) ids before the answer: the prefix both sides share, without the beginning of an answer that both have."""
    _, mask = pair.side(CHOSEN)
    end = pair.lengths[0]
    while end and mask[end - 1]:
        end -= 1
    return pair.tokens[:end]
