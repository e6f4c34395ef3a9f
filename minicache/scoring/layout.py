"""The choice of a layout of batches in which a model can be scored."""

import logging
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from minicache.cache.identity import TOLERANCE
from minicache.errors import ConfigError, FullMemory, ModelError, fits, is_lost_peer
from minicache.options.catalog import LAYOUTS
from minicache.pairs import PairTable
from minicache.processes.devices import attention_kernels
from minicache.processes.world import World
from minicache.scoring.attention import watching
from minicache.scoring.batch import Batch
from minicache.scoring.handshake import SAMPLE
from minicache.scoring.kernel_probe import require_computes
from minicache.scoring.layouts import layout_named
from minicache.scoring.masks import Windows
from minicache.scoring.memory import TO_SCORE
from minicache.scoring.rotary import changes_beyond, score_rows_alone
from minicache.scoring.scorer import DTYPES, PairScores, Scorer
from minicache.text import one_line
from minicache.trackers import Tracker

log = logging.getLogger(__name__)

# Tokens of the longest pair that a kernel is tried with.
LONG = 4096


def settle_layout(
    scorer: Scorer, table: PairTable, asked: str, world: World, tracker: Tracker, before: str = ""
) -> None:
    """Set the scorer's layout: the one asked for, or for `auto` the first with which the model gives the values of `padded`.

    before: that of the run that goes on, which `auto` tries first.

    All ranks must call this, and all get the same layout: one that a single rank cannot use is used by none.
    The tracker notes why `auto` did not use its first choice. table: it must hold the longest side that will be scored.

    Raises:
        ConfigError: the layout asked for by name cannot be used with this model.
        ModelError: the model cannot be scored at all. FullMemory: a few pairs do not fit in memory.
    """
    meets = bool(scorer.lockstep)
    trial = _Trial(scorer, table, world.device)
    problems: list[str] = []
    names = dict.fromkeys((before, *LAYOUTS) if before in LAYOUTS else LAYOUTS)
    for name in names if asked == "auto" else (asked,):
        found, kernels = [], trial.kernels(name)
        for kernel in kernels:
            problem = _weakest(world, world.together(partial(trial.problem, name, kernel), meets))
            log.debug("layout %s, attention by %s: %s", name, kernel or "the model's own", problem or "used")
            if problem is None:
                if name == "padded":
                    world.together(trial.require_alone, meets)
                for line in problems[:1]:
                    tracker.note(line)
                if kernel == "spans" and world.device.type != "cpu":
                    tracker.note(
                        f"rows are attended pair by pair on {world.device}: variable-length attention needs CUDA and half "
                        "precision, FlexAttention CUDA or xpu, and Triton"
                    )
                return
            trial.go_back()
            found.append(f"attention by {kernel}: {problem}" if len(kernels) > 1 else problem)
        problem = "; ".join(dict.fromkeys(found))
        problems.append(f"layout {name} is not used: {problem}")
    raise ConfigError(f"--layout {asked}: cannot be used with this model: {problem}; expected auto or padded")


def _weakest(world: World, problems: list[str | None]) -> str | None:
    """The problem of the first rank that has one, with its name if not all have it."""
    found = [(rank, problem) for rank, problem in enumerate(problems) if problem]
    if not found:
        return None
    rank, problem = found[0]
    return problem if len(found) == len(problems) else f"{world.name(rank)}: {problem}"


class _Trial:
    """Compares layouts with `padded`, in which the model is as it was loaded, on a few pairs."""

    def __init__(self, scorer: Scorer, table: PairTable, device: torch.device) -> None:
        self.scorer, self.table, self.device = scorer, table, device
        self.config = scorer.model.config.get_text_config()
        self.ends = table.side_lengths.max(1)  # (N,) tokens of the longer side
        self.shortest = np.argsort(table.lengths.sum(1), kind="stable")[:SAMPLE]
        self.reach = changes_beyond(self.config)
        own_positions = self.reach is not None and int(self.ends.max()) > self.reach
        scorer.use_layout("padded", own_positions=own_positions)
        if own_positions:
            score_rows_alone(scorer.model)
        # by the pairs of a sample
        self.expected: dict[tuple[int, ...], PairScores] = {}

    def require_alone(self) -> None:
        """Raises ModelError: padding moves a pair's logprobs, as in models that keep a fixed number of a row's keys."""
        with fits("scoring the longest pair", TO_SCORE):
            alone = self._scores("padded", self.shortest[:1]).logp_mean[0]
            beside = self._scores("padded", np.array([self.shortest[0], self.ends.argmax()])).logp_mean[0]
        moved = float((alone - beside).abs().max())
        if moved > TOLERANCE[self.scorer.dtype]:
            raise ModelError(
                f"the model's logprobs of a pair depend on the length of others in its batch, by up to {moved:.2g} nats per token; "
                "expected a model that reads each row by itself (a lower --max-length may keep it from dropping keys)"
            )

    def kernels(self, layout: str) -> tuple[str | None, ...]:
        """What to try for attention in this layout, the best first. None: a mask for all, and torch's own attention."""
        if layout_named(layout).pads:
            return (None,)
        return attention_kernels(self.device, half=self.scorer.dtype != "float32")

    def problem(self, layout: str, kernel: str | None) -> str | None:
        """Why this model cannot be scored in this layout by this kernel; None if it can, and the scorer does then.

        Raises:
            FullMemory: memory says nothing of the layout. The scorer is as it was before.
        """
        if layout == "padded":
            return None
        try:
            with fits(f"trying layout {layout} on a few pairs", f"--layout padded; {TO_SCORE}"):
                self._try(layout, kernel)
            return None
        except FullMemory:
            self.go_back()
            raise
        except ModelError as error:
            return f"its own code does not take it: {one_line(error.__cause__ or error, 160)}"
        # a model's own code or a compiler may raise anything
        except Exception as error:
            if is_lost_peer(error):
                raise
            return one_line(error, 160)
        finally:
            self.scorer.zero_grad(set_to_none=True)

    def go_back(self) -> None:
        """Let the scorer score `padded` batches again, as it did before."""
        self.scorer.use_layout("padded", own_positions=self.scorer.own_positions)

    def _try(self, layout: str, kernel: str | None) -> None:
        """Raises ValueError, or whatever the model's code raises: the layout cannot be used."""
        if self.scorer.own_positions:
            raise ValueError(f"its rotary positions change with a sequence's length beyond {self.reach:,} tokens")
        windows = Windows.read(self.config, int(self.ends.max()))
        if windows.recurrent and LAYOUTS[layout].branches:
            raise ValueError(
                f"the model has layers of {', '.join(windows.recurrent)}, which carry chosen into rejected"
            )
        same = partial(self._require_same, layout, kernel, windows)
        with watching() as calls:
            found = same(self.shortest)
        if windows.bite:
            beyond = np.flatnonzero(self.ends > windows.bite)
            same(beyond[[self.ends[beyond].argmin()]])
        # Code that does more with masks than hand them to each layer's attention may do something else with long rows.
        masks = {id(call.mask) for call in calls}
        if len(calls) != self.config.num_hidden_layers or len(masks) > len(set(windows.by_kind)):
            same(self.ends.argmax()[None])
        self._require_apart(layout, found)
        if kernel and kernel != "spans":
            batch = self._batch(layout, np.append(self.shortest, self._long()))
            require_computes(calls, batch, windows, kernel, DTYPES[self.scorer.dtype])
        if self.device.type != "cpu" and any(parameter.requires_grad for parameter in self.scorer.parameters()):
            # kinds of devices lack some operations
            self.scorer(self._batch(layout, self.shortest)).logp_sum.sum().backward()

    def _long(self) -> int:
        """The longest pair that a kernel is tried with: a longer one would take more memory than it would tell."""
        sizes = self.table.lengths.sum(1)
        return int(np.where(sizes <= max(LONG, int(sizes.min())), sizes, -1).argmax())

    def _require_same(self, layout: str, kernel: str | None, windows: Windows, sample: np.ndarray) -> PairScores:
        """The scores of pairs of the table, (n,) indices. Raises ValueError: they are others than in `padded`."""
        if (pairs := tuple(sample.tolist())) not in self.expected:
            self.scorer.use_layout("padded")
            self.expected[pairs] = self._scores("padded", sample)
        self.scorer.use_layout(layout, windows, kernel=kernel)
        found = self._scores(layout, sample)
        worst = float((self.expected[pairs].logp_mean - found.logp_mean).abs().max())
        if not worst <= TOLERANCE[self.scorer.dtype]:
            raise ValueError(f"it gives other logprobs, by up to {worst:.2g} nats per token")
        return found

    def _require_apart(self, layout: str, before: PairScores) -> None:
        """Require that other tokens in all chosen answers do not move the logprobs of the rejected ones: a leak may be small.

        before: the scores of the shortest pairs as they are.

        Raises:
            ValueError: they do.
        """
        batch = self._batch(layout, self.shortest)
        with torch.no_grad():
            after = self.scorer(replace(batch, input_ids=_other_chosen(batch)))
        moved = float((before.logp_mean - after.logp_mean)[:, 1].abs().max())
        if not moved <= TOLERANCE[self.scorer.dtype] / 10:
            raise ValueError(f"chosen answers move the logprobs of rejected ones, by up to {moved:.2g} nats per token")

    def _batch(self, layout: str, sample: np.ndarray) -> Batch:
        return layout_named(layout).make(self.table, sample).to(self.device)

    def _scores(self, layout: str, sample: np.ndarray) -> PairScores:
        with torch.no_grad():
            scores: PairScores = self.scorer(self._batch(layout, sample))
            return scores


def _other_chosen(batch: Batch) -> torch.Tensor:
    """(rows, length): the batch's ids, with others wherever a chosen answer alone reads them."""
    size = batch.input_ids.numel()
    of_rejected = batch.readers % 2 == 1
    read = [batch.read.new_zeros(size).index_fill(0, batch.read[side], 1) for side in (of_rejected, ~of_rejected)]
    alone = (read[1] > read[0]).view_as(batch.input_ids)
    return torch.where(alone, batch.input_ids.flip(1), batch.input_ids)
