"""What a model's own code does, found by running it: whether it is causal, whether its head is plain; its errors as one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minicache.errors import MinicacheError, ModelError, is_full_memory, is_lost_peer
from minicache.models.precision import Settling
from minicache.models.whole import require_finite
from minicache.scoring.head import Head
from minicache.text import one_line

# Tokens of the sequences that are run.
TOKENS = 8
# By how much a logit may move that must not move at all, as a share of the largest; quantized products look at all rows together.
STILL, STILL_QUANTIZED = 1e-3, 5e-2


def decoder_of(model: Any) -> nn.Module:
    """The model without its head; for an adapted model (peft), that of its base, which holds the adapters.

    The model itself if its code keeps decoder and head together.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # Llama 4's class names a part that it does not have
    decoder: nn.Module = base.base_model if base.base_model is not base else getattr(base, "model", base)
    return decoder


@torch.no_grad()
def probed(model: Any) -> Head | None:
    """The model's head as `Head` computes it; None if that does not give the model's own logits.

    Raises:
        ModelError: the model's code fails, or what it says of a token depends on the tokens after it.
    """
    device = next(model.parameters()).device
    ids = torch.arange(1, TOKENS + 1, device=device).repeat(2, 1)
    ids[1, -1] += 1
    ids %= model.get_input_embeddings().weight.shape[0]  # (2, TOKENS)
    settling = Settling(model)
    with own_errors(model):
        with settling:
            logits = model(input_ids=ids, use_cache=False).logits.float()  # (2, TOKENS, vocabulary)
        if not logits.isfinite().all():
            require_finite(model.named_parameters(), _name(model))
        _require_causal(model, logits)
        head = Head.of(model)
        # a class without a decoder of its own gives no hidden states
        with settling:
            hidden = (
                getattr(decoder_of(model)(input_ids=ids, use_cache=False), "last_hidden_state", None) if head else None
            )
        if head is None or hidden is None:
            return None
        found = head.logits(hidden.flatten(0, 1)).view_as(logits)
    # a soft cap under a name that `Head` does not know hardly shows in small logits
    close = 1e-4 if hidden.dtype == torch.float32 else 1e-2
    return head if torch.allclose(found, logits, rtol=close, atol=close * _largest(logits)) else None


def _largest(logits: torch.Tensor) -> float:
    """The largest finite number among the absolute values."""
    return float(logits.abs().nan_to_num(0.0, posinf=0.0).max())


def _require_causal(model: Any, logits: torch.Tensor) -> None:
    """Raises ModelError: a changed last token moved logits before it. logits: (2, TOKENS, vocabulary), alike but for that token."""
    moved = float((logits[0, :-1] - logits[1, :-1]).abs().max())
    share = STILL_QUANTIZED if getattr(model, "is_quantized", False) else STILL
    if moved > share * _largest(logits):
        raise ModelError(
            f"{_name(model)} is not causal: changing a token moved the logits before it by up to {moved:.2g}; expected a language "
            "model that reads from left to right (an encoder may have a causal mode in its config, as is_decoder)"
        )


@contextmanager
def own_errors(model: Any) -> Iterator[None]:
    """Raise whatever a model's own code raises as one line.

    Raises:
        ModelError: its code failed. torch.OutOfMemoryError: memory is full, a GPU's or the CPU's, which has no error of its own in
            torch. Errors of the network between processes pass unchanged.
    """
    try:
        yield
    except (MinicacheError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if is_lost_peer(error):
            raise
        line = one_line(error, 300)
        if is_full_memory(error):
            raise torch.OutOfMemoryError(line) from error
        raise ModelError(f"{_name(model)}: its own code failed: {line}") from error


def _name(model: Any) -> str:
    return type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
