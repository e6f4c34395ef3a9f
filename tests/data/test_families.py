"""Whole messages through the templates of ten families: what transformers renders of them, or a refusal of what it would drop."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs
from minicache.errors import RowRefused
from tests.data.test_tokenizers import with_template
from tests.references.families import FAMILIES

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "toolword",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
ASK = {"role": "user", "content": "askword one?"}
AGAIN = {"role": "user", "content": "askword two?"}
SYSTEM = {"role": "system", "content": "systemword"}
FIRST = {"role": "assistant", "content": "firstword"}
RESULT = {"role": "tool", "content": 'resultword "18"\n度', "tool_call_id": "c00000001", "name": "weather"}


def call(city: str, content: str | None, as_text: bool = False) -> dict[str, Any]:
    arguments: Any = {"city": city}
    function = {"name": "weather", "arguments": json.dumps(arguments) if as_text else arguments}
    return {
        "role": "assistant",
        "content": content,
        "tool_calls": [{"id": "c00000001", "type": "function", "function": function}],
    }


def said(text: str, **others: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **others}


# prompt, chosen answer, columns beside; the rejected answer is "badword"
TALKS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]] = {
    "plain": ([ASK], [said("goodword")], {}),
    "system": ([SYSTEM, ASK], [said("goodword")], {}),
    "two systems": ([SYSTEM, {"role": "system", "content": "otherword"}, ASK], [said("goodword")], {}),
    "several turns": ([SYSTEM, ASK, FIRST, AGAIN], [said(" goodword\n")], {}),
    "turns in the answer": ([ASK], [said("goodword"), AGAIN, said("goodword two")], {}),
    "text parts": ([{"role": "user", "content": [{"type": "text", "text": "askword one?"}]}], [said("goodword")], {}),
    "tools": ([ASK], [said("goodword")], {"tools": [TOOL]}),
    "tools as text": ([ASK], [said("goodword")], {"tools": json.dumps([TOOL])}),
    "documents": ([ASK], [said("goodword")], {"documents": [{"title": "t", "text": "documentword"}]}),
    "a call in the prompt": ([ASK, call("Rome", ""), RESULT], [said("goodword")], {"tools": [TOOL]}),
    "a call with words in the prompt": ([ASK, call("Rome", "lookword"), RESULT], [said("goodword")], {"tools": [TOOL]}),
    "a call of null content": ([ASK], [call("Rome", None)], {"tools": [TOOL]}),
    "a call as text": ([ASK], [call("Rome", None, as_text=True)], {}),
    "a call with words": ([ASK], [call("Rome", "lookword")], {}),
    "two calls at once": (
        [ASK],
        [{**call("Rome", None), "tool_calls": call("Rome", None)["tool_calls"] + call("Oslo", None)["tool_calls"]}],
        {},
    ),
    "a call, its result, an answer": ([ASK], [call("Rome", ""), RESULT, said("goodword")], {}),
    "thoughts": ([ASK], [said("goodword", reasoning_content="thoughtword")], {}),
    "thinking": ([ASK], [said("goodword", thinking="thoughtword")], {}),
    "thoughts in the text": ([ASK], [said("<think>\nthoughtword\n</think>\n\ngoodword")], {}),
    "earlier thoughts": (
        [ASK, said("<think>\nthoughtword\n</think>\n\nfirstword"), AGAIN],
        [said("<think>\nthoughtword two\n</think>\n\ngoodword")],
        {},
    ),
    "an argument": ([ASK], [said("goodword")], {"chat_template_kwargs": {"enable_thinking": False}}),
    "another argument": ([ASK], [said("goodword")], {"chat_template_kwargs": {"reasoning_effort": "high"}}),
}
MARKS = ("word", "Rome", "Oslo", "weather")


def transformers_text(tokenizer: Any, messages: list[dict[str, Any]], row: dict[str, Any], as_text: bool) -> str:
    """What transformers renders, with arguments of calls in the kind that the template wants; "" if the template refuses.

    transformers removes keys that are null, and R1's template wants a null content: so its own compiled template gets it.
    """
    messages = deepcopy(messages)
    for message in messages:
        if isinstance(message["content"], list):
            message["content"] = message["content"][0]["text"]
        for each in message.get("tool_calls", ()):
            arguments = each["function"]["arguments"]
            if as_text and isinstance(arguments, dict):
                each["function"]["arguments"] = json.dumps(arguments)
            elif not as_text and isinstance(arguments, str):
                each["function"]["arguments"] = json.loads(arguments)
    tools = json.loads(row["tools"]) if isinstance(row.get("tools"), str) else row.get("tools")
    if as_text:
        compiled = chat_template_utils._compile_jinja_template(tokenizer.chat_template)
        try:
            return str(compiled.render(messages=messages, add_generation_prompt=False, **tokenizer.special_tokens_map))
        # a template may raise anything
        except Exception:
            return ""
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tools=tools,
                documents=row.get("documents"),
                tokenize=False,
                **row.get("chat_template_kwargs", {}),
            )
        )
    # a template may raise anything
    except Exception:
        return ""


def marks_of(row: dict[str, Any], messages: list[dict[str, Any]]) -> set[str]:
    """The words of a conversation that a template must write, but for earlier thoughts and words beside a call in the prompt."""
    kept = deepcopy(messages)
    asked = [at for at, message in enumerate(kept) if message["role"] == "user"]
    for at, message in enumerate(kept):
        if message["role"] == "assistant" and at < asked[-1] and isinstance(message["content"], str):
            message["content"] = message["content"].split("</think>")[-1]
        if message in row["prompt"] and "tool_calls" in message:
            message["content"] = ""
    text = json.dumps(
        [
            [{k: v for k, v in m.items() if k not in ("name", "tool_call_id")} for m in kept],
            row.get("tools"),
            row.get("documents"),
        ]
    )
    words = "".join(sign if sign.isalpha() else " " for sign in text.replace("\\n", " ").replace("\\", " ")).split()
    return {word for word in words if word.endswith("word") or word in MARKS}


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_messages_render_as_in_transformers_or_are_refused(
    tokenizer_dir: Path, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    class FixedDate(chat_template_utils.datetime):  # type: ignore[name-defined, misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2024, 7, 26)

    monkeypatch.setattr(chat_template_utils, "datetime", FixedDate)
    ours = with_template(tokenizer_dir, tmp_path, FAMILIES[family])
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    outcomes = {}
    for name, (prompt, chosen, others) in TALKS.items():
        row = {"prompt": prompt, "chosen": chosen, "rejected": [said("badword")], **others}
        messages = [*prompt, *chosen]
        expected = transformers_text(theirs, messages, row, as_text=family == "deepseek-r1")
        lost = {mark for mark in marks_of(row, messages) if mark not in expected}
        try:
            ids, _ = Encoder(ours, 4096).encode(to_pairs(row, "f", 1)[0]).pair.side(0)
        except RowRefused as refusal:
            assert refusal.reason in ("template", "unused-field")
            assert not expected or lost, f"{name}: {refusal}"
            outcomes[name] = "refused"
            continue
        assert not lost, f"{name}: {sorted(lost)} of {expected!r}"
        assert ids.tolist() == theirs(expected, add_special_tokens=False)["input_ids"], name
        outcomes[name] = "read"
    assert outcomes["plain"] == outcomes["system"] == outcomes["text parts"] == "read"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("loss_on", ["answer", "assistant", "response"])
def test_words_of_users_and_tools_never_count(tokenizer_dir: Path, tmp_path: Path, family: str, loss_on: str) -> None:
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, FAMILIES[family]), 4096, loss_on=loss_on)
    read = 0
    for name, (prompt, chosen, others) in TALKS.items():
        row = {"prompt": prompt, "chosen": chosen, "rejected": [said("badword")], **others}
        try:
            ids, mask = encoder.encode(to_pairs(row, "f", 1)[0]).pair.side(0)
        except RowRefused:
            continue
        read += 1
        text = encoder.tokenizer.decode(ids[mask == 1])
        rest = encoder.tokenizer.decode(ids[mask == 0])
        if loss_on != "response":
            assert not any(word in text for word in ("askword", "resultword", "systemword", "documentword")), name
        assert ("firstword" in text) == (
            (loss_on == "assistant" and FIRST in prompt) or ("firstword" in text and loss_on == "assistant")
        )
        for word in ("goodword", "lookword") if "lookword" not in json.dumps(prompt) else ("goodword",):
            assert word not in rest, f"{name}: {rest!r}"
        if chosen[0].get("tool_calls"):
            assert "Rome" in text and "Rome" not in rest, name
        if "thoughtword" in json.dumps(chosen) and "earlier" not in name:
            assert "thoughtword" in text and "thoughtword" not in rest, name
    assert read >= 5
