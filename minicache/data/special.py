"""Special tokens' text in what people wrote: an `<|im_end|>` that a user types is text, and ends no turn.

Before a template renders contents, such text in them is *hidden*: replaced by as many private-use characters. So what the
template writes can be told from what it was given, and no place in the text moves. A twin of the tokenizer, whose special
tokens go by those hidden names, then finds the template's and reads the people's as plain text.
"""

import json
import re
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property

import numpy as np
from tokenizers import Encoding, Tokenizer

from minicache.data.records import Turn
from minicache.errors import ModelError, RowRefused
from minicache.pairs import Ints

FIRST_HIDDEN = 0x108000  # private use, in the plane that hardly any font uses
MOST = 0x10FFFE - FIRST_HIDDEN
MEANT = ("<think>", "</think>")  # part of an answer: templates look for them, and --think does


class SpecialText:
    """The special tokens of a tokenizer, as text.

    hidden: text of each -> what stands for it, of the same length.
    """

    def __init__(self, backend: Tokenizer, named: Collection[str]) -> None:
        """named: texts of special tokens that the tokenizer's configuration names, whether or not they are marked special.

        Raises:
            ModelError: there are more than can be told apart.
        """
        self.backend = backend
        self.added = {token.content: (number, token) for number, token in backend.get_added_tokens_decoder().items()}
        texts = [
            text
            for text, (_, token) in self.added.items()
            if text and text not in MEANT and (token.special or text in named)
        ]
        if len(texts) > MOST:
            raise ModelError(f"the tokenizer has {len(texts):,} special tokens; expected {MOST:,} or fewer")
        texts.sort(key=len, reverse=True)  # where one begins another, the longer is meant
        self.hidden = {text: chr(FIRST_HIDDEN + number) * len(text) for number, text in enumerate(texts)}
        self.shown = {hidden: text for text, hidden in self.hidden.items()}
        self._text, self._hidden = _any_of(texts), _any_of(self.shown)
        self._either = _any_of([*texts, *self.shown])
        self._made = _any_of([text for text in texts if backend.normalizer and self.added[text][1].normalized])
        self._names = {text[0] for text in self.shown}

    def hide(self, turns: tuple[Turn, ...], refuse: bool = False) -> tuple[Turn, ...]:
        """The turns with the text of special tokens hidden.

        Raises:
            RowRefused: there is such text, and `refuse` or no way to encode it.
        """
        return tuple(self._hide(turn, refuse) for turn in turns)

    def _hide(self, turn: Turn, refuse: bool) -> Turn:
        found = self._text.search(turn.content)
        if found and refuse:
            raise RowRefused(
                "special-text",
                f"a {turn.role} turn holds {found[0]!r}, the text of a special token; see --special-text",
            )
        if not self._names.isdisjoint(turn.content):
            raise RowRefused(
                "special-text", "a content holds private-use characters that stand for special tokens here"
            )
        content = self._text.sub(lambda found: self.hidden[found[0]], turn.content) if found else turn.content
        if self._made.pattern != NOTHING and self._made.search(self.backend.normalizer.normalize_str(content)):
            raise RowRefused("special-text", f"the tokenizer makes a special token of what a {turn.role} turn holds")
        return replace(turn, content=content) if found else turn

    def is_in(self, text: str) -> bool:
        """Whether something in a rendered text is hidden."""
        return self._hidden.search(text) is not None

    def encode(self, texts: list[str]) -> list[Encoding]:
        """Of rendered texts, with what is hidden in them as plain text; ids are the twin's, see `ids`."""
        swapped = [self._either.sub(lambda found: self._other(found[0]), text) for text in texts]
        return self._twin.encode_batch(swapped, add_special_tokens=False)

    def ids(self, encoding: Encoding) -> Ints:
        """(n,) int32: the tokenizer's own ids of what the twin encoded."""
        return self._own[np.array(encoding.ids, np.int64)]

    def require_plain(self, text: str) -> None:
        """Raises RowRefused if the tokenizer has only the special token for some hidden text."""
        (encoding,) = self.encode([text])
        special = {self.added[name][0] for name in self.hidden}
        found = sum(number in special for number in self.ids(encoding).tolist())
        if found != sum(1 for _ in self._text.finditer(text)):
            hidden = next(self._hidden.finditer(text))[0]
            raise RowRefused(
                "special-text", f"the tokenizer has no plain tokens for {self.shown[hidden]!r} in a content"
            )

    def _other(self, name: str) -> str:
        return self.hidden.get(name) or self.shown[name]

    @cached_property
    def _twin(self) -> Tokenizer:
        content = json.loads(self.backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self.hidden.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _own(self) -> Ints:
        """Id of the twin -> the tokenizer's own: a token that goes by another name got another id."""
        own = np.arange(self._twin.get_vocab_size() + max((number for number, _ in self.added.values()), default=0) + 1)
        for text, (number, _) in self.added.items():
            if (twins := self._twin.token_to_id(self.hidden.get(text, text))) is not None:
                own[twins] = number
        return own.astype(np.int32)


NOTHING = "(?!)"


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or NOTHING)
