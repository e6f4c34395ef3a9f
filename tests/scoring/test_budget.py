"""The token budget: found from what is free, kept by a resumed run, and what happens where a batch does not fit after all."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minicache.errors import ModelError
from minicache.models import checkpoint_activations
from minicache.options.train import TrainConfig
from minicache.pairs import PairTable
from minicache.scoring import budget
from minicache.scoring.batch import Batch
from minicache.scoring.budget import MOST, RESERVE, _saved, free_bytes, job_bytes, slot_bytes, training_budget
from minicache.scoring.head import CHUNK_NUMBERS
from minicache.scoring.scorer import PairScores, Scorer
from minicache.scoring.tables import score_table
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training import step
from tests.conftest import one_process, tiny_llama
from tests.scoring.test_scoring import random_pairs

CPU = torch.device("cpu")


def scorer_and_table(layout: str = "packed") -> tuple[Scorer, PairTable]:
    model = tiny_llama().requires_grad_(True)
    return Scorer(model, "float32", layout), PairTable.from_pairs(random_pairs(16), "int32")


@pytest.mark.parametrize("layout", ["packed", "shared", "padded"])
def test_a_slots_need_is_what_a_large_batch_keeps(layout: str) -> None:
    scorer, table = scorer_and_table(layout)
    saved, slots = _saved(scorer, table, np.arange(16), CPU)
    assert 0.7 < slot_bytes(scorer, table, False, CPU) / 1.25 / (saved / slots) < 1.4


def test_checkpointed_layers_need_less_as_was_foreseen() -> None:
    scorer, table = scorer_and_table()
    whole, foreseen = (slot_bytes(scorer, table, checkpointing, CPU) for checkpointing in (False, True))
    checkpoint_activations(scorer.model)
    saved, slots = _saved(scorer, table, np.arange(16), CPU)
    assert saved / slots < foreseen
    assert _saved(scorer, table, np.arange(16), CPU)[0] / slots < whole


def test_the_budget_follows_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, table = scorer_and_table()
    found = []
    for free in (1e12, 1.6e8, 1.3e8, 0.0):
        monkeypatch.setattr(budget, "free_bytes", lambda device, processes, free=free: free)
        found.append(training_budget(scorer, table, "adamw", False, CPU, 1))
    assert found[0] == MOST["cpu"] and found[-1] == 1
    assert found[0] > found[1] > found[2] > found[3]
    assert all(slots & (slots - 1) == 0 for slots in found), "powers of two: a little more free memory changes nothing"


@pytest.mark.parametrize(("processes", "copies"), [(1, 1), (2, 2), (4, 2)])
def test_the_buckets_of_ddp_hold_the_gradients_a_second_time(
    monkeypatch: pytest.MonkeyPatch, processes: int, copies: int
) -> None:
    """Of each trained number its gradients and Adam's two moments are taken off, to the byte, before a slot is."""
    scorer, table = scorer_and_table()
    trained = sum(parameter.numel() for parameter in scorer.parameters())
    vocabulary, width = 400, 32
    fixed = trained * (4 * copies + 8) + 3 * 4 * CHUNK_NUMBERS["cpu"] + 4 * vocabulary * width
    monkeypatch.setattr(budget, "slot_bytes", lambda *arguments: 1.0)
    monkeypatch.setattr(budget, "MOST", {"cpu": 2**40})
    for more, expected in ((100, 2**22), (-100, 2**21)):
        free = (fixed + 2**22 + more) / RESERVE
        monkeypatch.setattr(budget, "free_bytes", lambda device, processes, free=free: free)
        assert training_budget(scorer, table, "adamw", False, CPU, processes) == expected


def test_what_is_free_is_shared_by_the_processes() -> None:
    assert 0 < free_bytes(CPU, 4) < free_bytes(CPU) < float("inf")


def test_a_run_keeps_the_budget_it_found(ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(ref_cache, tmp_path / "run", max_steps=2, save_every=1, log_every=1)
    found = iter([64])
    monkeypatch.setattr("minicache.stages.train.training_budget", lambda *arguments: next(found))

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("minicache.training.loop.log_step", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config, one_process(), Silent())
    assert json.loads((tmp_path / "run/run.json").read_text())["token_budget"] == 64
    train(TrainConfig(**{**vars(config), "resume": True}), one_process(), Silent())
    facts = json.loads((tmp_path / "run/run.json").read_text())
    assert (facts["token_budget"], facts["tokens_per_micro_batch"]) == (64, None)


class Small(Scorer):
    """A device that holds 60 token slots."""

    def forward(self, batch: Batch, distribution: bool = False) -> PairScores:
        if batch.input_ids.numel() > 60:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(batch, distribution)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    model, table = tiny_llama(), PairTable.from_pairs(random_pairs(16), "int32")
    means = {}
    for kind in (Scorer, Small):
        scorer, means[kind] = kind(model, "float32", "packed"), np.full((16, 2), np.nan)
        for indices, _, scores in score_table(scorer, table, np.arange(16), None, CPU):
            assert np.isnan(means[kind][indices]).all(), "each pair once"
            means[kind][indices] = scores.logp_mean
    assert np.abs(means[Scorer] - means[Small]).max() < 1e-5


def test_few_attempts_find_the_batch_that_fits() -> None:
    """Half as large each time, and no larger again afterwards."""
    sizes: list[int] = []

    class Counted(Small):
        def forward(self, batch: Batch, distribution: bool = False) -> PairScores:
            sizes.append(batch.input_ids.numel())
            return super().forward(batch, distribution)

    model, table = tiny_llama(), PairTable.from_pairs(random_pairs(64), "int32")
    list(score_table(Counted(model, "float32", "packed"), table, np.arange(64), None, CPU))
    failed = [at for at, size in enumerate(sizes) if size > 60]
    assert max(sizes) > 8 * 60 and 3 < len(failed) <= np.ceil(np.log2(max(sizes) / 60)) + 1
    assert all(sizes[later] <= sizes[first] // 2 for first, later in pairwise(failed))


def test_a_pair_that_alone_does_not_fit_is_an_error() -> None:
    (pair,) = random_pairs(1)
    mask = np.ones(90, np.uint8)
    mask[0] = 0
    table = PairTable.from_pairs(
        [replace(pair, tokens=np.resize(pair.tokens, 90), loss_mask=mask, lengths=(1, 40, 49))], "int32"
    )
    scorer = Small(tiny_llama(), "float32", "shared")
    with pytest.raises(ModelError, match="a pair of 90 token slots does not fit in memory; lower --max-length"):
        next(score_table(scorer, table, np.arange(1), None, CPU))


def test_a_step_that_does_not_fit_says_what_to_try(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(step, "pair_logps", full)
    with pytest.raises(ModelError, match=r"step 0: 512 token slots .* try --tokens-per-micro-batch 256"):
        train(TrainConfig(ref_cache, tmp_path / "run", tokens_per_micro_batch=512), one_process(), Silent())


def group(place: Path, limit: str, current: int, inactive: int) -> None:
    place.mkdir(parents=True, exist_ok=True)
    (place / "memory.max").write_text(f"{limit}\n")
    (place / "memory.current").write_text(f"{current}\n")
    (place / "memory.stat").write_text(f"anon 7\ninactive_file {inactive}\nactive_file 3\n")


def test_a_job_has_what_the_tightest_of_its_control_groups_leaves(tmp_path: Path) -> None:
    own, groups = tmp_path / "own", tmp_path / "groups"
    groups.mkdir()
    own.write_text("4:memory:/other\n0::/job/step\n")
    assert job_bytes(groups, own) == job_bytes(groups, tmp_path / "absent") == float("inf")
    group(groups / "job/step", "max", 50, 10)
    assert job_bytes(groups, own) == float("inf")
    group(groups / "job", "1000", 600, 100)
    assert job_bytes(groups, own) == 503
    group(groups / "job/step", "300", 100, 0)
    assert job_bytes(groups, own) == 203
    group(groups / "job/step", "300", 400, 0)
    assert job_bytes(groups, own) == 0
