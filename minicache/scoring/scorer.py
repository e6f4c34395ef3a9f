"""(model, batch) -> logprobs: the only code that computes them, for reference, policy, evaluation and verification.

Whatever the model's precision, log-softmax, sums and means are float32. The head runs on counted positions only.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from minicache.errors import ConfigError
from minicache.models.balance import has_balance, recording
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.attention import for_device
from minicache.scoring.batch import Batch, Layout, layout_named
from minicache.scoring.batching import Indices, by_length
from minicache.scoring.head import Head, entropy_and_concentration

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
    The decoder and the head run apart, so that the logits of counted positions alone are made, in chunks (head.py). Of a model
    whose logits are not just that, the model's own forward makes them, of counted positions too but all at once.
    """

    def __init__(self, model: Any, dtype: str, layout: str = "padded", head_is_own: bool | None = None) -> None:
        """head_is_own: what `own_head` says of the model, where it is known without running it."""
        super().__init__()
        self.layout_name = layout
        self.model = model.eval()
        self.dtype = dtype
        self.has_balance = has_balance(model)
        self.head = own_head(model) if head_is_own is None else Head.of(model) if head_is_own else None
        self.lockstep: World | None = None  # of shards: the processes that must run each forward together

    def forward(self, batch: Batch, distribution: bool = False) -> PairScores:
        record = recording(self.model) if distribution and self.has_balance else nullcontext()
        with self._precision(batch.input_ids.device), record as routing:
            token_logps, *of_distribution = self._token_logps(batch, distribution)
        counts = batch.sum_by_side(torch.ones_like(token_logps))
        scores = PairScores(batch.sum_by_side(token_logps), counts, token_logps)
        if not distribution:
            return scores
        entropy, concentration = of_distribution
        balance = routing.loss(batch.read, batch.readers, 2 * batch.pairs) if routing else None
        return replace(
            scores,
            entropy=batch.sum_by_side(entropy) / counts,
            alignment=batch.sum_by_side(token_logps.detach() - concentration) / counts,
            balance=None if balance is None else balance.view(-1, 2).mean(1),
        )

    @property
    def layout(self) -> Layout:
        return layout_named(self.layout_name)

    def batches(self, table: PairTable, indices: Indices, budget: int) -> Iterator[tuple[Indices, Batch]]:
        """These pairs of a table, grouped by length under a budget of token slots: their indices, and they as a batch."""
        for chosen in by_length(self.layout.costs(table.lengths[indices]), budget, self.layout.pads):
            batch = self.layout.make(table, indices[chosen])
            yield indices[chosen], batch.pin() if torch.cuda.is_available() else batch

    def _token_logps(self, batch: Batch, distribution: bool) -> tuple[torch.Tensor, ...]:
        """(K,) each; see `Head.logps`."""
        mask = for_device(batch.mask, batch.input_ids.shape[1])
        inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": mask}
        given = {name: value for name, value in inputs.items() if value is not None}
        if self.head is None:
            with _only_positions(self.model, batch.sources):
                logits = self.model(**given, use_cache=False).logits[0]  # (K, vocabulary)
            logps = -cross_entropy(logits.float(), batch.targets, reduction="none")
            return (logps, *_of_the_distribution(logits)) if distribution else (logps,)
        hidden = decoder_of(self.model)(**given, use_cache=False).last_hidden_state  # (rows, length, hidden)
        hidden = hidden.flatten(0, 1)[batch.sources]
        return self.head.logps(hidden.to(DTYPES[self.dtype]), batch.targets, distribution)

    def _precision(self, device: torch.device) -> AbstractContextManager:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(device.type, DTYPES[self.dtype])


def decoder_of(model: Any) -> nn.Module:
    """The model without its head; of an adapted one (peft) that of its base, which holds the adapters."""
    return (model.get_base_model() if hasattr(model, "get_base_model") else model).base_model


@torch.no_grad()
def own_head(model: Any) -> Head | None:
    """The model's head as we compute it, if that gives the model's own logits."""
    head = Head.of(model)
    if head is None:
        return None
    ids = torch.arange(1, 5, device=head.linear.weight.device)[None] % head.linear.weight.shape[0]
    expected = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = decoder_of(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    found = head.logits(hidden.to(head.linear.weight.dtype))
    close = found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)
    return head if close else None


@torch.no_grad()
def _of_the_distribution(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(K, vocabulary) -> entropy (K,) and log sum p^2 (K,), float32, nats. In pieces: a second set of logits need not fit."""
    parts = []
    for piece in logits.split(CHUNK):
        parts.append(torch.stack(entropy_and_concentration(piece.float().log_softmax(1))))
    entropy, concentration = torch.cat(parts, dim=1)
    return entropy, concentration


class _only_positions:
    """Within this context the model's head sees the given positions of the flattened rows, (K,), and no others."""

    def __init__(self, model: Any, positions: torch.Tensor) -> None:
        self.head, self.positions = model.get_output_embeddings(), positions

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
