"""DPO without any of this project: one answer at a time, no padding, two live models, in float64."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from minicache.pairs import EncodedPair, PairTable
from minicache.training.order import Mixture, global_batches

STEPS, BATCH, LR, BETA, SEED = 3, 4, 1e-3, 0.1, 42
PROBED = 6  # pairs on which the trained policies are compared


@dataclass(frozen=True)
class Computed:
    """logp_mean: (N, 2) of every pair by the reference. losses, norms: of each step. policy: (PROBED, 2) after the steps.

    moved: by how much the steps changed these, at most. double: whether the model's code runs in float64; else it is float32.
    """

    logp_mean: np.ndarray
    losses: list[float]
    norms: list[float]
    policy: np.ndarray
    moved: float
    double: bool


def open_plain(directory: str, double: bool = True) -> Any:
    """The model as transformers opens it by default, in float64 or float32, in eval mode."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    if not double:
        return model
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the grouped products have no float64
    return model.double()


def runs_in_float64(directory: str) -> bool:
    """Whether the model's own code works on float64 weights, forward and backward."""
    try:
        open_plain(directory)(input_ids=torch.arange(3, 40)[None], use_cache=False).logits.sum().backward()
    except RuntimeError:
        return False
    return True


def logps_of(model: Any, pair: EncodedPair) -> list[torch.Tensor]:
    """The logprobs of the counted tokens of each side, (n,) float64."""
    sides = []
    for side in (0, 1):
        ids, mask = (torch.from_numpy(values.astype(np.int64)) for values in pair.side(side))
        _forget_lengths(model)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].double()
        sides.append(logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0][mask[1:].bool()])
    return sides


def _forget_lengths(model: Any) -> None:
    """Undo what a longer sequence left behind in rotary embeddings of dynamic NTK."""
    for module in model.modules():
        if "dynamic" in str(getattr(module, "rope_type", "")):
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq.clone()


def means_of(model: Any, table: PairTable, count: int) -> np.ndarray:
    """(count, 2): the mean logprob of each side of the first pairs."""
    with torch.no_grad():
        sides = [[float(side.mean()) for side in logps_of(model, table[index])] for index in range(count)]
    return np.array(sides)


def compute(directory: str, table: PairTable) -> Computed:
    """The reference's values, and `STEPS` steps of AdamW."""
    double = runs_in_float64(directory)
    reference, policy = (open_plain(directory, double) for _ in range(2))
    before = means_of(reference, table, len(table))
    losses, norms = _train(policy.requires_grad_(True), before * table.token_counts, table)
    after = means_of(policy, table, PROBED)
    moved = float(np.abs(after - before[:PROBED]).max())
    return Computed(logp_mean=before, losses=losses, norms=norms, policy=after, moved=moved, double=double)


def _train(policy: Any, reference: np.ndarray, table: PairTable) -> tuple[list[float], list[float]]:
    """Train the policy; returns losses and gradient norms. reference: (N, 2), the sums of the logprobs."""
    parameters = list(policy.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0)
    losses, norms = [], []
    order = global_batches(Mixture.of([np.arange(len(table))]), BATCH, SEED)
    for _, batch in zip(range(STEPS), order, strict=False):
        total = 0.0
        for index in batch:
            chosen, rejected = (side.sum() for side in logps_of(policy, table[int(index)]))
            loss = -logsigmoid(BETA * (chosen - rejected - (reference[index, 0] - reference[index, 1]))) / len(batch)
            loss.backward()
            total += loss.item()
        losses.append(total)
        norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms
