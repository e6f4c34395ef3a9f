"""Whether a kernel computes attention as torch's own does, values and gradients: on numbers of no meaning, in a model's sizes."""

from collections.abc import Iterable

import torch

from minicache.scoring.attention import Call
from minicache.scoring.batch import Batch
from minicache.scoring.kernels import Form, Spans, attended
from minicache.scoring.masks import Mask, Windows, masks_of

# Relative, in the norm of a tensor: of rounding to half precision, and of sums in another order in float32. A mask that is wrong in
# one block of 128 moves more.
WITHIN = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}
# Key heads; the others are alike.
HEADS = 2
NAMES = ("values", "gradients of the query", "gradients of the key", "gradients of the value", "gradients of the sinks")


def require_computes(calls: Iterable[Call], batch: Batch, windows: Windows, kernel: str, dtype: torch.dtype) -> None:
    """Require of a kernel, for each form of attention that a model asks for, what a walk over the pairs gives in float32.

    Both stages require the gradients, so that both take the same kernel. calls: of the model. batch: packed, on the device, of
    pairs of the lengths that will be scored.

    Raises:
        ValueError: it computes something else. Whatever a compiler or kernel raises: it does not run here.
    """
    done = set()
    for call in calls:
        # one of each kind
        if (kind := (call.shapes[0][1::2], call.shapes[1:], call.dtypes, call.form[:2])) in done:
            continue
        done.add(kind)
        for window in {window for _, window in windows.by_kind}:
            mask = masks_of(batch, Windows((("", window),)), kernel)
            assert batch.mask is not None and not isinstance(mask, dict)
            _require_alike(call, mask, Spans.of(batch.mask, window), batch.input_ids, dtype)


def _require_alike(call: Call, mask: Mask | None, spans: Spans, row: torch.Tensor, dtype: torch.dtype) -> None:
    """row: (1, length), on the device."""
    heads = min(HEADS, call.shapes[1][1])
    groups = call.shapes[0][1] // call.shapes[1][1]
    numbers = torch.Generator().manual_seed(0)
    given = [
        torch.randn(1, heads * (groups if place == 0 else 1), row.shape[1], shape[3], generator=numbers)
        .to(row.device, precision)
        .requires_grad_()
        for place, (shape, precision) in enumerate(zip(call.shapes, call.dtypes, strict=True))
    ]
    sinks = call.form.sinks
    if sinks is not None:
        given.append(sinks.detach()[: heads * groups].clone().requires_grad_())
    found = _with_gradients(given, mask, call.form, dtype)
    exact = [each.detach().float().requires_grad_() for each in given]
    expected = _with_gradients(exact, spans, call.form, torch.float32)
    for name, ours, due in zip(NAMES, found, expected, strict=False):
        moved = float((ours.float() - due).norm() / due.norm())
        if not moved <= WITHIN[dtype]:
            raise ValueError(f"its {name} differ from those of plain attention, by {moved:.2g} of their norm")


def _with_gradients(given: list[torch.Tensor], mask: Mask | None, form: Form, dtype: torch.dtype) -> list[torch.Tensor]:
    """The output of attention, and the gradients of query, key, value and, if the form has them, the sinks."""
    sinks = given[3] if len(given) > 3 else None
    kind = given[0].device.type
    with torch.enable_grad(), torch.autocast(kind, dtype, enabled=dtype != torch.float32):
        output = attended(given[0], given[1], given[2], mask, form._replace(sinks=sinks))
    weights = torch.linspace(-1, 1, output.shape[2], device=output.device)[:, None]
    return [output.detach(), *torch.autograd.grad((output.float() * weights).sum(), given)]
