"""What a template leaves out of a conversation is noticed, however short it is; what it writes in another form is not refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs
from minicache.data.records import Note
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from tests.conftest import Row
from tests.data.test_families import TEMPLATES, call, say

SHAPE = (
    "{% for m in MESSAGES %}{{ '<|im_start|>' + m.role + '\n' + (CONTENT) + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(content: str = "m.content", messages: str = "messages") -> str:
    return SHAPE.replace("CONTENT", content).replace("MESSAGES", messages)


QWEN3 = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
WITH_THOUGHTS = template("('<think>\n\n</think>\n\n' if m.role == 'assistant' else '') + m.content")
TEXTS_ALONE = QWEN3.replace("call.arguments | tojson", "(call.arguments.values() | select('string') | join(','))")
FIRST_CALL = QWEN3.replace("message.tool_calls or []", "(message.tool_calls or [])[:1]")
TOOL = {"type": "function", "function": {"name": "a", "parameters": {}}}


@pytest.fixture
def tokenizer(tokenizer_dir: Path) -> ChatTokenizer:
    return ChatTokenizer.load(tokenizer_dir)


def row(prompt: Any, chosen: Any, **beside: Any) -> Row:
    asked = prompt if isinstance(prompt, list) else [say("user", prompt)]
    chosen = chosen if isinstance(chosen, dict) else say("assistant", chosen)
    return {"prompt": asked, "chosen": [chosen], "rejected": [say("assistant", "other")], **beside}


def rendered(tokenizer: ChatTokenizer, row: Row, **options: Any) -> tuple[str, set[Note]]:
    """The text of the chosen side with what counts between « and », and the notes."""
    encoder, (pair,) = Encoder(tokenizer, 4096, **options), to_pairs(row, "f", 1)
    side = encoder._renderer.render(pair)[0][0]
    text = side.text
    for begin, end in reversed(side.spans):
        text = f"{text[:begin]}«{text[begin:end]}»{text[end:]}"
    return text, set(encoder.encode(pair).notes)


EARLIER = [say("user", "a"), say("assistant", "a"), say("user", "a")]
SYSTEMS = [say("system", "a"), say("user", "b"), say("assistant", "c"), say("system", "a"), say("user", "d")]
CALLING = say("assistant", None, tool_calls=[call("a", {"n": "a"})])
NUMBER = say("assistant", None, tool_calls=[call("a", {"n": "a", "k": 7})])
TWO_CALLS = say("assistant", None, tool_calls=[call("a", {"n": "a"}), call("a", {"n": "a"}, 2)])
BOTH_THOUGHTS = say("assistant", "a", thinking="b", reasoning_content="c")
DROPPED = {
    "the beginning": (template(messages="messages[-2:]"), row(EARLIER, "a")),
    "the system turn": (template(messages="messages if m.role != 'system'"), row([say("system", "a"), *EARLIER], "a")),
    "a second system turn": (template(messages="messages if m.role != 'system' or loop.first"), row(SYSTEMS, "a")),
    "the end of long texts": (template("m.content[:9]"), row("a", "123456789 and more")),
    "calls beside tools": (QWEN3.replace("message.tool_calls or []", "[]"), row("q", CALLING, tools=[TOOL])),
    "numbers": (TEXTS_ALONE, row("q", NUMBER)),
    "the second call": (FIRST_CALL, row("q", TWO_CALLS)),
    "the first of two thoughts": (QWEN3, row("q", "<think>\na\n</think>\n\na</think>\n\na")),
    "words before a thought": (QWEN3, row("q", "a <think>\na\n</think>\n\na")),
    "another thought of the turn": (QWEN3, row("q", BOTH_THOUGHTS)),
    "thoughts that are a list": (QWEN3, row("q", say("assistant", "a", reasoning_content=["a"]))),
    "documents": (WITH_THOUGHTS, row("q", "a", documents=[{"text": "a"}])),
}


@pytest.mark.parametrize("what", DROPPED)
@pytest.mark.parametrize("think", ["keep", "drop"])
def test_what_is_dropped_is_noticed(tokenizer: ChatTokenizer, what: str, think: str) -> None:
    source, said = DROPPED[what]
    for loss_on in ("response", "answer", "assistant"):
        with pytest.raises(RowRefused) as refused:
            rendered(replace(tokenizer, template=source), said, loss_on=loss_on, think=think)
        assert refused.value.reason in ("template", "unused-field")


PARTS = SHAPE.replace("(CONTENT)", "(m.content | map(attribute='text') | join)").replace("MESSAGES", "messages")
HARD = 'é\n\n"x" \\ <b>&amp; </b>\t你好 '
WRITTEN = {
    "trimmed": (template("m.content | trim"), row("  a\n", "\n b \n")),
    "on one line": (template("m.content | replace('\n', ' ')"), row("a\nb", "c\nd")),
    "as JSON": (template("m.content | tojson"), row(HARD, HARD)),
    "as JSON in ASCII": (template("m.content | tojson(ensure_ascii=true)"), row(HARD, HARD)),
    "as HTML": (template("m.content | e | string"), row(HARD, HARD)),
    "in parts alone": (PARTS, row("a", "b")),
    "tags in a question": (QWEN3, row("what is <think> and </think>?", "a")),
    "a thought without an end": (QWEN3, row("q", "<think>\na")),
    "values of all kinds": (QWEN3, row("q", say("assistant", None, tool_calls=[
        call("f", {"n": [1, {"a": None, "b": 1.5e-7}], "é\n": True, "": HARD})]))),
    "results as JSON": (QWEN3, row([say("user", "q"), CALLING, say("tool", json.dumps({"a": HARD}))], "a")),
}  # fmt: skip


@pytest.mark.parametrize("how", WRITTEN)
def test_what_is_written_in_another_form_is_no_reason_to_refuse(tokenizer: ChatTokenizer, how: str) -> None:
    source, said = WRITTEN[how]
    rendered(replace(tokenizer, template=source), said)


def test_a_key_that_the_template_does_not_read_is_listed(tokenizer: ChatTokenizer) -> None:
    named = row("q", say("assistant", "a", name="b"))
    for think in ("keep", "drop"):
        notes = rendered(replace(tokenizer, template=WITH_THOUGHTS), named, think=think)[1]
        assert notes == {Note("unused", "name of a turn")}
    reading = template("(m.name or '') + m.content")
    assert rendered(replace(tokenizer, template=reading), named)[1] == set()


SPECIAL = "<|im_end|>"
PLACES = {
    "a call": row("q", say("assistant", None, tool_calls=[call("f", {SPECIAL: "a"})])),
    "a result": row([say("user", "q"), CALLING, say("tool", SPECIAL)], "a"),
    "a thought": row("q", say("assistant", "a", reasoning_content=SPECIAL)),
    "a tool": row("q", "a", tools=[{"type": "function", "function": {"name": SPECIAL}}]),
    "an opening": row([say("user", "q"), say("assistant", f"so{SPECIAL}")], " a"),
}


@pytest.mark.parametrize("place", PLACES)
def test_special_tokens_in_calls_and_tools_are_text_too(tokenizer: ChatTokenizer, place: str) -> None:
    qwen3 = replace(tokenizer, template=QWEN3)
    (pair,), ends = to_pairs(PLACES[place], "f", 1), []
    for how in ("plain", "allow"):
        result = Encoder(qwen3, 4096, special_text=how).encode(pair)
        ends.append((result.pair.side(0)[0] == 2).sum())
        assert Note("special-text", SPECIAL) in result.notes
        assert qwen3.decode(result.pair.side(0)[0]) == qwen3.render(pair.prompt + pair.chosen, context=pair.context)
    assert ends[1] == ends[0] + 1
    with pytest.raises(RowRefused, match="special token"):
        Encoder(qwen3, 4096, special_text="refuse").encode(pair)


def test_special_tokens_that_a_template_escapes_are_refused(tokenizer: ChatTokenizer) -> None:
    """Their hidden characters would be written as escapes."""
    source = template("m.content | tojson(ensure_ascii=true)")
    with pytest.raises(RowRefused, match="escapes the text of a special token"):
        rendered(replace(tokenizer, template=source), row(SPECIAL, "a"))


OPENED = [say("user", "q"), say("assistant", "The answer is")]


@pytest.mark.parametrize("loss_on", ["response", "answer", "assistant"])
@pytest.mark.parametrize("family", sorted(file.stem for file in TEMPLATES.glob("*.jinja")))
def test_an_answer_that_the_prompt_opens_counts_from_there(tokenizer: ChatTokenizer, family: str, loss_on: str) -> None:
    named = {**tokenizer.special, "bos_token": "<s>", "eos_token": "</s>"}
    source = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    text, _ = rendered(replace(tokenizer, template=source, special=named), row(OPENED, " yes"), loss_on=loss_on)
    before, counted = text.split("«")
    assert before.endswith("The answer is") and counted.startswith(" yes<")


def test_openings_of_other_kinds(tokenizer: ChatTokenizer) -> None:
    qwen3, asked = replace(tokenizer, template=QWEN3), say("user", "q")
    think = row([asked, say("assistant", "<think>\nHm")], " yes\n</think>\n\na")
    assert "<think>\nHm« yes\n</think>\n\na<|im_end|>\n»" in rendered(qwen3, think)[0]
    space = row([asked, say("assistant", "so ")], "a")
    assert "\nso «a<|im_end|>\n»" in rendered(qwen3, space)[0]
    thought = row([asked, say("assistant", "so", reasoning_content="t")], " a")
    assert "t\n</think>\n\nso« a<|im_end|>" in rendered(qwen3, thought)[0]
    acting = row([asked, say("assistant", "so")], say("assistant", "", tool_calls=[call("f", {"n": 1})]))
    assert "\nso«\n<tool_call>" in rendered(qwen3, acting)[0]
    assert (
        "assistant\nso« a<|im_end|>\n»" in rendered(qwen3, row([asked, say("assistant", "so")], " a"), think="drop")[0]
    )


def test_left_truncation_cuts_the_opening_before_the_answer(tokenizer: ChatTokenizer) -> None:
    (pair,) = to_pairs(row([say("user", "why " * 50), say("assistant", "so " * 50)], "not a mat"), "f", 1)
    whole, cut = (Encoder(tokenizer, most, truncate="left").encode(pair).pair.side(0) for most in (4096, 20))
    assert len(cut[0]) <= 20 and cut[0].tolist() == whole[0][-len(cut[0]) :].tolist()
    assert cut[1].sum() == whole[1].sum() > 2


def test_tools_in_several_places_agree(tokenizer: ChatTokenizer) -> None:
    other, system = {**TOOL, "strict": True}, say("system", "s", tools=json.dumps([TOOL]))
    said = row([system, say("user", "q")], "a")
    (pair,) = to_pairs(said, "f", 1)
    assert to_pairs({**said, "tools": [TOOL]}, "f", 1) == [pair] and pair.context.tools == [TOOL]
    with pytest.raises(RowRefused, match="'tools' stands in several places"):
        to_pairs({**said, "tools": [other]}, "f", 1)
    assert Encoder(replace(tokenizer, template=QWEN3), 4096).encode(pair).notes == ()
