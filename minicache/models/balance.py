"""The load-balancing loss of a mixture of experts, from the router logits of forward passes.

    with recording(model, weight) as routing:
        model(input_ids)
    # a model that balances each sequence by itself: (sequences,) float32, to be added to the loss of each
    penalty = routing.loss(read, readers, sequences)
    # any other balances all tokens of a step: sums of which the loss follows once all passes of the step are known
    load = routing.load(tokens)

MiniMind's models have MiniMind's loss. Any other family has that of transformers; without a weight by option only if its config
sets `output_router_logits`, because most mixtures are fine-tuned without one. A family whose routers transformers does not record
one by one has none here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from minicache.models.generations import GENERATIONS, require_mixtures
from minicache.processes.world import World


@dataclass(frozen=True)
class Load:
    """What the balance of a step needs of one of its passes: sums over tokens. They add up over passes and processes.

    chosen: (groups, experts) float32, how often each expert was chosen, without gradients. scores: (groups, experts) float32, of
    the routers' probabilities, with gradients. tokens: () float32. factor: of the loss, the coefficient included. A group is a
    layer, or all layers together.
    """

    chosen: torch.Tensor
    scores: torch.Tensor
    tokens: torch.Tensor
    factor: float

    def __add__(self, other: "Load") -> "Load":
        return replace(
            self,
            chosen=self.chosen + other.chosen,
            scores=self.scores + other.scores,
            tokens=self.tokens + other.tokens,
        )

    def detached(self, counts: bool = True) -> "Load":
        """The same without gradients; zeros if it does not count."""
        share = float(counts)
        return replace(
            self, chosen=self.chosen * share, scores=self.scores.detach() * share, tokens=self.tokens * share
        )

    def to(self, device: torch.device) -> "Load":
        """The same on a device."""
        return replace(
            self, chosen=self.chosen.to(device), scores=self.scores.to(device), tokens=self.tokens.to(device)
        )

    def over(self, world: World) -> "Load":
        """The sum over all processes, which must all call this. Without gradients."""
        flat = torch.cat([self.chosen.flatten(), self.scores.detach().flatten(), self.tokens[None]])
        chosen, scores = world.sum(flat)[:-1].view(2, *self.chosen.shape)
        return replace(self, chosen=chosen, scores=scores, tokens=flat[-1])

    def loss(self, step: "Load") -> torch.Tensor:
        """(): the part of this pass in the balance of a step, whose load is `step`. The parts of all passes sum to the step's.

        Differentiable: the share of the tokens that chose an expert has no gradient, and the mean of the scores is a sum.
        """
        return self.factor * (step.chosen * self.scores).sum() / step.tokens**2


class Routing:
    """The router logits of one forward pass, in the order of the layers."""

    def __init__(self, config: Any, weight: float) -> None:
        self.config, self.weight = config, weight
        # router -> (rows x length, experts)
        self.logits: dict[nn.Module, torch.Tensor] = {}

    def loss(self, read: torch.Tensor, readers: torch.Tensor, sequences: int) -> torch.Tensor:
        """(sequences,) float32: the balance of each sequence by itself, summed over layers, times the weight.

        This is the loss of MiniMind 2504 and 2510. It is differentiable with respect to the routers.

        read, readers: (S,) int64, positions in the flattened rows, and the sequence (0 to sequences - 1) of each; see `Batch`. A
            prefix that two sequences share is listed for both.

        Source: MiniMind's MoEGate; Switch Transformer, arXiv:2101.03961, eq. 4 to 6.
        """
        top: int = self.config.num_experts_per_tok
        layers = [_imbalance(logits[read], top, readers, sequences) for logits in self._layers]
        total: torch.Tensor = self.weight / top * torch.stack(layers).sum(0)
        return total

    def load(self, tokens: torch.Tensor) -> Load:
        """The load of this pass. tokens: (T,) int64, positions in the flattened rows, that of a shared token once.

        MiniMind 3 balances each layer, and sums over them. transformers balances the choices of all layers together.

        Source: MiniMind's MOEFeedForward; `load_balancing_loss_func` of transformers.
        """
        top: int = self.config.num_experts_per_tok
        found = [_choices(logits[tokens], top) for logits in self._layers]
        chosen, scores = (torch.stack([each.sum(0) for each in values]) for values in zip(*found, strict=True))
        count = len(tokens)
        if getattr(self.config, "minimind", None) is None:
            chosen, scores, count = chosen.sum(0, keepdim=True), scores.sum(0, keepdim=True), count * len(found)
        factor = self.weight * chosen.shape[1]
        return Load(chosen=chosen, scores=scores, tokens=scores.new_full((), count), factor=factor)

    @property
    def _layers(self) -> list[torch.Tensor]:
        assert self.logits, "no router ran while recording"
        return list(self.logits.values())


def balances_steps(model: nn.Module) -> bool:
    """Whether the loss balances all tokens of a step together; else each sequence by itself."""
    return getattr(model.config, "minimind", None) in (None, "3")


def has_routers(model: nn.Module) -> bool:
    """Whether the model is a mixture whose routers `recording` finds."""
    return bool(_routers(model))


def own_weight(model: nn.Module) -> float:
    """The weight of the loss in the model's own configuration; 0 where it asks for none, or `recording` cannot compute it."""
    config: Any = model.config
    asked = getattr(config, "minimind", None) is not None or getattr(config, "output_router_logits", False)
    return float(getattr(config, "router_aux_loss_coef", None) or 0) if asked and has_routers(model) else 0.0


def weight_before(model: nn.Module) -> float:
    """The weight that runs had before they recorded one."""
    early = has_routers(model) and getattr(model.config, "minimind", None) in ("2504", "2510")
    return 0.1 if early else own_weight(model)


@contextmanager
def recording(model: nn.Module, weight: float) -> Iterator[Routing]:
    """Record the router logits of the one forward pass that runs in this context. weight: of the loss.

    The hooks keep references and compute nothing, so that a checkpointed layer does the same with and without them. When such
    a layer runs again in backward, the logits of its first run are kept.

    Raises:
        ModelError: transformers is too old to give the logits of MiniMind's routers.
    """
    if getattr(model.config, "minimind", None):
        require_mixtures()
    routing = Routing(model.config, weight)

    def keep(router: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        index = routers[router]
        routing.logits.setdefault(router, _logits(router, parts) if index is None else parts[index])

    routers = _routers(model)
    handles = [router.register_forward_hook(keep) for router in routers]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def _routers(model: nn.Module) -> dict[nn.Module, int | None]:
    """Each router -> the index of the logits in its output; None where `_logits` finds them (MiniMind).

    For another family both follow from the model class's declaration for `output_router_logits`; without one, or with several
    kinds of routers, the result is empty.
    """
    config: Any = model.config
    if generation := GENERATIONS.get(getattr(config, "minimind", "")):
        end = generation.experts.router.removesuffix(".weight")
        return {part: None for path, part in model.named_modules() if path.endswith(end)}
    declared: Any = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits")
    if not hasattr(declared, "target_class"):
        return {}
    kind, name = declared.target_class, declared.layer_name or ""
    return {part: declared.index for path, part in model.named_modules() if isinstance(part, kind) and name in path}


def _logits(router: Any, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """(T, experts): the output part with a number for every expert. The order of the parts depends on transformers' version.

    The weights have as many numbers where a token goes to all experts; the loss is then the same constant from either.
    """
    # a weight in 4 bits has no rows
    experts = getattr(router, "out_features", None) or len(router.weight)
    return next(part for part in parts if part.is_floating_point() and part.shape[-1] == experts)


def _choices(logits: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """1 where an expert was chosen and 0 elsewhere, and the probabilities, (S, experts) float32 each. logits: (S, experts)."""
    scores = logits.float().softmax(-1)
    return torch.zeros_like(scores).scatter(-1, scores.topk(top).indices, 1.0), scores


def _imbalance(logits: torch.Tensor, top: int, owners: torch.Tensor, count: int) -> torch.Tensor:
    """(count,): for each sequence, experts x sum over experts of (share of tokens that chose it) x (mean score).

    Even routing gives `top`.

    logits: (S, experts) of the tokens. top: experts per token. owners: (S,) sequence of each token. count: number of sequences.
    """
    experts = logits.shape[-1]
    picks, scores = _choices(logits, top)
    # not bincount, which waits for a GPU to tell the largest
    tokens = scores.new_zeros(count).index_add(0, owners, torch.ones_like(scores[:, 0])).clamp(min=1)[:, None]
    load, score = (values.new_zeros(count, experts).index_add(0, owners, values) / tokens for values in (picks, scores))
    return experts * (load * score).sum(1)
