"""Bytes that the head reads and writes in a training step on a GPU, by count: python -m benchmarks.head.

Every operation reads its inputs and writes its outputs once, in tensors without content; torch.logsumexp is the four operations
that torch makes of it. `before` is 0.1.0's head, in which each chunk cast the weight, and each change of the logits was a copy
or a pass of its own. `compiled` are the products alone, and one pass over the logits where they are used: what is left when a
compiler joins the passes between them.
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicache.scoring import head
from minicache.scoring.head import CHUNK_NUMBERS, Head

# Operations that read and write nothing, and those that read or write one number of a row.
NONE, ONE = {"empty", "empty_like", "new_empty", "device"}, {"gather", "scatter_", "scatter_add_"}


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write. seen: by operation."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not (getattr(func, "is_view", False) or name in NONE | ONE):
            tensors = [each for each in tree_leaves((args, result)) if isinstance(each, torch.Tensor)]
            size = sum(each.numel() * each.element_size() for each in tensors)
            # the largest; the difference; its exp; their sum
            size *= 6 if name == "logsumexp" else 1
            self.seen[name] = self.seen.get(name, 0) + size
        return result


def ours(logps: Head, hidden: torch.Tensor, targets: torch.Tensor) -> None:
    """Forward and backward of a step that is not logged."""
    logps.logps(hidden, targets, distribution=False)[0].sum().backward()


def logged(logps: Head, hidden: torch.Tensor, targets: torch.Tensor) -> None:
    """Forward and backward of a step that is logged."""
    logps.logps(hidden, targets, distribution=True)[0].sum().backward()


def before(logps: Head, hidden: torch.Tensor, targets: torch.Tensor) -> None:
    """The operations of 0.1.0's head, whose every step had the whole distribution."""
    weight = logps.linear.weight.detach()
    rows = CHUNK_NUMBERS["cuda"] // len(weight)
    grad_weight = torch.zeros_like(weight)
    with torch.no_grad():
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logits = _product(h, weight.to(h.dtype).T) + 0
            normalizer = logits.logsumexp(1)
            logits.gather(1, t[:, None])
            logps_ = logits.sub_(normalizer[:, None])
            p = logps_.exp()
            (p[:, None] @ logps_[:, :, None], p[:, None] @ p[:, :, None])
        cast = weight.to(hidden.dtype)
        for h, t in zip(torch.split(hidden, rows), torch.split(targets, rows), strict=True):
            logits = _product(h, weight.to(h.dtype).T) + 0
            grad = logits.new_empty(len(t), 1)
            grads = logits.sub_(logits.logsumexp(1, keepdim=True)).exp_().mul_(grad)
            half = grads.scatter_add_(1, t[:, None], grad).to(h.dtype)
            torch.mm(half, cast)
            grad_weight += _product(half.T, h)


def compiled(logps: Head, hidden: torch.Tensor, targets: torch.Tensor) -> None:
    """As `ours`, with the passes over a chunk's logits joined to one that reads them, and writes what is multiplied next."""

    def scores(h: Any, weight: Any, bias: Any, t: Any, scale: float, cap: Any, distribution: bool) -> Any:
        return _scored(_product(h, weight.T)), h.new_empty(len(h), dtype=torch.float32)

    def gradients(h: Any, weight: Any, bias: Any, t: Any, normalizer: Any, grad: Any, scale: float, cap: Any) -> Any:
        return _product(h, weight.T).to(h.dtype)

    functions: dict[Callable[..., Any], Callable[..., Any]] = {head._scores: scores, head._gradients: gradients}
    with patch.object(head, "_fused", lambda function, kind: functions[function]):
        ours(logps, hidden, targets)


def _scored(logits: torch.Tensor) -> torch.Tensor:
    return logits.amax(1)


def _product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, as one operation on a GPU makes it."""
    return torch.mm(left, right, out_dtype=torch.float32)


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """As the head's own on a GPU."""
    torch.addmm(total, left, right, out_dtype=torch.float32, out=total)


def _logits(hidden: torch.Tensor, weight: torch.Tensor, bias: None, scale: float, cap: None) -> torch.Tensor:
    """As the head's own on a GPU."""
    return _product(hidden, weight.T)


def moved(positions: int, vocabulary: int, width: int) -> dict[str, float]:
    """Bytes by way of computing, forward and backward, of a weight in float32 that is trained in passes of bfloat16."""
    found = {}
    for name, way in {"before": before, "eager": ours, "logged": logged, "compiled": compiled}.items():
        as_on_cuda = patch.multiple(head, _logits=_logits, _add_product=_add_product)
        with FakeTensorMode(), as_on_cuda, patch.dict(CHUNK_NUMBERS, cpu=CHUNK_NUMBERS["cuda"]):
            linear = nn.Linear(width, vocabulary, bias=False)
            hidden = torch.empty(positions, width, dtype=torch.bfloat16, requires_grad=True)
            targets = torch.empty(positions, dtype=torch.int64)
            with Moved() as counted:
                way(Head(linear, 1.0, None), hidden, targets)
        found[name] = float(sum(counted.seen.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=12_000)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    asked = parser.parse_args()
    found = moved(**vars(asked))
    for name, size in found.items():
        print(f"{name:9} {size / 1e9:6.1f} GB  {size / found['before']:.2f}")


if __name__ == "__main__":
    main()
