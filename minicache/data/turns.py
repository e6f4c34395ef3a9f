"""Turns of a conversation, as preference files hold them -> `Turn`. A turn keeps every key that a template may read."""

import json
import re
from typing import Any

from minicache.data.records import ROLES, THOUGHTS, Turn, is_blank, is_empty
from minicache.data.values import json_of, kind_of, listed, require_sound, text_of
from minicache.errors import RowRefused

ROLE_NAMES = {
    **{role: role for role in ROLES},
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "developer": "system",
    "observation": "tool",
    "ipython": "tool",
    "function": "tool",
    "tool_response": "tool",
    "tool_results": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
# Roles whose content is a call as JSON text (LLaMA-Factory, ms-swift), perhaps behind a thought.
CALLERS = ("function_call", "tool_call")
THOUGHT = re.compile(r"\s*(<think>.*?</think>)\s*", re.DOTALL)
# Keys with the text of a turn; the first that is not empty counts.
CONTENTS = ("content", "value", "text")
# Types of parts that are text.
TEXTS = ("text", "input_text", "output_text")
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Keys with the calls of a turn; the first that is not empty counts.
CALLS = ("tool_calls", "function_call")
# Keys that may hold the JSON text of what they mean.
AS_JSON = ("tools", *CALLS, *MEDIA)


def turns_of(value: object, field: str) -> list[Turn]:
    """The turns of a list, or of a single turn."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise RowRefused("wrong-type", f"{field!r} must be a list of turns, got {kind_of(value)}")
    return [turn_of(item, field) for item in value]


def turn_of(item: object, field: str) -> Turn:
    """A message of any common form: {role, content}, {from, value} or {role, text}, and its other keys.

    Raises:
        RowRefused: it has no role or no content, an unknown role, or is no text.
    """
    if not isinstance(item, dict):
        raise RowRefused("wrong-type", f"a turn of {field!r} must be an object, got {kind_of(item)}")
    role_key = "from" if "from" in item else "role"
    text_keys = sorted((key for key in CONTENTS if key in item), key=lambda key: item[key] in (None, "", []))
    text_key = next(iter(text_keys), "")
    is_call = any(not is_blank(item.get(key)) for key in CALLS)
    for key, is_there in (
        (role_key, role_key in item),
        ("value" if role_key == "from" else "content", text_key or is_call),
    ):
        if not is_there:
            raise RowRefused(
                "missing-field",
                f"a turn of {field!r} has no {key!r}; it has {listed(item)}; expected role and content, or from and value: rename "
                "other keys, such as those that tags of LLaMA-Factory's dataset_info.json name",
            )
    name = text_of(item[role_key], role_key).lower()
    role = ROLE_NAMES.get(name)
    if role is None:
        raise RowRefused("unknown-role", f"role {item[role_key][:40]!r} in {field!r}; known: {', '.join(ROLE_NAMES)}")
    if len(item) == 2 and type(item.get(text_key)) is str and name not in CALLERS:
        return Turn(role, text_of(item[text_key], text_key))
    more = {
        key: value
        for key, value in item.items()
        if key not in (role_key, text_key) and not (is_blank if key in AS_JSON else is_empty)(value)
    }
    for key in ("role", *CONTENTS):
        if key in more and (
            more[key] != item[text_key] if key in CONTENTS else ROLE_NAMES.get(str(more[key]).lower()) != role
        ):
            of = text_key if key in CONTENTS else role_key
            raise RowRefused(
                "unused-field", f"a turn of {field!r} has {of!r} and {key!r}, which differ; expected one of them"
            )
        more.pop(key, None)
    return _with_keys(role, name, item.get(text_key), more, field)


def _with_keys(role: str, name: str, content: object, more: dict[str, Any], field: str) -> Turn:
    """A turn with keys beside role and content, or whose content is no text."""
    for key in MEDIA:
        if key in more:
            raise _no_media(key, field)
    calls = _calls(more)
    if name in CALLERS:
        text = text_of(content, name)
        thought = THOUGHT.match(text)
        calls = _call_list(json_of(text[thought.end() :] if thought else text, name), name)
        # In the content, as the thoughts of LLaMA-Factory's other answers.
        content = thought[1] if thought else None
    if calls:
        more["tool_calls"] = calls
    if role == "tool" and _is_data(content):
        # Llama 3's templates write the value, others its text (`template.Template`).
        more["content"], content = content, json.dumps(content, ensure_ascii=False)
    if isinstance(content, list):
        content = _text_of_parts(content, field)
    if content is None and calls:
        more["content"], content = None, ""
    for key, value in more.items():
        if key in THOUGHTS and not isinstance(value, list | dict):
            text_of(value, key)
        require_sound(value)
    return Turn(role, text_of(content, "content"), more or None)


def _is_data(content: object) -> bool:
    """Whether the content of a tool's turn is a value that the tool returned: an object, or a list of what are no parts."""
    return isinstance(content, dict) or (isinstance(content, list) and not all(map(_is_part, content)))


def _is_part(part: object) -> bool:
    if not isinstance(part, dict):
        return isinstance(part, str)
    kind = str(part.get("type", "text" if part.keys() == {"text"} else ""))
    return (kind in TEXTS and "text" in part) or any(name in kind for name in MEDIA)


def _text_of_parts(parts: list[Any], field: str) -> str:
    """The text of a content that is a list of parts. Raises RowRefused: a part is no text."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        if not isinstance(part, dict):
            raise RowRefused("wrong-type", f"a part of a content in {field!r} must be an object, got {kind_of(part)}")
        kind = str(part.get("type", "text"))
        if kind not in TEXTS or "text" not in part:
            raise _no_media(kind, field)
        texts.append(text_of(part["text"], "text"))
    return "".join(texts)


def _no_media(kind: str, field: str) -> RowRefused:
    return RowRefused(
        "media", f"{field!r} holds {kind[:40]!r}; expected text: minidpo trains language models on text alone"
    )


# --- calls ---


def _calls(more: dict[str, Any]) -> list[Any]:
    """The calls of a message, removed from its keys: `tool_calls`, or `function_call` of older APIs."""
    for key in CALLS:
        if key in more:
            value = more.pop(key)
            return _call_list(json_of(value, key) if isinstance(value, str) else value, key)
    return []


def _call_list(value: Any, key: str) -> list[Any]:
    items = value if isinstance(value, list) else [value]
    return [_call(json_of(item, key) if isinstance(item, str) else item, key) for item in items]


def _call(call: Any, key: str) -> dict[str, Any]:
    """A call as templates read it: {type, function: {name, arguments}}. Raises RowRefused: it is none."""
    if isinstance(call, dict) and not isinstance(call.get("function"), dict) and "name" in call:
        function = {name: call[name] for name in ("name", "arguments", "parameters") if name in call}
        function.setdefault("arguments", function.pop("parameters", {}))
        rest = {name: each for name, each in call.items() if name not in ("name", "arguments", "parameters", "type")}
        call = {**rest, "type": "function", "function": function}
    if not isinstance(call, dict) or not isinstance(call.get("function"), dict):
        raise RowRefused(
            "wrong-type", f"{key!r}: expected a call with a function's name and arguments, got {kind_of(call)}"
        )
    text_of(call["function"].get("name"), "name")
    return call
