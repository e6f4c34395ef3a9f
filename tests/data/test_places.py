"""What --data can name: each kind gives the same rows and the same pairs, is named the same tomorrow, and goes on after a kill."""

import bz2
import csv
import errno
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.cli import expand_data
from minicache.data import urls
from minicache.data.files import MOST_ROW, DataFile, read_rows
from minicache.data.folders import glob_pattern, splits_by_name
from minicache.data.places import OF_FOLDER, locate, located
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import ConfigError, DataError, MinicacheError, OutputError, RowRefused, StoreError
from minicache.intake.prompts import read_prompts
from minicache.options.exchange import ImportConfig
from minicache.options.others import CompareConfig
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.stages.import_cache import import_cache
from minicache.stages.precompute import precompute
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import Cli, one_process, precompute_into, write_jsonl
from tests.helpers.hub import COMMIT, OLD, Hub, serving

ROWS = [{"prompt": f'why {n}\nnot, "that"', "chosen": f"the cat {n}", "rejected": f"a mat, {n}"} for n in range(40)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
PIECES = [LINES[: LINES.index(b'{"prompt": "why 15')], LINES[LINES.index(b'{"prompt": "why 15') :]]


def as_table(delimiter: str = ",", rows: list[dict[str, str]] = ROWS) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, str]] = ROWS) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), file := io.BytesIO())
    return file.getvalue()


def as_arrow(rows: list[dict[str, str]] = ROWS, new: Callable[..., Any] = pa.ipc.new_stream) -> bytes:
    table = pa.Table.from_pylist(rows)
    with new(file := io.BytesIO(), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return file.getvalue()


def save_to_disk(folder: Path, rows: list[dict[str, str]] = ROWS) -> Path:
    """As datasets 5.2 does, with the shards in an order that is not that of their names."""
    folder.mkdir(parents=True)
    (folder / "data-b.arrow").write_bytes(as_arrow(rows[:15]))
    (folder / "data-a.arrow").write_bytes(as_arrow(rows[15:]))
    (folder / "cache-0123.arrow").write_bytes(as_arrow(rows[:1]))
    files = [{"filename": "data-b.arrow"}, {"filename": "data-a.arrow"}]
    (folder / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def find(tmp_path: Path, notes: list[str]) -> Callable[..., list[DataFile]]:
    """The files of a value of --data."""
    return lambda value: locate(str(value), tmp_path / "scratch", notes.append)


Find = Callable[..., list[DataFile]]


def rows_of(files: list[DataFile]) -> list[object]:
    return [row for file in files for _, row in read_rows(file)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    from huggingface_hub import constants

    with serving() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        yield hub


# --- files ---

FILES = {
    "x.csv": as_table(),
    "bom.csv": b"\xef\xbb\xbf" + as_table(),
    "x.tsv": as_table("\t"),
    "x.CSV.gz": gzip.compress(as_table()),
    "json-in.csv": LINES,
    "without-suffix": as_table(),
    "tabs": as_table("\t"),
    "x.jsonl.bz2": bz2.compress(PIECES[0]) + bz2.compress(PIECES[1]),
    "x.jsonl.xz": lzma.compress(PIECES[0]) + b"\0" * 8 + lzma.compress(PIECES[1]) + b"\0" * 4,
    "x.csv.xz": lzma.compress(as_table()),
    "x.arrow": as_arrow(),
    "file.feather": as_arrow(new=pa.ipc.new_file),
    "x.parquet": as_parquet(),
}


def test_a_drive_of_windows_is_no_folder_with_a_configuration() -> None:
    found = OF_FOLDER.fullmatch(r"C:\data\pairs@train")
    assert found and found.groupdict() == {"path": r"C:\data\pairs", "config": None, "split": "train"}


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert [row for _, row in read_rows(str(tmp_path / name))] == ROWS


def test_cells_are_text_as_they_stand_and_rows_have_the_line_they_begin_at(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(
        b',prompt,chosen\r\n0,"a\r\nb",\n\n1,"[{""role"": 1}]",NA\n2,only\n3,x,y,z\n4,\xff,b\n'
    )
    rows = list(read_rows(str(tmp_path / "x.csv")))
    assert [line for line, _ in rows] == [2, 5, 6, 7, 8]
    assert rows[0][1] == {"Unnamed: 0": "0", "prompt": "a\r\nb", "chosen": ""}
    assert rows[1][1] == {"Unnamed: 0": "1", "prompt": '[{"role": 1}]', "chosen": "NA"}
    refused = [row for _, row in rows if isinstance(row, RowRefused)]
    assert [row.reason for row in refused] == ["broken-csv", "broken-csv", "bad-unicode"]
    assert "expected 3 cells, one for each name in the header, got 4" in str(refused[1])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'a,b\n1,"x\n2,y\n', "row at line 2 is not CSV: unexpected end of data"),
        (b'a,b\n1,2\n3,"say "hi", now"\n', "row at line 3 is not CSV: ',' expected after"),
        (b"a,b\n1," + b"x" * MOST_ROW + b"\n", f"a row of more than {MOST_ROW:,} characters"),
        (b'a,b\n1,"' + b"xy,zzzz\n" * (MOST_ROW // 8), f"a row of more than {MOST_ROW:,} characters"),
        (b"a,a\n1,2\n", "name of each column, each once; got 'a', 'a'"),
        (b"a,\x1b[31m\n1,2\n", "name of each column"),
        (b"a,b\n", "holds no rows"),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.csv").write_bytes(content)
    with pytest.raises(DataError) as error:
        list(read_rows(str(tmp_path / "x.csv")))
    assert said in str(error.value) and "x.csv" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["x.bz2", "x.xz", "x.arrow", "file.arrow", "large.xz"])
def test_a_cut_or_greedy_file_is_refused_by_the_name_it_was_given(tmp_path: Path, name: str) -> None:
    whole = {
        "x.bz2": bz2.compress(LINES),
        "x.xz": lzma.compress(LINES),
        "x.arrow": as_arrow(),
        "file.arrow": as_arrow(new=pa.ipc.new_file),
    }
    greedy = lzma.compress(LINES, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 2**29}])
    (tmp_path / "copy").write_bytes(greedy if name not in whole else whole[name][: len(whole[name]) * 2 // 3])
    with pytest.raises(DataError, match=f"^given/{name}: cannot be read") as error:
        list(read_rows(DataFile(f"given/{name}", tmp_path / "copy")))
    assert "\n" not in str(error.value) and str(tmp_path) not in str(error.value)


def test_arrow_with_offsets_that_lead_elsewhere_is_refused_and_bad_text_costs_its_row(tmp_path: Path) -> None:
    whole = as_arrow([{"prompt": "x" * 1234}])
    before, _, after = whole.rpartition((1234).to_bytes(4, "little"))
    (tmp_path / "bad.arrow").write_bytes(before + (10**9).to_bytes(4, "little") + after)
    with pytest.raises(DataError, match="cannot be read as arrow after 0 rows"):
        list(read_rows(str(tmp_path / "bad.arrow")))
    column = pa.array([b"a", b"\xff\xfe", b"c"]).view(pa.string())
    with pa.ipc.new_stream(tmp_path / "text.arrow", pa.schema([("prompt", pa.string())])) as writer:
        writer.write_batch(pa.record_batch([column], ["prompt"]))
    rows = [row for _, row in read_rows(str(tmp_path / "text.arrow"))]
    assert isinstance(rows[1], RowRefused) and rows[1].reason == "bad-unicode"
    assert rows[::2] == [{"prompt": "a"}, {"prompt": "c"}]


# --- folders and globs ---


def test_a_folder_is_all_its_shards_in_the_order_of_their_names(tmp_path: Path, find: Find, notes: list[str]) -> None:
    folder = tmp_path / "d"
    (folder / "more").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "x.jsonl").write_text("no")
    (folder / "a.csv").write_bytes(as_table(rows=ROWS[:9]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[9:10]).encode()))
    (folder / "more" / "a.parquet").write_bytes(as_parquet(ROWS[10:30]))
    (folder / "more" / "b.arrow").write_bytes(as_arrow(ROWS[30:]))
    for name in ("README.md", "dataset_infos.json", "b.jsonl.minicache.json", "archive.zip"):
        (folder / name).write_text("---\ntitle: none\n---\n")
    (folder / "more" / "up").symlink_to(folder)
    files = find(f"{folder}/")
    assert [file.name for file in files] == [
        f"{folder}/{name}" for name in ("a.csv", "b.jsonl.gz", "more/a.parquet", "more/b.arrow")
    ]
    assert rows_of(files) == ROWS
    assert notes == [f"{folder}: not used: README.md, archive.zip, b.jsonl.minicache.json, dataset_infos.json"]


def test_a_folder_with_splits_asks_for_one(tmp_path: Path, find: Find) -> None:
    for name in ("train-a.jsonl", "train-b.jsonl", "test.jsonl"):
        write_jsonl(tmp_path / name, [{"of": name}])
    with pytest.raises(DataError, match=rf"has the splits train, test; add one of them, as in {tmp_path}@train"):
        find(tmp_path)
    with pytest.raises(DataError, match="has the splits train, test; got @dev"):
        find(f"{tmp_path}@dev")
    assert rows_of(find(f"{tmp_path}@train")) == [{"of": "train-a.jsonl"}, {"of": "train-b.jsonl"}]
    (tmp_path / "test.jsonl").rename(tmp_path / "other.jsonl")
    with pytest.raises(DataError, match=r"has the split train, and files of no split: other.jsonl; add @train"):
        find(tmp_path)
    assert len(find(f"{tmp_path}@train")) == 2
    (tmp_path / "d@train").mkdir()
    write_jsonl(tmp_path / "d@train" / "x.jsonl", [{"of": "itself"}])
    assert rows_of(find(tmp_path / "d@train")) == [{"of": "itself"}]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (
            ["data/train_sft-00000-of-00001.parquet", "data/test_prefs-00000-of-00002-ab12.parquet", "x.json"],
            {"test_prefs": 1, "train_sft": 1},
        ),
        (["train-00000-of-00001.parquet", "validation-00000-of-00001.parquet"], {"train": 1, "validation": 1}),
        (["a/train/x.jsonl", "a/dev/x.jsonl", "test.jsonl"], {"train": 1, "validation": 1}),
        (["my_training_set.csv", "x-eval.csv", "val.csv"], {"train": 1, "validation": 1, "test": 1}),
        (["trainer.jsonl", "contest.jsonl", "device/x.csv"], {"train": 3}),
    ],
)
def test_splits_have_the_hubs_names(names: list[str], splits: dict[str, int]) -> None:
    assert {split: len(files) for split, files in splits_by_name(names).items()} == splits


def test_globs_go_through_folders_as_the_shell_does(tmp_path: Path, find: Find, notes: list[str]) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    for name in ("d/x-1.jsonl", "d/x-2.jsonl", "d/e/x-3.jsonl"):
        write_jsonl(tmp_path / name, [{"of": name}])
    (tmp_path / "d" / "notes.md").write_text("x")
    (tmp_path / "d" / "rows.txt").write_text('{"of": "rows.txt"}\n')

    def names(glob: str) -> list[str]:
        rows: list[Any] = rows_of(find(tmp_path / glob))
        return [row["of"] for row in rows]

    assert names("d/x-*.jsonl") == ["d/x-1.jsonl", "d/x-2.jsonl"] and not notes
    assert names("**/*.jsonl") == ["d/e/x-3.jsonl", "d/x-1.jsonl", "d/x-2.jsonl"]
    assert names("d/*.txt") == ["rows.txt"] and not notes
    assert names("d/*") == ["d/x-1.jsonl", "d/x-2.jsonl"] and len(notes) == 1 and "notes.md" in notes[0]
    with pytest.raises(DataError, match="no file fits"):
        find(tmp_path / "d/*.csv")
    for glob, name, fits in (
        ("a/*.c", "a/b/x.c", False),
        ("**/x.c", "x.c", True),
        ("a/**", "a/b/x.c", True),
        ("[!a]?.c", "bb.c", True),
    ):
        assert bool(glob_pattern(glob).fullmatch(name)) == fits, glob
    for glob in ("[z-a].parquet", "[!]"):
        with pytest.raises(DataError, match=f"{re.escape(glob)}: is no pattern of files' names"):
            glob_pattern(glob)
    assert glob_pattern("[a&&b].c").fullmatch("&.c") and glob_pattern("[a||b]").fullmatch("|")


def test_what_datasets_wrote_is_read_in_its_order(tmp_path: Path, find: Find, notes: list[str]) -> None:
    folder = save_to_disk(tmp_path / "one")
    assert rows_of(find(folder)) == rows_of(find(f"{folder}@train")) == ROWS
    assert notes[0] == f"{folder}: not used: cache-0123.arrow"
    for split in ("prefs", "heldout"):
        save_to_disk(tmp_path / "both" / split, ROWS if split == "prefs" else ROWS[:20])
    (tmp_path / "both" / "dataset_dict.json").write_text('{"splits": ["prefs", "heldout"]}')
    with pytest.raises(DataError, match="has the splits prefs, heldout; add one"):
        find(tmp_path / "both")
    assert rows_of(find(f"{tmp_path}/both@heldout")) == ROWS[:20]
    for files, said in (
        ([{"filename": "../secret.arrow"}], "lists ../secret.arrow, which is not there"),
        ([], "lists no files"),
    ):
        (folder / "state.json").write_text(json.dumps({"_data_files": files}))
        with pytest.raises(DataError, match=said):
            find(folder)
    (folder / "state.json").write_text(json.dumps({"_data_files": [], "_indices_data_files": [{}]}))
    with pytest.raises(DataError, match="flatten_indices"):
        find(folder)


# --- pipes ---


def test_a_pipe_is_copied_and_named_as_given(tmp_path: Path, find: Find) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(as_table(),))
    writer.start()
    (file,) = find(tmp_path / "pipe")
    writer.join()
    assert file.name == str(tmp_path / "pipe") and file.path.parent == tmp_path / "scratch"
    assert rows_of([file]) == ROWS and file.path.stat().st_mode & 0o777 == 0o600


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_copies_are_gone_afterwards_and_standard_input_is_read_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    piped(monkeypatch, LINES)
    with located(["-"], print) as files:
        assert [file.name for file in files] == ["-"] and rows_of(files) == ROWS
        assert list(tmp_path.iterdir()) == [files[0].path.parent]
    assert not list(tmp_path.iterdir())
    with pytest.raises(ConfigError, match="expected standard input once"), located(["-", "x", "-"], print):
        pass


# --- URLs ---


def test_an_object_a_folder_and_a_glob_of_a_store(find: Find, notes: list[str]) -> None:
    import obstore

    store = urls.store_at("memory://places")
    objects = {
        "d/a.jsonl": PIECES[0],
        "d/e/b.csv": as_table(rows=ROWS[15:]),
        "d/README.md": b"x",
        "s/test.csv": b"",
        "s/train.csv": as_table(),
    }
    for name, content in objects.items():
        obstore.put(store, name, content)
    for value in ("memory://places/d", "memory://places/d/"):
        files = find(value)
        assert [file.name for file in files] == ["memory://places/d/a.jsonl", "memory://places/d/e/b.csv"]
        assert rows_of(files) == ROWS
    assert notes[0] == "memory://places/d: not used: README.md"
    assert rows_of(find("memory://places/d/**/*.[jc]*")) == ROWS
    assert len(find("memory://places/d/*.jsonl")) == len(find("memory://places/d/a.jsonl")) == 1
    assert rows_of(find("memory://places/s@train")) == ROWS
    obstore.put(urls.store_at("memory://root"), "train.csv", as_table())
    assert rows_of(find("memory://root")) == rows_of(find("memory://root/@train")) == ROWS
    for value, said in (("d/none.csv", "no such object"), ("d/*.tsv", "no object fits"), ("s", "train, test; add")):
        with pytest.raises(DataError, match=said):
            find(f"memory://places/{value}")
    with pytest.raises(ConfigError, match="expected s3://"):
        find("ftp://host/file")


def test_a_file_of_a_web_server_is_named_without_its_secrets(hub: Hub, find: Find) -> None:
    hub.add("web/files", {"file.csv.gz": gzip.compress(as_table()), "page": b"<html>"})
    (file,) = find(f"{hub.address}/file.csv.gz?signature=secret#part")
    assert file.name == f"{hub.address}/file.csv.gz" and rows_of([file]) == ROWS
    for path, kind, said in (("none", DataError, "404"), ("page", DataError, "is a web page")):
        with pytest.raises(kind, match=said):
            find(f"{hub.address}/{path}?signature=secret")
    hub.cut_at = "file.csv.gz"
    with pytest.raises(StoreError, match="the connection broke after") as error:
        find(f"{hub.address}/file.csv.gz?signature=secret")
    assert "secret" not in str(error.value)
    with pytest.raises(StoreError, match="cannot be fetched"):
        find("http://127.0.0.1:9/x.jsonl")


# --- the Hub ---

README = b"""---
configs:
- config_name: one
  data_files:
  - split: train
    path: ["one/a*", "./one/b.csv"]
  - split: dev
    path: one/held.jsonl
- config_name: two
  default: true
  data_files: two/*
- config_name: three
  data_dir: three
---
# Text
"""


def test_a_data_set_is_pinned_to_a_commit_and_only_its_data_are_fetched(hub: Hub, find: Find, notes: list[str]) -> None:
    hub.add(
        "org/name",
        {"data/a.jsonl": PIECES[0], "data/b.csv": as_table(rows=ROWS[15:]), "README.md": b"# x", "name.py": b"run()"},
        {"x.jsonl": LINES},
    )
    files = find("org/name")
    assert [file.name for file in files] == [f"org/name@{COMMIT}:data/a.jsonl", f"org/name@{COMMIT}:data/b.csv"]
    assert rows_of(files) == ROWS and notes == ["org/name: not used: README.md, name.py"]
    assert not [path for path in hub.asked if "name.py" in path]
    assert [file.name for file in find("org/name@train?revision=v1")] == [f"org/name@{OLD}:x.jsonl"]
    assert rows_of(find(files[1].name)) == ROWS[15:]
    assert rows_of(find(f"org/name:data?revision={COMMIT}")) == ROWS


def test_a_readme_says_which_files_make_a_configuration_and_a_split(hub: Hub, find: Find) -> None:
    names = ("one/a.jsonl", "one/b.csv", "one/held.jsonl", "two/x.jsonl", "three/train.jsonl", "three/test.jsonl")
    hub.add("org/name", {"README.md": README, **dict.fromkeys(names, LINES)})

    def files(value: str) -> list[str]:
        return [file.name.partition(":")[2] for file in find(value)]

    assert files("org/name") == ["two/x.jsonl"]
    assert files("org/name:one@train") == ["one/a.jsonl", "one/b.csv"]
    assert files("org/name:three@test") == ["three/test.jsonl"]
    for value, said in (
        ("org/name:one", "has the splits train, dev; add one of them"),
        ("org/name:four", "has the configurations one, two, three; got :four"),
        ("org/name:three", "has the splits train, test"),
    ):
        with pytest.raises(DataError, match=said):
            find(value)
    hub.add("org/twins", {"README.md": README.replace(b"name: three", b"name: one"), **dict.fromkeys(names, LINES)})
    with pytest.raises(DataError, match="two configurations are called 'one'; expected one"):
        find("org/twins")
    hub.add("org/open", {"README.md": README.replace(b"default: true", b"x: 1"), **dict.fromkeys(names, LINES)})
    with pytest.raises(DataError, match="has the configurations one, two, three; add one of them, as in org/open:one"):
        find("org/open")
    for front in ("[", "!!bool x", '!!int ""', '!!float ""', "!!timestamp x", "0x" + "F" * 4000, "{a: 1, a: 2}"):
        hub.add("org/bad", {"README.md": f"---\nconfigs: {front}\n---\n".encode(), "x.jsonl": LINES})
        with pytest.raises(DataError, match="are no YAML"):
            find("org/bad")


def test_a_local_path_wins_and_a_name_of_neither_says_both(
    hub: Hub, find: Find, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add("org/name", {"x.jsonl": LINES})
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_jsonl(tmp_path / "org" / "name" / "x.jsonl", [{"of": "here"}])
    assert rows_of(find("org/name")) == rows_of(find("org/name@train")) == [{"of": "here"}]
    for value, said in (
        ("org/none", f"org/none: no such file or directory, and as a data set: {hub.address} has no data set org/none"),
        ("org/none.jsonl", "org/none.jsonl: no such file or directory; expected a file"),
        ("none", "none: no such file or directory; expected a file"),
        ("../none/x", "no such file or directory; expected a file"),
    ):
        with pytest.raises(DataError, match=said):
            find(value)
    (tmp_path / "org").rename(tmp_path / "gone")
    with pytest.raises(DataError, match="the data set org/name has no such revision"):
        find("org/name?revision=v9")
    with pytest.raises(DataError, match="has no such file at this commit"):
        find(f"org/name@{COMMIT}:y.jsonl")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        StoreError, match=r"no such file or directory, and as a data set: http://127\.0.* cannot be reached"
    ):
        find("org/name")


def test_a_commit_that_was_fetched_is_read_without_a_network(
    hub: Hub, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("org/name", {"x.jsonl": LINES})
    before = [file.name for file in find("org/name")]
    asked = len(hub.asked)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [file.name for file in find(f"org/name?revision={COMMIT}")] == before
    with pytest.raises(
        StoreError, match=r"\?revision=COMMIT.*the data set org/other is not, or not whole, among what was"
    ):
        find("org/other")
    assert len(hub.asked) == asked


# Error of the system -> what the line says.
ON_DISK = {
    OSError(errno.ENOSPC, "No space left on device"): "a file: the disk is full; free some space",
    OSError(errno.EDQUOT, "Disk quota exceeded", "/hf/x"): "/hf/x: the disk is full; free some space",
    PermissionError(errno.EACCES, "Permission denied", "/hf/x"): "/hf/x: Permission denied",
    OSError(errno.ENAMETOOLONG, "File name too long", "/hf/x"): "/hf/x: File name too long",
}


@pytest.mark.parametrize("error", ON_DISK, ids=repr)
@pytest.mark.parametrize("value", ["org/name", f"org/name@{COMMIT}:x.jsonl"])
def test_a_disk_that_takes_no_download_is_no_matter_of_the_network(
    hub: Hub, find: Find, monkeypatch: pytest.MonkeyPatch, value: str, error: OSError
) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    hub.add("org/name", {"x.jsonl": LINES})
    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(OutputError, match=f"^{ON_DISK[error]}.*; HF_HOME names another place") as told:
        find(value)
    assert "network" not in str(told.value)


def test_an_error_of_this_program_is_no_matter_of_the_network(
    hub: Hub, find: Find, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/name", {"x.jsonl": LINES})
    monkeypatch.setattr("minicache.data.hub.Folder.select", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        find("org/name")


# --- stage one ---


class Killed(Silent):
    """Ends a call, as a kill does, once it has encoded so many rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows

    def advance(self, pairs: int, tokens: int) -> None:
        self.left -= pairs
        if self.left < 0:
            raise KeyboardInterrupt


def run(cache: Path, model: Path, *data: str, tracker: Silent | None = None) -> None:
    precompute(PrecomputeConfig(str(model), data, cache, block_pairs=8), one_process(), tracker or Silent())


def pairs_of(cache: ReferenceCache) -> list[Any]:
    return list(cache.load().table.keys.tolist())


@pytest.fixture
def plain(model_dir: Path, tmp_path: Path) -> Path:
    """A cache of the rows as one jsonl file."""
    (tmp_path / "plain.jsonl").write_bytes(LINES)
    return precompute_into(tmp_path / "plain", model_dir, tmp_path / "plain.jsonl")


@pytest.mark.parametrize("kind", ["stdin", "hub", "store"])
def test_a_killed_call_goes_on_when_the_same_content_comes_again(
    plain: Path, model_dir: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import obstore

    hub.add("org/name", {"plain.jsonl": LINES})
    obstore.put(urls.store_at("memory://kill"), "plain.jsonl", LINES)
    value, name = {
        "stdin": ("-", "-"),
        "hub": ("org/name", f"org/name@{COMMIT}:plain.jsonl"),
        "store": ("memory://kill/", "memory://kill/plain.jsonl"),
    }[kind]
    piped(monkeypatch, LINES)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cache", model_dir, value, tracker=Killed(30))
    (source,) = ReferenceCache(tmp_path / "cache").log.sources
    assert source.name == name and not source.complete and len(ReferenceCache(tmp_path / "cache").blocks) == 3
    piped(monkeypatch, LINES)
    run(tmp_path / "cache", model_dir, value)
    whole, resumed = ReferenceCache(plain), ReferenceCache(tmp_path / "cache")
    (source,) = resumed.log.sources
    assert source == replace(whole.log.sources[0], name=name)
    assert pairs_of(resumed) == pairs_of(whole) and len(resumed.blocks) == len(whole.blocks)


def test_each_kind_gives_the_same_pairs(plain: Path, model_dir: Path, tmp_path: Path) -> None:
    expected = pairs_of(ReferenceCache(plain))
    for name in ("x.csv", "x.parquet", "x.arrow", "x.jsonl.xz"):
        (tmp_path / name).write_bytes(FILES[name])
        cache = ReferenceCache(precompute_into(tmp_path / f"of-{name}", model_dir, tmp_path / name))
        assert pairs_of(cache) == expected
    folder = save_to_disk(tmp_path / "saved")
    cache = ReferenceCache(precompute_into(tmp_path / "of-saved", model_dir, folder))
    assert pairs_of(cache) == expected
    assert [source.name for source in cache.log.sources] == [f"{folder}/data-b.arrow", f"{folder}/data-a.arrow"]


def test_errors_and_refusals_name_what_was_given(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    piped(monkeypatch, b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n' + LINES)
    run(tmp_path / "cache", model_dir, "-")
    assert json.loads((tmp_path / "cache" / "refused.jsonl").read_text())["file"] == "-"
    piped(monkeypatch, b"")
    arguments = ["precompute-ref", "--model", tmp_path / "absent", "--ref-cache", tmp_path / "new", "--data", "x", "-"]
    with pytest.raises(MinicacheError, match=r"^-: the file is empty"):
        run(tmp_path / "new", tmp_path / "absent", "-")
    code, _, stderr = cli(*arguments)
    assert code == 1 and "x: no such file or directory" in stderr


@pytest.mark.slow
def test_several_processes_read_one_standard_input(model_dir: Path, tmp_path: Path, plain: Path) -> None:
    command = [sys.executable, "-m", "minicache", "precompute-ref", "--model", model_dir, "--data", "-"]
    done = subprocess.run(
        [*map(str, command), "--ref-cache", str(tmp_path / "cache"), "--block-pairs", "8", "--nproc", "2"],
        input=LINES,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert pairs_of(ReferenceCache(tmp_path / "cache")) == pairs_of(ReferenceCache(plain))


def test_a_folder_can_be_imported_and_trained_on(model_dir: Path, tmp_path: Path, plain: Path) -> None:
    (tmp_path / "d").mkdir()
    scored = [{**row, "ref_chosen_logps": -1.0 - n, "ref_rejected_logps": -2.0} for n, row in enumerate(ROWS)]
    write_jsonl(tmp_path / "d" / "a.jsonl", scored[:15])
    write_jsonl(tmp_path / "d" / "b.jsonl", scored[15:])
    config = ImportConfig(str(tmp_path / "d"), tmp_path / "new", model=str(model_dir), logps="mean", dtype="float32")
    import_cache(config, Silent())
    imported = ReferenceCache(tmp_path / "new").load()
    assert imported.table.source.tolist() == [[0, n] for n in range(1, 16)] + [[1, n] for n in range(1, 26)]
    assert imported.reference.logp_mean[:, 0].tolist() == [-1.0 - n for n in range(40)]
    data = (f"{tmp_path}/d/b*.jsonl",)
    report = train(
        TrainConfig(ref_cache=(plain,), out=tmp_path / "run", data=data, batch_size=5), one_process(), Silent()
    )
    assert report.model_step == 5


def test_prompts_come_from_a_folder_and_a_pipe(
    tokenizer_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_dir)

    def prompts(value: str) -> list[str]:
        return [prompt.text for prompt in read_prompts(CompareConfig("", prompts=value), tokenizer)]

    (tmp_path / "x.csv").write_text("id,prompt\n1,why\n2,why not\n")
    assert prompts(str(tmp_path)) == ["why", "why not"]
    for content in (b"why\nwhy not\n", b'{"prompt": "why"}\n{"prompt": "why not"}\n'):
        piped(monkeypatch, content)
        assert prompts("-") == ["why", "why not"]


def test_standard_input_can_be_one_of_several_on_the_command_line() -> None:
    assert expand_data(["--data", "a", "-", "b", "--ref-cache", "c"]) == [
        *("--data", "a", "--data", "-", "--data", "b"),
        *("--ref-cache", "c"),
    ]
