"""Caches made apart, merged: the store of one go, or a refusal that says why."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheDamaged, CacheIncomplete, CacheMismatch, CacheNotFound, ConfigError, OutputError
from minicache.options.others import MergeConfig
from minicache.options.train import TrainConfig
from minicache.reports.contents import read_cache
from minicache.stages.merge import MergeReport, merge
from minicache.trackers import Silent
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl
from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import FORKS, run_here, wait_for


def run(out: Path, *caches: Path) -> MergeReport:
    return merge(MergeConfig(caches, out), Silent())


def load(cache: Path) -> dict[bytes, np.ndarray]:
    table, scores = ReferenceCache(cache).load()
    return {digest.tobytes(): mean for digest, mean in zip(table.digest, scores.logp_mean, strict=True)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """17, 10 and 14 pairs, each with a row that is refused."""
    place = tmp_path_factory.mktemp("data")
    rows = [[*make_rows(count, seed=30 + count), {"chosen": []}] for count in (17, 10, 14)]
    return [write_jsonl(place / f"{number}.jsonl", part) for number, part in enumerate(rows)]


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, files: list[Path]) -> list[Path]:
    """A cache a file, with each token's logprob."""
    place = tmp_path_factory.mktemp("apart")
    return [precompute_into(place / str(n), model_dir, file, per_token=True) for n, file in enumerate(files)]


def test_merged_they_are_the_store_of_one_go(
    apart: list[Path], files: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    report = run(tmp_path / "merged", *apart)
    assert (report.pairs, report.blocks, report.twice) == (41, 3 + 2 + 2, 0)
    assert_same_store(tmp_path / "merged", precompute_into(tmp_path / "whole", model_dir, *files, per_token=True))
    assert not list(ReferenceCache(tmp_path / "merged").verify())
    assert {item.name for item in tmp_path.iterdir()} == {"merged", "whole"}


def test_a_merged_cache_is_appended_to_repaired_and_trained_from(
    apart: list[Path], files: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    from minicache.stages.train import train

    merged, whole = tmp_path / "merged", tmp_path / "whole"
    run(merged, *apart[:2])
    shutil.rmtree(merged / "pairs/tokens/c/4")
    precompute_into(merged, model_dir, *files, per_token=True)
    precompute_into(whole, model_dir, *files, per_token=True)
    assert_same_store(merged, whole)
    first = [
        train(TrainConfig(ref_cache=cache, out=tmp_path / f"run-{cache.name}", max_steps=2), one_process(), Silent())
        for cache in (merged, whole)
    ]
    assert first[0].progress.last["loss"] == first[1].progress.last["loss"]
    assert abs(first[0].progress.first["loss"] - np.log(2)) < 1e-4


def test_pairs_of_several_are_kept_once_and_counted(model_dir: Path, tmp_path: Path) -> None:
    """Once where the whole file is in both, and once where another file has some of the same rows."""
    rows = make_rows(20, seed=7)
    first = write_jsonl(tmp_path / "first.jsonl", [*rows[:12], {"chosen": []}])
    second = write_jsonl(tmp_path / "second.jsonl", [*rows[15:], *rows[5:15]])
    a = precompute_into(tmp_path / "a", model_dir, first)
    b = precompute_into(tmp_path / "b", model_dir, second, first)
    report = run(tmp_path / "merged", a, b)
    assert report.given == [(a, 12), (b, 20)] and report.pairs == 20 and report.twice == 12
    log = ReferenceCache(tmp_path / "merged").log
    assert [(source.rows, source.kept, source.duplicates) for source in log.sources] == [(13, 12, 0), (15, 8, 7)]
    values = load(tmp_path / "merged")
    for cache in (a, b):
        assert all(np.abs(values[digest] - mean).max() < 1e-5 for digest, mean in load(cache).items())
    (refused,) = [json.loads(line) for line in (tmp_path / "merged/refused.jsonl").read_text().splitlines()]
    assert refused["source"] == 0 and refused["line"] == 13
    table, _ = ReferenceCache(tmp_path / "merged").load()
    whole, _ = ReferenceCache(precompute_into(tmp_path / "whole", model_dir, first, second)).load()
    assert np.array_equal(table.digest, whole.digest) and np.array_equal(table.source, whole.source)
    assert read_cache(tmp_path / "merged").inspection.complete


def test_the_other_way_round_files_and_their_refused_rows_are_renumbered(
    apart: list[Path], files: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    run(tmp_path / "merged", apart[2], apart[0])
    assert_same_store(
        tmp_path / "merged", precompute_into(tmp_path / "whole", model_dir, files[2], files[0], per_token=True)
    )


def test_caches_of_different_requests_are_refused_with_the_fields_named(
    apart: list[Path], ref_cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(CacheMismatch, match=r"per_token is False, .* True") as error:
        run(tmp_path / "merged", apart[0], ref_cache)
    assert "weights" not in str(error.value) and str(ref_cache) in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_read_in_two_formats_is_refused(
    apart: list[Path], files: list[Path], model_dir: Path, tmp_path: Path
) -> None:
    other = precompute_into(tmp_path / "other", model_dir, files[0], format="messages", per_token=True)
    with pytest.raises(
        CacheMismatch, match="was read with --format messages, in another of the caches with --format auto"
    ):
        run(tmp_path / "merged", apart[0], other)


def test_holes_and_damage_are_refused_by_name(apart: list[Path], tmp_path: Path) -> None:
    for place, message in (
        ("ledger/ref/c/1", "other: ledger/ref, block 1 is missing"),
        ("ledger/pairs/c/0", "other: ledger/pairs, block 0 is missing"),
    ):
        other = shutil.copytree(apart[1], tmp_path / "other")
        shutil.rmtree(other / place)
        with pytest.raises(CacheIncomplete, match=message):
            run(tmp_path / "merged", apart[0], other)
        shutil.rmtree(other)
    other = shutil.copytree(apart[1], tmp_path / "other")
    (other / "pairs/tokens/c/1/0").write_bytes(b"")
    with pytest.raises(CacheDamaged, match="block 1"):
        run(tmp_path / "merged", apart[0], other)
    cache = CacheWriter(other)
    cache.log.sources[0].complete = False
    cache.write_log()
    with pytest.raises(CacheIncomplete, match=r"interrupted while reading .*1\.jsonl"):
        run(tmp_path / "merged", apart[0], other)
    assert [item.name for item in tmp_path.iterdir()] == ["other"]


def test_pairs_with_other_values_are_refused(apart: list[Path], tmp_path: Path) -> None:
    other = shutil.copytree(apart[0], tmp_path / "other")
    cache = CacheWriter(other)
    scores = cache.blocks.ref(1)
    scores.logp_mean[3, 1] += 5e-5  # rounding
    cache.write_ref(1, scores)
    assert run(tmp_path / "near", apart[0], other).twice == 17
    scores.logp_mean[5, 1] += 2e-4
    cache.write_ref(1, scores)
    with pytest.raises(CacheMismatch, match=rf"pair 13 of {other} is pair 13 of {apart[0]}, but .* differ by 0\.0002"):
        run(tmp_path / "far", apart[0], other)


def test_what_exists_is_not_written_over(apart: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for out in (tmp_path / "empty", tmp_path / "link", apart[0]):
        with pytest.raises(OutputError, match="exists; expected the name of a cache to make"):
            run(out, *apart)
    with pytest.raises(CacheNotFound, match="no such directory"):
        run(tmp_path / "merged", apart[0], tmp_path / "absent")


@pytest.mark.parametrize("caches", [(), ("a",), ("a", "a"), ("a", "b/../a")])
def test_fewer_than_two_caches_are_refused(caches: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="expected two different caches or more"):
        MergeConfig(tuple(map(Path, caches)), Path("c"))


def test_the_command_tells_what_it_did(apart: list[Path], tmp_path: Path, cli: Cli) -> None:
    code, stdout, _ = cli("merge", *apart, "--ref-cache", tmp_path / "merged")
    said = " ".join(stdout.split())
    assert code == 0 and "17 pairs of" in said and "✓ 41 pairs, 7 blocks in" in said, said
    code, _, stderr = cli("merge", *apart, "--ref-cache", tmp_path / "merged")
    assert code == 1 and "exists" in stderr and "Traceback" not in stderr


@pytest.mark.slow
def test_killed_it_leaves_no_cache_and_repeated_it_makes_one(model_dir: Path, tmp_path: Path) -> None:
    files = [write_jsonl(tmp_path / f"{seed}.jsonl", make_rows(30, seed=seed)) for seed in (1, 2)]
    parts = [precompute_into(tmp_path / f"part{n}", model_dir, file, block_pairs=1) for n, file in enumerate(files)]
    arguments = ["merge", *map(str, parts), "--ref-cache", str(tmp_path / "merged")]
    for blocks in (3, 30):
        process = FORKS.Process(target=run_here, args=(arguments, tmp_path / "output"))
        process.start()
        wait_for(
            lambda: len(list(tmp_path.glob(".merged.*.draft/ledger/ref/c/*"))) > blocks,  # noqa: B023
            process.is_alive,
        )
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        assert process.is_alive() and not (tmp_path / "merged").exists()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (tmp_path / "merged").exists() and len(list(tmp_path.glob(".merged.*.draft"))) == 1
    run(tmp_path / "merged", *parts)
    assert not list(tmp_path.glob(".*"))
    assert_same_store(tmp_path / "merged", precompute_into(tmp_path / "whole", model_dir, *files, block_pairs=1))
