"""Checks of what is compiled and what is waited for: forms of attention, the head, graphs, host waits."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.figures import Figure, Machine, at_most, attempt, exactly, forget_graphs
from benchmarks.gpu.material import (
    SMALL,
    Size,
    half_of,
    make_model,
    make_pairs,
    make_run,
    size_here,
    steps_of,
    table_of,
)
from benchmarks.gpu.values import wait
from benchmarks.head import moved
from benchmarks.measure import alternate, peak_gb
from minicache.processes.devices import attention_kernels
from minicache.scoring import head as own_head
from minicache.scoring.attention import attend
from minicache.scoring.batch import Batch
from minicache.scoring.head import Head
from minicache.scoring.kernels import Mask
from minicache.scoring.masks import ALL_SEEN, block_mask, masks_of
from minicache.scoring.scorer import Scorer

WIDTHS = (128, 64, 80, 96, 256, 192)
# Largest distance of outputs and gradients from dense attention in float32, as a share of their norm.
CLOSE = {"float32": 1e-4, "bfloat16": 2e-2, "float16": 5e-3}
# Of queries, and of keys and values.
HEADS = (8, 2)
PARTS = ("output", "gradient of query", "gradient of key", "gradient of value")


def forms(machine: Machine, dtype: str) -> list[str]:
    """Each way to attend over a packed row here, by the names of scoring/kernels.py, and a dense mask."""
    kernels = attention_kernels(machine.device, dtype != "float32")
    return list(dict.fromkeys([*kernels, "spans", "dense"]))


def mask_for(batch: Batch, form: str) -> Mask:
    """The mask of a packed row with which `attend` takes this form."""
    if form != "dense":
        mask = masks_of(batch, ALL_SEEN, form)
        assert not isinstance(mask, dict)
        return mask
    assert batch.mask is not None
    length = batch.input_ids.shape[1]
    at = torch.arange(length, device=batch.input_ids.device)
    sees = block_mask(batch.mask.to(at.device)[0, 0], length).mask_mod
    return sees(at, at, at[:, None], at)[None, None]  # type: ignore[no-any-return]


def attention(machine: Machine) -> Iterator[Figure]:
    """Each form of attention by the width of a head, in both precisions, forward and backward, on pairs of real length."""
    table = make_pairs(machine, 3 if machine.tiny else 6, 100)
    scorer = Scorer(make_model(machine, size_here(machine, SMALL), "float32"), "float32", "packed")
    batch = scorer.batch(table, np.arange(len(table))).to(machine.device)
    for dtype in (half_of(machine), "float32"):
        for width in WIDTHS:
            # torch compiles a function for so many kinds of inputs at most
            forget_graphs()
            kind = getattr(torch, dtype)
            length = batch.input_ids.numel()
            heads, of_keys = (2, 1) if machine.tiny else HEADS
            shapes = ((1, heads, length, width), *[(1, of_keys, length, width)] * 2)
            inputs = [torch.randn(shape, device=machine.device).to(kind) for shape in shapes]
            expected = _attend([each.float() for each in inputs], mask_for(batch, "dense"))
            for form in forms(machine, dtype):
                what = f"{form}, width {width}, {dtype}"
                yield from attempt(what, partial(_compared, machine, what, inputs, batch, form, expected, CLOSE[dtype]))
    machine.needs_gpu("the other kernels")


def _compared(
    machine: Machine, what: str, inputs: Any, batch: Batch, form: str, expected: Any, bound: float
) -> Iterator[Figure]:
    run = partial(_attend, inputs, mask_for(batch, form))
    found = run()
    errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True)]
    worst = int(np.argmax(np.nan_to_num(errors, nan=np.inf)))
    yield at_most(f"{what}: {PARTS[worst]}, the worst", errors[worst], bound, "of its norm")
    times = alternate({"": run}, 1 if machine.tiny else 5)[""]
    yield Figure(f"{what}: forward and backward", min(times) * 1e3, "ms")


def _attend(inputs: list[torch.Tensor], mask: Mask) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value."""
    leaves = [each.detach().requires_grad_(True) for each in inputs]
    output, _ = attend(nn.Module(), *leaves, mask)
    output.float().square().sum().backward()
    return [output.detach(), *(each.grad for each in leaves if each.grad is not None)]


def waits(machine: Machine) -> Iterator[Figure]:
    """The lines of an optimizer step, which is not logged, that make the host wait for the device."""
    size = size_here(machine, SMALL)
    table = make_pairs(machine, 24, size.shape[-1])
    for layout in ("packed", "shared", "padded"):
        yield from attempt(layout, partial(_waits, machine, size, table, layout))
    machine.needs_gpu("what waits for it")


def _waits(machine: Machine, size: Size, table: Any, layout: str) -> Iterator[Figure]:
    model = make_model(machine, size, "float32").requires_grad_(True)
    budget = int(table.lengths.sum()) // 2
    steps = steps_of(make_run(machine, model, table, batch_size=8, layout=layout, tokens_per_micro_batch=budget))
    # the first is logged, and the second compiles what the others run
    for _ in range(2):
        next(steps)()
    third = next(steps)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if machine.has_cuda:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            third()
        finally:
            if machine.has_cuda:
                torch.cuda.set_sync_debug_mode("default")
    found = sorted({f"{Path(each.filename).name}:{each.lineno}" for each in seen if "synchroniz" in str(each.message)})
    if machine.has_cuda:
        yield exactly(f"{layout}: waits", ", ".join(found) or "none", "none")


def head(machine: Machine) -> Iterator[Figure]:
    """Forward and backward of the head of a 0.6B model, eager and compiled."""
    positions, width, vocabulary = (64, 32, 600) if machine.tiny else (12_000, 1024, 151_936)
    torch.manual_seed(0)
    linear = nn.Linear(width, vocabulary, bias=False, device=machine.device)
    own, half = Head(linear, 1.0, None), getattr(torch, half_of(machine))
    hidden = torch.randn(positions, width, device=machine.device).to(half).requires_grad_(True)
    targets = torch.randint(vocabulary, (positions,), device=machine.device)

    def passes() -> torch.Tensor:
        linear.zero_grad(set_to_none=True)
        logps = own.logps(hidden, targets, distribution=False)[0]
        logps.sum().backward()
        return logps.detach()

    counted = moved(positions, vocabulary, width)
    found, seconds = {}, {}
    for name in ("eager", "compiled") if machine.has_cuda else ("eager",):
        eager = patch.object(own_head, "_fused", lambda function, kind: function) if name == "eager" else nullcontext()
        with eager:
            found[name] = passes()
            yield Figure(f"{name}: peak", peak_gb(passes), "GB")
            seconds[name] = min(alternate({"": passes}, 5)[""])
        yield Figure(f"{name}: time", seconds[name] * 1e3, "ms")
        yield Figure(f"{name}: bytes that it moves, by count", counted[name] / 1e9, "GB")
        yield Figure(f"{name}: rate of them", counted[name] / seconds[name] / 1e12, "TB/s")
    machine.needs_gpu("the compiled head")
    yield at_most("compiled over eager: time", seconds["compiled"] / seconds["eager"], 0.8)
    yield at_most("compiled - eager: logprobs", float((found["compiled"] - found["eager"]).abs().max()), 1e-2, "nats")


def graphs(machine: Machine) -> Iterator[Figure]:
    """How many graphs are compiled by batches of seven lengths, with and without gradients."""
    from torch._dynamo.utils import counters

    size = size_here(machine, SMALL)
    model = make_model(machine, size, "float32").requires_grad_(True)
    # FlexAttention, where there is a compiler; the other kernels are not compiled
    scorer, random = Scorer(model, half_of(machine), "packed"), np.random.default_rng(0)
    before, total = counters["stats"]["unique_graphs"], []
    for length in (20, 230, 1000, 43, 1700, 300, 4000):
        parts = np.array([[length // 4, length // 3, length // 2]] * 3) // (8 if machine.tiny else 1) + 2
        batch = scorer.batch(table_of(parts, size.shape[-1], random), np.arange(3)).to(machine.device)
        with torch.no_grad():
            scorer(batch)
        for distribution in (True, False):
            scorer(batch, distribution).logp_mean.sum().backward()
        wait(machine)
        total.append(counters["stats"]["unique_graphs"] - before)
    machine.needs_gpu("graphs")
    yield Figure("graphs after each of seven lengths", ", ".join(map(str, total)))
    # attention and three functions of the head, each for one length and then for any
    yield at_most("graphs", float(total[-1]), 14)
    yield exactly("graphs that the last three lengths add", total[-1] - total[3], 0)
    yield exactly("functions that were given up, because they compiled too often", len(counters["recompile_limit"]), 0)
