"""(model, batch) -> logprobs: the only code that computes them, for reference, policy, evaluation and verification.

Whatever the model's precision, log-softmax, sums and means are float32. The head runs on counted positions only.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from minicache.batch import Batch
from minicache.errors import ConfigError
from minicache.models.balance import has_balance, recording

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
CHUNK = 256  # positions


@dataclass(frozen=True)
class PairScores:
    """Scores of B pairs; column 0 is chosen, column 1 rejected.

    logp_sum: (B, 2) float32, nats. token_count: (B, 2) float32. token_logps: (K,) float32, in the order of the batch.
    Of the whole distribution, if asked for, without gradients: entropy: (B, 2) float32, its mean over the counted tokens, nats;
    alignment: (B, 2) float32, mean of log p(token) - log sum p^2, nats (Zhou et al. 2024, WPO, arXiv:2406.11827, section 3.2).
    balance: (B,) float32, a mixture of experts' load-balancing loss; None for a dense model.
    """

    logp_sum: torch.Tensor
    token_count: torch.Tensor
    token_logps: torch.Tensor
    entropy: torch.Tensor | None = None
    alignment: torch.Tensor | None = None
    balance: torch.Tensor | None = None

    @property
    def logp_mean(self) -> torch.Tensor:
        """(B, 2) float32, nats a token."""
        return self.logp_sum / self.token_count


class Scorer(nn.Module):
    """A model that scores batches. A module, so that DDP can wrap it and reduce gradients through its forward.

    The model runs in eval mode in both stages: dropout would make the policy differ from itself as the reference.
    """

    def __init__(self, model: nn.Module, dtype: str) -> None:
        super().__init__()
        self.model = model.eval()
        self.dtype = dtype
        self.has_balance = has_balance(model)

    def forward(self, batch: Batch, distribution: bool = False) -> PairScores:
        balanced = distribution and self.has_balance
        record = recording(self.model) if balanced else nullcontext()
        with self._precision(batch.input_ids.device), _only_positions(self.model, batch.sources), record as routing:
            logits = self.model(input_ids=batch.input_ids, use_cache=False).logits  # (1, K, vocabulary)
        token_logps = -cross_entropy(logits[0].float(), batch.targets, reduction="none")  # (K,)
        counts = batch.sum_by_side(torch.ones_like(token_logps))
        scores = PairScores(batch.sum_by_side(token_logps), counts, token_logps)
        if not distribution:
            return scores
        entropy, concentration = _of_the_distribution(logits[0].detach())
        return replace(
            scores,
            entropy=batch.sum_by_side(entropy) / counts,
            alignment=batch.sum_by_side(token_logps.detach() - concentration) / counts,
            balance=routing.loss(batch.is_token()).view(-1, 2).mean(1) if routing else None,
        )

    def _precision(self, device: torch.device) -> AbstractContextManager:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(device.type, DTYPES[self.dtype])


@torch.no_grad()
def _of_the_distribution(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, vocabulary) -> entropy (K,) and log sum p^2 (K,), float32, nats. In pieces: a second set of logits need not fit."""
    parts = []
    for piece in logits.split(CHUNK):
        logps = piece.float().log_softmax(1)
        parts.append(torch.stack([-(logps.exp() * logps).sum(1), (2 * logps).logsumexp(1)]))
    entropy, concentration = torch.cat(parts, dim=1)
    return entropy, concentration


class _only_positions:
    """Within this context the model's head sees the given positions of the flattened rows, (K,), and no others.

    A hook on the head, and not a head of our own, so that whatever a family does to its logits afterwards (scaling, capping)
    is still done by the family.
    """

    def __init__(self, model: nn.Module, positions: torch.Tensor) -> None:
        self.head, self.positions = model.get_output_embeddings(), positions  # type: ignore[operator]

    def __enter__(self) -> None:
        self.handle = self.head.register_forward_pre_hook(
            lambda head, inputs: (inputs[0].flatten(0, 1)[self.positions][None],)
        )

    def __exit__(self, *error: object) -> None:
        self.handle.remove()


def resolve_dtype(dtype: str, device: torch.device) -> str:
    """'auto' is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: the GPU has no bfloat16.
    """
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype == "bfloat16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise ConfigError("--dtype bfloat16: this GPU has none; choose float16 or float32")
    return dtype
