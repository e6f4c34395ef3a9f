"""Reference caches on the Hugging Face Hub, read through its library from a server on loopback."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from minicache.cache.places.hub import snapshot_at
from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.errors import ConfigError, DataError, OutputError, StoreError
from minicache.options.train import TrainConfig, ValidationOptions
from minicache.training.pinned import pins, with_pins
from minicache.training.run_directory import read_record
from tests.conftest import Cli, make_rows, precompute_into, write_jsonl
from tests.helpers.hub_repos import Files, Hub

URL = "hf://datasets/org/name"


def files_of(cache: Path) -> Files:
    return {
        file.relative_to(cache).as_posix(): file.read_bytes()
        for file in cache.rglob("*")
        if file.is_file() and not file.name.endswith("claim")
    }


def test_a_cache_is_read_at_one_commit(repos: Hub, ref_cache: Path) -> None:
    made = repos.add("dataset", "org/name", {**files_of(ref_cache), "other.txt": b"x"})
    here, there = ReferenceCache(ref_cache), ReferenceCache(URL)
    assert there.path == f"{URL}@{made.commits[0][0]}"
    assert there.identity == here.identity and list(there.verify()) == []
    for name, column in here.to_numpy().items():
        assert np.array_equal(column, there.to_numpy()[name], equal_nan=True), name
    assert (there.tokenizer_dir / "tokenizer.json").read_bytes() == (here.tokenizer_dir / "tokenizer.json").read_bytes()
    assert not any("other.txt" in each for each in repos.asked)
    # another commit later: this process keeps the one it has begun with
    made.commit({"README.md": b""})
    assert ReferenceCache(URL).path == there.path


def test_a_revision_a_folder_and_what_was_downloaded(
    repos: Hub, ref_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    below = {f"a/b/{name}": content for name, content in files_of(ref_cache).items()}
    made = repos.add("dataset", "org/name", below)
    made.commit({"README.md": b""})
    cache = ReferenceCache(f"{URL}@v1/a/b/")
    pinned = f"{URL}@{made.commits[0][0]}/a/b"
    assert cache.path == pinned and cache.complete
    snapshot_at.cache_clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(repos.asked)
    assert ReferenceCache(pinned).complete and len(repos.asked) == asked


def test_what_is_not_there_is_one_line(repos: Hub, ref_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repos.add("dataset", "org/name", {"README.md": b""})
    for url, kind, said in [
        (URL, Exception, "no reference cache at its top"),
        (f"{URL}@v2", DataError, "no such revision"),
        ("hf://datasets/org/none", DataError, "no data set org/none that you may see"),
        ("hf://org/name", ConfigError, "expected hf://datasets/org/name"),
        ("hf://datasets/name", ConfigError, "expected hf://datasets/org/name"),
    ]:
        with pytest.raises(kind, match=said):
            ReferenceCache(url)
    monkeypatch.delenv("HF_TOKEN")
    snapshot_at.cache_clear()
    with pytest.raises(DataError, match="a private one needs a token"):
        ReferenceCache(URL)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    snapshot_at.cache_clear()
    with pytest.raises(StoreError, match="9 cannot be reached"):
        ReferenceCache(URL)


def test_nothing_is_written_there(repos: Hub, ref_cache: Path, cli: Cli, model_dir: Path, data_file: Path) -> None:
    repos.add("dataset", "org/name", files_of(ref_cache))
    with pytest.raises(OutputError, match="is read only"):
        CacheWriter(URL)
    for command in (
        ["precompute-ref", "--model", model_dir, "--data", data_file],
        ["merge", ref_cache, "other"],
        ["import-cache", "table.jsonl"],
    ):
        code, _, stderr = cli(*command, "--ref-cache", URL)
        assert code == 1 and "minidpo push CACHE org/name" in " ".join(stderr.split()), stderr
    assert repos.written == []


def test_a_run_records_the_commit_and_resumes_from_it(repos: Hub, ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    made = repos.add("dataset", "org/name", files_of(ref_cache))
    train = ["train", "--out", tmp_path / "run", "--device", "cpu"]
    code, _, stderr = cli(*train, "--batch-size", "8", "--max-steps", "2", "--save-every", "1", "--ref-cache", URL)
    assert code == 0, stderr
    record = read_record(tmp_path / "run")
    assert record and record.ref_cache == f"{URL}@{made.commits[0][0]}"
    # the run is as if it had been killed after its first step; the data set gets pairs of others; the run does not see them
    facts = json.loads((tmp_path / "run/run.json").read_text())
    del facts["outcome"]
    (tmp_path / "run/run.json").write_text(json.dumps(facts))
    shutil.rmtree(tmp_path / "run/model")
    made.commit({})
    snapshot_at.cache_clear()
    code, _, stderr = cli(*train, "--resume")
    assert code == 0 and (tmp_path / "run/model/config.json").is_file(), stderr


def test_each_cache_of_a_mixture_is_pinned_and_keeps_its_weight(repos: Hub, ref_cache: Path, tmp_path: Path) -> None:
    made = repos.add("dataset", "org/name", files_of(ref_cache))
    places = (f"{URL}:0.7", f"{ref_cache}:0.3")
    config = TrainConfig(ref_cache=places, out=tmp_path, validation=ValidationOptions(eval_cache=f"{URL}@v1"))
    commits = pins(config)
    fixed, commit = with_pins(config, commits), f"{URL}@{made.commits[0][0]}"
    assert fixed.ref_cache == (f"{commit}:0.7", f"{ref_cache}:0.3") and fixed.validation.eval_cache == commit
    assert fixed.caches == [(commit, 0.7), (str(ref_cache), 0.3)] and pins(fixed) == {}


def test_every_command_that_reads_takes_one(
    repos: Hub, ref_cache: Path, model_dir: Path, tmp_path: Path, cli: Cli
) -> None:
    repos.add("dataset", "org/name", files_of(ref_cache))
    other = precompute_into(tmp_path / "other", model_dir, write_jsonl(tmp_path / "more.jsonl", make_rows(5, seed=3)))
    for command in (
        ["inspect-cache", URL],
        ["inspect-cache", URL, "--pair", 3],
        ["inspect-cache", URL, "--verify"],
        ["diff", URL, ref_cache],
        ["evaluate", "--policy", model_dir, "--ref-cache", URL, "--device", "cpu"],
        ["merge", URL, other, "--ref-cache", tmp_path / "merged"],
        ["export", "--ref-cache", URL, "--out", tmp_path / "pairs.jsonl"],
    ):
        code, _, stderr = cli(*command)
        assert code == 0, (command, stderr)
    assert repos.written == []
