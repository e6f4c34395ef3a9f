"""Whatever stands in a row is used, refused by name, or listed: for random columns and keys of turns, in every form."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicache.data.columns import SEEN, Reading
from minicache.data.encode import Encoded, Encoder
from minicache.data.formats import FORMATS, to_pairs
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.turns import MEDIA
from minicache.errors import RowRefused
from tests.data.test_hostile import quickly
from tests.data.test_layouts import LAYOUTS, Row

# A row of each form that is a pair.
ROWS = {name: layout for name, layout in LAYOUTS.items() if isinstance(layout.pairs, list)}
NAMES = st.one_of(
    st.sampled_from(sorted(SEEN)),
    st.sampled_from(["id", "score", "lang", "status", "rating"]),
    st.text("abcz_", min_size=1, max_size=9),
)
VALUES = st.one_of(
    st.text("xyz ", min_size=1, max_size=30).map(lambda text: text + "unheard"),
    st.integers(),
    st.booleans(),
    st.lists(st.just("unheard of"), min_size=1, max_size=2),
    st.dictionaries(st.just("k"), st.just("unheard of"), min_size=1),
)
EMPTY: st.SearchStrategy[Any] = st.sampled_from([None, "", [], {}])


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> Encoder:
    return Encoder(ChatTokenizer.load(tokenizer_dir), 4096)


def outcome(encoder: Encoder, row: Row, reading: Reading) -> tuple[Encoded | None, RowRefused | None]:
    try:
        return encoder.encode(to_pairs(row, "f", 1, reading)[0]), None
    except RowRefused as refusal:
        return None, refusal


def ids_of(encoded: Encoded | None) -> bytes:
    assert encoded
    return encoded.pair.digest


@quickly
@given(st.sampled_from(sorted(ROWS)), NAMES, VALUES)
def test_another_column_is_used_refused_by_name_or_listed(encoder: Encoder, form: str, column: str, value: Any) -> None:
    row, reading = ROWS[form].row, ROWS[form].reading
    named = {column, *(path.partition(".")[0] for path in reading.renamed.values())}
    if column in row or named & reading.renamed.keys():
        return
    before, _ = outcome(encoder, row, reading)
    if not before:
        return
    after, refusal = outcome(encoder, {**row, column: value}, reading)
    if refusal:
        # Columns that make another form of the row refuse it for what that form misses.
        assert repr(column) in str(refusal) or column in str(refusal) or refusal.reason in ("missing-field", "tie")
        # A column of a name that --columns reads elsewhere cannot be ignored alone.
        if refusal.reason in ("unused-field", "media") and not reading.columns:
            assert column in SEEN
            ignoring = Reading(**{**vars(reading), "ignore_fields": column})
            assert ids_of(outcome(encoder, {**row, column: value}, ignoring)[0]) == ids_of(before)
        return
    assert after
    listed = [note.detail for note in after.notes if note.kind == "unused"]
    assert column in [name.partition(".")[0] for name in listed] or ids_of(after) != ids_of(before)


@quickly
@given(st.sampled_from(sorted(ROWS)), NAMES, EMPTY)
def test_what_is_empty_changes_nothing(encoder: Encoder, form: str, column: str, value: Any) -> None:
    row, reading = ROWS[form].row, ROWS[form].reading
    if column in row:
        return
    before, after = (outcome(encoder, each, reading)[0] for each in (row, {**row, column: value}))
    # Not every row's turns can be written by the fixture's template.
    assert (not before and not after) or (
        before and after and ids_of(before) == ids_of(after) and before.notes == after.notes
    )


TURNS: Row = {
    "prompt": [{"role": "user", "content": "why"}],
    "chosen": [{"role": "assistant", "content": "because"}],
    "rejected": [{"role": "assistant", "content": "no"}],
}
KEYS = st.one_of(
    st.sampled_from(["tool_calls", "reasoning_content", "thinking", "name", "weight", "tool_call_id", "id", *MEDIA]),
    st.text("abcz_", min_size=1, max_size=9),
)


@quickly
@given(st.sampled_from(sorted(TURNS)), KEYS, VALUES)
def test_another_key_of_a_turn_is_used_refused_by_name_or_listed(
    encoder: Encoder, side: str, key: str, value: Any
) -> None:
    row = deepcopy(TURNS)
    row[side][0][key] = value
    after, refusal = outcome(encoder, row, Reading())
    if refusal:
        assert key in str(refusal)
        ignoring = outcome(encoder, row, Reading(ignore_fields=key))[0]
        assert ids_of(ignoring) == ids_of(outcome(encoder, TURNS, Reading())[0])
        return
    assert after
    listed = [note.detail for note in after.notes if note.kind == "unused"]
    assert f"{key} of a turn" in listed or ids_of(after) != ids_of(outcome(encoder, TURNS, Reading())[0])


def test_every_form_has_a_row_here() -> None:
    """The form that reads a row is the first that fits: so each must be the first for some row."""
    first = set()
    for layout in ROWS.values():
        row = {name: value for name, value in layout.row.items() if value is not None}
        for name, known in FORMATS.items():
            if known.fields <= row.keys() and known.fits(row):
                first.add(name)
                break
    rest = FORMATS.keys() - first
    assert rest <= {"prompt", "summaries"}, rest


@pytest.mark.parametrize("name", ["messages", "prompt", "sharegpt", "swift"])
def test_tools_and_system_reach_the_template_from_every_form(name: str, tokenizer_dir: Path, tmp_path: Path) -> None:
    from tests.data.test_tokenizers import with_template

    template = (Path(__file__).parents[1] / "references" / "templates" / "qwen25.jinja").read_text(encoding="utf-8")

    user, good, bad = (
        {"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b"))
    )
    rows: dict[str, Row] = {
        "messages": {"chosen": [user, good], "rejected": [user, bad]},
        "prompt": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "sharegpt": {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
        "swift": {"messages": [user, good], "rejected_response": "b"},
    }
    encoder = Encoder(with_template(tokenizer_dir, tmp_path, template), 4096)
    tools = [{"type": "function", "function": {"name": "look"}}]
    pair, expected = (
        encoder.encode(to_pairs({**rows[form], "system": "be brief", "tools": given}, "f", 1)[0]).pair
        for form, given in ((name, json.dumps(tools)), ("prompt", tools))
    )
    assert pair.digest == expected.digest
    text = encoder.tokenizer.decode(pair.side(0)[0])
    assert "be brief" in text and '"look"' in text
