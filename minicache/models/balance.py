"""The load-balancing loss of a mixture of experts, from what its routers said during a forward pass.

    with recording(model) as routing:
        model(input_ids)
    penalty = routing.loss(read, readers, sequences)  # (sequences,) float32, to be added to the loss of each

MiniMind's models have theirs. Any other family has transformers' own, and only if its config asks (`output_router_logits`), because
most mixtures are fine-tuned without one; a family whose routers transformers itself does not record one by one has none here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minicache.models.generations import GENERATIONS, require_mixtures


class Routing:
    """What the routers of one forward pass said, in the order of the layers."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.logits: dict[nn.Module, torch.Tensor] = {}  # router -> (R x L, experts)

    def loss(self, read: torch.Tensor, readers: torch.Tensor, sequences: int) -> torch.Tensor:
        """The load-balancing loss of each sequence, summed over layers, its coefficient (`router_aux_loss_coef`) included.

        2504 and 2510 balance each sequence for itself. 3, and transformers' own, balance all tokens of the batch together, each
        once: every sequence then carries the same number, which depends on what shares its batch.

        read, readers: (S,) positions in the flattened rows and the sequence, from 0 to below `sequences`, each belongs to; see
            `Batch`. A prefix that two sequences share is listed for both.
        Returns: (sequences,) float32, differentiable with respect to the routers.
        Source: MiniMind's MoEGate and MOEFeedForward; Switch Transformer, arXiv 2101.03961, eq. 4 to 6.
        """
        assert self.logits, "no router ran while recording"
        coefficient, generation = self.config.router_aux_loss_coef, getattr(self.config, "minimind", None)
        if generation in (None, "3"):
            read = read.unique()
        if generation is None:
            return (coefficient * self._of_transformers(read)).expand(sequences)
        top, each = self.config.num_experts_per_tok, generation != "3"
        owners, count = (readers, sequences) if each else (torch.zeros_like(read), 1)
        layers = [_imbalance(logits[read], top, owners, count) for logits in self.logits.values()]
        total = coefficient * torch.stack(layers).sum(0)  # (count,)
        return total / top if each else total.expand(sequences)

    def _of_transformers(self, read: torch.Tensor) -> torch.Tensor:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        balance: Any = load_balancing_loss_func  # its annotations miss what its docstring allows
        logits = tuple(logits[read].float() for logits in self.logits.values())
        return balance(logits, logits[0].shape[-1], self.config.num_experts_per_tok)


def has_balance(model: nn.Module) -> bool:
    """Whether the model was trained with a load-balancing loss that `recording` can compute."""
    config: Any = model.config
    asked = getattr(config, "minimind", None) is not None or getattr(config, "output_router_logits", False)
    return bool(asked) and bool(getattr(config, "router_aux_loss_coef", None)) and bool(_routers(model))


@contextmanager
def recording(model: nn.Module) -> Iterator[Routing]:
    """Record what every router says in the one forward pass that runs within.

    The hooks keep references and compute nothing, so that a checkpointed layer does the same with and without them; when
    it runs again for its backward pass, what it said first stands.

    Raises:
        ModelError: transformers is too old to tell what MiniMind's routers say.
    """
    assert has_balance(model), f"{type(model).__name__} has no load-balancing loss"
    if getattr(model.config, "minimind", None):
        require_mixtures()
    routing = Routing(model.config)

    def keep(router: nn.Module, inputs: tuple, output: Any) -> None:
        parts = output if isinstance(output, tuple) else (output,)
        routing.logits.setdefault(router, _logits(router, parts) if (at := places[router]) is None else parts[at])

    places = _routers(model)
    handles = [router.register_forward_hook(keep) for router in places]
    try:
        yield routing
    finally:
        for handle in handles:
            handle.remove()


def _routers(model: nn.Module) -> dict[nn.Module, int | None]:
    """Each router, and where in its output the logits stand; None: see `_logits`.

    Of another family as the model's own class declares it for `output_router_logits`; empty where it declares none, or several
    kinds.
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
    """Of logits, weights and choices, whose order changes with the version of transformers, what has a number for every expert.

    So have the weights where a token goes to all experts; then the loss is the same constant from either.
    """
    return next(part for part in parts if part.is_floating_point() and part.shape[-1] == len(router.weight))


def _imbalance(logits: torch.Tensor, top: int, owners: torch.Tensor, count: int) -> torch.Tensor:
    """Experts x sum over experts of (tokens that chose it / tokens) x (its mean score), of each sequence; even routing gives `top`.

    logits: (S, experts) of the tokens; owners: (S,) their sequences, `count` of them. top: experts a token. Returns: (count,).
    """
    experts = logits.shape[-1]
    scores = logits.float().softmax(-1)
    picks = torch.zeros_like(scores).scatter(-1, scores.topk(top).indices, 1.0)
    tokens = torch.bincount(owners, minlength=count).clamp(min=1)[:, None]
    load, score = (values.new_zeros(count, experts).index_add(0, owners, values) / tokens for values in (picks, scores))
    return experts * (load * score).sum(1)
