"""Optimizer steps on a device that raises where a host would wait: python -m tests.training.no_waits_worker CACHE OUT CASES.

Prints a JSON object: the name of a case -> what was raised in it, or the weights' distance from those of the same steps on a CPU.
"""

import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from minicache.errors import ModelError
from minicache.options.dictionaries import fill
from minicache.options.train import TrainConfig
from minicache.processes import devices
from minicache.processes.world import World
from minicache.scoring import kernels, layout
from minicache.scoring.batching import ahead
from minicache.stages.train import FROM_DISK, _prepare, _save_memory_and_time
from minicache.trackers import Silent
from minicache.training import step as steps
from minicache.training import validation
from minicache.training.log_lines import log_step
from minicache.training.metrics import Means
from minicache.training.snapshot import begin
from minicache.training.state import Run
from minicache.training.step import count_step, plan, take_step
from minicache.training.validation import EvalSet, evaluate_policy, pair_logps
from tests.helpers import varlen
from tests.helpers.fake_device import Device, Waited, register, watched

CPU = torch.device("cpu")
STEPS = 2


def flex(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    """Attention under a block mask, in place of FlexAttention, which knows the devices that it runs on."""
    at = torch.arange(query.shape[2], device=query.device)
    seen = options["block_mask"].mask_mod(at, at, at[:, None], at)
    return scaled_dot_product_attention(
        query, key, value, attn_mask=seen, scale=options["scale"], enable_gqa=options["enable_gqa"]
    )


@cache
def prepared(options: str, device: torch.device) -> Run:
    """The run with these options, as JSON. One that waits ends before it changes a weight, so the next may begin with it."""
    run, _ = _prepare(fill(TrainConfig, json.loads(options)), None, World(0, 1, device), Silent(), FROM_DISK)
    _save_memory_and_time(run)
    return run


def weights_after(options: dict[str, Any], device: torch.device) -> list[torch.Tensor]:
    """The trained weights after some steps, of which nothing but a line of the log may wait."""
    guard = nullcontext if device == CPU else watched
    run = prepared(json.dumps(options), device)
    training = begin(run, None)
    for number, mine in enumerate(ahead(plan(run, 0))):
        if number == STEPS:
            break
        with guard():
            norm = take_step(run, training, mine)
        count_step(run, training, mine.indices, 1.0)
        # step 0 has a line of its own
        with guard() if number else nullcontext():
            log_step(run, training, norm, Silent())
    _validate(run, guard)
    return [each.detach().to(CPU) for each in run.scorer.parameters() if each.requires_grad]


def _validate(run: Run, guard: Callable[[], Any]) -> None:
    """A validation, in which nothing but its end may wait: the sum, and the figures of all pairs."""
    if run.objective.over_the_batch:
        return

    with pytest.MonkeyPatch.context() as patch, guard():
        patch.setattr(Means, "reduce", lambda means, world, patient: {})
        patch.setattr(validation, "_gathered", lambda world, preferences: None)
        held_out = EvalSet(run.cached, np.arange(4))
        evaluate_policy(run.scorer, held_out, run.objective, run.budget, run.world, Silent())


# What someone may add to a step, given its scores.
WAITS: dict[str, Callable[[torch.Tensor], object]] = {
    "item": lambda logps: logps.detach().sum().item(),
    "tolist": lambda logps: logps.detach().tolist(),
    "if": lambda logps: 1 if logps.sum() > 0 else 0,
    "float": lambda logps: float(logps.detach().sum()),
    "to the CPU": lambda logps: logps.cpu(),
    "to the CPU later": lambda logps: logps.to("cpu", non_blocking=True),
    "a copy to the CPU": lambda logps: torch.empty(logps.shape).copy_(logps.detach()),
    "from the CPU": lambda logps: torch.ones(3).to(logps.device),
    "not pinned": lambda logps: torch.ones(3).to(logps.device, non_blocking=True),
    "blocking": lambda logps: torch.ones(3).pin_memory().to(logps.device),
    "a mask as an index": lambda logps: logps[logps > -1],
    "assignment by a mask": lambda logps: torch.zeros_like(logps).index_put_((logps > -1,), logps.new_ones(())),
    "an index of the CPU": lambda logps: logps[torch.tensor([0, 0])],
    "nonzero": lambda logps: logps.nonzero(),
    "where": lambda logps: torch.where(logps > -1),
    "masked_select": lambda logps: logps.masked_select(logps > -1),
    "unique": lambda logps: logps.unique(),
    "equal": lambda logps: torch.equal(logps, logps),
    "allclose": lambda logps: torch.allclose(logps, logps),
    "bincount": lambda logps: torch.bincount(logps.flatten().long().abs(), minlength=4),
    "repeat_interleave": lambda logps: logps.repeat_interleave(torch.ones_like(logps[:, 0]).long(), dim=0),
    "in backward": lambda logps: logps.register_hook(lambda grad: grad * grad.sum().item()),
}


def _waiting(wait: Callable[[torch.Tensor], object], *arguments: Any) -> Any:
    logps = pair_logps(*arguments)
    wait(logps.policy)
    return logps


def main() -> None:
    device = register()
    varlen.register()
    found: dict[str, Any] = {}
    with Device(), pytest.MonkeyPatch.context() as patch:
        # what a GPU with a compiler has
        patch.setattr(devices, "has_triton", lambda: True)
        patch.setattr(devices, "FLEX", {device.type})
        patch.setattr(devices, "FLOAT64", {"cpu", device.type})
        patch.setitem(devices.BACKENDS, device.type, "none")
        patch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 0)
        patch.setattr(kernels, "_compiled_flex", lambda: flex)
        for name, options in json.loads(sys.argv[1]).items():
            wait = WAITS.get(options.pop("wait", ""))
            tried = (options.pop("kernel", "flex"),)
            patch.setattr(
                layout, "attention_kernels", lambda device, half, tried=tried: ("spans",) if device == CPU else tried
            )
            patch.setattr(steps, "pair_logps", partial(_waiting, wait) if wait else pair_logps)
            try:
                weights = weights_after(options, device)
            # as one line, if a model's own code was running
            except (Waited, ModelError) as error:
                found[name] = str(error)
                continue
            expected = weights_after(options, CPU)
            found[name] = max(float((a - b).abs().max()) for a, b in zip(weights, expected, strict=True))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
