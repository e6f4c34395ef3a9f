"""Tools, documents and calls in the spellings of TRL, LLaMA-Factory and MiniMind: what the template gets of them."""

import json
from pathlib import Path
from typing import Any

import pytest

from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs, to_prompt
from minicache.data.records import Context, Note, is_blank, is_empty
from minicache.errors import RowRefused
from tests.conftest import Row
from tests.data.test_families import TEMPLATES, say
from tests.data.test_tokenizers import with_template

BARE = {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}
WHOLE = {"type": "function", "function": BARE}
EMPTY: tuple[Any, ...] = ("", " \n", "[]", " []\n", "{}", "null", '""', [], {}, None)
ASKED, GOOD, BAD = say("user", "q"), say("assistant", "a"), say("assistant", "b")
ROWS: dict[str, Row] = {
    "messages": {"chosen": [ASKED, GOOD], "rejected": [ASKED, BAD]},
    "prompt": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "q", "chosen": "a", "rejected": "b"},
    "outputs": {"instruction": "q", "output": ["a", "b"]},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "swift": {"messages": [ASKED, GOOD], "rejected_response": "b"},
}
FACTORY = ("alpaca", "outputs", "sharegpt")


@pytest.fixture(scope="module")
def qwen(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    source = (TEMPLATES / "qwen25.jinja").read_text(encoding="utf-8")
    return Encoder(with_template(tokenizer_dir, tmp_path_factory.mktemp("qwen"), source), 4096)


# --- nothing in other words ---


def with_empty(place: str, value: Any) -> Row:
    """A row with an empty value at one of the places that tools, documents and calls have."""
    row = ROWS["messages"]
    if place == "a system turn":
        turns = [say("system", "s", tools=value), ASKED]
        return {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    if place in ("tool_calls", "function_call"):
        return {"chosen": [ASKED, {**GOOD, place: value}], "rejected": [ASKED, BAD]}
    name, _, inner = place.partition(".")
    return {**row, name: {inner: value} if inner else value}


PLACES = (
    *("tools", "documents", "chat_template_kwargs", "chat_template_kwargs.tools", "chat_template_kwargs.documents"),
    *("a system turn", "tool_calls", "function_call", "history", "images", "context", "score"),
)


@pytest.mark.parametrize("value", EMPTY, ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_every_spelling_of_nothing_is_nothing(qwen: Encoder, place: str, value: Any) -> None:
    bare = with_empty(place, None)
    (pair,), (plain,) = (to_pairs(row, "f", 1) for row in (with_empty(place, value), bare))
    assert pair.context == Context() and pair == plain
    encoded, expected = qwen.encode(pair), qwen.encode(plain)
    assert encoded.pair.digest == expected.pair.digest and encoded.notes == expected.notes == ()


@pytest.mark.parametrize("value", EMPTY, ids=repr)
def test_what_is_empty_differs_from_no_other_place(value: Any) -> None:
    (pair,) = to_pairs({**ROWS["prompt"], "tools": value, "chat_template_kwargs": {"tools": [WHOLE]}}, "f", 1)
    assert pair.context.tools == [WHOLE]


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_lists_in_two_places_are_the_same_or_refused(name: str) -> None:
    one, other = [{"name": "a", "text": "x"}], [{"name": "b", "text": "x"}]
    row = {**ROWS["prompt"], name: json.dumps(one)}
    (pair,) = to_pairs({**row, "chat_template_kwargs": {name: one}}, "f", 1)
    assert getattr(pair.context, name) == one
    with pytest.raises(RowRefused, match=f"'{name}' stands in several places.*--ignore-fields {name}"):
        to_pairs({**row, "chat_template_kwargs": {name: other}}, "f", 1)


@pytest.mark.parametrize("text", ["[]", "null", "{}", '""'])
def test_an_answer_that_says_so_is_an_answer(text: str) -> None:
    """JSON text of nothing is nothing only where JSON is expected."""
    assert is_blank(text) and not is_empty(text)
    (pair,) = to_pairs({"prompt": text, "system": text, "chosen": text, "rejected": "b"}, "f", 1)
    assert [turn.content for turn in (*pair.prompt, *pair.chosen)] == [text] * 3


# --- tools without {type, function} around them ---


@pytest.mark.parametrize(
    "given", [[BARE], json.dumps([BARE]), BARE, [WHOLE, BARE]], ids=["list", "text", "one", "mixed"]
)
@pytest.mark.parametrize("form", ROWS)
def test_bare_tools_of_llama_factory_are_made_whole_and_others_are_counted(
    form: str, given: Any, qwen: Encoder
) -> None:
    pair = to_pairs({**ROWS[form], "tools": given}, "f", 1, *reading_of(form))[0]
    count = 2 if isinstance(given, list) and len(given) == 2 else 1
    if form in FACTORY:
        assert pair.context.tools == [WHOLE] * count and not pair.notes
        whole = to_pairs({**ROWS[form], "tools": [WHOLE] * count}, "f", 1, *reading_of(form))[0]
        assert qwen.encode(pair).pair.digest == qwen.encode(whole).pair.digest
    else:
        assert pair.context.tools == ([WHOLE, BARE] if count == 2 else [BARE])
        assert pair.notes == (Note("bare-tools"),)


def reading_of(form: str) -> tuple[Any, ...]:
    from minicache.data.columns import Reading

    return (Reading(pairs="best-worst"),) if form == "outputs" else ()


@pytest.mark.parametrize("tool", [WHOLE, {"type": "code"}, {"function": BARE}, {"name": "x", "type": "custom"}, "look"])
def test_what_is_no_bare_tool_stays_as_it_is(tool: Any) -> None:
    (pair,) = to_pairs({**ROWS["sharegpt"], "tools": [tool]}, "f", 1)
    assert pair.context.tools == [tool] and not pair.notes


def test_a_prompt_gets_the_tools_that_its_rows_were_trained_with() -> None:
    row = ROWS["sharegpt"]
    assert to_prompt({**row, "tools": [BARE]})[1].tools == [WHOLE]
    asked = {"conversations": row["conversations"], "tools": [BARE]}
    assert to_prompt(asked)[1].tools == [WHOLE]
    # MiniMind's dialogues
    assert to_prompt({"conversations": [say("system", "s", tools=[BARE]), ASKED]})[1].tools == [BARE]
