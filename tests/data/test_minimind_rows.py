"""MiniMind's rows with thoughts, calls and tools: ids and loss masks of its own data set class, restated in tests/references."""

import json
from itertools import product
from pathlib import Path

import pytest

from minicache.data.encode import Encoder
from minicache.data.formats import to_pair
from minicache.data.tokenizers import ChatTokenizer
from tests.conftest import Row
from tests.references.conversations import encode

TOOLS = json.dumps([{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}])
CALL = {"name": "weather", "arguments": {"city": '你好 "x"\n', "n": 2}}
THOUGHTS: tuple[Row, ...] = (
    {"content": "on a mat"},
    {"content": "on a mat", "reasoning_content": "the cat\n\nsat"},
    {"content": "<think>\nwhy not\n</think>\n\non a mat"},
    {"content": "on a mat", "reasoning_content": None},
)
CALLS: tuple[Row, ...] = (
    {"content": "", "tool_calls": json.dumps([CALL], ensure_ascii=False)},
    {"content": "then", "tool_calls": json.dumps([CALL, {**CALL, "arguments": {"n": "n"}}])},
    {
        "content": "",
        "reasoning_content": "it rained",
        "tool_calls": json.dumps([{"type": "function", "function": CALL}]),
    },
    {"content": None, "tool_calls": [{"type": "function", "id": "c1", "function": CALL}]},
)
RESULTS = [{"role": "tool", "content": '{"t": "世界"}'}, {"role": "tool", "content": "n"}]
SYSTEMS: tuple[list[Row], ...] = (
    [],
    [{"role": "system", "content": "a"}],
    [{"role": "system", "content": "a", "tools": TOOLS}],
    [{"role": "system", "content": "", "tools": TOOLS}],
)


def whole_rows() -> list[Row]:
    """Rows of turns with every key of MiniMind's, the last of which differ."""
    rows: list[Row] = []
    for system, earlier, first in product(SYSTEMS, THOUGHTS, CALLS):
        asked = [*system, {"role": "user", "content": "why"}, {"role": "assistant", **earlier}]
        asked.append({"role": "user", "content": "and then"})
        call, end = {"role": "assistant", **first}, {"role": "assistant", "content": "it rained"}
        rows.append({"chosen": [*asked, call], "rejected": [*asked, end]})
        rows.append({"chosen": [*asked, call, *RESULTS, {**end, **earlier}], "rejected": [*asked, call, *RESULTS, end]})
        rows.append({"chosen": [*asked, call, RESULTS[0], end], "rejected": [*asked, end]})
    return rows


def require_miniminds_masks(directory: Path, think: str) -> int:
    """The number of rows that have the ids and masks of MiniMind 3's class."""
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    encoder, compared = Encoder(ChatTokenizer.load(directory), 9999, loss_on="assistant", think=think), 0
    for row in whole_rows():
        expected = [encode(theirs, "minimind3", row[side], 9999, think) for side in ("chosen", "rejected")]
        if expected[0] == expected[1]:
            continue
        pair = encoder.encode(to_pair(row, "f", 1)).pair
        assert [tuple(column.tolist() for column in pair.side(side)) for side in (0, 1)] == expected
        compared += 1
    return compared


@pytest.mark.parametrize("think", ["keep", "drop"])
def test_rows_with_thoughts_and_calls_get_miniminds_ids_and_masks(
    minimind_tokenizers: dict[str, Path], think: str
) -> None:
    assert require_miniminds_masks(minimind_tokenizers["minimind3"], think) > 150
