"""The machine around it: clocks, disks, names, models and tokenizers that change under a cache."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import make_rows, tiny_llama, write_jsonl
from tests.helpers.stores import assert_same_store, contents
from tests.stages.test_precompute import small_disk
from tests.torture.conftest import BLOCK, Orderly, StageOne
from tests.torture.test_run import flags, whole
from tests.training.test_resume import assert_same_run

__all__ = ["small_disk", "whole"]  # fixtures


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock of the wall is a day before the last one. time.monotonic never does so: the system sees to it."""
    real, looks = time.time, iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: real() - 86400 * next(looks))


@pytest.mark.usefixtures("backwards")
def test_a_clock_that_goes_backwards(
    small: tuple[Path, Path],
    ref_cache: Path,
    whole: Path,
    tmp_path: Path,
    orderly: Orderly,
    stage_one: StageOne,
) -> None:
    assert stage_one(tmp_path / "cache") == (0, "")
    assert_same_store(tmp_path / "cache", small[0])
    assert orderly("train", *flags(ref_cache, tmp_path / "run")) == (0, "")
    assert_same_run(tmp_path / "run", whole)


@pytest.mark.parametrize("stamp", [0, 2**33])
def test_files_from_1970_and_from_the_future(
    small: tuple[Path, Path], tmp_path: Path, stage_one: StageOne, orderly: Orderly, stamp: int
) -> None:
    cache = shutil.copytree(small[0], tmp_path / "cache")
    (cache / "pairs/tokens/c/1/0").write_bytes(b"")
    for file in [cache, *cache.rglob("*")]:
        os.utime(file, (stamp, stamp))
    assert stage_one(cache) == (0, "")
    assert_same_store(cache, small[0])
    assert orderly("train", "--ref-cache", cache, "--out", tmp_path / "run", "--max-steps", 2) == (0, "")


NAMES = ["with space", "数据 目录", "a'b\"c", "[x]*?", "-dash", "%20{}$HOME", "é" * 80, "new\nline", ".hidden"]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_of_a_path(model_dir: Path, tmp_path: Path, orderly: Orderly, name: str) -> None:
    """All stages, with model, data, cache and run below such a directory."""
    place = tmp_path / name
    place.mkdir()
    model = shutil.copytree(model_dir, place / "model")
    data = write_jsonl(place / f"{name}.jsonl", make_rows(6))
    cache, run = place / f"{name}-cache", place / f"{name}-run"
    stage = ["precompute-ref", "--model", model, "--ref-cache", cache, "--block-pairs", 4]
    assert orderly(*stage, "--data", data) == (0, "")
    assert orderly(*stage, "--data", data, write_jsonl(place / "more.jsonl", make_rows(3, seed=9))) == (0, "")
    assert orderly("inspect-cache", cache, "--verify") == (0, "")
    assert orderly("train", "--ref-cache", cache, "--out", run, "--max-steps", 2) == (0, "")
    assert orderly("train", "--out", run, "--resume") == (0, "")
    assert orderly("evaluate", "--policy", run, "--ref-cache", cache) == (0, "")
    copy = shutil.copytree(cache, place / f"{name}-copy")
    assert orderly("merge", cache, copy, "--ref-cache", place / f"{name}-merged") == (0, "")
    assert orderly("export", "--policy", run, "--out", place / f"{name}-policy") == (0, "")
    assert orderly("plot", run, "--out", place / f"{name}.svg") == (0, "")


@pytest.fixture
def read_only(small: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """A directory that even root cannot write to, with the cache in it."""
    place = tmp_path / "read-only"
    shutil.copytree(small[0], tmp_path / "there" / "cache")
    place.mkdir()
    try:
        for options in (["--bind", tmp_path / "there"], ["-o", "remount,bind,ro"]):
            subprocess.run(["mount", *options, place], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs leave to mount a file system: {error}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_directory_that_cannot_be_written_to(
    read_only: Path,
    small: tuple[Path, Path],
    tmp_path: Path,
    orderly: Orderly,
    stage_one: StageOne,
) -> None:
    """A cache there is read, inspected, trained from; what writes there says so in one line."""
    cache = read_only / "cache"
    assert orderly("inspect-cache", cache, "--verify") == (0, "")
    assert orderly("train", "--ref-cache", cache, "--out", tmp_path / "run", "--max-steps", 2) == (0, "")
    assert orderly("evaluate", "--policy", tmp_path / "run", "--ref-cache", cache) == (0, "")
    for code, said in (
        stage_one(cache),
        stage_one(read_only / "new"),
        orderly("train", "--ref-cache", cache, "--out", read_only / "run", "--max-steps", 2),
        orderly("merge", cache, small[0], "--ref-cache", read_only / "merged"),
        orderly("export", "--policy", tmp_path / "run", "--out", read_only / "policy"),
        orderly("plot", tmp_path / "run", "--out", read_only / "plot.svg"),
    ):
        assert code == 1 and str(read_only) in said
        assert "Read-only file system" in said or "cannot be written to" in said
    assert contents(cache) == contents(small[0])


def test_a_disk_that_fills_up_in_training(small_disk: Path, ref_cache: Path, whole: Path, orderly: Orderly) -> None:
    """At every amount of free space: one line, and with room enough it goes on to the same end."""
    out, ballast, failures = small_disk / "run", small_disk / "ballast", 0
    subprocess.run(["mount", "-o", "remount,size=3m", small_disk], check=True)
    room = shutil.disk_usage(small_disk).free
    for free in range(0, room, 20 * 4096):
        ballast.unlink(missing_ok=True)
        left = shutil.disk_usage(small_disk).free
        ballast.write_bytes(b"x" * max(0, left - free))
        resume = ["--resume"] if (out / "run.json").exists() else []
        code, said = orderly("train", *flags(ref_cache, out), *resume)
        if code == 0:
            break
        failures += 1
        assert "disk" in said or "No space left" in said, said
    assert code == 0 and failures > 2
    assert_same_run(out, whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("command", ["precompute-ref", "train"])
def test_logits_that_are_no_numbers(
    small: tuple[Path, Path], model_dir: Path, tmp_path: Path, orderly: Orderly, value: float, command: str
) -> None:
    """Named by pair, nothing of it stored; a policy that begins so is refused before a step."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[300] = value
    broken = shutil.copytree(model_dir, tmp_path / "model")
    model.save_pretrained(broken)
    cache = tmp_path / "cache"
    if command == "train":
        code, said = orderly("train", "--ref-cache", small[0], "--out", tmp_path / "run", "--init-from", broken)
        assert code == 1 and not (tmp_path / "run" / "model").exists(), said
        return
    code, said = orderly(
        "precompute-ref", "--model", broken, "--data", small[1], "--ref-cache", cache, "--block-pairs", BLOCK
    )
    assert code == 1 and f"{small[1]}:1;" in said and "no finite logprob" in said
    assert not list((cache / "ref").rglob("c")) and not list((cache / "ledger" / "ref").rglob("c"))


def test_weights_and_tokenizer_changed_under_the_same_path(
    small: tuple[Path, Path],
    model_dir: Path,
    tmp_path: Path,
    orderly: Orderly,
    stage_one: StageOne,
) -> None:
    """Neither stage goes on with a cache of what is no longer there; as it was, it does."""
    model, cache = shutil.copytree(model_dir, tmp_path / "model"), tmp_path / "cache"
    assert stage_one(cache, model=model) == (0, "")
    before = contents(cache)
    sound = (model / "model.safetensors").read_bytes()
    tiny_llama(seed=1).save_pretrained(model)
    code, said = stage_one(cache, model=model)
    assert code == 1 and "weights is" in said
    code, said = orderly("train", "--ref-cache", cache, "--out", tmp_path / "run")
    assert code == 1 and "weights digest" in said and not (tmp_path / "run").exists()
    (model / "model.safetensors").write_bytes(sound)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(
        json.dumps({**settings, "chat_template": settings["chat_template"] + " "})
    )
    code, said = stage_one(cache, model=model)
    assert code == 1 and "template is" in said
    assert contents(cache) == before
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (cache / "tokenizer" / "tokenizer.json").write_text("{}")
    assert stage_one(cache, model=model) == (0, "")
    assert contents(cache) == before
