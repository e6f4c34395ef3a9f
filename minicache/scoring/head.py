"""Hidden states -> logprobs of given tokens, in chunks: the whole (K, vocabulary) logits never exist.

The gradients of the logprobs are known only after the loss, so backward computes the logits of each chunk again: a third more
matrix work in the head, for memory that does not grow with K.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

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
        bias = self.linear.bias
        return self.finish(_matmul(hidden, self.linear.weight.to(hidden.dtype)) + (0 if bias is None else bias.float()))

    def finish(self, logits: torch.Tensor) -> torch.Tensor:
        """Scale and cap logits, (K, vocabulary), in place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def logps(self, hidden: torch.Tensor, targets: torch.Tensor, distribution: bool) -> tuple[torch.Tensor, ...]:
        """The logprobs of the targets, (K,) float32, nats; with `distribution` also entropy and log sum p^2, (K,) each.

        The latter two have no gradients. hidden: (K, hidden), in the precision of the matrix product. targets: (K,) int64.
        """
        apply: Any = _Logps.apply
        outputs: tuple[torch.Tensor, ...] = apply(
            hidden, self.linear.weight, self.linear.bias, targets, self, distribution
        )
        return outputs


def _matmul(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right.T in float32. On CUDA products of half precision are not rounded to it after their summation in float32."""
    if left.dtype == torch.float32:
        return left @ right.T
    if left.is_cuda:
        return torch.mm(left, right.T, out_dtype=torch.float32)
    return (left @ right.T).float()


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
        chunk = max(1, CHUNK_NUMBERS.get(hidden.device.type, 2**23) // weight.shape[0])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.chunk = head, chunk
        with torch.autocast(hidden.device.type, enabled=False):
            parts = [
                _forward(head.logits(h), t, distribution)
                for h, t in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
            ]
        outputs = tuple(torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
        cast = weight.to(hidden.dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(targets), ctx.chunk):
                piece = slice(start, start + ctx.chunk)
                grad = _backward(ctx.head, ctx.head.logits(hidden[piece]), targets[piece], grads[0][piece])
                if grad_bias is not None:
                    grad_bias += grad.sum(0)
                grad = grad.to(hidden.dtype)
                torch.mm(grad, cast, out=grad_hidden[piece])
                if grad_weight is None:
                    continue
                if grad.dtype == torch.float32:
                    grad_weight.addmm_(grad.T, hidden[piece])
                else:
                    grad_weight += _matmul(grad.T, hidden[piece].T)
        grad_parameters = (
            grad_weight.to(weight.dtype) if grad_weight is not None else None,
            grad_bias.to(bias.dtype) if grad_bias is not None else None,
        )
        return grad_hidden, *grad_parameters, None, None, None


def _forward(logits: torch.Tensor, targets: torch.Tensor, distribution: bool) -> tuple[torch.Tensor, ...]:
    """The outputs of `Head.logps` for a chunk. logits: (k, vocabulary) float32, overwritten. targets: (k,)."""
    normalizer = logits.logsumexp(1)  # (k,)
    logps = logits.gather(1, targets[:, None])[:, 0] - normalizer
    if not distribution:
        return (logps,)
    return logps, *entropy_and_concentration(logits.sub_(normalizer[:, None]))


def entropy_and_concentration(logps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """-sum p log p and log sum p^2, (k,) each, nats. logps: (k, vocabulary), logprobs of whole distributions."""
    probabilities = logps.exp()
    return -torch.linalg.vecdot(probabilities, logps), torch.linalg.vecdot(probabilities, probabilities).log()


def _backward(head: Head, logits: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """The gradient of the logits before scale and cap, (k, vocabulary) float32: grad * (onehot - p), through tanh and scale.

    logits: (k, vocabulary) float32, overwritten. targets, grad: (k,).
    """
    slope = None if head.cap is None else 1 - (logits / head.cap) ** 2
    grads = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_().mul_(-grad[:, None])
    grads.scatter_add_(1, targets[:, None], grad[:, None])
    if slope is not None:
        grads.mul_(slope)
    return grads.mul_(head.scale) if head.scale != 1 else grads
