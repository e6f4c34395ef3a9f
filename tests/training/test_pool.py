"""Which pairs a run takes: of a file, by digest; of several caches, by weight."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.reader import JoinedCaches, ReferenceCache
from minicache.errors import CacheMismatch, ConfigError
from minicache.options.train import TrainConfig, ValidationOptions
from minicache.scoring.loading import load_pairs
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training import step as steps
from minicache.training.order import Mixture
from minicache.training.state import Run, Training
from tests.conftest import Cli, make_rows, one_process, precompute_into, write_jsonl

TIMES = ("tokens_per_second", "memory_gb")


class Listener(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def run(
    ref_cache: Path | str | tuple[Path | str, ...], out: Path, listener: Silent | None = None, **options: Any
) -> TrainReport:
    settings = {"batch_size": 8, "epochs": 2, "lr": 1e-3, "log_every": 1, **options}
    return train(TrainConfig(ref_cache, out, **settings), one_process(), listener or Silent())


def lines(out: Path) -> list[dict[str, Any]]:
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in read]


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> list[Path]:
    """Of 24 and of 16 pairs."""
    place = tmp_path_factory.mktemp("caches")
    files = [write_jsonl(place / f"{count}.jsonl", make_rows(count, seed=count)) for count in (24, 16)]
    return [precompute_into(place / file.stem, model_dir, file) for file in files]


# --- a file of pairs ---


def test_a_reordered_subset_is_trained_on_as_if_the_cache_were_of_it_alone(
    ref_cache: Path, model_dir: Path, tmp_path: Path
) -> None:
    rows = make_rows(40)
    subset = [rows[30], rows[3], rows[17], {"chosen": []}, *rows[5:12], rows[3]]
    file = write_jsonl(tmp_path / "subset.jsonl", subset)
    listener = Listener()
    run(ref_cache, tmp_path / "run", listener, data=(str(file),))
    assert any(
        "10 pairs" in note and "1 repeat another" in note and "1 cannot be used" in note for note in listener.notes
    )
    alone = precompute_into(tmp_path / "alone", model_dir, file)
    run(alone, tmp_path / "expected")
    assert lines(tmp_path / "run") == lines(tmp_path / "expected")
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["pairs"] == 10 and facts["data"] == [str(file)]


def test_a_pair_that_is_not_in_the_cache_is_named_and_nothing_is_made(ref_cache: Path, tmp_path: Path) -> None:
    rows, others = make_rows(40), make_rows(5, seed=9)
    file = write_jsonl(tmp_path / "more.jsonl", [rows[0], *others[:3], rows[1], others[3]])
    with pytest.raises(CacheMismatch, match=r"4 pairs of --data .*more.jsonl line 2-4, 6\).*precompute-ref") as error:
        run(ref_cache, tmp_path / "run", data=(str(file),))
    assert str(ref_cache) in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_file_without_a_pair_is_refused(ref_cache: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "none.jsonl", [{"chosen": []}, {"rejected": 3}])
    with pytest.raises(ConfigError, match="none of 2 rows is a pair"):
        run(ref_cache, tmp_path / "run", data=(str(file),))


def test_pairs_of_a_file_are_held_out_by_their_digests_as_ever(ref_cache: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "subset.jsonl", make_rows(40)[:30])
    held = ReferenceCache(ref_cache).load().table.digest[:30, 0] < np.uint64(0.3 * 2**64)
    run(ref_cache, tmp_path / "run", data=(str(file),), validation=ValidationOptions(holdout=0.3), max_steps=1)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (facts["held_out"], facts["pairs"]) == (held.sum(), 30 - held.sum()) and 0 < held.sum() < 30


# --- several caches ---


def test_several_caches_are_trained_on_as_their_merger(caches: list[Path], model_dir: Path, tmp_path: Path) -> None:
    run(tuple(caches), tmp_path / "run")
    files = [cache.with_suffix(".jsonl") for cache in caches]
    run(precompute_into(tmp_path / "whole", model_dir, *files), tmp_path / "expected")
    assert lines(tmp_path / "run") == lines(tmp_path / "expected")


def test_several_caches_are_decoded_into_one_scratch_file(caches: list[Path], tmp_path: Path) -> None:
    joined = JoinedCaches([ReferenceCache(cache) for cache in caches])
    mapped = load_pairs(joined, tmp_path, one_process(), Silent())
    parts = [ReferenceCache(cache).load() for cache in caches]
    np.testing.assert_array_equal(mapped.table.tokens, np.concatenate([part.table.tokens for part in parts]))
    means = np.concatenate([part.reference.logp_mean for part in parts])
    np.testing.assert_array_equal(mapped.reference.logp_mean, means)
    assert mapped.table.keys.tobytes() == b"".join(part.table.keys.tobytes() for part in parts)


def test_weights_are_shares_of_an_epoch(caches: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[np.ndarray] = []

    def count(run: Run, training: Training, indices: np.ndarray, seconds: float) -> int:
        taken.append(indices)
        return steps.count_step(run, training, indices, seconds)

    monkeypatch.setattr("minicache.training.loop.count_step", count)
    listener = Listener()
    run((f"{caches[0]}:0.75", f"{caches[1]}:.25"), tmp_path / "run", listener, epochs=3)
    assert any("24 of 24 pairs" in note and "8 of 16 pairs" in note for note in listener.notes)
    epochs = np.split(np.concatenate(taken), 3)
    for epoch in epochs:
        assert len(np.unique(epoch)) == 32 and (epoch < 24).sum() == 24
    second = [set(epoch[epoch >= 24].tolist()) for epoch in epochs]
    assert second[0] | second[1] == set(range(24, 40))  # once round before any comes again
    assert second[2] != second[0]


@pytest.mark.parametrize("sizes", [(100, 10), (7, 7, 7), (1, 1000)])
@pytest.mark.parametrize("weights", [(1, 1, 1), (0.2, 0.7, 0.1), (5, 1, 3)])
def test_an_epoch_holds_the_shares_and_no_pair_twice(sizes: tuple[int, ...], weights: tuple[float, ...]) -> None:
    weights = weights[: len(sizes)]
    parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    mixture = Mixture.of(parts, weights)
    shares = np.array(weights) / sum(weights)
    exact = shares * (np.array(sizes) / shares).min()
    assert (np.abs(np.array(mixture.taken) - exact) <= 1).all() and (np.array(mixture.taken) <= sizes).all()
    for epoch in range(4):
        pairs = mixture.epoch(7, epoch)
        assert len(np.unique(pairs)) == len(pairs) == len(mixture)
        np.testing.assert_array_equal(pairs, mixture.epoch(7, epoch))
        assert [int(np.isin(pairs, part).sum()) for part in parts] == list(mixture.taken)


def test_a_pair_in_two_caches_is_taken_once(ref_cache: Path, model_dir: Path, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "again.jsonl", [*make_rows(40)[:6], *make_rows(4, seed=3)])
    again = precompute_into(tmp_path / "again", model_dir, file)
    listener = Listener()
    run((ref_cache, again), tmp_path / "run", listener, max_steps=1)
    assert any("6 pairs are in more than one cache" in note for note in listener.notes)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["pairs"] == 44
    with pytest.raises(ConfigError, match="has no pair left"):
        subset = precompute_into(tmp_path / "inside", model_dir, write_jsonl(tmp_path / "in.jsonl", make_rows(40)[:6]))
        run((f"{ref_cache}:1", f"{subset}:1"), tmp_path / "other")


def test_a_mixed_run_that_was_killed_resumes_to_the_same_end(caches: list[Path], tmp_path: Path) -> None:
    mixed = f"{caches[0]}:2", f"{caches[1]}:1"
    settings: dict[str, Any] = {"epochs": 3, "save_every": 2}
    run(mixed, tmp_path / "whole", **settings)

    class Killed(BaseException):
        pass

    class Kills(Silent):
        def log(self, step: int, metrics: dict[str, float]) -> None:
            if step == 8:
                raise Killed

    with pytest.raises(Killed):
        run(mixed, tmp_path / "run", Kills(), **settings)
    with pytest.raises(CacheMismatch, match="cannot change its pairs half-way"):
        run((f"{caches[0]}:1", f"{caches[1]}:1"), tmp_path / "run", resume=True, **settings)
    run(mixed, tmp_path / "run", resume=True, **settings)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_caches_of_different_models_do_not_mix(ref_cache: Path, model_dir: Path, tmp_path: Path, cli: Cli) -> None:
    other = precompute_into(
        tmp_path / "other", model_dir, write_jsonl(tmp_path / "a.jsonl", make_rows(8)), max_length=64, block_pairs=4
    )
    code, _, err = cli("train", "--ref-cache", ref_cache, "--ref-cache", other, "--out", tmp_path / "run")
    assert code == 1 and err.count("error:") == 1
    row = next(line for line in err.splitlines() if line.strip().startswith("max_length"))
    assert row.split() == ["max_length", "64", "1024", "yes"]
    assert not any(line.strip().startswith("block_pairs") for line in err.splitlines())


@pytest.mark.parametrize(
    ("caches", "problem"),
    [
        (("a:1", "b"), "a weight for each cache"),
        (("a:0", "b:1"), "weight of 0"),
        (("a:-1", "b:1"), "a:-1: expected a weight above 0"),
        (("a:nan", "b:1"), "a:nan: expected a weight above 0"),
        (("a:0.7",), "a share beside other caches"),
        (("a", "./a"), "named twice"),
        (("a:1", "a:2"), "named twice"),
    ],
)
def test_caches_that_cannot_be_mixed(caches: tuple[str, ...], problem: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=problem):
        TrainConfig(caches, tmp_path)


def test_what_follows_a_colon_is_a_weight_only_if_it_is_a_number(tmp_path: Path) -> None:
    places = ("s3://bucket/a:0.25", "dir:1e-1", "C:dir:3")
    config = TrainConfig(places, tmp_path)
    assert config.caches == [("s3://bucket/a", 0.25), ("dir", 0.1), ("C:dir", 3.0)]
    assert TrainConfig("file:///x", tmp_path).caches == [("file:///x", None)]
