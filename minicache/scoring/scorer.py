"""(model, batch) -> logprobs: the only code that computes them, for the reference, the policy, evaluation and verification.

In every precision of the model log-softmax and means are float32, and sums over a side float64. The head runs on counted positions
only.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from minicache.models.balance import Load, Routing, balances_steps, has_routers, own_weight, recording
from minicache.models.precision import follow_autocast
from minicache.models.quantized import compute_in
from minicache.pairs import PairTable
from minicache.processes.devices import attention_kernels, pins
from minicache.processes.world import World
from minicache.scoring.attention import set_attention, use_spans
from minicache.scoring.batch import Batch, References
from minicache.scoring.batching import Indices, by_length
from minicache.scoring.head import Head, entropy_and_concentration
from minicache.scoring.layouts import Layout, layout_named
from minicache.scoring.masks import ALL_SEEN, Windows, masks_of, one_sequence_a_row
from minicache.scoring.probe import decoder_of, own_errors, probed

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
# Positions whose distribution `_of_the_distribution` computes at once.
CHUNK = 256
# (n,) indices of pairs and their batch, still on the CPU -> what a loss reads of the cache for them.
LookUp = Callable[[Indices, Batch], References]


@dataclass(frozen=True)
class PairScores:
    """Scores of B pairs with K predictions; column 0 is chosen, column 1 rejected. All tensors but the first are float32.

    logp_sum: (B, 2), nats, as `Batch.sum_members` gives it. token_count: (B, 2), counted tokens. token_logps: (K,), nats, in the
    order of the batch's predictions.

    None unless asked for:
    entropy: (B, 2), mean entropy over the counted tokens, nats, without gradients.
    alignment: (B, 2), mean of log p(token) - log sum p^2, nats, without gradients. Source: Zhou et al. 2024, WPO,
        arXiv:2406.11827, section 3.2.
    balance: (B,), load-balancing loss of a mixture of experts that balances each sequence. load: of one that balances a step.
    """

    logp_sum: torch.Tensor
    token_count: torch.Tensor
    token_logps: torch.Tensor
    entropy: torch.Tensor | None = None
    alignment: torch.Tensor | None = None
    balance: torch.Tensor | None = None
    load: Load | None = None

    @property
    def logp_mean(self) -> torch.Tensor:
        """(B, 2) float32, nats per token."""
        return (self.logp_sum / self.token_count).float()

    def balanced(self, step: Load, pairs: int) -> "PairScores":
        """With the balance, whose mean over the pairs of a step is the step's. step: its load. pairs: their number."""
        assert self.load
        count = len(self.token_count)
        return replace(self, balance=(self.load.loss(step) * (pairs / count)).expand(count))


class Scorer(nn.Module):
    """A model that scores batches. It is a module, so that DDP can wrap it and reduce gradients through its forward.

    The model runs in eval mode in both stages: with dropout the policy would differ from itself as the reference. Decoder and head
    run separately, so that only the logits of counted positions are computed, in chunks (head.py). If that does not give the
    model's own logits, its own forward computes them, also for counted positions only, but all at once.
    """

    def __init__(self, model: Any, dtype: str, layout: str = "padded", head_is_own: bool | None = None) -> None:
        """Wrap a transformers model.

        dtype: precision of the passes. head_is_own: whether `probed` finds a head; None runs the model to find out.
        """
        super().__init__()
        self.model = model.eval()
        compute_in(model, DTYPES[dtype])
        follow_autocast()
        self.attention = model.config.get_text_config()._attn_implementation
        self.dtype = dtype
        # Of the loss that balances a mixture's experts; 0: there is none.
        self.balance_weight = own_weight(model)
        self.head = probed(model) if head_is_own is None else Head.of(model) if head_is_own else None
        # The processes that must run each forward together, if the model is sharded.
        self.lockstep: World | None = None
        # In how many shards the model lies, and, if it does, a function that gives its copy without weights.
        self.shards = 1
        # Whether embedding and head are shards of their own, whole only while each computes.
        self.ends_apart = True
        self.whole: Callable[[], Scorer] | None = None
        self.use_layout(layout)

    def forward(self, batch: Batch, distribution: bool = False, balance: bool = False) -> PairScores:
        """The scores of a batch.

        distribution: with entropy and alignment, of the whole distribution over the vocabulary, at the price of a copy of each
        chunk's logits. balance: with the load-balancing loss, if the model has one.
        """
        with self._passing(batch, balance) as routing:
            token_logps, *of_distribution = self._token_logps(batch, distribution)
        counts = batch.token_count
        scores = PairScores(logp_sum=batch.sum_by_side(token_logps), token_count=counts, token_logps=token_logps)
        if routing and self.balances_steps:
            scores = replace(scores, load=routing.load(batch.distinct))
        elif routing:
            per_side = routing.loss(batch.read, batch.readers, 2 * batch.pairs)
            scores = replace(scores, balance=per_side.view(-1, 2).mean(1))
        if not distribution:
            return scores
        entropy, concentration = of_distribution
        return replace(
            scores,
            entropy=(batch.sum_by_side(entropy) / counts).float(),
            alignment=(batch.sum_by_side(token_logps.detach() - concentration) / counts).float(),
        )

    @torch.no_grad()
    def load(self, batch: Batch) -> Load:
        """The load of a batch in a model that balances steps, without gradients. The head does not run, unless it is a shard's."""
        if self.lockstep:
            # FSDP's hooks expect the whole pass
            load: Load = self(batch, balance=True).load
            return load
        with self._passing(batch, balance=True) as routing:
            decoder_of(self.model)(**self.inputs_of(batch), use_cache=False)
        assert routing
        return routing.load(batch.distinct)

    def use_layout(
        self, name: str, windows: Windows = ALL_SEEN, own_positions: bool = False, kernel: str | None = None
    ) -> None:
        """Score batches of this layout from now on; with `padded` the model's attention is as it was loaded.

        windows: those of the model's layers that hide something in these batches. own_positions: positions are given to the model
        also where they follow from the row, because its rotary embedding looks at the longest of them. kernel: what computes
        attention over a packed row; None: what suits each batch's device in every precision.
        """
        self.layout_name, self.windows, self.own_positions, self.kernel = name, windows, own_positions, kernel
        if name == "padded":
            set_attention(self.model, self.attention)
        else:
            use_spans(self.model)

    @property
    def balances_steps(self) -> bool:
        """Whether there is a loss that balances all tokens of a step together."""
        return bool(self.balance_weight) and balances_steps(self.model)

    def weigh_balance(self, weight: float) -> bool:
        """Give the loss that balances experts another weight than the model's own; returns whether the model has experts."""
        found = has_routers(self.model)
        self.balance_weight = weight if found else 0.0
        return found

    @property
    def outline(self) -> "Scorer":
        """This scorer, or for a model in shards one of the whole model without weights, on the device `meta`."""
        if self.whole is None:
            return self
        made = self.whole()
        made.use_layout(self.layout_name, self.windows, self.own_positions, self.kernel)
        made.balance_weight = self.balance_weight
        return made

    @property
    def layout(self) -> Layout:
        """The layout of its batches."""
        return layout_named(self.layout_name)

    def batches(
        self, table: PairTable, indices: Indices, budget: int, references: LookUp | None = None
    ) -> Iterator[tuple[Indices, Batch]]:
        """Batches of pairs of a table, grouped by length under a budget of token slots: (n,) indices and the batch."""
        for chosen in by_length(self.layout.costs(table.lengths[indices]), budget, self.layout.pads):
            yield indices[chosen], self.batch(table, indices[chosen], references)

    def batch(self, table: PairTable, indices: Indices, references: LookUp | None = None) -> Batch:
        """The batch of these pairs of a table, (n,), in page-locked memory where a device copies from it."""
        made = self.layout.make(table, indices)
        if references:
            made = replace(made, references=references(indices, made))
        return made.pin() if pins(next(self.parameters()).device) else made

    def _token_logps(self, batch: Batch, distribution: bool) -> tuple[torch.Tensor, ...]:
        """The outputs of `Head.logps` for the batch's predictions, (K,) each."""
        inputs = self.inputs_of(batch)
        if self.head is None:
            with _only_positions(self.model, batch.sources) as select:
                logits = select(self.model(**inputs, use_cache=False).logits)  # (K, vocabulary)
            logps = -cross_entropy(logits.float(), batch.targets, reduction="none")
            return (logps, *_of_the_distribution(logits)) if distribution else (logps,)
        # (rows, length, hidden)
        hidden = decoder_of(self.model)(**inputs, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1)[batch.sources]
        return self.head.logps(hidden.to(DTYPES[self.dtype]), batch.targets, distribution)

    def inputs_of(self, batch: Batch, kernel: str | None = None) -> dict[str, Any]:
        """What the model reads of a batch, by the names of transformers. kernel: another than `use_layout` set."""
        ids = batch.input_ids
        inputs: dict[str, Any] = {"input_ids": ids}
        if batch.mask is not None or self.own_positions:
            inputs["position_ids"] = batch.position_ids
        if batch.mask is not None:
            kernel = kernel or self.kernel or attention_kernels(ids.device)[-1]
            inputs["attention_mask"] = masks_of(batch, self.windows, kernel)
        if (starts := batch.boundaries) is not None:
            at = torch.arange(ids.shape[1], device=ids.device, dtype=torch.int32)
            inputs["seq_idx"] = torch.searchsorted(starts, at, right=True, out_int32=True)[None] - 1
            inputs["cu_seq_lens_q"] = inputs["cu_seq_lens_k"] = starts
        return inputs

    @contextmanager
    def _passing(self, batch: Batch, balance: bool) -> Iterator[Routing | None]:
        """The circumstances of a forward pass; gives what the routers say if there is a balance to compute."""
        weight = self.balance_weight
        record = recording(self.model, weight) if balance and weight else nullcontext()
        with self._precision(batch.input_ids.device), record as routing, own_errors(self.model), one_sequence_a_row():
            yield routing

    def _precision(self, device: torch.device) -> AbstractContextManager[Any]:
        if self.dtype == "float32":
            return nullcontext()
        return torch.autocast(device.type, DTYPES[self.dtype])


@torch.no_grad()
def _of_the_distribution(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Entropy and log sum p^2, (K,) float32 each, nats. logits: (K, vocabulary)."""
    parts = []
    # in pieces, because a float32 copy of all logits may not fit in memory
    for piece in torch.split(logits, CHUNK):
        logps = piece.float().log_softmax(1)
        parts.append(torch.stack(entropy_and_concentration(logps, logps.exp())))
    entropy, concentration = torch.cat(parts, dim=1)
    return entropy, concentration


@contextmanager
def _only_positions(model: Any, positions: torch.Tensor) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
    """Let the model's head see only these positions of the flattened rows, (K,); gives the function that selects their logits."""
    head = model.get_output_embeddings()
    if head is None:
        yield lambda logits: logits.flatten(0, 1)[positions]
        return
    handle = head.register_forward_pre_hook(lambda head, inputs: (inputs[0].flatten(0, 1)[positions][None],))
    try:
        yield lambda logits: logits[0]
    finally:
        handle.remove()
