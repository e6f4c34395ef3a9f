"""The load-balancing loss of a mixture of experts, from the router logits of a forward pass.

    with recording(model) as routing:
        model(input_ids)
    # (sequences,) float32, to be added to the loss of each sequence
    penalty = routing.loss(read, readers, sequences)

MiniMind's models have MiniMind's loss. Any other family has that of transformers, and only if its config sets
`output_router_logits`, because most mixtures are fine-tuned without one. A family whose routers transformers does not record
one by one has none here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minicache.models.generations import GENERATIONS, require_mixtures


class Routing:
    """The router logits of one forward pass, in the order of the layers."""

    def __init__(self, config: Any) -> None:
        self.config = config
        # router -> (rows x length, experts)
        self.logits: dict[nn.Module, torch.Tensor] = {}

    def loss(
        self, read: torch.Tensor, readers: torch.Tensor, sequences: int, distinct: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(sequences,) float32: the load-balancing loss of each sequence, summed over layers, times `router_aux_loss_coef`.

        MiniMind 2504 and 2510 balance each sequence by itself. MiniMind 3 and transformers balance all tokens of the batch
        together, each counted once: every sequence then has the same loss, which depends on the rest of the batch. The result is
        differentiable with respect to the routers.

        read, readers: (S,) int64, positions in the flattened rows, and the sequence (0 to sequences - 1) of each; see `Batch`. A
            prefix that two sequences share is listed for both.
        distinct: (T,) int64, a position of each token, that of a shared one once. None: no token is shared.

        Source: MiniMind's MoEGate and MOEFeedForward; Switch Transformer, arXiv:2101.03961, eq. 4 to 6.
        """
        assert self.logits, "no router ran while recording"
        coefficient: float = self.config.router_aux_loss_coef
        generation = getattr(self.config, "minimind", None)
        if generation in (None, "3"):
            read = read if distinct is None else distinct
        if generation is None:
            return (coefficient * self._of_transformers(read)).expand(sequences)
        top: int = self.config.num_experts_per_tok
        by_sequence = generation != "3"
        owners, count = (readers, sequences) if by_sequence else (torch.zeros_like(read), 1)
        layers = [_imbalance(logits[read], top, owners, count) for logits in self.logits.values()]
        total = coefficient * torch.stack(layers).sum(0)  # (count,)
        return total / top if by_sequence else total.expand(sequences)

    def _of_transformers(self, read: torch.Tensor) -> torch.Tensor:
        """(): transformers' own loss over the positions `read`, (S,)."""
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        # the annotations of the function exclude arguments that its docstring allows
        balance: Any = load_balancing_loss_func
        logits = tuple(logits[read].float() for logits in self.logits.values())
        loss: torch.Tensor = balance(logits, logits[0].shape[-1], self.config.num_experts_per_tok)
        return loss


def has_balance(model: nn.Module) -> bool:
    """Whether the model was trained with a load-balancing loss that `recording` can compute."""
    config: Any = model.config
    asked = getattr(config, "minimind", None) is not None or getattr(config, "output_router_logits", False)
    return bool(asked) and bool(getattr(config, "router_aux_loss_coef", None)) and bool(_routers(model))


@contextmanager
def recording(model: nn.Module) -> Iterator[Routing]:
    """Record the router logits of the one forward pass that runs in this context.

    The hooks keep references and compute nothing, so that a checkpointed layer does the same with and without them. When such
    a layer runs again in backward, the logits of its first run are kept.

    Raises:
        ModelError: transformers is too old to give the logits of MiniMind's routers.
    """
    assert has_balance(model), f"{type(model).__name__} has no load-balancing loss"
    if getattr(model.config, "minimind", None):
        require_mixtures()
    routing = Routing(model.config)

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


def _imbalance(logits: torch.Tensor, top: int, owners: torch.Tensor, count: int) -> torch.Tensor:
    """(count,): for each sequence, experts x sum over experts of (share of tokens that chose it) x (mean score).

    Even routing gives `top`.

    logits: (S, experts) of the tokens. top: experts per token. owners: (S,) sequence of each token. count: number of sequences.
    """
    experts = logits.shape[-1]
    scores = logits.float().softmax(-1)
    picks = torch.zeros_like(scores).scatter(-1, scores.topk(top).indices, 1.0)
    # not bincount, which waits for a GPU to tell the largest
    tokens = scores.new_zeros(count).index_add(0, owners, torch.ones_like(scores[:, 0])).clamp(min=1)[:, None]
    load, score = (values.new_zeros(count, experts).index_add(0, owners, values) / tokens for values in (picks, scores))
    return experts * (load * score).sum(1)
