"""A tokenizer and a chat template as plain files, used without torch: text in, ids with character spans out.

Everything is read from a directory with `tokenizer.json` and, beside it, the Hugging Face files that name the chat template
and the special tokens. `models/` writes such a directory for any model; a cache keeps one in `cache/tokenizer/`.
"""

import json
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer, processors

from minicache.data.records import Turn
from minicache.data.special import SpecialText
from minicache.errors import ConfigError, ModelError, RowRefused
from minicache.pairs import Ints

PLAIN_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant: {% endif %}"
)
"""The form of a conversation where the tokenizer brings no template: "User: …\\n\\nAssistant: …</s>\\n\\n"."""


@dataclass(frozen=True)
class ChatTokenizer:
    """A tokenizer with the template that renders turns for it.

    backend: the tokenizers library's object. template: Jinja source. special: names like bos_token -> text.
    """

    backend: Tokenizer
    template: str
    special: dict[str, str]
    digest: str

    @classmethod
    def load(cls, directory: Path) -> "ChatTokenizer":
        """Read a directory of tokenizer files.

        Raises:
            ModelError: there is no readable tokenizer.json, or what lies beside it makes no sense.
        """
        file = directory / "tokenizer.json"
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            backend = Tokenizer.from_file(str(file))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelError(f"{file}: cannot be read as a tokenizer: {error}") from error
        # All text is encoded without added special tokens; what remains of a post-processor only trims the spans.
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.no_truncation()
        backend.no_padding()
        config = _read_json(directory / "tokenizer_config.json")
        special = {name: _token_text(value) for name, value in config.items() if name.endswith("_token") and value}
        return cls(backend, _template(directory, config) or PLAIN_TEMPLATE, special, _digest(content))

    def render(self, turns: tuple[Turn, ...], open_answer: bool = False) -> str:
        """The conversation as one string; `open_answer` ends it where the assistant would begin to speak.

        Raises:
            RowRefused: the template refuses these turns (most enforce an order of roles).
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        template = self._compiled
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=open_answer, **self.special
            )
        except Exception as error:  # a template is a program: on an odd row it may raise anything
            line = " ".join(str(error).split())[:300] or type(error).__name__
            raise RowRefused("template", f"the chat template refuses it: {line}") from error

    def encode(self, texts: list[str], hides: bool = False) -> list[tuple[Ints, Ints]]:
        """Of each text: ids (n,) int32 and the characters each token spans, (n, 2) begin and end.

        hides: `special_text` has hidden something in them, which is encoded as the plain text it stands for.

        Raises:
            ModelError: the tokenizer has no token for some text, not even one for the unknown.
        """
        hidden = [at for at, text in enumerate(texts) if hides and self.special_text.is_in(text)]
        try:
            encodings = self.backend.encode_batch(texts, add_special_tokens=False)
            ids: list[Ints] = [np.array(encoding.ids, np.int32) for encoding in encodings]
            for at, encoding in zip(hidden, self.special_text.encode([texts[at] for at in hidden]), strict=True):
                encodings[at], ids[at] = encoding, self.special_text.ids(encoding)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise ModelError(f"the tokenizer cannot encode the data: {error}") from error
        offsets = (np.array(encoding.offsets, np.int64).reshape(-1, 2) for encoding in encodings)
        return list(zip(ids, offsets, strict=True))

    def decode(self, ids: Ints) -> str:
        return self.backend.decode([int(token) for token in ids], skip_special_tokens=False)

    @cached_property
    def special_text(self) -> SpecialText:
        return SpecialText(self.backend, set(self.special.values()))

    @cached_property
    def _compiled(self) -> jinja2.Template:
        # The same environment as transformers', without `strftime_now`: a template that writes today's date into the
        # prompt (Llama 3.2) then falls back to its fixed one, and the same data gives the same pairs tomorrow.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        # transformers' block around what an assistant says; it renders as its content
        template = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", self.template)
        template = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", template)
        try:
            return environment.from_string(template)
        except jinja2.TemplateError as error:
            raise ConfigError(f"the chat template cannot be compiled: {error}") from error


def _template(directory: Path, config: dict) -> str:
    file = directory / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read: {error}") from error
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
        template = named.get("default")
    elsewhere = not template and (directory / "additional_chat_templates").is_dir()  # named ones too, in files
    if elsewhere or not isinstance(template, str):
        raise ModelError(f"{directory}: expected one chat template, or one named 'default'; add --chat-template FILE")
    return template


def _read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{file}: expected a JSON object, got a {type(content).__name__}")
    return content


def _token_text(value: object) -> str:
    return str(value.get("content", "")) if isinstance(value, dict) else str(value)


def _digest(content: dict) -> str:
    """Of what turns text into ids; padding, truncation and post-processing are not used."""
    used = {key: content.get(key) for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    return blake2b(json.dumps(used, sort_keys=True).encode(), digest_size=16).hexdigest()


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
