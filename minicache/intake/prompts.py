"""The prompts of `compare`: from the command line, from a file, or from the pairs of a cache. No torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from minicache.cache.reader import ReferenceCache
from minicache.data.files import SUFFIXES, DataFile, read_rows, suffix_of
from minicache.data.folders import Note
from minicache.data.formats import to_prompt
from minicache.data.places import located
from minicache.data.records import NO_CONTEXT, Context, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.written import Written
from minicache.errors import CacheMismatch, DataError, RowRefused
from minicache.options.others import CompareConfig
from minicache.options.where import Where
from minicache.pairs import CHOSEN, EncodedPair, Ints

DEFAULT_PAIRS = 16

# A prompt's origin, as an error names it, its turns, and what the template gets beside them.
Asked = tuple[str, tuple[Turn, ...], Context]


@dataclass(frozen=True)
class Prompt:
    """A prompt. text: for people. turns: () for a prompt of a cache, which holds tokens only. ids: (n,) for the models."""

    text: str
    turns: tuple[Turn, ...]
    ids: Ints


def read_prompts(config: CompareConfig, tokenizer: ChatTokenizer, note: Note = lambda _: None) -> list[Prompt]:
    """All prompts of a config: those of --prompt first, then the files', then the cache's. note: shows a line to a person.

    Raises:
        DataError: a file or a row of it holds no prompt.
        CacheError: the cache cannot be read or was made with another tokenizer.
    """
    asked: list[Asked] = [("--prompt", (Turn("user", text),), NO_CONTEXT) for text in config.prompt]
    if config.prompts:
        with located((str(config.prompts),), note) as files:
            asked += [each for file in files for each in _of_file(file, config)]
    prompts = [
        _render(place, _with_system(turns, config.system), context, tokenizer) for place, turns, context in asked
    ]
    return prompts + (_of_cache(config.ref_cache, config.pairs, tokenizer) if config.ref_cache else [])


def _of_file(file: DataFile, config: CompareConfig) -> Iterator[Asked]:
    rows = read_rows(file) if _holds_rows(file) else _lines(file)
    for number, row in rows:
        place = f"--prompts {file.name}, line {number}"
        try:
            if isinstance(row, RowRefused):
                raise row
            yield place, *to_prompt(row, config.reading)
        except RowRefused as refusal:
            raise DataError(f"{place}: {refusal}") from refusal


def _holds_rows(file: DataFile) -> bool:
    """Whether a file holds rows and not a prompt per line: by its suffix; without one, as of a pipe, by whether it is JSON."""
    if PurePosixPath(file.name).suffix:
        return suffix_of(file.name) in SUFFIXES
    with file.path.open("rb") as stream:
        return stream.read(1) in (b"{", b"[")


def _lines(file: DataFile) -> Iterator[tuple[int, object]]:
    try:
        lines = file.path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {file.name}: cannot be read: {error}") from error
    found = [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise DataError(f"--prompts {file.name}: expected one prompt per line, found none")
    yield from found


def _with_system(turns: tuple[Turn, ...], system: str | None) -> tuple[Turn, ...]:
    return (Turn("system", system), *turns) if system and all(turn.role != "system" for turn in turns) else turns


def _render(place: str, turns: tuple[Turn, ...], context: Context, tokenizer: ChatTokenizer) -> Prompt:
    try:
        special = tokenizer.special_text
        hidden = special.hide(turns), special.hide_context(context)
        text = tokenizer.render(hidden[0], True, hidden[1])
        Written(tokenizer.chat).check(text, *hidden, shared=len(turns))
        hides = hidden != (turns, context)
        if hides:
            special.require_plain(text)
        ((ids, _),) = tokenizer.encode([text], [0] if hides else [])
    except RowRefused as refusal:
        raise DataError(f"{place}: {refusal}") from refusal
    if not len(ids):
        raise DataError(f"{place}: has no token; expected some text")
    shown = "\n\n".join(f"{turn.role}: {turn.content}" for turn in turns) if len(turns) > 1 else turns[0].content
    return Prompt(shown, turns, ids)


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
    """(n,) ids before the answer: the shared prefix, without the beginning of an answer that both sides share."""
    _, mask = pair.side(CHOSEN)
    end = pair.lengths[0]
    while end and mask[end - 1]:
        end -= 1
    return pair.tokens[:end]
