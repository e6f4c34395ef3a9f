"""The token budget: found from what is free, kept by a resumed run, and what happens where a batch does not fit after all."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache.errors import ModelError
from minicache.machine import job_bytes
from minicache.options.train import TrainConfig
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring import budget
from minicache.scoring.batch import Batch
from minicache.scoring.budget import MOST, RESERVE, free_bytes, scoring_budget, training_budget
from minicache.scoring.counting import counted_pass
from minicache.scoring.memory import How, Line, Pass, need_of
from minicache.scoring.scorer import PairScores, Scorer
from minicache.scoring.tables import SLOTS, Budget, score_table
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training import step
from tests.conftest import one_process, tiny_llama
from tests.scoring.test_scoring import random_pairs

CPU = torch.device("cpu")


def scorer_and_table(layout: str = "packed") -> tuple[Scorer, PairTable]:
    model = tiny_llama().requires_grad_(True)
    return Scorer(model, "float32", layout), PairTable.from_pairs(random_pairs(16), "int32")


def budget_with(monkeypatch: pytest.MonkeyPatch, free: float, checkpointing: bool = False) -> int:
    scorer, table = scorer_and_table()
    monkeypatch.setattr(budget, "free_bytes", lambda device, processes: free)
    return training_budget(scorer, table, "adamw", checkpointing, one_process(), Silent())


def test_the_budget_follows_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [budget_with(monkeypatch, free) for free in (1e12, 2e7, 8e6, 4e6)]
    assert found[0] == MOST["cpu"]
    assert found[0] > found[1] > found[2] > found[3]
    assert all(slots & (slots - 1) == 0 for slots in found), "powers of two: a little more free memory changes nothing"
    assert budget_with(monkeypatch, 8e6, checkpointing=True) > found[2]


def test_a_budget_takes_no_more_than_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """And twice as many slots would."""
    scorer, table = scorer_and_table()
    longest = int(scorer.layout.costs(table.lengths).argmax())
    one, two = (scorer.layout.make(table, np.full(count, longest)) for count in (1, 2))
    need = need_of(scorer, counted_pass(scorer, one, two, How(training=True)), "adamw")
    free = 2e7
    slots = budget_with(monkeypatch, free)
    assert need.state + need.passes.bytes(slots) <= RESERVE * free < need.state + need.passes.bytes(2 * slots)


def test_a_whole_model_has_its_gradients_once() -> None:
    """Also with DDP: test_parallel.py looks into its buckets."""
    scorer, _ = scorer_and_table()
    trained = sum(parameter.numel() for parameter in scorer.parameters())
    need = need_of(scorer, Pass(Line(0, 1), Line(0, 1), Line(0, 1), 1), "adamw")
    assert (need.weights, need.gradients, need.optimizer, need.copies) == (4 * trained, 4 * trained, 8 * trained, 0)


def test_shards_divide_weights_gradients_and_optimizer_and_gather_two_layers() -> None:
    scorer, _ = scorer_and_table()
    scorer.shards = 4
    trained = sum(parameter.numel() for parameter in scorer.parameters())
    (layer, _) = (sum(each.numel() for each in layer.parameters()) for layer in scorer.model.model.layers)
    end = scorer.model.lm_head.weight.numel()
    need = need_of(scorer, Pass(Line(0, 1), Line(0, 1), Line(0, 1), 1), "adamw")
    assert (need.weights, need.gradients, need.optimizer) == (trained, trained, 2 * trained)
    root = trained - 2 * layer - 2 * end
    assert need.copies == 4 * 3 * root + 2 * 4 * layer + (4 + 4) * layer
    # a weight and a buffer, while the head computes, and for the gradient of the embedding
    assert (need.passes.at_head.fixed, need.passes.end) == (2 * 4 * end, 2 * 4 * end)
    scorer.ends_apart = False
    need = need_of(scorer, need.passes, "adamw")
    assert need.copies == 4 * 3 * (root + 2 * end) + 2 * 4 * layer + (4 + 4) * layer
    assert (
        need_of(scorer, Pass(Line(0, 1), Line(0, 1), Line(0, 1), 1), None).copies
        == 4 * (root + 2 * end) + 2 * 4 * layer
    )


class Several(World):
    """Three processes, the second with the least memory."""

    def gather(self, value: Any) -> list[Any]:
        fits, slots, free, need = value
        return [value, (fits // 4, slots // 4, free / 4, need), (fits // 2, slots // 2, free / 2, need)]


def test_all_processes_take_the_smallest_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device, processes: 1e12)
    scorer, table = scorer_and_table()
    assert training_budget(scorer, table, "adamw", False, Several(0, 1, CPU), Silent()) == MOST["cpu"] // 4
    assert scoring_budget(scorer, table, Several(0, 1, CPU), Silent()) == SLOTS["cpu"] // 4


def test_a_pair_that_cannot_fit_is_an_error_before_the_first_step(
    ref_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "free_bytes", lambda device, processes: 1e5)
    message = (
        r"longest pair, \d+ token slots, does not fit in memory: it needs .* kB for the optimizer; 100.0 kB are free"
    )
    with pytest.raises(ModelError, match=message):
        train(TrainConfig(ref_cache, tmp_path / "run"), one_process(), Silent())
    assert not (tmp_path / "run" / "run.json").exists()
    train(TrainConfig(ref_cache, tmp_path / "run", tokens_per_micro_batch=64, max_steps=1), one_process(), Silent())


def test_a_model_whose_code_reads_values_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, table = scorer_and_table()
    monkeypatch.setattr(budget, "free_bytes", lambda device, processes: 2e7)
    counted = training_budget(scorer, table, "adamw", False, one_process(), Silent())

    def reads(*arguments: object) -> None:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(budget, "counted_pass", reads)
    monkeypatch.setattr(budget, "COUNTED", {})
    measured = training_budget(scorer, table, "adamw", False, one_process(), Silent())
    assert measured in (counted // 2, counted, 2 * counted)


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

    def forward(self, batch: Batch, distribution: bool = False, balance: bool = False) -> PairScores:
        if batch.input_ids.numel() > 60:
            raise torch.OutOfMemoryError("out of memory")
        return super().forward(batch, distribution, balance)


def test_a_batch_that_does_not_fit_is_halved_until_it_does() -> None:
    model, table = tiny_llama(), PairTable.from_pairs(random_pairs(16), "int32")
    means = {}
    for kind in (Scorer, Small):
        scorer, means[kind] = kind(model, "float32", "packed"), np.full((16, 2), np.nan)
        for indices, _, scores in score_table(scorer, table, np.arange(16), None, CPU):
            assert np.isnan(means[kind][indices]).all(), "each pair once"
            means[kind][indices] = scores.logp_mean
    assert np.abs(means[Scorer] - means[Small]).max() < 1e-5


def test_a_smaller_batch_is_kept_for_the_next_table() -> None:
    scorer, table = Small(tiny_llama(), "float32", "packed"), PairTable.from_pairs(random_pairs(16), "int32")
    kept = Budget(SLOTS["cpu"])
    list(score_table(scorer, table, np.arange(16), kept, CPU))
    found = kept.slots
    assert found <= 60
    list(score_table(scorer, table, np.arange(16), kept, CPU))
    assert kept.slots == found


def test_few_attempts_find_the_batch_that_fits() -> None:
    """Half as large each time, and no larger again afterwards."""
    sizes: list[int] = []

    class Counted(Small):
        def forward(self, batch: Batch, distribution: bool = False, balance: bool = False) -> PairScores:
            sizes.append(batch.input_ids.numel())
            return super().forward(batch, distribution, balance)

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
    with pytest.raises(ModelError, match=r"step 0, of 512 token slots at once, .* try --tokens-per-micro-batch 256"):
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
