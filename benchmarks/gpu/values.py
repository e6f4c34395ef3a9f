"""Checks of values: whether the device computes what it should, by how much it differs from itself, and what it is."""

import copy
import shutil
import time
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from benchmarks.gpu.figures import Figure, Machine, at_most, attempt, exactly, near_ln_2
from benchmarks.gpu.material import SMALL, Size, half_of, make_model, make_pairs, make_run, size_here, steps_of
from minicache.cache.identity import TOLERANCE
from minicache.options.catalog import LAYOUTS
from minicache.options.train import LossOptions
from minicache.pairs import PairTable
from minicache.processes.devices import attention_kernels, facts_of, free_memory, has_bfloat16, has_flex
from minicache.scoring.batching import Indices
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table
from minicache.training.losses import Logps, Objective

# Distance of the gradients from those of padded float32, as a share of their norm.
GRADIENTS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 2e-2}
# A budget that no two pairs fit.
ALONE = 1


def machine(machine: Machine) -> Iterator[Figure]:
    """What is here, and the rate of a plain product."""
    device = machine.device
    yield Figure("torch", torch.__version__)
    yield Figure("transformers", transformers.__version__)
    for name in ("triton", "peft", "bitsandbytes", "gguf"):
        yield Figure(name, find_spec(name) is not None)
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    yield exactly("C compiler", compiler is not None, True)
    yield exactly("TF32", torch.backends.cuda.matmul.allow_tf32, False)
    size = 256 if machine.tiny else 8192
    yield from attempt("products", lambda: _products(machine, size))
    machine.needs_gpu("its name, memory and precisions")
    facts = facts_of(device)
    yield Figure("name", facts.name)
    yield Figure("cards", float(torch.cuda.device_count()))
    yield Figure("compute capability", facts.capability)
    yield Figure("memory", facts.memory / 1e9, "GB")
    yield Figure("free memory", free_memory(device) / 1e9, "GB")
    yield exactly("bfloat16", has_bfloat16(device), True)
    yield exactly("FlexAttention can be compiled", has_flex(device), True)


def _products(machine: Machine, size: int) -> Iterator[Figure]:
    for dtype in (half_of(machine), "float32"):
        left = torch.randn(size, size, device=machine.device, dtype=getattr(torch, dtype))
        times = []
        for _ in range(6):
            wait(machine)
            started = time.perf_counter()
            left @ left
            wait(machine)
            times.append(time.perf_counter() - started)
        yield Figure(f"{dtype} product of {size} x {size}", 2 * size**3 / min(times) / 1e12, "TFLOP/s")


def wait(machine: Machine) -> None:
    """Wait for the device."""
    if machine.has_cuda:
        torch.cuda.synchronize()


def _model(machine: Machine, size: Size) -> Any:
    """A model to train, with weights so large that its logprobs differ from uniform by far more than rounding."""
    model = make_model(machine, size, "float32").requires_grad_(True)
    with torch.no_grad():
        for weight in model.parameters():
            # norms have one dimension
            weight.mul_(5 if weight.ndim > 1 else 1)
    return model


def layouts(machine: Machine) -> Iterator[Figure]:
    """Values and gradients of each layout in both precisions, against those of padded float32."""
    size = size_here(machine, SMALL)
    model, table = _model(machine, size), make_pairs(machine, 12, size.shape[-1])
    expected = _passes(machine, model, table, PADDED, "float32")

    def compared(way: Way, dtype: str) -> Iterator[Figure]:
        found, what = _passes(machine, model, table, way, dtype), f"{way.name}, {dtype}"
        values = float((found[0] - expected[0]).abs().max())
        yield at_most(f"{what}: values", values, TOLERANCE[dtype], "nats per token")
        gradients = float((found[1] - expected[1]).norm() / expected[1].norm())
        yield at_most(f"{what}: gradients", gradients, GRADIENTS[dtype], "of their norm")

    for dtype in ("float32", half_of(machine)):
        for way in ways(machine, dtype):
            if (way, dtype) != (PADDED, "float32"):
                yield from attempt(f"{way.name}, {dtype}", partial(compared, way, dtype))


class Way(NamedTuple):
    """A layout, and for packed rows what computes attention over them."""

    layout: str
    kernel: str | None = None

    @property
    def name(self) -> str:
        return f"{self.layout} by {self.kernel}" if self.kernel else self.layout

    def scorer(self, model: Any, dtype: str) -> Scorer:
        """The model's scorer that goes this way."""
        made = Scorer(model, dtype)
        made.use_layout(self.layout, kernel=self.kernel)
        return made


PADDED = Way("padded")


def ways(machine: Machine, dtype: str) -> list[Way]:
    """Each layout with each kernel that may attend over its rows here, the product's first choice first."""
    kernels = attention_kernels(machine.device, dtype != "float32")
    flat = ("packed", "sequences")
    return [Way(layout, kernel) for layout in LAYOUTS for kernel in (kernels if layout in flat else (None,))]


def _passes(machine: Machine, model: Any, table: PairTable, way: Way, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 2) mean logprobs and the gradients of their sum, (weights,), on the CPU."""
    scorer = way.scorer(model, dtype)
    means = scorer(scorer.batch(table, np.arange(len(table))).to(machine.device)).logp_mean
    # one side weighs more, so that gradients do not cancel where both sides are alike
    (means[:, 0] - 0.5 * means[:, 1]).sum().backward()
    gradients = torch.cat([each.grad.flatten().double().cpu() for each in model.parameters()])
    model.zero_grad(set_to_none=True)
    return means.detach().double().cpu(), gradients


def noise(machine: Machine) -> Iterator[Figure]:
    """Differences between scores of the same pairs by the same weights, and what they make of the loss at step 0."""
    size = size_here(machine, SMALL)
    table = make_pairs(machine, 6 if machine.tiny else 48, size.shape[-1])
    model = _model(machine, size)
    for dtype in ("float32", half_of(machine)):
        yield from attempt(dtype, lambda dtype=dtype: _noise(machine, model, table, dtype))  # type: ignore[misc]


def _noise(machine: Machine, model: Any, table: PairTable, dtype: str) -> Iterator[Figure]:
    usual, *rest = ways(machine, dtype)
    scorer, everything = usual.scorer(model, dtype), np.arange(len(table))
    whole = int(table.lengths.sum())
    first = _scores(machine, scorer, table, whole)
    yield exactly(
        f"{dtype}, the same batches again: bit for bit",
        bool((_scores(machine, scorer, table, whole) == first).all()),
        True,
    )
    batch = scorer.batch(table, everything).to(machine.device)
    with_gradients = scorer(batch, distribution=True).logp_mean.detach().cpu().numpy()
    others = {
        "the same batch, with gradients": with_gradients,
        "batches of a third": _scores(machine, scorer, table, whole // 3),
        "pairs alone": _scores(machine, scorer, table, ALONE),
    }
    for way in rest:
        others[way.name] = _scores(machine, way.scorer(model, dtype), table, whole // 2)
    for name, found in others.items():
        difference = np.abs(found - first)
        yield at_most(
            f"{dtype}, {name}: largest difference", float(difference.max()), TOLERANCE[dtype], "nats per token"
        )
        yield Figure(f"{dtype}, {name}: mean difference", float(difference.mean()), "nats per token")
        at_step_0 = {kind: _at_step_0(table, first, found, kind) for kind in ("mean", "sum")}
        for kind, (loss, _) in at_step_0.items():
            yield near_ln_2(f"{dtype}, {name}, {kind}", loss)
        yield Figure(f"{dtype}, {name}: accuracy at step 0", at_step_0["mean"][1])


def _scores(machine: Machine, scorer: Scorer, table: PairTable, budget: int) -> Indices:
    """(N, 2) mean logprobs, as stage one finds them."""
    means = np.zeros((len(table), 2), np.float32)
    for indices, _, scores in score_table(scorer, table, np.arange(len(table)), budget, machine.device):
        means[indices] = scores.logp_mean.cpu().numpy()
    return means


def _at_step_0(table: PairTable, reference: Indices, policy: Indices, kind: str) -> tuple[float, float]:
    """Loss and accuracy of a policy that should be the reference."""
    counts = torch.from_numpy(table.token_counts).float()
    both = [torch.from_numpy(each).double() * (counts if kind == "sum" else 1) for each in (policy, reference)]
    objective = Objective.parse("sigmoid", kind, 0.1 if kind == "mean" else 0.01, LossOptions())
    losses = objective(Logps(both[0], both[1], counts, kind == "mean"), 1.0)
    margins = (both[0] - both[1]) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    return float(losses.mean()), float((margins > 0).double().mean())


def determinism(machine: Machine) -> Iterator[Figure]:
    """The same passes and the same optimizer steps twice, compared bit for bit."""
    size = size_here(machine, SMALL)
    model, table = _model(machine, size), make_pairs(machine, 32, size.shape[-1])
    for way in ways(machine, half_of(machine)):
        one, two = (_passes(machine, model, table, way, half_of(machine)) for _ in range(2))
        yield exactly(f"{way.name}: values", torch.equal(one[0], two[0]), True)
        yield exactly(f"{way.name}: gradients", torch.equal(one[1], two[1]), True)
    ends = []
    for _ in range(2):
        own = copy.deepcopy(model)
        run = make_run(machine, own, table, batch_size=8, lr=1e-3, tokens_per_micro_batch=int(table.lengths.sum()) // 8)
        for _, step in zip(range(3), steps_of(run), strict=False):
            step()
        ends.append(torch.cat([each.detach().flatten() for each in own.parameters()]))
    yield exactly("weights after three steps", torch.equal(*ends), True)
    yield Figure("largest difference of them", float((ends[0] - ends[1]).abs().max()))
