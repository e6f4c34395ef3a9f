"""The load-balancing loss of a mixture of experts, from what its routers said during a forward pass.

    with recording(model) as routing:
        model(input_ids)
    penalty = routing.loss(mask)  # (R,) float32, to be added to the loss of each row

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

    def loss(self, mask: torch.Tensor) -> torch.Tensor:
        """The load-balancing loss of each row, summed over layers, its coefficient (`router_aux_loss_coef`) included.

        2504 and 2510 balance each sequence for itself. 3, and transformers' own, balance all tokens of the batch together:
        every row then carries the same number, which depends on what shares its batch.

        mask: (R, L) bool, True at real tokens; padding counts in no share.
        Returns: (R,) float32, differentiable with respect to the routers.
        Source: MiniMind's MoEGate and MOEFeedForward; Switch Transformer, arXiv 2101.03961, eq. 4 to 6.
        """
        assert self.logits, "no router ran while recording"
        coefficient, generation = self.config.router_aux_loss_coef, getattr(self.config, "minimind", None)
        if generation is None:
            return (coefficient * self._of_transformers(mask)).expand(len(mask))
        rows = mask.reshape(1, -1) if generation == "3" else mask
        top = self.config.num_experts_per_tok
        layers = [_imbalance(logits, top, rows) for logits in self.logits.values()]
        total = coefficient * torch.stack(layers).sum(0)  # (R,), or (1,) for all tokens together
        return total.expand(len(mask)) if generation == "3" else total / top

    def _of_transformers(self, mask: torch.Tensor) -> torch.Tensor:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        balance: Any = load_balancing_loss_func  # its annotations miss what its docstring allows
        logits = tuple(logits.float() for logits in self.logits.values())
        return balance(logits, logits[0].shape[-1], self.config.num_experts_per_tok, mask)


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


def _imbalance(logits: torch.Tensor, top: int, mask: torch.Tensor) -> torch.Tensor:
    """Experts x sum over experts of (tokens that chose it / tokens) x (its mean score), of each row; even routing gives `top`.

    logits: (R x L, experts). top: experts a token. mask: (R, L) bool. Returns: (R,) float32.
    """
    experts = logits.shape[-1]
    weights = mask.unsqueeze(-1).float()  # (R, L, 1)
    scores = logits.float().softmax(-1).view(*mask.shape, experts)
    picks = torch.zeros_like(scores).scatter(-1, scores.topk(top).indices, 1.0)
    tokens = weights.sum(1).clamp(min=1)  # (R, 1)
    load, score = (picks * weights).sum(1) / tokens, (scores * weights).sum(1) / tokens  # (R, experts)
    return experts * (load * score).sum(1)
