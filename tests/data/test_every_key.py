"""Every column of a row and every key of a turn is used, listed or refused by name, whatever it is called and holds."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicache.data.columns import SEEN, Reading
from minicache.data.encode import Encoder
from minicache.data.formats import FORMATS, to_pairs
from minicache.data.records import THOUGHTS, Note
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.turns import MEDIA
from minicache.errors import RowRefused
from tests.conftest import Row
from tests.data.test_families import TEMPLATES

quickly = settings(max_examples=int(os.environ.get("EXAMPLES", 150)), deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

QUESTION, GOOD, BAD = "What is 你好?", "It is hello.", "Who knows"


def asked(role: str = "role", content: str = "content", who: str = "user") -> list[Row]:
    return [{role: who, content: QUESTION}]


def answer(text: str, role: str = "role", content: str = "content", who: str = "assistant") -> Row:
    return {role: who, content: text}


def saying(text: str) -> list[Row]:
    return [*asked(), answer(text)]


SHAREGPT = ("from", "value")
HUMAN = asked(*SHAREGPT, "human")
# A row of each form; all say the same.
ROWS: dict[str, Row] = {
    "sharegpt": {"conversations": HUMAN, "chosen": answer(GOOD, *SHAREGPT, "gpt"),
                 "rejected": answer(BAD, *SHAREGPT, "gpt")},
    "stack-exchange": {"question": QUESTION, "response_j": GOOD, "response_k": BAD},
    "ultrainteract": {"trajectory": HUMAN, "chosen": GOOD, "rejected": BAD},
    "math-step": {"prompt": QUESTION, "initial_reason_steps": "It", "chosen": " is hello.", "rejected": " rained"},
    "messages": {"chosen": saying(GOOD), "rejected": saying(BAD)},
    "prompt": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "hh": {"chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
           "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}"},
    "alpaca": {"instruction": QUESTION, "chosen": GOOD, "rejected": BAD},
    "orca": {"question": QUESTION, "chosen": GOOD, "rejected": BAD},
    "input": {"input": QUESTION, "chosen": GOOD, "rejected": BAD},
    "argilla": {"prompt": QUESTION, "chosen_response": GOOD, "rejected_response": BAD},
    "swift": {"messages": saying(GOOD), "rejected_response": BAD},
    "pku": {"prompt": QUESTION, "response_0": BAD, "response_1": GOOD, "better_response_id": 1},
    "helpsteer2": {"prompt": QUESTION, "response_1": GOOD, "response_2": BAD, "preference_strength": -2},
    "helpsteer3": {"context": asked(), "response1": BAD, "response2": GOOD, "overall_preference": 2},
    "shp": {"history": QUESTION, "human_ref_A": GOOD, "human_ref_B": BAD, "labels": 1},
    "webgpt": {"question": QUESTION, "answer_0": GOOD, "answer_1": BAD, "score_0": 0.5, "score_1": -0.5},
    "summaries": {"prompt": QUESTION, "summaries": [{"text": BAD}, {"text": GOOD}], "choice": 1},
    "arena": {"conversation_a": saying(GOOD), "conversation_b": saying(BAD), "winner": "model_a"},
    "arena-votes": {"prompt": json.dumps([QUESTION]), "response_a": json.dumps([GOOD]),
                    "response_b": json.dumps([BAD]), "winner_model_a": 1,
                    "winner_model_b": 0},
    "nectar": {"prompt": QUESTION, "answers": [{"answer": BAD, "rank": 2}, {"answer": GOOD, "rank": 1}]},
    "answers": {"question": QUESTION, "answers": [{"text": GOOD, "pm_score": 4}, {"text": BAD, "pm_score": 1}]},
    "ultrafeedback": {"instruction": QUESTION, "completions": [{"response": BAD, "overall_score": 2},
                                                               {"response": GOOD, "overall_score": 7}]},
    "distilabel": {"instruction": QUESTION, "generations": [BAD, GOOD], "ratings": [1, 5]},
    "outputs": {"instruction": QUESTION, "output": [GOOD, BAD]},
}  # fmt: skip
OTHER = {"math-step"}
PAIRS = "best-worst"


@pytest.fixture(scope="module")
def encoder(tokenizer_dir: Path) -> Encoder:
    """Of a template that writes tools, calls and thoughts, and no documents."""
    template = (TEMPLATES / "qwen3.jinja").read_text(encoding="utf-8")
    return Encoder(replace(ChatTokenizer.load(tokenizer_dir), template=template), 4096)


def outcome(encoder: Encoder, row: Row, ignored: str = "") -> tuple[bytes, set[Note]]:
    """The digest of the row's pair and what is noted of it."""
    (pair,) = to_pairs(row, "f", 1, Reading(pairs=PAIRS, ignore_fields=ignored))
    result = encoder.encode(pair)
    return result.pair.digest, set(result.notes)


def test_each_form_has_a_row_and_all_say_the_same(encoder: Encoder) -> None:
    assert ROWS.keys() == FORMATS.keys()
    for name, row in ROWS.items():
        (auto,), (forced,) = (to_pairs(row, "f", 1, Reading(form, pairs=PAIRS)) for form in ("auto", name))
        assert auto == forced
    assert len({outcome(encoder, row)[0] for name, row in ROWS.items() if name not in OTHER}) == 1
    assert all(not outcome(encoder, row)[1] for row in ROWS.values())


NOTHING: list[Any] = [None, "", [], {}]
WORDS = st.text("abcxyz", min_size=3, max_size=6).map(lambda text: f"W{text}")
NAMES = st.one_of(
    st.sampled_from(sorted({*SEEN, *(field for form in FORMATS.values() for field in form.fields), "documents"})),
    st.text("abcdefgh_", min_size=1, max_size=6),
)
TURNS = st.lists(st.builds(lambda role, text: {"role": role, "content": text},
                           st.sampled_from(["user", "assistant", "system"]), WORDS), min_size=1, max_size=3)  # fmt: skip
VALUES = st.one_of(
    WORDS, st.integers(), st.booleans(), st.lists(WORDS, min_size=1, max_size=2), TURNS,
    st.dictionaries(WORDS, WORDS, min_size=1, max_size=2),
)  # fmt: skip
KEYS = st.one_of(st.sampled_from(["name", "tool_call_id", "tool_calls", "function_call", "tools", "weight", "text",
                                  *THOUGHTS, *MEDIA]), st.text("abcdefgh_", min_size=1, max_size=6))  # fmt: skip


def require_accounted(encoder: Encoder, row: Row, base: Row, name: str) -> None:
    """A row with one name more than `base` uses it, lists it or is refused by it, and goes on where it is ignored."""
    plain = outcome(encoder, base)
    try:
        digest, notes = outcome(encoder, row)
    except RowRefused as refusal:
        assert f"{name}" in str(refusal), refusal
    else:
        assert digest != plain[0] or any(note.detail.split(" of a turn")[0].startswith(name) for note in notes), notes
    assert outcome(encoder, row, name) == plain


@quickly
@given(st.sampled_from(sorted(ROWS)), NAMES, VALUES)
def test_a_column_is_used_listed_or_refused_by_name(encoder: Encoder, form: str, name: str, value: Any) -> None:
    row = ROWS[form]
    if name not in row:
        require_accounted(encoder, {**row, name: value}, row, name)


@quickly
@given(st.sampled_from(["sharegpt", "messages", "swift", "arena", "helpsteer3", "ultrainteract"]), KEYS, VALUES,
       st.integers(0, 1))  # fmt: skip
def test_a_key_of_a_turn_is_used_listed_or_refused_by_name(
    encoder: Encoder, form: str, key: str, value: Any, place: int
) -> None:
    row = ROWS[form]
    changed, found = with_key(row, key, value, place)
    if found:
        require_accounted(encoder, changed, row, key)


def with_key(row: Row, key: str, value: Any, place: int) -> tuple[Row, bool]:
    """The row with a key more in the turn at this place of each conversation, and whether there is one."""
    changed = {}
    for column, turns in row.items():
        items = [turns] if isinstance(turns, dict) else turns
        if isinstance(items, list):
            items = [{**turn, key: value} if at == place and key not in turn else turn for at, turn in enumerate(items)]
        changed[column] = items[0] if isinstance(turns, dict) else items
    return changed, changed != row


@quickly
@given(st.sampled_from(["nectar", "answers", "ultrafeedback"]), NAMES, VALUES)
def test_a_key_of_a_ranked_answer_is_listed_or_refused_by_name(
    encoder: Encoder, form: str, name: str, value: Any
) -> None:
    column = "completions" if form == "ultrafeedback" else "answers"
    row = ROWS[form]
    if name not in row[column][0]:
        answers = [{**each, name: value} for each in row[column]]
        require_accounted(encoder, {**row, column: answers}, row, f"{column}.{name}")


@quickly
@given(st.sampled_from(sorted(ROWS)), NAMES, KEYS, st.sampled_from(NOTHING), st.integers(0, 1))
def test_what_is_null_or_empty_changes_nothing(
    encoder: Encoder, form: str, name: str, key: str, value: Any, place: int
) -> None:
    row = ROWS[form]
    plain = outcome(encoder, row)
    if name not in row:
        assert outcome(encoder, {**row, name: value}) == plain
    if form in ("sharegpt", "messages", "swift", "arena", "helpsteer3", "ultrainteract"):
        assert outcome(encoder, with_key(row, key, value, place)[0]) == plain
