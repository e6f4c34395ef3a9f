"""Hidden states -> logprobs of given tokens, in chunks: the whole (K, vocabulary) logits never exist.

The gradients of the logprobs are known only after the loss, so backward computes the logits of each chunk again: a third more
matrix work in the head, for memory that does not grow with K. A vocabulary is 50 to 150 times as wide as a hidden state is in
bytes that a GPU moves, so what is done to the logits is done in place, and in one pass where there is a compiler.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._triton import has_triton

from minicache.processes.devices import by_kind
from minicache.text import one_line

log = logging.getLogger(__name__)

# Logits (numbers, not bytes) of one chunk: small beside a model, enough to keep the device busy.
CHUNK_NUMBERS = {"cpu": 2**23, "cuda": 2**27}

# Settings that hold the soft cap of the logits: Gemma's, RecurrentGemma's, xLSTM's.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


@dataclass(frozen=True)
class Head:
    """A model's output layer: logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap), or without tanh if cap is None.

    linear: with weight (vocabulary, hidden). scale: Granite's 1 / logits_scaling, Cohere's logit_scale. cap: Gemma's soft cap.
    """

    linear: nn.Linear
    scale: float
    cap: float | None

    @classmethod
    def of(cls, model: Any) -> "Head | None":
        """The head of a transformers model; None if it is not a plain linear layer.

        The family may change its logits in other ways too, so the caller must compare them (see `probed`).
        """
        linear, config = model.get_output_embeddings(), model.config.get_text_config()
        if type(linear) is not nn.Linear:
            return None
        scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
        caps = (getattr(config, name, None) for name in CAPS)
        return cls(linear, float(scale), next((cap for cap in caps if cap is not None), None))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(K, vocabulary) float32. hidden: (K, hidden)."""
        return _logits(hidden, self.linear.weight.to(hidden.dtype), self.linear.bias, self.scale, self.cap)

    def logps(self, hidden: torch.Tensor, targets: torch.Tensor, distribution: bool) -> tuple[torch.Tensor, ...]:
        """The logprobs of the targets, (K,) float32, nats; with `distribution` also entropy and log sum p^2, (K,) each.

        The latter two have no gradients. hidden: (K, hidden), in the precision of the matrix product. targets: (K,) int64.
        """
        apply: Any = _Logps.apply
        outputs: tuple[torch.Tensor, ...] = apply(
            hidden, self.linear.weight, self.linear.bias, targets, self, distribution
        )
        return outputs[: 3 if distribution else 1]

    def rows(self, kind: str) -> int:
        """The number of predictions in a chunk, on a kind of device."""
        return max(1, by_kind(CHUNK_NUMBERS, torch.device(kind)) // len(self.linear.weight))

    def bytes(self, kind: str, dtype: torch.dtype, training: bool) -> int:
        """The most bytes that `logps` makes at once beside its inputs and outputs, with backward if training.

        kind: of device. dtype: of the matrix product. Without a compiler; with one it is less.
        """
        weight, numbers = self.linear.weight, self.rows(kind) * len(self.linear.weight)
        size = dtype.itemsize if dtype != torch.float32 else 0
        # elsewhere than on CUDA, products of half precision are made in it, and then copied to float32
        product = size if kind != "cuda" else 0
        cast = weight.numel() * dtype.itemsize if weight.dtype != dtype else 0
        forward = numbers * max(4 + product, 8)
        if not training:
            return cast + forward
        backward = numbers * max(4 + product, 4 + size + (4 if self.cap else 0))
        if weight.requires_grad:
            at_end = weight.numel() * weight.element_size() if weight.dtype != torch.float32 else 0
            in_product = product * numbers + (product + 4) * weight.numel() if product else 0
            backward = 4 * weight.numel() + max(backward, in_product, at_end)
        return cast + max(forward, backward)


class _Logps(torch.autograd.Function):
    """`Head.logps` with gradients for hidden, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        head: Head,
        distribution: bool,
    ) -> tuple[torch.Tensor, ...]:
        kind = hidden.device.type
        cast, rows = weight.to(hidden.dtype), head.rows(kind)
        with torch.autocast(kind, enabled=False):
            parts = [
                _fused(_scores, kind)(h, cast, bias, t, head.scale, head.cap, distribution)
                for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True)
            ]
        normalizer, *outputs = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.save_for_backward(hidden, weight, bias, targets, normalizer)
        ctx.head = head
        ctx.mark_non_differentiable(*outputs[1:])
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *_: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets, normalizer = ctx.saved_tensors
        head, kind = ctx.head, hidden.device.type
        cast, rows = weight.to(hidden.dtype), head.rows(kind)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        with torch.autocast(kind, enabled=False):
            for start in range(0, len(targets), rows):
                piece = slice(start, start + rows)
                grads = _fused(_gradients, kind)(
                    hidden[piece], cast, bias, targets[piece], normalizer[piece], grad[piece], head.scale, head.cap
                )
                torch.mm(grads, cast, out=grad_hidden[piece])
                if grad_bias is not None:
                    grad_bias += grads.sum(0, dtype=torch.float32)
                if grad_weight is not None:
                    _add_product(grad_weight, grads.T, hidden[piece])
                # before the next chunk is made
                del grads
        grad_parameters = (
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
        )
        return grad_hidden, *grad_parameters, None, None, None


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float, cap: float | None
) -> torch.Tensor:
    """(k, vocabulary) float32. On CUDA products of half precision are not rounded to it after their summation in float32."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.T).float()
    if bias is not None:
        logits += bias.float()
    if scale != 1:
        logits *= scale
    return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """total += left @ right, summed in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total += left @ right


def _scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    scale: float,
    cap: float | None,
    distribution: bool,
) -> tuple[torch.Tensor, ...]:
    """The logarithm of the sum over exp of the logits, then the outputs of `Head.logps`, for a chunk."""
    logits = _logits(hidden, weight, bias, scale, cap)
    of_target, most = logits.gather(1, targets[:, None])[:, 0], logits.amax(1)
    logits.sub_(most[:, None])
    powers = logits.exp() if distribution else logits.exp_()
    total = powers.sum(1)
    normalizer = total.log() + most
    logps = of_target - normalizer
    if not distribution:
        return normalizer, logps
    return normalizer, logps, *entropy_and_concentration(logits.sub_(total.log()[:, None]), powers.div_(total[:, None]))


def _gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    normalizer: torch.Tensor,
    grad: torch.Tensor,
    scale: float,
    cap: float | None,
) -> torch.Tensor:
    """The gradient of hidden @ weight.T for a chunk, grad * (onehot - p), through tanh and scale, in the precision of hidden."""
    logits = _logits(hidden, weight, bias, scale, cap)
    slope = None if cap is None else (logits / cap).square_().neg_().add_(1)
    logits.sub_(normalizer[:, None])
    # p - onehot
    of_target = torch.expm1(logits.gather(1, targets[:, None]))
    grads = logits.exp_().scatter_(1, targets[:, None], of_target)
    if slope is not None:
        grads *= slope
    return grads.mul_((-scale * grad)[:, None]).to(hidden.dtype)


def entropy_and_concentration(logps: torch.Tensor, probabilities: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum p log p and log sum p^2, (k,) each, nats. logps, probabilities: (k, vocabulary), overwritten."""
    return -logps.mul_(probabilities).sum(1), probabilities.square_().sum(1).log()


@cache
def _fused(function: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """The function, compiled on a kind of device that has a compiler: it then reads the logits once, and writes little."""
    return Compiled(function) if kind == "cuda" and has_triton() else function


class Compiled:
    """A function without side effects, compiled by torch; by itself, once its compilation has failed."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.run = function, torch.compile(function)

    def __call__(self, *args: Any) -> Any:
        try:
            return self.run(*args)
        except torch.OutOfMemoryError:
            raise
        # compilers fail in many ways
        except Exception as error:
            if self.run is self.function:
                raise
            log.warning("the head runs without a compiler, which failed: %s", one_line(error, 300))
            self.run = self.function
        return self.run(*args)
