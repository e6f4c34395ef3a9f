"""Runs by recipe against MiniMind's train_dpo.py of each date, written anew as plain loops in float64."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minicache.cache.reader import ReferenceCache
from minicache.models import load_model
from minicache.models.minimind_save import save_pth
from minicache.options.dictionaries import fill
from minicache.options.recipes import RECIPES
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training.order import Mixture, global_batches
from tests.conftest import make_rows, one_process, precompute_into, write_jsonl
from tests.references.checkpoints import draw, reference_of

STEPS = 12
# Enough to move the weights of so small a model: the scripts' own rate is multiplied by it.
FASTER = 1e4


@dataclass(frozen=True)
class Script:
    """What a train_dpo.py of one date says. first: number of the first step. Source: jingyaogong/minimind at that date."""

    generation: str
    lr: float
    batch: int
    epochs: int
    beta: float
    averaged: bool
    rate: Callable[[float], float]
    first: int
    balance: float


def until_december(t: float) -> float:
    return 1 / 10 + 0.5 * (1 + math.cos(math.pi * t))


def since_december(t: float) -> float:
    return 0.1 + 0.45 * (1 + math.cos(math.pi * t))


SCRIPTS = {
    # 278ec76, 1 April 2025
    "minimind-2504": Script("minimind2-2504", 1e-8, 8, 2, 0.1, True, until_december, 0, 0.0),
    # caae54a, 29 April 2025
    "minimind-2505": Script("minimind2-2510", 1e-8, 4, 2, 0.1, True, until_december, 0, 0.0),
    # acd5925, 29 October 2025
    "minimind-2510": Script("minimind2-2510", 4e-8, 4, 1, 0.1, True, until_december, 1, 0.0),
    # 9d89857, 1 January 2026
    "minimind-2512": Script("minimind2-2510", 4e-8, 4, 1, 0.1, True, since_december, 1, 0.01),
    # 101d7df, 25 March 2026
    "minimind-3": Script("minimind3", 4e-8, 4, 1, 0.15, False, since_december, 1, 5e-4),
}


class Trained(NamedTuple):
    """losses, balances, rates: of each step the preference loss, the weighted balance (0 without one), the learning rate."""

    losses: list[float]
    balances: list[float]
    rates: list[float]
    weights: dict[str, Tensor]


def by_script(script: Script, name: str, cache: Path, lr: float) -> Trained:
    """What a script makes of the pairs of a cache.

    It takes the pairs in this program's order, because the original shuffles by torch's generator, and each sequence without
    padding: the original pads, and lets its routers' balance count the padding as text. In generation 3 that balance counts what
    both sides begin with once, as docs/minimind.md says; the original counts it twice.
    """
    reference, table = reference_of(name), ReferenceCache(cache).load().table
    top = reference.DEFAULTS.experts_per_token
    start = draw(name)
    # a tied head is one tensor
    policy = {key: value.double().requires_grad_(True) for key, value in start.items()}
    first, *_, last = policy
    policy[last] = policy[first]
    optimizer = torch.optim.AdamW(list(dict.fromkeys(policy.values())), lr=lr)
    batches = global_batches(Mixture.of([np.arange(len(table))]), script.batch, seed=42)
    losses, balances, rates = [], [], []
    for step in range(STEPS):
        rate = script.rate((step + script.first) / STEPS) * lr
        for group in optimizer.param_groups:
            group["lr"] = rate
        ratios, scores = [], []
        for pair in table.take(next(batches)):
            for side in (0, 1):
                ids, mask = (torch.from_numpy(each.astype(np.int64)) for each in pair.side(side))
                computed = reference.compute(policy, ids[None])
                with torch.no_grad():
                    before = reference.compute({key: value.double() for key, value in start.items()}, ids[None]).logits
                logps = [logps_of(logits, ids, mask, script.averaged) for logits in (computed.logits, before)]
                ratios.append(logps[0] - logps[1])
                again = pair.lengths[0] if side and script.generation == "minimind3" else 0
                scores.append([layer[:, again:] for layer in computed.scores])
        chosen, rejected = torch.stack(ratios).view(-1, 2).unbind(1)
        loss = -logsigmoid(script.beta * (chosen - rejected)).mean()
        is_balanced = script.balance and scores[0]
        balance = script.balance * balance_of(reference, scores, top) if is_balanced else torch.zeros(())
        optimizer.zero_grad()
        (loss + balance).backward()
        torch.nn.utils.clip_grad_norm_(list(dict.fromkeys(policy.values())), 1.0)
        optimizer.step()
        losses.append(loss.item())
        balances.append(balance.item())
        rates.append(rate)
    return Trained(losses, balances, rates, {key: value.detach() for key, value in policy.items()})


def logps_of(logits: Tensor, ids: Tensor, mask: Tensor, averaged: bool) -> Tensor:
    """(): the logprob of a sequence's counted tokens. logits: (1, L, vocabulary)."""
    found = logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    total = (found * mask[1:]).sum()
    return total / mask[1:].sum() if averaged else total


def balance_of(reference: Any, scores: list[list[Tensor]], top: int) -> Tensor:
    """The balance of a step: of generation 3 over all its tokens, before that the mean over sequences."""
    if reference.__name__.endswith("minimind3"):
        scores = [[torch.cat(layer, 1) for layer in zip(*scores, strict=True)]]
    return torch.cat([reference.balance_loss(each, top, 1.0) for each in scores]).mean()


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("recipe", SCRIPTS)
def test_a_recipe_trains_as_the_script_of_its_date(
    checkpoints: Path, tokenizer_dir: Path, tmp_path: Path, recipe: str, kind: str
) -> None:
    script, options = SCRIPTS[recipe], RECIPES[recipe].options
    name = f"{script.generation}-{kind}"
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(12))
    model = checkpoints / f"{name}.pth"
    cache = precompute_into(tmp_path / "cache", model, data, tokenizer=str(tokenizer_dir), loss_on="assistant")
    given = {"ref_cache": cache, "out": tmp_path / "run", "log_every": 1, "max_steps": STEPS, "save_every": 0}
    lr = script.lr * FASTER
    config = fill(TrainConfig, {**options, **given, "lr": lr})
    assert (options["lr"], config.batch_size, config.epochs) == (script.lr, script.batch, script.epochs)
    assert (options["balance"], config.balance) == (script.balance, script.balance)
    train(config, one_process(), Silent())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = by_script(script, name, cache, lr)
    assert [line["lr"] for line in lines] == pytest.approx(expected.rates, rel=1e-12)
    assert [line["loss"] for line in lines] == pytest.approx(expected.losses, abs=2e-6)
    assert [line.get("aux_loss", 0.0) for line in lines] == pytest.approx(expected.balances, rel=1e-5)
    assert all((kind == "moe" and script.balance > 0) == (balance > 0) for balance in expected.balances)
    save_pth(load_model(str(tmp_path / "run" / "model")).model, tmp_path / "policy.pth", "float32")
    found, start = torch.load(tmp_path / "policy.pth"), draw(name)
    for key, weight in expected.weights.items():
        moved = (weight - start[key]).norm()
        assert (found[key] - weight).norm() < 1e-3 * moved, key
