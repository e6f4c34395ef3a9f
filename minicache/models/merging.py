"""An adapter merged into its base: one model, which computes the same."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from minicache.errors import ModelError
from minicache.models.peft_library import quiet
from minicache.text import one_line

# Token ids of the probe, and the largest difference of its logits, as a share of the largest logit: float32 rounds by a
# thousandth of that.
PROBE, TOLERANCE = 8, 1e-3


@torch.no_grad()
def merge(adapted: Any, directory: Path) -> nn.Module:
    """The plain model of an adapted one in float32, in eval mode. directory: the adapter's, for errors.

    Layers that shared weights before share them no longer where the adapter changes one of them.

    Raises:
        ModelError: adapters of this kind cannot be merged, or the merged model computes something else.
    """
    adapted.eval()
    kind = adapted.peft_config["default"].peft_type.value
    before = _logits(adapted)
    _part_tied(adapted)
    try:
        with quiet():
            merged: nn.Module = adapted.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError, TypeError, RuntimeError) as error:
        line = one_line(error, 200)
        raise ModelError(f"{directory}: peft cannot merge this {kind} adapter into its base: {line}") from error
    moved, largest = float((_logits(merged) - before).abs().max()), float(before.abs().max())
    if not moved <= TOLERANCE * max(1.0, largest):
        raise ModelError(
            f"{directory}: merged into its base, this {kind} adapter changes logits by {moved:.2g}, so it is no part of the "
            "weights; expected one that merges, such as LoRA"
        )
    return merged


def _logits(model: Any) -> torch.Tensor:
    """(PROBE, vocabulary) Logits of a few tokens."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(1, PROBE + 1)[None] % vocabulary
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits[0].float()
    return logits


def _part_tied(adapted: Any) -> None:
    """Give the head weights of its own, if it shares the embeddings' and an adapter changes one use of them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    ends: list[Any] = [adapted.get_input_embeddings(), adapted.get_output_embeddings()]
    if None in ends or not any(isinstance(end, BaseTunerLayer) for end in ends):
        return
    embeddings, head = (getattr(end, "base_layer", end) for end in ends)
    if embeddings.weight is head.weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        adapted.get_base_model().config.tie_word_embeddings = False
