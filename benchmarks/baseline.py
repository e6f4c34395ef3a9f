"""A plain DPO trainer with a live reference, as MiniMind's train_dpo.py: two models, padded rows, full logits."""

from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from benchmarks.case import BETA, Case, Optimizer, micro_batches, twin
from minicache.scoring.batching import Indices


class LiveReference:
    """A `Contestant`."""

    def __init__(self, case: Case, optimizer: Optimizer) -> None:
        self.case, self.optimizer = case, optimizer
        self.policy, self.frozen = twin(case.model), twin(case.model)

    def reference(self) -> np.ndarray:
        """(N, 2) mean logprobs of the frozen model, nats per token."""
        parts = []
        for indices in micro_batches(self.case.everything, self.case.micro_pairs):
            with torch.no_grad():
                parts.append(self.logps(self.frozen, *self.rows(indices)).T.cpu().numpy())
        return np.concatenate(parts)

    def step(self, indices: Indices) -> None:
        """One optimizer step on these pairs."""
        for part in micro_batches(indices, self.case.micro_pairs):
            rows = self.rows(part)
            with torch.no_grad():
                reference = self.logps(self.frozen, *rows)
            chosen, rejected = self.logps(self.policy, *rows) - reference
            (-logsigmoid(BETA * (chosen - rejected)).sum() / len(indices)).backward()
        self.optimizer.step()

    def rows(self, indices: Indices) -> tuple[torch.Tensor, torch.Tensor]:
        """(2n, length) ids, chosen rows first, and (2n, length - 1) mask, padded to the longest side."""
        pairs = [self.case.table[int(index)] for index in indices]
        sides = [pair.side(side) for side in (0, 1) for pair in pairs]
        longest = max(len(ids) for ids, _ in sides)
        ids, mask = (np.stack([np.pad(side[which], (0, longest - len(side[0]))) for side in sides]) for which in (0, 1))
        device = self.case.device
        return torch.tensor(ids, dtype=torch.long, device=device), torch.tensor(mask[:, 1:]).float().to(device)

    def logps(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(2, n) mean logprobs of chosen and rejected, nats per token; ids and mask as of `rows`."""
        half = self.case.dtype != "float32"
        with torch.autocast(self.case.device.type, getattr(torch, self.case.dtype), enabled=half):
            logits = model(ids, use_cache=False).logits
        logps = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
        return ((logps * mask).sum(1) / mask.sum(1)).view(2, -1)
