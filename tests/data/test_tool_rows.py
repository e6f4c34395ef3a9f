"""Tools, documents and calls in the spellings of TRL, LLaMA-Factory and MiniMind: what the template gets of them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minicache.data.columns import Reading
from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.formats import to_pairs, to_prompt
from minicache.data.records import Context, Note, is_blank, is_empty
from minicache.data.sampling import digest_of
from minicache.errors import RowRefused
from tests.conftest import Row
from tests.data.test_families import DATE, TEMPLATES, call, say
from tests.data.test_families import fixed_day as fixed_day
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
    pair = to_pairs({**ROWS[form], "tools": given}, "f", 1, reading_of(form))[0]
    count = 2 if isinstance(given, list) and len(given) == 2 else 1
    if form in FACTORY:
        assert pair.context.tools == [WHOLE] * count and not pair.notes
        whole = to_pairs({**ROWS[form], "tools": [WHOLE] * count}, "f", 1, reading_of(form))[0]
        assert qwen.encode(pair).pair.digest == qwen.encode(whole).pair.digest
    else:
        assert pair.context.tools == ([WHOLE, BARE] if count == 2 else [BARE])
        assert pair.notes == (Note("bare-tools"),)


def reading_of(form: str) -> Reading:
    return Reading(pairs="best-worst" if form == "outputs" else "")


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


# --- nulls that a table in columns fills in ---

CALLS = [
    call("look", {"city": "x"}),
    call("add", {"a": 1, "b": {"c": 2}}),
    call("list", {"all": [{"n": "m"}, {"k": 1}]}),
]
SCHEMAS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {name: {"type": "x"}}}},
    }
    for name in ("look", "add", "list")
]
FILLED: list[Row] = [
    {
        "prompt": [say("system", "s"), ASKED],
        "chosen": [say("assistant", None, tool_calls=[each])],
        "rejected": [say("assistant", "b")],
        "tools": [schema],
        "chat_template_kwargs": {"mood": "x"} if at else {"tone": "y"},
    }
    for at, (each, schema) in enumerate(zip(CALLS, SCHEMAS, strict=True))
]


def written(rows: list[Row], folder: Path, kind: str) -> Path:
    """A file with these rows."""
    import pyarrow
    import pyarrow.parquet

    file, table = folder / f"rows.{kind}", pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(table, file)
    else:
        with pyarrow.ipc.new_stream(str(file), table.schema) as stream:
            stream.write_table(table)
    return file


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_in_columns_gives_the_pairs_of_its_rows_as_json(qwen: Encoder, tmp_path: Path, kind: str) -> None:
    read = [row for _, row in read_rows(str(written(FILLED, tmp_path, kind)))]
    assert '"city": null' in json.dumps(read[1])
    for row, given in zip(read, FILLED, strict=True):
        (pair,), (expected,) = to_pairs(row, "f", 1), to_pairs(given, "f", 1)
        assert pair == expected and pair.context == expected.context
        assert qwen.encode(pair).pair.digest == qwen.encode(expected).pair.digest
        assert to_prompt(row)[1] == pair.context


def test_a_null_of_an_author_in_json_stays() -> None:
    asked = [say("assistant", None, tool_calls=[call("look", {"city": None})])]
    (pair,) = to_pairs({"prompt": [ASKED], "chosen": asked, "rejected": [BAD], "tools": [{**WHOLE, "x": None}]}, "f", 1)
    assert pair.chosen[0].message["tool_calls"] == asked[0]["tool_calls"] and "x" in (pair.context.tools or [{}])[0]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_sample_of_a_table_is_chosen_by_all_that_it_says(tmp_path: Path, kind: str) -> None:
    """Caches keep the last digest of their sample, so that the same rows are read again."""
    import pyarrow

    read = [row for _, row in read_rows(str(written(FILLED, tmp_path, kind)))]
    plain = pyarrow.Table.from_pylist(FILLED).to_pylist()
    assert [digest_of(row, 3) for row in read] == [digest_of(row, 3) for row in plain]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_null_of_a_turn_or_of_an_answer_is_what_it_was(tmp_path: Path, kind: str) -> None:
    ranked = {"prompt": "q", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": None}]}
    beside = {"prompt": "q", "chosen": "a", "rejected": "b", "meta": {"system": None, "n": 1}}
    for rows, reading, said in (
        ([ranked], Reading(pairs="best-worst"), "'rank' must be a number, got null"),
        ([beside], Reading(columns="system=meta.system"), ""),
        ([{**ROWS["prompt"], "rejected": None}], Reading(), "'rejected' must be text or a list of turns, got null"),
    ):
        ((_, row),) = read_rows(str(written(rows, tmp_path, kind)))
        if said:
            with pytest.raises(RowRefused, match=said):
                to_pairs(row, "f", 1, reading)
        else:
            assert to_pairs(row, "f", 1, reading)[0].prompt == to_pairs(ROWS["prompt"], "f", 1)[0].prompt


# --- what a template leaves out, and the remedy ---


def test_the_refusal_of_a_system_text_that_mistral_drops_says_what_to_do(tokenizer_dir: Path, tmp_path: Path) -> None:
    mistral = encoder_of("mistral3", tokenizer_dir, tmp_path)
    row = {**ROWS["prompt"], "system": "be brief"}
    with pytest.raises(RowRefused, match=r"the system says.*'be brief'.*--chat-template.*--ignore-fields"):
        mistral.encode(to_pairs(row, "f", 1)[0])
    mistral.encode(to_pairs(row, "f", 1, Reading(ignore_fields="system"))[0])
    with pytest.raises(RowRefused, match=r"(?!.*ignore-fields)the assistant says.*\(--chat-template\)$"):
        calling = say("assistant", "and text", tool_calls=[call("f", {})])
        mistral.encode(to_pairs({"prompt": "q", "chosen": [calling], "rejected": [BAD]}, "f", 1)[0])


def encoder_of(family: str, tokenizer_dir: Path, folder: Path) -> Encoder:
    source = (TEMPLATES / f"{family}.jinja").read_text(encoding="utf-8")
    return Encoder(with_template(tokenizer_dir, folder / family, source), 4096)


# --- calls behind a thought, results that are no text ---

SAID = '{"name": "look", "arguments": {"city": "x"}}'


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
@pytest.mark.parametrize("calls", [SAID, f"[{SAID}, {SAID}]"], ids=["one", "two"])
@pytest.mark.parametrize("between", ["", "\n\n"])
def test_a_call_behind_a_thought_has_both(role: str, calls: str, between: str, qwen: Encoder) -> None:
    asked = [{"from": "human", "value": "q"}]
    ends = [{"from": role, "value": f"<think>\nhm\n</think>{between}{calls}"}, {"from": "gpt", "value": "b"}]
    pair = to_pairs({"conversations": asked, "chosen": ends[0], "rejected": ends[1]}, "f", 1)[0]
    (turn,) = pair.chosen
    assert turn.content == "<think>\nhm\n</think>" and turn.more
    assert len(turn.more["tool_calls"]) == (2 if calls[0] == "[" else 1)
    text = qwen.tokenizer.decode(qwen.encode(pair).pair.side(0)[0])
    assert "<think>" in text and "hm" in text and '"city": "x"' in text


@pytest.mark.parametrize("value", [f"<think>\nhm {SAID}", f"hm <think>a</think>{SAID}", "<think>a</think>", "look"])
def test_a_call_that_is_no_json_is_refused(value: str) -> None:
    with pytest.raises(RowRefused, match="expected JSON") as refused:
        to_pairs({"prompt": "q", "chosen": [{"role": "function_call", "content": value}], "rejected": [BAD]}, "f", 1)
    assert refused.value.reason == "wrong-type"


VALUES: tuple[Any, ...] = (
    {"temp": 20, "é": "ü"},
    {"text": "x"},
    [{"temp": 20}, {"temp": 3}],
    [{"title": "t", "text": "x"}],
    [{"type": "car", "price": 3}],
    [1, 2],
)


@pytest.mark.usefixtures("fixed_day")
@pytest.mark.parametrize("value", VALUES, ids=repr)
@pytest.mark.parametrize("family", ["llama31", "qwen25", "qwen3", "mistral3", "gptoss"])
def test_a_result_that_is_a_value_is_written_as_transformers_writes_it_or_as_json(
    family: str, value: Any, tokenizer_dir: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    encoder = encoder_of(family, tokenizer_dir, tmp_path)
    if encoder.tokenizer.template and "strftime_now" in encoder.tokenizer.template:
        encoder = replace(encoder, tokenizer=replace(encoder.tokenizer, date=DATE))
    asked = [ASKED, say("assistant", None, tool_calls=[call("look", {"city": "x"})])]
    result = say("tool", value, tool_call_id="c00000001")
    pair, as_text = (
        to_pairs({"prompt": [*asked, each], "chosen": [GOOD], "rejected": [BAD]}, "f", 1)[0]
        for each in (result, {**result, "content": json.dumps(value, ensure_ascii=False)})
    )
    said = encoder._renderer.render(pair)[0][0].text
    encoder.encode(pair)
    if family in ("llama31", "gptoss"):
        theirs = AutoTokenizer.from_pretrained(tmp_path / family)
        assert said == theirs.apply_chat_template([*asked, result, GOOD], tokenize=False)
        assert re.search(rf"(\n\n|\|>){re.escape(json.dumps(value, ensure_ascii=False))}<\|(eot_id|end)\|>", said)
    else:
        assert said == encoder._renderer.render(as_text)[0][0].text


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio", "video"])
def test_a_picture_that_a_tool_returned_is_media(kind: str) -> None:
    turns = [ASKED, say("tool", [{"type": kind, "data": "…"}])]
    with pytest.raises(RowRefused) as refused:
        to_pairs({"prompt": turns, "chosen": [GOOD], "rejected": [BAD]}, "f", 1)
    assert refused.value.reason == "media"


@pytest.mark.parametrize(
    "parts", [["a", "b"], [{"type": "text", "text": "a"}, "b"], [{"text": "a"}, {"text": "b"}]], ids=repr
)
def test_parts_of_a_result_are_its_text(parts: list[Any]) -> None:
    (pair,) = to_pairs({"prompt": [ASKED, say("tool", parts)], "chosen": [GOOD], "rejected": [BAD]}, "f", 1)
    assert pair.prompt[1].message == say("tool", "ab")


# --- LLaMA-Factory's tags ---


def test_turns_with_other_keys_say_that_tags_name_them() -> None:
    renamed = {"speaker": "human", "words": "q"}
    with pytest.raises(RowRefused, match=r"has no 'role'; it has 'speaker', 'words'.*tags of LLaMA-Factory") as refused:
        to_pairs({"conversations": [renamed], "chosen": "a", "rejected": "b"}, "f", 1)
    assert refused.value.reason == "missing-field"
