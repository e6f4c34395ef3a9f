"""A chat template: messages -> text, as transformers' `apply_chat_template` renders them. No torch."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
from jinja2 import meta, nodes

from minicache.data.arguments import FIXED_DATE, decoded
from minicache.data.bounded_jinja import BoundedEnvironment
from minicache.data.records import NO_CONTEXT, THOUGHTS, Context, Turn
from minicache.errors import ConfigError, RowRefused
from minicache.text import one_line

# A call that no row holds.
CALLED = {"qxk": "qxv"}


@dataclass(frozen=True)
class Template:
    """A chat template.

    source: Jinja. special: names like bos_token -> text. date: what `strftime_now` gives, ISO 8601; "" is FIXED_DATE, or none
    for a template that can do without. arguments: values of variables that the template reads, such as `enable_thinking`.
    named: the names of the tokenizer's other templates.
    """

    source: str
    special: Mapping[str, str]
    date: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    named: tuple[str, ...] = ()

    def render(self, turns: tuple[Turn, ...], open_answer: bool = False, context: Context = NO_CONTEXT) -> str:
        """The conversation as one string; with `open_answer` it ends in the generation prompt.

        Raises:
            RowRefused: the template refuses these turns (most templates enforce an order of roles).
            ConfigError: the template cannot be compiled.
        """
        template = self._compiled
        values = {**self.special, **self.arguments, **context.arguments}
        self._environment.spent.begin()
        try:
            return template.render(
                **{
                    **values,
                    "messages": [self._message(turn) for turn in turns],
                    "tools": context.tools,
                    "documents": context.documents,
                    "add_generation_prompt": open_answer,
                }
            )
        # a template is a program and may raise anything on an unusual row
        except Exception as error:
            line = one_line(error, 300)
            raise RowRefused("template", f"the chat template refuses it: {line}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names of all variables that the template reads: its arguments, `tools`, `documents` and others."""
        return frozenset(meta.find_undeclared_variables(self._parsed))

    def mentions(self, name: str) -> bool:
        """Whether the template names this key of a message anywhere."""
        return name in self._names

    @cached_property
    def switches(self) -> tuple[str, ...]:
        """Words that users put into contents and that the template looks for, such as SmolLM3's "/no_think"; the longest first."""
        return tuple(sorted((name for name in self._names if re.fullmatch(r"/\w+", name)), key=len, reverse=True))

    @cached_property
    def _names(self) -> set[str]:
        attributes = {node.attr for node in self._parsed.find_all(nodes.Getattr)}
        return attributes | {node.value for node in self._parsed.find_all(nodes.Const) if isinstance(node.value, str)}

    @cached_property
    def asks_date(self) -> bool:
        """Whether the template asks for today's date."""
        return any(node.name == "strftime_now" for node in self._parsed.find_all(nodes.Name))

    @cached_property
    def _text(self) -> str:
        # transformers' block around an assistant turn renders as its content.
        text = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", self.source)
        return re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", text)

    @cached_property
    def _environment(self) -> BoundedEnvironment:
        environment = BoundedEnvironment({"tojson": _to_json})
        environment.globals["raise_exception"] = _raise_exception
        # A template that can do without a date (Llama 3.2) writes its own fixed one.
        if self.date or not re.search(r"strftime_now\s+is\s+(not\s+)?defined", self.source):
            environment.globals["strftime_now"] = datetime.fromisoformat(self.date or FIXED_DATE).strftime
        return environment

    @cached_property
    def _parsed(self) -> nodes.Template:
        try:
            return self._environment.parse(self._text)
        # a template that is nested too deeply makes the parser and Python's compiler raise what they like
        except Exception as error:
            raise _not_compiled(error) from error

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return self._environment.bounded_template(self._text)
        # as in `_parsed`
        except Exception as error:
            raise _not_compiled(error) from error

    # --- a message as the template reads it ---

    def _message(self, turn: Turn) -> dict[str, Any]:
        """The message as transformers gives it: thoughts under each of their names, and no content instead of null."""
        message = turn.message
        if isinstance(message["content"], dict | list) and not self._takes_values:
            message["content"] = turn.content
        if self._takes_parts_alone and turn.content:
            message["content"] = [{"type": "text", "text": turn.content}]
        if not turn.more:
            return message
        if message["content"] is None and not self._takes_null:
            del message["content"]
        if turn.more.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in turn.more["tool_calls"]]
        # transformers/utils/chat_template_utils.py, _alias_reasoning_fields
        thoughts = next((turn.more[key] for key in THOUGHTS if turn.more.get(key) is not None), None)
        return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}

    @cached_property
    def _takes_parts_alone(self) -> bool:
        """Whether the template writes a content that is a list of parts, and none that is text."""
        parts = [{"type": "text", "text": CALLED["qxk"]}]
        return CALLED["qxk"] not in self._probed(CALLED["qxk"]) and CALLED["qxk"] in self._probed(parts)

    @cached_property
    def _takes_values(self) -> bool:
        """Whether the template writes what a tool returned as JSON (Llama 3); others print an object as Python does, or fail."""
        call = {"type": "function", "id": "c00000001", "function": {"name": "f", "arguments": {}}}
        result = {"role": "tool", "tool_call_id": "c00000001", "content": CALLED}
        return json.dumps(CALLED) in self._probed("q", {"role": "assistant", "tool_calls": [call]}, result)

    @cached_property
    def _takes_null(self) -> bool:
        """Whether the template writes calls beside a content that is null, and not where there is none (DeepSeek R1)."""
        is_written = [self._writes_call({}), self._writes_call({"content": None})]
        return is_written == [False, True]

    def _writes_call(self, content: dict[str, Any]) -> bool:
        return any(CALLED["qxk"] in self._rendered_call(each, content) for each in (CALLED, json.dumps(CALLED)))

    # The arguments of a call: an object in most templates, JSON text in some.

    def _call(self, call: Any) -> Any:
        arguments = call["function"].get("arguments")
        if isinstance(arguments, str) and not self._takes_text:
            arguments = decoded(arguments)
        elif isinstance(arguments, dict) and self._takes_text and not self._takes_objects:
            arguments = json.dumps(arguments, ensure_ascii=False)
        else:
            return call
        return {**call, "function": {**call["function"], "arguments": arguments}}

    @cached_property
    def _takes_text(self) -> bool:
        """Whether the template writes arguments that are JSON text as they are, not as a quoted text."""
        return json.dumps(CALLED) in self._written_call(json.dumps(CALLED))

    @cached_property
    def _takes_objects(self) -> bool:
        return CALLED["qxk"] in self._written_call(CALLED)

    def _written_call(self, arguments: Any) -> str:
        """What the template writes of a call with these arguments, "" if it does not."""
        contents: tuple[dict[str, Any], ...] = ({}, {"content": None}, {"content": ""})
        texts = (self._rendered_call(arguments, content) for content in contents)
        return next((text for text in texts if CALLED["qxk"] in text), "")

    def _rendered_call(self, arguments: Any, content: dict[str, Any]) -> str:
        call = {"type": "function", "id": "c00000001", "function": {"name": "f", "arguments": arguments}}
        return self._probed("q", {"role": "assistant", **content, "tool_calls": [call]})

    def _probed(self, question: Any, *answers: dict[str, Any]) -> str:
        """What the template writes of messages that no row holds, "" if it cannot."""
        values = {**self.special, **self.arguments, "tools": None, "documents": None, "add_generation_prompt": False}
        self._environment.spent.begin()
        try:
            return self._compiled.render(messages=[{"role": "user", "content": question}, *answers], **values)
        # as in `render`
        except Exception:
            return ""


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _not_compiled(error: Exception) -> ConfigError:
    return ConfigError(f"the chat template cannot be compiled: {one_line(error, 300)}")


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def require_read(template: Template, date: str, arguments: str) -> None:
    """Raises ConfigError: the template does not read a date or a value that it is given. arguments: JSON text, or ""."""
    if date and not template.asks_date:
        raise ConfigError("--date: the chat template does not ask for today's date; leave it out")
    for name in json.loads(arguments or "{}"):
        if name not in template.variables:
            raise ConfigError(f"--template-arg {name}: the chat template does not read it; leave it out")
