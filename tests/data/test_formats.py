"""Six forms of a row, five kinds of file, and everything that can be wrong with either."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from minicache.data.encode import Encoder
from minicache.data.files import read_rows, zstd
from minicache.data.formats import FORMATS, to_pair
from minicache.data.records import Pair, Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import DataError, RowRefused
from tests.conftest import Row, make_rows, write_jsonl

QUESTION, GOOD, BAD = "What is 你好?", "It is hello.", "Who knows"


def turns(*pairs: tuple[str, object], role: str = "role", content: str = "content") -> list[Row]:
    return [{role: who, content: text} for who, text in pairs]


SINGLE: dict[str, Row] = {
    "messages": {
        "chosen": turns(("user", QUESTION), ("assistant", GOOD)),
        "rejected": turns(("user", QUESTION), ("assistant", BAD)),
    },
    "prompt": {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    "ultrafeedback": {
        "prompt": QUESTION,
        "prompt_id": "1",
        "score_chosen": 8.0,
        "chosen": turns(("user", QUESTION), ("assistant", GOOD)),
        "rejected": turns(("user", QUESTION), ("assistant", BAD)),
    },
    "trl-conversational": {
        "prompt": turns(("user", QUESTION)),
        "chosen": turns(("assistant", GOOD)),
        "rejected": turns(("assistant", BAD)),
    },
    "stack-exchange": {"qid": 1, "question": QUESTION, "response_j": GOOD, "response_k": BAD},
    "sharegpt": {
        "conversations": turns(("human", QUESTION), role="from", content="value"),
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "hh": {
        "chosen": f"\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
}
MULTI: dict[str, Row] = {
    "messages": {
        "chosen": turns(("user", "a"), ("assistant", "b"), ("user", QUESTION), ("assistant", GOOD)),
        "rejected": turns(("user", "a"), ("assistant", "b"), ("user", QUESTION), ("assistant", BAD)),
    },
    "trl-conversational": {
        "prompt": turns(("user", "a"), ("assistant", "b"), ("user", QUESTION)),
        "chosen": turns(("assistant", GOOD)),
        "rejected": turns(("assistant", BAD)),
    },
    "sharegpt": {
        "conversations": turns(("human", "a"), ("gpt", "b"), ("human", QUESTION), role="from", content="value"),
        "chosen": turns(("gpt", GOOD), role="from", content="value"),
        "rejected": turns(("gpt", BAD), role="from", content="value"),
    },
    "hh": {
        "chosen": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {QUESTION}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: a\n\nAssistant: b\n\nHuman: {QUESTION}\n\nAssistant: {BAD}",
    },
}


@pytest.mark.parametrize("rows", [SINGLE, MULTI], ids=["one turn", "several turns"])
def test_rows_that_say_the_same_give_the_same_encoded_pair(rows: dict[str, Row], tokenizer_dir: Path) -> None:
    encoder = Encoder(ChatTokenizer.load(tokenizer_dir), max_length=512)
    pairs = {name: to_pair(row, "f", 1) for name, row in rows.items()}
    assert len(set(pairs.values())) == 1
    assert len({encoder.encode(pair)[0].digest for pair in pairs.values()}) == 1


def test_a_file_in_two_forms_gives_the_same_encoded_pairs(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Lines of chosen and rejected conversations, and an array in ShareGPT's form, with rows that are refused among them."""
    rows = make_rows(60)
    rows[7]["rejected"] = rows[7]["chosen"]
    rows[20]["chosen"][-1] = {"role": "assistant", "content": " "}
    chat = write_jsonl(tmp_path / "chat.jsonl", rows)
    speakers, forms = {"user": "human", "assistant": "gpt"}, []
    for row in rows:
        said = {
            side: [{"from": speakers[turn["role"]], "value": turn["content"]} for turn in row[side]] for side in row
        }
        last = {side: turns[-1] for side, turns in said.items()}
        forms.append({"conversations": said["chosen"][:-1], **last})
    (tmp_path / "sharegpt.json").write_text(json.dumps(forms, ensure_ascii=False), encoding="utf-8")
    assert require_two_forms_alike(tokenizer_dir, chat, tmp_path / "sharegpt.json") == 58


def pair_or_refusal(row: object, line: int) -> Pair | RowRefused:
    try:
        return to_pair(row, "f", line)
    except RowRefused as refusal:
        return refusal


def require_two_forms_alike(tokenizer_dir: Path, *files: Path, every: int = 1) -> int:
    """The number of pairs in each file, once it is sure that all files give the same pairs and refuse for the same reasons.

    every: read one row of so many.
    """
    encoder = Encoder(ChatTokenizer.load(tokenizer_dir), max_length=4096)
    digests = []
    for file in files:
        pairs = [pair_or_refusal(row, line) for line, (_, row) in enumerate(read_rows(str(file))) if line % every == 0]
        encoded = list(encoder.encode_all(pairs, 0))
        digests.append([item if isinstance(item, RowRefused) else item[0].digest for item in encoded])
    kept = [[item for item in items if isinstance(item, bytes)] for items in digests]
    assert kept[0] == kept[1]
    refused = [[item.reason for item in items if isinstance(item, RowRefused)] for items in digests]
    assert refused[0] == refused[1]
    return len(kept[0])


def test_a_system_turn_stays(tokenizer_dir: Path) -> None:
    row = {**SINGLE["sharegpt"], "system": "Be brief."}
    assert to_pair(row, "f", 1).prompt[0] == Turn("system", "Be brief.")


def test_a_forced_format_reads_only_that() -> None:
    assert to_pair(SINGLE["prompt"], "f", 1, "prompt").chosen == (Turn("assistant", GOOD),)
    with pytest.raises(RowRefused, match="format hh needs 'chosen', 'rejected'") as refused:
        to_pair(SINGLE["stack-exchange"], "f", 1, "hh")
    assert refused.value.reason == "missing-field"
    for name in FORMATS:
        with pytest.raises(RowRefused):
            to_pair({"chosen": 1, "rejected": 2, "prompt": 3, "conversations": 4, "question": 5}, "f", 1, name)


ANSWER = turns(("user", "q"), ("assistant", "a"))
BAD_ROWS = [
    ("wrong-type", [1, 2]),
    ("wrong-type", "text"),
    ("wrong-type", None),
    ("unknown-format", {}),
    ("unknown-format", {"text": "x"}),
    ("missing-field", {"chosen": "x"}),
    ("missing-field", {"chosen": "x", "rejected": "y"}),
    ("missing-field", {"question": "q", "response_j": "x"}),
    ("missing-field", {"chosen": turns(("assistant", "a")), "rejected": turns(("assistant", "b"))}),
    ("missing-field", {"chosen": [{"role": "user"}], "rejected": ANSWER}),
    ("wrong-type", {"prompt": "q", "chosen": "x", "rejected": 3}),
    ("wrong-type", {"prompt": "q", "chosen": "x", "rejected": None}),
    ("missing-field", {"prompt": {"a": 1}, "chosen": "x", "rejected": "y"}),
    ("wrong-type", {"prompt": 3, "chosen": "x", "rejected": "y"}),
    ("wrong-type", {"chosen": ["a"], "rejected": ANSWER}),
    ("wrong-type", {"chosen": ANSWER, "rejected": "x"}),
    ("missing-field", {"chosen": {"a": 1}, "rejected": {"a": 2}}),
    ("wrong-type", {"chosen": turns(("user", "q"), ("assistant", 3)), "rejected": ANSWER}),
    ("unknown-role", {"chosen": turns(("user", "q"), ("narrator", "a")), "rejected": ANSWER}),
    ("empty-answer", {"chosen": [], "rejected": ANSWER}),
    ("empty-answer", {"prompt": "q", "chosen": "", "rejected": "y"}),
    ("empty-answer", {"prompt": "q", "chosen": "x", "rejected": " \n"}),
    ("empty-answer", {"chosen": ANSWER, "rejected": ANSWER[:1]}),
    ("identical", {"chosen": ANSWER, "rejected": ANSWER}),
    ("identical", {"prompt": "q", "chosen": "same", "rejected": "same"}),
    ("prompts-differ", {"chosen": ANSWER, "rejected": turns(("user", "other"), ("assistant", "a"))}),
    ("bad-unicode", {"prompt": "q", "chosen": "\ud800", "rejected": "y"}),
    ("bad-unicode", {"conversations": turns(("user", "q")), "chosen": "\ud800", "rejected": "y"}),
    ("bad-unicode", {"messages": ANSWER, "rejected_response": "\ud800"}),
    ("bad-unicode", {"prompt": "q", "chosen": "x", "rejected": "y", "chat_template_kwargs": {"mood": "\ud800"}}),
    ("wrong-type", {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": float("nan")}),
    ("wrong-type", {"prompt": "q", "response_1": "x", "response_2": "y", "preference_strength": True}),
    ("wrong-type", {"prompt": "q", "answers": [{"answer": "x", "rank": 10**400}, {"answer": "y", "rank": 1}]}),
]


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS)
def test_a_bad_row_is_refused_with_its_reason(reason: str, row: object) -> None:
    with pytest.raises(RowRefused) as refused:
        to_pair(row, "f", 1)
    assert refused.value.reason == reason
    assert 10 < len(str(refused.value)) < 400 and "\n" not in str(refused.value)


def test_answers_of_several_turns_are_kept_whole() -> None:
    more = turns(("user", "q"), ("assistant", "x"), ("user", "and?"), ("assistant", "y"))
    pair = to_pair({"chosen": more, "rejected": ANSWER}, "f", 1)
    assert len(pair.prompt) == 1 and len(pair.chosen) == 3 and len(pair.rejected) == 1


ROWS = make_rows(5)
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
MANY = [{**ROWS[0], "n": number} for number in range(3000)]


def parquet(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)


FILES = {
    "plain.jsonl": lambda file: file.write_text(LINES + "\n", encoding="utf-8"),
    "no-newline-at-the-end.jsonl": lambda file: file.write_text(LINES, encoding="utf-8"),
    "bom.jsonl": lambda file: file.write_text(LINES, encoding="utf-8-sig"),
    "crlf.jsonl": lambda file: file.write_bytes(LINES.replace("\n", "\r\n").encode()),
    "array.json": lambda file: file.write_text(json.dumps(ROWS), encoding="utf-8"),
    "pretty.json": lambda file: file.write_text("\n\n" + json.dumps(ROWS, indent=2), encoding="utf-8"),
    "lines.jsonl.gz": lambda file: file.write_bytes(gzip.compress(LINES.encode())),
    "wrong-suffix.txt": lambda file: file.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "two-frames.zst": lambda file: file.write_bytes(
        zstd.compress(LINES[:99].encode()) + zstd.compress(LINES[99:].encode())
    ),
    "lines.jsonl.zst": lambda file: file.write_bytes(zstd.compress(LINES.encode())),
    "rows.parquet": parquet,
}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    FILES[name](tmp_path / name)
    assert list(read_rows(str(tmp_path / name))) == list(enumerate(ROWS, start=1))


def test_line_numbers_are_those_an_editor_shows(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('\n{"a": 1}\n\n{broken\n{"a": 2}\n')
    rows = list(read_rows(str(tmp_path / "x.jsonl")))
    assert [line for line, _ in rows] == [2, 4, 5]
    assert isinstance(rows[1][1], RowRefused) and rows[1][1].reason == "broken-json"


def test_one_line_that_is_not_utf_8_costs_that_line_alone(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": "\xff\xfe"}\n{"a": 2}\n')
    rows = list(read_rows(str(tmp_path / "x.jsonl")))
    assert [line for line, _ in rows] == [1, 2, 3]
    assert isinstance(rows[1][1], RowRefused) and rows[1][1].reason == "bad-unicode"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a":' * 100_000, "9" * 10_000, "NaN", "nul", '{"a": 1} {"b": 2}'])
def test_no_line_breaks_the_reader(tmp_path: Path, line: str) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n' + line + "\n")
    _, (number, row) = read_rows(str(tmp_path / "x.jsonl"))
    assert number == 2
    with pytest.raises(RowRefused):
        if isinstance(row, RowRefused):
            raise row
        to_pair(row, "f", 2)


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


BAD_FILES = {
    "cut.jsonl.gz": cut(gzip.compress(json.dumps(MANY).encode())),
    "cut-lines.jsonl.gz": cut(gzip.compress("\n".join(map(json.dumps, MANY)).encode())),
    "cut.jsonl.zst": cut(zstd.compress("\n".join(map(json.dumps, MANY)).encode())),
    "cut.parquet": b"PAR1 and then nothing of the kind",
    "broken.json": b'[{"a": 1}, {"a"',
    "empty": b"",
    "blank": b" \n\n\t\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_cannot_be_read_is_one_line_with_its_name(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(BAD_FILES[name])
    with pytest.raises(DataError, match=name.replace(".", r"\.")) as error:
        list(read_rows(str(file)))
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_directory_are_said_to_be_that(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        next(read_rows(str(tmp_path / "absent.jsonl")))
    with pytest.raises(DataError, match="is a directory"):
        next(read_rows(str(tmp_path)))


def test_the_shipped_sample_is_sound() -> None:
    """At least 120 pairs, English and Chinese, one and several turns, none twice; the better answer is not known by its length."""
    sample = Path(__file__).parents[2] / "minicache" / "sample"
    pairs = [
        to_pair(row, "f", line) for name in ("train", "heldout") for line, row in read_rows(f"{sample / name}.jsonl")
    ]
    assert len(pairs) >= 120 and len({pair.prompt for pair in pairs}) == len(pairs)
    chinese = [pair for pair in pairs if any("\u4e00" <= sign <= "\u9fff" for sign in pair.prompt[-1].content)]
    several = [pair for pair in pairs if len(pair.prompt) > 1]
    assert len(chinese) > 20 and len(several) > 20 and isinstance(pairs[0], Pair)
    for some in (chinese, [pair for pair in pairs if pair not in chinese]):
        assert 0.4 < np.mean([len(pair.chosen[0].content) < len(pair.rejected[0].content) for pair in some]) < 0.6
