"""Options of stage two against plain loops in float64, one answer at a time, on pairs whose answers begin alike."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from torch.utils.flop_counter import FlopCounterMode

from minicache.cache.reader import ReferenceCache
from minicache.errors import CacheMismatch
from minicache.models import load_model
from minicache.options.others import EvaluateConfig
from minicache.options.train import LossOptions, TrainConfig, ValidationOptions
from minicache.pairs import EncodedPair, PairTable
from minicache.scoring.layouts import padded
from minicache.scoring.scorer import Scorer
from minicache.stages.evaluate import evaluate
from minicache.stages.train import TrainReport, train
from minicache.trackers import Silent
from minicache.training.order import Mixture, global_batches
from minicache.training.speed import memory_gb, step_flops
from tests.conftest import make_rows, one_process, precompute_into, tiny_llama, write_jsonl

STEPS, BATCH, LR, BETA = 2, 4, 3e-3, 0.5


def run(ref_cache: Path, out: Path, **options: Any) -> TrainReport:
    settings: dict[str, Any] = {
        "batch_size": BATCH,
        "max_steps": STEPS,
        "lr": LR,
        "beta": BETA,
        "log_every": 1,
        "save_every": 0,
    }
    settings |= {"schedule": "constant", "warmup": 0.0, "tokens_per_micro_batch": 150, **options}
    return train(TrainConfig(ref_cache, out, **settings), one_process(), Silent())


def curve(out: Path, name: str = "loss") -> np.ndarray:
    return np.array([json.loads(line)[name] for line in (out / "metrics.jsonl").read_text().splitlines()])


@pytest.fixture(scope="session")
def alike(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A cache with each token's logprob of 16 pairs; both answers begin with the same counted tokens, of lengths that differ."""
    rows = make_rows(16, seed=3)
    for row in rows:
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] = "the cat sat " + row[side][-1]["content"]
    directory = tmp_path_factory.mktemp("alike")
    data = write_jsonl(directory / "pairs.jsonl", rows)
    cache = precompute_into(directory / "cache", model_dir, data, per_token=True, loss_on="assistant")
    table = ReferenceCache(cache).load().table
    assert all(table[index].loss_mask[: table[index].lengths[0]].sum() > 2 for index in range(16))
    assert (table.token_counts[:, 0] > table.token_counts[:, 1]).any()
    return cache


# --- the plain loop ---

Side = dict[str, torch.Tensor]  # of an answer's counted tokens, each (n,) float64: logp, log sum p^2, entropy
Plain = Callable[[list[Side], list[Side]], torch.Tensor]


def plain_sides(model: torch.nn.Module, pair: EncodedPair) -> list[Side]:
    sides = []
    for side in (0, 1):
        ids, mask = (torch.from_numpy(values.astype(np.int64)) for values in pair.side(side))
        logps = model(ids[None]).logits[0, :-1].log_softmax(-1)
        counted = mask[1:].bool()
        squares = logps.exp().square().sum(-1).log()
        entropy = -(logps.exp() * logps).sum(-1)
        chosen = logps.gather(1, ids[1:, None])[:, 0]
        sides.append({"logp": chosen[counted], "squares": squares[counted], "entropy": entropy[counted]})
    return sides


def plain_run(model_dir: Path, table: PairTable, loss_of: Plain) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of the first steps: two live models, AdamW by hand."""
    policy, reference = (load_model(str(model_dir)).model.double() for _ in range(2))
    policy.requires_grad_(True)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LR, weight_decay=0.0)
    losses, norms = [], []
    for _, batch in zip(
        range(STEPS), global_batches(Mixture.of([np.arange(len(table))]), BATCH, seed=42), strict=False
    ):
        pairs = [table[int(index)] for index in batch]
        each = (loss_of(plain_sides(policy, pair), plain_sides(reference, pair)) for pair in pairs)
        total = sum(each, torch.zeros((), dtype=torch.float64)) / len(batch)
        total.backward()
        losses.append(total.item())
        norms.append(torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def scores(sides: list[Side], logps: str, alpha: float) -> list[torch.Tensor]:
    """LD-DPO's score of each answer: tokens beyond the shorter answer's length weigh alpha."""
    shorter = min(len(side["logp"]) for side in sides)
    both = []
    for side in sides:
        weights = torch.tensor([1.0 if rank < shorter else alpha for rank in range(len(side["logp"]))])
        both.append((side["logp"] * weights).sum() / (len(weights) if logps == "mean" else 1))
    return both


def dpo(policy: list[Side], reference: list[Side], logps: str, alpha: float = 1.0) -> torch.Tensor:
    (chosen, rejected), (ref_chosen, ref_rejected) = (scores(sides, logps, alpha) for sides in (policy, reference))
    return -logsigmoid(BETA * ((chosen - rejected) - (ref_chosen - ref_rejected)))


def wpo(policy: list[Side], reference: list[Side], logps: str) -> torch.Tensor:
    weights = [(side["logp"] - side["squares"]).mean().exp().detach() for side in policy]
    return weights[0] * weights[1] * dpo(policy, reference, logps)


@pytest.mark.parametrize("logps", ["mean", "sum"])
@pytest.mark.parametrize(
    ("options", "loss_of"),
    [
        (LossOptions(wpo=True), wpo),
        (LossOptions(ld_alpha=0.3), lambda p, r, logps: dpo(p, r, logps, 0.3)),
        (LossOptions(ld_alpha=0.0), lambda p, r, logps: dpo(p, r, logps, 0.0)),
    ],
)
def test_the_first_steps_are_those_of_a_plain_loop(
    alike: Path,
    model_dir: Path,
    tmp_path: Path,
    logps: str,
    options: LossOptions,
    loss_of: Callable[[list[Side], list[Side], str], torch.Tensor],
) -> None:
    run(alike, tmp_path / "run", logps=logps, loss_options=options)
    table = ReferenceCache(alike).load().table
    losses, norms = plain_run(model_dir, table, lambda policy, reference: loss_of(policy, reference, logps))
    assert np.allclose(curve(tmp_path / "run"), losses, rtol=5e-5)
    assert np.allclose(curve(tmp_path / "run", "grad_norm"), norms, rtol=1e-3)


@pytest.mark.parametrize("logps", ["mean", "sum"])
def test_ld_dpo_at_alpha_1_is_dpo(alike: Path, tmp_path: Path, logps: str) -> None:
    run(alike, tmp_path / "plain", logps=logps, loss_options=LossOptions(sft_weight=0.1))
    run(alike, tmp_path / "ld", logps=logps, loss_options=LossOptions(sft_weight=0.1, ld_alpha=1.0))
    for name in ("loss", "kl", "logps/rejected", "grad_norm"):
        assert np.allclose(curve(tmp_path / "plain", name), curve(tmp_path / "ld", name), rtol=1e-4, atol=1e-6), name


def test_the_sft_term_counts_every_token_whatever_ld_alpha_says(alike: Path, tmp_path: Path) -> None:
    for name, alpha in (("plain", None), ("ld", 0.0)):
        run(alike, tmp_path / name, max_steps=1, loss_options=LossOptions(sft_weight=1.0, ld_alpha=alpha))
    assert curve(tmp_path / "plain") == pytest.approx(
        curve(tmp_path / "ld"), rel=1e-6
    )  # at step 0, where DPO's is ln 2


def test_ld_alpha_needs_a_cache_with_every_token(alike: Path, ref_cache: Path, tmp_path: Path) -> None:
    options = LossOptions(ld_alpha=0.5)
    with pytest.raises(CacheMismatch, match=r"--ld-alpha: needs each token's .* --per-token into another cache"):
        run(ref_cache, tmp_path / "run", loss_options=options)
    with pytest.raises(CacheMismatch, match="--ld-alpha: needs"):
        run(alike, tmp_path / "run", loss_options=options, validation=ValidationOptions(eval_cache=ref_cache))
    assert not (tmp_path / "run").exists()
    run(alike, tmp_path / "run", loss_options=options)
    with pytest.raises(CacheMismatch, match="--ld-alpha: needs"):
        evaluate(EvaluateConfig(str(tmp_path / "run"), ref_cache), one_process(), Silent())


def test_metrics_of_the_first_step_are_plain_means(alike: Path, model_dir: Path, tmp_path: Path) -> None:
    run(alike, tmp_path / "run", max_steps=1)
    table, model = ReferenceCache(alike).load().table, load_model(str(model_dir)).model.double()
    batch = next(global_batches(Mixture.of([np.arange(len(table))]), BATCH, seed=42))
    sides = [plain_sides(model, table[int(index)]) for index in batch]
    for column, name in enumerate(("chosen", "rejected")):
        assert curve(tmp_path / "run", f"tokens/{name}") == np.mean([len(pair[column]["logp"]) for pair in sides])
        means = [pair[column]["logp"].mean().item() for pair in sides]
        assert curve(tmp_path / "run", f"logps/{name}") == pytest.approx(np.mean(means), rel=1e-5)
    entropy = torch.cat([side["entropy"] for pair in sides for side in pair]).mean().item()
    assert curve(tmp_path / "run", "entropy") == pytest.approx(entropy, rel=1e-5)
    assert curve(tmp_path / "run", "memory_gb") > 0.05


def test_how_far_the_policy_has_moved_is_a_mean_over_tokens(alike: Path, model_dir: Path, tmp_path: Path) -> None:
    """kl_tokens and kl of a trained policy against float64 logits of both models; k3 of the means is the lower one."""
    run(alike, tmp_path / "run")
    found = evaluate(EvaluateConfig(str(tmp_path / "run"), alike), one_process(), Silent()).metrics
    table = ReferenceCache(alike).load().table
    models = [load_model(str(each)).model.double() for each in (tmp_path / "run" / "model", model_dir)]
    by_tokens, of_means = [], []
    with torch.no_grad():
        for index in range(len(table)):
            policy, reference = (plain_sides(model, table[index]) for model in models)
            for mine, theirs in zip(policy, reference, strict=True):
                d = mine["logp"] - theirs["logp"]
                by_tokens.append((d.neg().exp() - 1 + d).mean().item())
                of_means.append((d.mean().neg().exp() - 1 + d.mean()).item())
    assert found["kl_tokens"] == pytest.approx(np.mean(by_tokens), rel=1e-3)
    assert found["kl"] == pytest.approx(np.mean(of_means), rel=1e-3)
    assert 0 < found["kl"] < found["kl_tokens"]
    assert "kl_tokens" in json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])


# --- what a step costs ---


def one_pair(length: int) -> PairTable:
    """Both sides as long: a prompt of 3 and answers that differ at once, all of them counted."""
    ids, mask = np.arange(5, 5 + length), np.r_[np.zeros(3, int), np.ones(length - 3, int)]
    return PairTable.from_pairs([EncodedPair.join(ids, mask, np.r_[ids[:3], ids[3:] + 50], mask)], "uint16")


def test_step_flops_of_a_dense_model_are_those_that_run() -> None:
    """torch counts every multiplication; with the whole square of attention, where half of it is needed."""
    model, table, length = tiny_llama(), one_pair(20), 20
    model.set_attn_implementation("eager")
    scorer = Scorer(model, "float32")
    with FlopCounterMode(display=False) as counter:
        scorer(padded(table, np.array([0]))).logp_sum.sum().backward()
    unneeded = 6 * 2 * 32 * 2 * length**2  # 6 x layers x width x sides x length^2
    # The head's forward runs again for its backward, and of its backward torch does not see the product written in place: as much.
    assert step_flops(model, table, np.array([0])) == counter.get_total_flops() - unneeded
    assert memory_gb(torch.device("cpu")) > 0.05


def test_step_flops_of_a_mixture_count_the_experts_that_a_token_goes_to(checkpoints: Path) -> None:
    model, table = load_model(str(checkpoints / "minimind3-moe.pth")).model, one_pair(20)
    settings: Any = model.config
    hidden, layers, heads = settings.hidden_size, settings.num_hidden_layers, settings.num_attention_heads
    size, kv = settings.head_dim, settings.num_key_value_heads
    attention = hidden * size * (heads + 2 * kv) + heads * size * hidden
    experts = settings.num_experts_per_tok * 3 * hidden * settings.moe_intermediate_size + hidden * settings.num_experts
    per_token = layers * (attention + experts)
    square = 6 * layers * heads * size * 2 * 20**2
    for factor, trained in ((6, True), (4, False)):
        model.requires_grad_(trained)
        flops = step_flops(model, table, np.array([0]))
        assert flops == factor * (per_token * 40 + settings.vocab_size * hidden * 34) + square
