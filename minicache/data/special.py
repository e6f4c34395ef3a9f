"""The text of special tokens in a content: an `<|im_end|>` that a user typed is plain text and ends no turn.

Before a template renders the contents, such text in them is *hidden*: replaced by as many private-use characters. This tells
the special tokens that the template writes from those in the contents, and moves no position in the text. A twin of the
tokenizer, in which the special tokens have the hidden names, then encodes the template's special tokens as such and those in
the contents as plain text.
"""

import json
import re
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from minicache.data.records import NO_CONTEXT, Context, Pair, Turn, texts_in
from minicache.errors import ModelError, RowRefused
from minicache.failures import told_by
from minicache.pairs import Ints

# Private-use characters in plane 16, which hardly any font uses.
FIRST_HIDDEN = 0x108000
MOST = 0x10FFFE - FIRST_HIDDEN
# Such a character as JSON in ASCII has it.
ESCAPED = re.compile(r"\\udb[ef]", re.IGNORECASE)
# Part of an answer: templates and --think look for them.
MEANT = ("<think>", "</think>")


def encoding() -> AbstractContextManager[None]:
    """Within this context texts are encoded.

    Raises:
        RowRefused: that fails. A vocabulary may lack a token for some character and for the unknown, a pattern may take too many
            steps on a long run of spaces.
    """
    return told_by(lambda line: RowRefused("tokenizer", f"the tokenizer cannot encode it: {line}"))


class SpecialText:
    """The special tokens of a tokenizer, as text.

    hidden: text of a special token -> the private-use characters that replace it, of the same length.
    """

    def __init__(self, backend: Tokenizer, named: Collection[str]) -> None:
        """Find the special tokens of `backend`.

        named: texts of special tokens that the tokenizer's configuration names, marked as special or not.

        Raises:
            ModelError: there are more special tokens than private-use characters.
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
        # Where one begins with another, the longer one matches first.
        texts.sort(key=len, reverse=True)
        self.hidden = {text: chr(FIRST_HIDDEN + number) * len(text) for number, text in enumerate(texts)}
        self.shown = {hidden: text for text, hidden in self.hidden.items()}
        self._text, self._hidden = _any_of(texts), _any_of(self.shown)
        self._either = _any_of([*texts, *self.shown])
        self._made = _any_of([text for text in texts if backend.normalizer and self.added[text][1].normalized])
        self._names = {text[0] for text in self.shown}

    def hide(self, turns: tuple[Turn, ...], refuse: bool = False) -> tuple[Turn, ...]:
        """The turns with the text of special tokens hidden.

        Raises:
            RowRefused: a content holds such text and `refuse` is set, or it cannot be encoded as plain text.
        """
        return tuple(self._hidden_turn(turn, refuse) for turn in turns)

    def _hidden_turn(self, turn: Turn, refuse: bool) -> Turn:
        what = f"a turn of the {turn.role}"
        content = self._hidden_text(turn.content, what, refuse)
        more = self.hide_all(turn.more, what, refuse) if turn.more else turn.more
        if content is turn.content and more == turn.more:
            return turn
        return replace(turn, content=content, more=more)

    def hide_all(self, value: Any, what: str, refuse: bool = False) -> Any:
        """A JSON value with the text of special tokens hidden in all of its texts. what: its name in errors.

        Raises:
            RowRefused: as `hide`.
        """
        if isinstance(value, str):
            return self._hidden_text(value, what, refuse)
        if isinstance(value, Mapping):
            return {
                self.hide_all(name, what, refuse): self.hide_all(each, what, refuse) for name, each in value.items()
            }
        return [self.hide_all(each, what, refuse) for each in value] if isinstance(value, list) else value

    def _hidden_text(self, text: str, what: str, refuse: bool) -> str:
        found = self._text.search(text)
        if found and refuse:
            raise RowRefused(
                "special-text", f"{what} holds {found[0]!r}, the text of a special token; see --special-text"
            )
        if not self._names.isdisjoint(text):
            raise RowRefused(
                "special-text", "a content holds private-use characters, which minidpo uses in place of special tokens"
            )
        hidden = self._text.sub(lambda found: self.hidden[found[0]], text) if found else text
        if self._made.pattern != NOTHING:
            with encoding():
                normalized = self.backend.normalizer.normalize_str(hidden)
            if self._made.search(normalized):
                raise RowRefused("special-text", f"the tokenizer makes a special token of what {what} holds")
        return hidden

    def hide_context(self, context: Context, refuse: bool = False) -> Context:
        """As `hide`, for what a template gets beside the turns."""
        if context is NO_CONTEXT:
            return context
        return Context(
            tools=self.hide_all(context.tools, "a tool", refuse),
            documents=self.hide_all(context.documents, "a document", refuse),
            arguments=self.hide_all(context.arguments, "a template argument", refuse),
        )

    def first_in(self, pair: Pair) -> str:
        """The first text of a special token in a pair, "" without any."""
        beside = (pair.context.tools, pair.context.documents, pair.context.arguments)
        turns = ((turn.content, turn.more) for turn in (*pair.prompt, *pair.chosen, *pair.rejected))
        for text in (each for values in (*turns, beside) for value in values for each in texts_in(value)):
            if found := self._text.search(text):
                return found[0]
        return ""

    def encode(self, texts: list[str]) -> list[Encoding]:
        """The encodings of rendered texts by the twin, hidden text as plain text; see `ids` for the tokenizer's own ids.

        Raises:
            RowRefused: it cannot encode one of them.
        """
        swapped = [self._either.sub(lambda found: self._other(found[0]), text) for text in texts]
        with encoding():
            return self._twin.encode_batch(swapped, add_special_tokens=False)

    def ids(self, encoding: Encoding) -> Ints:
        """(n,) int32: the tokenizer's own ids of an encoding by the twin."""
        return self._own[np.array(encoding.ids, np.int64)]

    def require_plain(self, text: str) -> None:
        """Refuse a text whose hidden text the tokenizer can only encode as the special token.

        Raises:
            RowRefused: there is such text.
        """
        if ESCAPED.search(text):
            raise RowRefused("special-text", "the chat template escapes the text of a special token in a content")
        (encoding,) = self.encode([text])
        found = sum(number in self.numbers for number in self.ids(encoding).tolist())
        if found != sum(1 for _ in self._text.finditer(text)):
            hidden = next(self._hidden.finditer(text))[0]
            raise RowRefused(
                "special-text", f"the tokenizer has no plain tokens for {self.shown[hidden]!r} in a content"
            )

    def show(self, text: str) -> str:
        """A text with what is hidden in it."""
        return self._hidden.sub(lambda found: self.shown[found[0]], text)

    def _other(self, name: str) -> str:
        return self.hidden.get(name) or self.shown[name]

    @cached_property
    def numbers(self) -> frozenset[int]:
        """The ids of the special tokens."""
        return frozenset(self.added[text][0] for text in self.hidden)

    @cached_property
    def _twin(self) -> Tokenizer:
        content = json.loads(self.backend.to_str())
        for token in content["added_tokens"]:
            token["content"] = self.hidden.get(token["content"], token["content"])
        return Tokenizer.from_str(json.dumps(content))

    @cached_property
    def _own(self) -> Ints:
        """The twin's id -> the tokenizer's own id: a token with another name has another id."""
        own = np.arange(self._twin.get_vocab_size() + max((number for number, _ in self.added.values()), default=0) + 1)
        for text, (number, _) in self.added.items():
            if (twins := self._twin.token_to_id(self.hidden.get(text, text))) is not None:
                own[twins] = number
        return own.astype(np.int32)


NOTHING = "(?!)"


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, texts)) or NOTHING)
