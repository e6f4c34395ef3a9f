"""A tokenizer and a chat template, read from plain files without torch: text -> ids with character spans.

The directory holds `tokenizer.json` and the Hugging Face files that name the chat template and the special tokens. `models/`
writes such a directory for any model; a cache keeps one in `cache/tokenizer/`.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, processors

from minicache.data.records import NO_CONTEXT, Context, Turn
from minicache.data.special import SpecialText, encoding
from minicache.data.template import Template
from minicache.data.tokenizer_bounds import require_bounded
from minicache.errors import ModelError
from minicache.failures import told_by
from minicache.pairs import Ints
from minicache.text import one_line

log = logging.getLogger(__name__)

CONFIG = "tokenizer_config.json"
# The folder of the templates beside the default one, as transformers writes them.
NAMED = "additional_chat_templates"

# The chat template of a tokenizer that has none: "User: …\n\nAssistant: …</s>\n\n".
PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with its chat template.

    backend: the object of the tokenizers library. template: Jinja source. special: names like bos_token -> text.
    digest: of everything that turns text into ids. date, arguments: what the template gets besides, see `Template`; the
    arguments as JSON text. named: the names of its other templates, which are not used.
    """

    backend: Tokenizer
    template: str
    special: dict[str, str]
    digest: str
    date: str = ""
    arguments: str = ""
    named: tuple[str, ...] = ()

    @classmethod
    def load(cls, directory: Path) -> "ChatTokenizer":
        """Read a directory of tokenizer files.

        Raises:
            ModelError: there is no readable tokenizer.json, it is beyond bounds, or a file beside it is damaged.
        """
        file = directory / "tokenizer.json"
        with reading(file):
            content = json.loads(file.read_text(encoding="utf-8"))
            require_bounded(file, content)
            backend = Tokenizer.from_file(str(file))
        # Text is encoded without added special tokens, so a post-processor could only trim the spans.
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.no_truncation()
        backend.no_padding()
        config = read_config(directory)
        special = {name: _token_text(value) for name, value in config.items() if name.endswith("_token") and value}
        template, source = template_of(directory, config)
        log.debug("tokenizer %s: chat template from %s", directory, source)
        named = tuple(sorted(file.stem for file in (directory / NAMED).glob("*.jinja")))
        return cls(backend, template, special, _digest(content), named=named)

    def render(self, turns: tuple[Turn, ...], open_answer: bool = False, context: Context = NO_CONTEXT) -> str:
        """The conversation as one string; see `Template.render`."""
        return self.chat.render(turns, open_answer, context)

    def encode(self, texts: list[str], hiding: Sequence[int] = ()) -> list[tuple[Ints, Ints]]:
        """For each text: ids (n,) int32 and the character span of each token, (n, 2) int64 begin and end.

        hiding: indices of texts in which `special_text` has hidden text, which is encoded as the plain text that it replaces.

        Raises:
            RowRefused: the tokenizer cannot encode one of them.
        """
        with encoding():
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
            ids: list[Ints] = [np.array(each.ids, np.int32) for each in encodings]
        for at, each in zip(hiding, self.special_text.encode([texts[at] for at in hiding]), strict=True):
            encodings[at], ids[at] = each, self.special_text.ids(each)
        offsets = (np.array(each.offsets, np.int64).reshape(-1, 2) for each in encodings)
        return list(zip(ids, offsets, strict=True))

    def decode(self, ids: Ints | list[int], special: bool = True) -> str:
        """The text of ids, (n,). special: special tokens included.

        Raises:
            ModelError: the tokenizer cannot decode them.
        """
        with told_by(lambda line: ModelError(f"the tokenizer cannot decode token ids: {line}")):
            return self.backend.decode([int(token) for token in ids], skip_special_tokens=not special)

    def decode_after(self, ids: Ints, count: int) -> str:
        """The text of ids after the first `count`. They are decoded too: some decoders drop the space before the first word.

        Raises:
            ModelError: as `decode`.
        """
        before, text = self.decode(ids[:count]), self.decode(ids)
        # Where a character begins before, the two texts differ there.
        return text[len(before) :] if text.startswith(before) else self.decode(ids[count:])

    def are_special(self, ids: Ints) -> NDArray[np.bool_]:
        """(n,) Which of the ids are special tokens; such text that a row holds has plain ids, see `SpecialText`."""
        return np.isin(ids, list(self.special_text.numbers))

    @cached_property
    def special_text(self) -> SpecialText:
        """The special tokens, as text; made once."""
        return SpecialText(self.backend, set(self.special.values()))

    @cached_property
    def chat(self) -> Template:
        """The chat template, ready to render."""
        return Template(self.template, self.special, self.date, json.loads(self.arguments or "{}"), self.named)


def reading(file: Path) -> AbstractContextManager[None]:
    """Within this context a tokenizer.json is read.

    Raises:
        ModelError: that fails.
    """
    return told_by(lambda line: ModelError(f"{file}: cannot be read as a tokenizer: {line}"))


def template_of(directory: Path, config: dict[str, Any]) -> tuple[str, str]:
    """The chat template of the tokenizer, or the plain one, and the name of its source.

    Raises:
        ModelError: the file cannot be read, or there are several templates and none is called 'default'.
    """
    file = directory / "chat_template.jinja"
    try:
        if file.exists():
            text = file.read_text(encoding="utf-8")
            return (text, file.name) if text else (PLAIN_TEMPLATE, "the plain form")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    # named templates may also lie in files
    elsewhere = not template and (directory / NAMED).is_dir()
    if elsewhere or not isinstance(template, str):
        raise ModelError(f"{directory}: expected one chat template, or one named 'default'; add --chat-template FILE")
    return (template, CONFIG) if template else (PLAIN_TEMPLATE, "the plain form")


def read_config(directory: Path) -> dict[str, Any]:
    """The settings in a directory of tokenizer files; {} if it has none.

    Raises:
        ModelError: they cannot be read.
    """
    file = directory / CONFIG
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {one_line(error, 300)}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    return content


def _token_text(value: object) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _digest(content: dict[str, Any]) -> str:
    """blake2b-128 of what turns text into ids; padding, truncation and post-processing are not used."""
    used = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return blake2b(json.dumps(used, sort_keys=True).encode(), digest_size=16).hexdigest()
