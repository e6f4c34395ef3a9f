"""Input by people who mean harm, or by no people at all: read, or refused in one line, in bounded memory."""

import gzip
import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minicache.cache.identity import digest_of
from minicache.cache.manifest import Manifest
from minicache.cache.reader import ReferenceCache
from minicache.data.columns import Reading
from minicache.data.encode import Encoder
from minicache.data.files import MOST_DEPTH, MOST_ROW, read_rows, zstd
from minicache.data.formats import FORMATS, to_pair, to_prompt
from minicache.data.records import Pair, Turn
from minicache.data.tokenizer_files import copy_tokenizer
from minicache.data.tokenizers import ChatTokenizer
from minicache.data.workers import ALONE, RowEncoder
from minicache.errors import CacheDamaged, CacheError, DataError, RowRefused
from tests.conftest import make_rows
from tests.data.test_special_text import special_ids
from tests.data.test_tokenizers import TEMPLATES, with_template
from tests.torture.test_store import changed, leaves

quickly = settings(max_examples=int(os.environ.get("EXAMPLES", 60)), deadline=None, derandomize=True,
                   suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip

NAMES = ["prompt", "chosen", "rejected", "role", "content", "from", "value", "conversations", "system", "messages", "question",
         "response_j", "response_k", "user", "assistant", "gpt", "human", "tool"]  # fmt: skip
ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()), max_size=20)
TEXT = st.one_of(st.sampled_from([*NAMES, "\n\nHuman: a\n\nAssistant: b", "<|im_end|>", "\ud800", "\0"]), ANY_TEXT)
TURN = st.fixed_dictionaries({}, optional=dict.fromkeys(("role", "content", "from", "value"), TEXT))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.lists(TURN, max_size=4)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)
ROW = st.one_of(JSON, st.dictionaries(st.sampled_from(NAMES), st.one_of(TEXT, st.lists(TURN, max_size=4), JSON)))


@pytest.fixture(scope="module")
def tokenizers(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, ChatTokenizer]:
    place = tmp_path_factory.mktemp("templates")
    return {name: with_template(tokenizer_dir, place / name, template) for name, template in TEMPLATES.items()}


# --- rows ---


@quickly
@given(ROW, st.sampled_from(["auto", *FORMATS]))
def test_any_row_is_a_pair_or_refused_for_a_reason(row: object, format: str) -> None:
    for read in (lambda: to_pair(row, "f", 1, format), lambda: to_prompt(row)):
        try:
            read()
        except RowRefused as refusal:
            assert refusal.reason and str(refusal) and "\n" not in str(refusal)


@quickly
@given(st.one_of(st.binary(max_size=300), st.lists(ROW, max_size=4), st.lists(st.one_of(TEXT, st.binary(max_size=30)))))
def test_any_file_is_read_or_refused(tmp_path: Path, content: bytes | list[Any]) -> None:
    """Bytes; lines of rows; lines of anything; as a whole or compressed, sound or cut."""
    if isinstance(content, list):
        lines = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in content]
        content = b"\n".join(lines)
    file = tmp_path / "file"
    for data in (content, gzip.compress(content), zstd.compress(content), b"[" + content.replace(b"\n", b",") + b"]",
                 gzip.compress(content)[:-5], zstd.compress(content)[:-1], b"PAR1" + content, b"\xef\xbb\xbf" + content,
                 ):  # fmt: skip
        file.write_bytes(data)
        try:
            for line, row in read_rows(str(file)):
                assert line >= 1
                if not isinstance(row, RowRefused):
                    with suppress(RowRefused):
                        to_pair(row, "f", line)
        except DataError as error:
            assert str(file) in str(error)


CONTENT = st.lists(
    st.one_of(st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "assistant\n", "\n", " "]), ANY_TEXT)
)


@quickly
@given(
    st.lists(CONTENT.map("".join), min_size=3, max_size=5),
    st.sampled_from(sorted(TEMPLATES)),
    st.sampled_from(["response", "assistant"]),
)
def test_no_content_ends_a_turn_or_changes_another(
    tokenizers: dict[str, ChatTokenizer], texts: list[str], name: str, loss_on: str
) -> None:
    """Whatever is typed: the ids are those of the text, and as many special tokens are in them as for harmless contents."""
    tokenizer, turns = tokenizers[name], len(texts) // 2 * 2 - 1
    texts = [text.encode(errors="replace").decode() for text in texts]
    roles = ["user", "assistant"] * 3
    prompt = tuple(Turn(role, text) for role, text in zip(roles, texts[:turns], strict=False))
    pair = Pair(prompt, (Turn("assistant", texts[-2] + "x"),), (Turn("assistant", texts[-1] + "y"),))
    harmless = Pair(
        tuple(Turn(turn.role, "a") for turn in prompt), (Turn("assistant", "x"),), (Turn("assistant", "y"),)
    )
    encoder = Encoder(tokenizer, 10**6, loss_on=loss_on)
    try:
        encoded = encoder.encode(pair).pair
    except RowRefused as refusal:
        assert refusal.reason in ("template", "special-text", "identical")
        return
    plain = encoder.encode(harmless).pair
    for side, answer in enumerate((pair.chosen, pair.rejected)):
        ids, mask = encoded.side(side)
        assert tokenizer.decode(ids) == tokenizer.render(pair.prompt + answer)
        assert special_ids(tokenizer, ids) == special_ids(tokenizer, plain.side(side)[0])
        assert mask.any()


# --- sizes ---

READ = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from minicache.data.files import read_rows
from minicache.errors import DataError, RowRefused
try:
    for line, row in read_rows(sys.argv[1]):
        print(line, row.reason if isinstance(row, RowRefused) else "ok")
except DataError as error:
    print("DataError", error)
"""


def read_in_memory_of(megabytes: int, file: Path) -> list[str]:
    command = [sys.executable, "-c", READ, str(file), str(megabytes * 2**20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


def test_a_line_of_100_MB_is_refused_and_the_next_is_read(tmp_path: Path) -> None:
    row = b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    long = b'{"prompt": "' + b"x" * 100_000_000 + b'"}\n'
    (tmp_path / "file").write_bytes(row + long + b" " * 2 * MOST_ROW + b"\n" + row + long[:-3])
    assert read_in_memory_of(900, tmp_path / "file") == ["1 ok", "2 too-large", "4 ok", "5 too-large"]


def write_table(file: Path, table: pa.Table) -> None:
    """As parquet or as arrow, by the file's suffix."""
    if file.suffix == ".parquet":
        pq.write_table(table, file, dictionary_pagesize_limit=2**30)
        return
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


TIMES = {
    "date": (pa.date32(), 2**31 - 1), "date in ms": (pa.date64(), 2**62), "time of day": (pa.time32("s"), 2**31 - 1),
    "timestamp": (pa.timestamp("us"), 2**62), "zone": (pa.timestamp("us", "UTC"), 2**62),
    "unknown zone": (pa.timestamp("us", "Mars/Olympus"), 0), "nanoseconds": (pa.timestamp("ns"), 1),
    "duration": (pa.duration("s"), 2**62), "negative": (pa.timestamp("us"), -(2**62)),
}  # fmt: skip


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("name", TIMES)
def test_times_beyond_those_of_python_cost_no_row(tmp_path: Path, name: str, suffix: str) -> None:
    """As PostgreSQL's 'infinity'; alone, in a list, an object, a map and a dictionary."""
    kind, value = TIMES[name]
    times = pa.array([value, None], pa.int32() if kind.bit_width == 32 else pa.int64()).view(kind)
    columns: dict[str, Any] = {
        "plain": times,
        "list": pa.ListArray.from_arrays([0, 1, 2], times),
        "object": pa.StructArray.from_arrays([times], ["at"]),
        "map": pa.MapArray.from_arrays([0, 1, 2], pa.array(["a", "b"]), times),
        "set": pa.DictionaryArray.from_arrays([0, 0], times[:1]),
    }
    # parquet's library has no empty object to write, nor a dictionary of durations
    if suffix == "parquet":
        del columns["set"]
    write_table(tmp_path / f"file.{suffix}", pa.table({"chosen": ["a", "b"], **columns}))
    rows: list[Any] = [row for _, row in read_rows(str(tmp_path / f"file.{suffix}"))]
    assert [row["chosen"] for row in rows] == ["a", "b"]
    assert isinstance(rows[0]["plain"], str) and [rows[0]["plain"]] == rows[0]["list"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_text_that_many_rows_refer_to_is_decoded_for_few_at_once(tmp_path: Path, suffix: str) -> None:
    """A dictionary's entry of 20 MB for 150 rows, of which each is small enough; and all of them in a list, which is not."""
    long, indices = pa.array(["x" * 20_000_000]), pa.array([0] * 150, pa.int32())
    write_table(tmp_path / f"file.{suffix}", pa.table({"chosen": pa.DictionaryArray.from_arrays(indices, long)}))
    assert len(read_in_memory_of(1200, tmp_path / f"file.{suffix}")) == 150
    lists = pa.ListArray.from_arrays([0, 150], pa.DictionaryArray.from_arrays(indices, long))
    write_table(tmp_path / f"file.{suffix}", pa.table({"chosen": lists}))
    assert read_in_memory_of(1200, tmp_path / f"file.{suffix}") == ["1 too-large"]


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_of_a_table_that_is_not_UTF_8_the_one_row_is_refused(tmp_path: Path, suffix: str) -> None:
    """In a list too, and where the rows refer to the texts."""
    texts = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    columns = {"text": texts, "list": pa.ListArray.from_arrays([0, 1, 2, 3], texts)}
    if suffix == "arrow":
        columns["set"] = pa.DictionaryArray.from_arrays([0, 1, 2], texts)
    for name, column in columns.items():
        write_table(tmp_path / f"file.{suffix}", pa.table({name: column}))
        rows = [row for _, row in read_rows(str(tmp_path / f"file.{suffix}"))]
        assert [isinstance(row, RowRefused) and row.reason for row in rows] == [False, "bad-unicode", False], name


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path: Path, suffix: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["chosen", "chosen"])
    write_table(tmp_path / f"file.{suffix}", table)
    with pytest.raises(DataError, match="expected each column once, got two named 'chosen'"):
        list(read_rows(str(tmp_path / f"file.{suffix}")))


def test_what_is_nested_too_deeply_is_refused_alone_or_among_many(tokenizer_dir: Path, tmp_path: Path) -> None:
    """Up to what JSON can be read at all; rows travel between processes once there are many."""
    rows = make_rows(ALONE + 300, seed=1)
    depths = [MOST_DEPTH - 2, MOST_DEPTH + 1, 900, 990, 10_000, 1_000_000]
    lines = [json.dumps(row) for row in rows]
    for at, depth in enumerate(depths):
        lines[-2 * at - 2] = lines[-2 * at - 2][:-1] + ', "more": ' + "[" * depth + "]" * depth + "}"
    (tmp_path / "file").write_text("\n".join(lines))
    encoder = RowEncoder(Encoder(ChatTokenizer.load(tokenizer_dir), 500), "file", Reading(), 0)
    results = list(encoder.encode_by_all_cores(read_rows(str(tmp_path / "file"))))
    refused = {
        item.line: item.reason for item in results if isinstance(item, RowRefused) if item.reason == "broken-json"
    }
    assert refused == {len(lines) - 2 * at - 1: "broken-json" for at in range(1, len(depths))}
    (tmp_path / "array").write_text("[" + ",".join(lines[-4:-2]) + "]")
    assert [isinstance(row, RowRefused) for _, row in read_rows(str(tmp_path / "array"))] == [True, False]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('{"prompt": "a", "chosen": "b", "rejected": "c", "chosen": "d"}', "d"),  # as everywhere, the last one counts
        ('{"prompt": "a", "chosen": "b\\u0000", "rejected": NaN}', "wrong-type"),
        ('{"prompt": "a", "chosen": ' + "9" * 5000 + ', "rejected": "c"}', "broken-json"),
        ('{"prompt": "a", "chosen": -Infinity, "rejected": "c"}', "wrong-type"),
        ('{"prompt": "a", "chosen": "\\ud800", "rejected": "c"}', "bad-unicode"),
        ('{"prompt": "a", "chosen": "b\x00", "rejected": "c"}', "broken-json"),
        ('{"prompt": "a", "chosen": "b\\u0000\\r\\u2028\\ufffe", "rejected": "c"}', "b\0\r\u2028\ufffe"),
    ],
)
def test_odd_json_is_read_as_it_says_or_refused(tmp_path: Path, line: str, expected: str) -> None:
    (tmp_path / "file").write_text("\n" * 1100 + line + "\r\n")
    ((number, row),) = read_rows(str(tmp_path / "file"))
    try:
        assert number == 1101
        if isinstance(row, RowRefused):
            raise row
        assert to_pair(row, "f", 1).chosen[0].content == expected
    except RowRefused as refusal:
        assert refusal.reason == expected


# --- a cache from a stranger ---


@quickly
@given(
    st.one_of(
        JSON,
        st.fixed_dictionaries(
            {"minicache": st.one_of(JSON, st.fixed_dictionaries({"identity": JSON, "log": JSON, "digest": TEXT}))}
        ),
    )
)
def test_any_manifest_is_refused(attributes: Any) -> None:
    with pytest.raises(CacheError):
        Manifest.from_attributes(attributes if isinstance(attributes, dict) else {"minicache": attributes}, "here")


@quickly
@given(st.data())
def test_a_signed_manifest_is_refused_or_one_that_could_be(ref_cache: Path, data: st.DataObject) -> None:
    manifest = json.loads((ref_cache / "zarr.json").read_text())["attributes"]["minicache"]
    content: Any = {key: manifest[key] for key in ("identity", "log")}
    for _ in range(data.draw(st.integers(1, 3))):
        content = changed(
            content, data.draw(st.sampled_from([path for path in leaves(content) if path])), data.draw(JSON)
        )
    try:
        digest = digest_of(content)
        read = Manifest.from_attributes({"minicache": {**content, "digest": digest}}, "here")
    except CacheError:
        return
    assert read.to_attributes()["minicache"]["digest"] == digest
    assert 0 < read.identity.block_pairs * read.identity.max_length < 2**45


@pytest.mark.parametrize("what", ["device", "pipe", "giant", "frame", "blocks"])
def test_files_that_are_none_of_a_caches_are_refused(ref_cache: Path, tmp_path: Path, what: str) -> None:
    cache = tmp_path / "cache"
    subprocess.run(["cp", "-r", ref_cache, cache], check=True)
    chunk = cache / "pairs/tokens/c/1/0"
    if what == "blocks":
        for file in cache.rglob("*/*/zarr.json"):
            content = json.loads(file.read_text())
            content["shape"][0] = 10**12
            file.write_text(json.dumps(content))
        with pytest.raises(CacheDamaged, match="expected 16,777,216 blocks or fewer"):
            ReferenceCache(cache)
        return
    chunk.unlink()
    if what == "device":
        chunk.symlink_to("/dev/zero")
    elif what == "pipe":
        os.mkfifo(chunk)
    elif what == "giant":
        with chunk.open("wb") as giant:
            giant.truncate(2**40)
    else:
        frame = zstd.compress(bytes(2**28))
        chunk.write_bytes(frame + checksum(frame))
    with pytest.raises(CacheDamaged, match="pairs/tokens, block 1: a chunk is damaged"):
        ReferenceCache(cache).load()


def checksum(data: bytes) -> bytes:
    """As zarr's crc32c codec appends it."""
    return np.uint32(google_crc32c.value(data)).tobytes()


def test_a_tokenizer_folder_hands_on_its_own_files_alone(tokenizer_dir: Path, ref_cache: Path, tmp_path: Path) -> None:
    """Weights, pickles, another config and links to somewhere else get into no policy and no merged cache."""
    folder = tmp_path / "tokenizer"
    subprocess.run(["cp", "-r", ref_cache / "tokenizer", folder], check=True)
    names = {file.name for file in folder.iterdir()}
    for name in (
        "config.json",
        "pytorch_model.bin",
        "model.safetensors",
        "adapter_config.json",
        "modeling_x.py",
        "x.pkl",
    ):
        (folder / name).write_text("{}")
    copy_tokenizer(folder, tmp_path / "copy")
    assert {file.name for file in (tmp_path / "copy").iterdir()} == names
    cache = tmp_path / "cache"
    subprocess.run(["cp", "-r", ref_cache, cache], check=True)
    (cache / "tokenizer" / "merges.txt").symlink_to("/etc/passwd")
    with pytest.raises(CacheDamaged, match=r"merges.txt: expected a file"):
        _ = ReferenceCache(cache).tokenizer_dir


def test_a_template_reaches_nothing_but_text(tokenizer_dir: Path, tmp_path: Path) -> None:
    """jinja2's immutable sandbox: no attribute that leads to Python, no change of what it is given."""
    for number, template in enumerate(
        (
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ raise_exception.__globals__['os'].system('touch pwned') }}",
            "{{ messages[0].update({'content': 'x'}) }}",
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "{% include '/etc/passwd' %}",
            "{{ lipsum.__globals__ }}",
            "{{ range(10**9) | list }}",
            "{{ '%s' | format(messages.__class__) ~ messages.__len__.__self__ }}",
        )
    ):
        tokenizer = with_template(tokenizer_dir, tmp_path / str(number), template)
        try:
            assert (
                tokenizer.render((Turn("user", "a"),)) == ""
            )  # what it may not have is undefined, and undefined is no text
        except RowRefused as refusal:
            assert refusal.reason == "template"
    assert not Path("pwned").exists()
