"""Compare weights in bfloat16 with float32 ones: curves of one run in four forms. `python -m benchmarks.weights --help`

What differs is what is left of an update of the learning rate's size. Plain bfloat16 rounds the weight to the nearest number, which
is nearly always the one it came from; passes in bfloat16 do the same to float32 weights, which at least remember.
Results: benchmarks/results/weights.json.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measure import command_line, machine
from benchmarks.results import publish
from benchmarks.tables import short_name
from minicache.errors import MinicacheError
from minicache.models import load_model, save_tokenizer
from minicache.models.huggingface import quiet
from minicache.options import catalog
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.processes.world import World
from minicache.stages.precompute import precompute
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training import optim, step

PLAIN = "bfloat16, rounded to the nearest"
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm.default, ATEN.mm.out, ATEN.bmm.default, ATEN.addmm.default}
# Form -> precision of the weights and of the passes.
FORMS = {
    "float32, passes too": ("float32", "float32"),
    "float32": ("float32", "bfloat16"),
    "--weights bfloat16": ("bfloat16", "bfloat16"),
    PLAIN: ("bfloat16", "bfloat16"),
}
# SmolLM2's own begins with thirty tokens that no pair needs.
PLAIN_CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
COLUMNS = [
    "weights",
    "bytes a weight",
    "weights that moved",
    "margin, second half",
    "loss, last quarter",
    "margins differ",
]


def main() -> None:
    options, console = parse(), Console()
    quiet()
    try:
        with tempfile.TemporaryDirectory() as directory:
            curves, rows = measure(options, Path(directory), console)
    except MinicacheError as error:
        sys.exit(f"weights: {error}")
    report = {
        "what": f"{short_name(options.model)} stored in bfloat16, the {options.pairs} shortest pairs of {options.data}, "
        f"{options.steps} steps of {options.batch} pairs at a learning rate of {options.lr:g}, sums of logprobs, beta 0.1, passes "
        "in bfloat16 but in the first row, products summed in float32. Bytes: weights, gradients and the optimizer's state. Moved: "
        "the share of the weights of matrices that the run left at another bfloat16 number. Margins are mean rewards over the "
        "pairs of a step; the last column is their mean distance from those of the first row.",
        "note": options.note,
        "machine": machine(),
        "command": command_line("weights"),
        "table": [COLUMNS, rows],
        "curves": curves,
    }
    publish("weights", report, console)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weights", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="minicache/sample/train.jsonl")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--note", help="a remark to print with the figures")
    return parser.parse_args()


def measure(options: argparse.Namespace, place: Path, console: Console) -> tuple[dict[str, Any], list[list[str]]]:
    """The metrics of all steps by form, and rows of COLUMNS."""
    world, model, cache = World(0, 1, torch.device("cpu")), place / "model", place / "cache"
    load_model(options.model).model.to(torch.bfloat16).save_pretrained(model)
    save_tokenizer(options.model, model, PLAIN_CHAT)
    rows_file = place / "pairs.jsonl"
    shortest = sorted(Path(options.data).read_text(encoding="utf-8").splitlines(), key=len)[: options.pairs]
    rows_file.write_text("\n".join(shortest) + "\n", encoding="utf-8")
    with Products():
        precompute(PrecomputeConfig(str(model), (str(rows_file),), cache, dtype="bfloat16"), world, Silent())
    begun = _numbers(model)
    # compiled by a CPU's compiler, the update of 135 million weights takes seconds instead of a minute
    optim.fuses = lambda device: True
    passes = step._accumulate
    step._accumulate = lambda *arguments: in_float32(passes, *arguments)
    curves: dict[str, Any] = {}
    rows: list[list[str]] = []
    for form, (weights, dtype) in FORMS.items():
        started = time.process_time()
        with_plain = catalog.OptimizerEntry(code="benchmarks.weights:nearest", state_bytes=4)
        before = catalog.ROUNDING["adamw"]
        catalog.ROUNDING["adamw"] = with_plain if form == PLAIN else before
        size = 8.0 if weights == "float32" else 4.0
        size += catalog.WEIGHTS[weights]["adamw"].state_bytes
        out = place / "run"
        config = TrainConfig(
            cache,
            out,
            max_steps=options.steps,
            batch_size=options.batch,
            lr=options.lr,
            logps="sum",
            schedule="constant",
            warmup=0.0,
            weights=weights,
            dtype=dtype,
            log_every=1,
            save_every=0,
        )
        train(config, world, Silent())
        catalog.ROUNDING["adamw"] = before
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        curves[form] = {name: [line[name] for line in lines] for name in ("loss", "rewards/margin", "grad_norm")}
        rows.append(_row(form, size, curves, begun, _numbers(out / "model")))
        out.rename(place / f"run-{len(rows)}")
        console.print(f"{form}: {time.process_time() - started:.0f} s of CPU time")
    return curves, rows


class Products(TorchDispatchMode):
    """Products of half precision as a GPU computes them: summed in float32, rounded once. Twenty times as fast on many CPUs."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        made = func.overloadpacket(*(each.float() if isinstance(each, torch.Tensor) else each for each in args))
        return kwargs["out"].copy_(made) if "out" in kwargs else made.bfloat16()


def in_float32(passes: Callable[..., None], *arguments: Any) -> None:
    """Run forward and backward with `Products`."""
    with Products():
        passes(*arguments)


def nearest(groups: Any, lr: float) -> torch.optim.Optimizer:
    """AdamW as it is, on weights in bfloat16: what is added to them is rounded to the nearest number."""
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def _numbers(model: Path) -> dict[str, torch.Tensor]:
    """The matrices of a saved model, in bfloat16."""
    (file,) = model.glob("*.safetensors")
    return {name: each.bfloat16() for name, each in load_file(file).items() if each.ndim == 2}


def _row(
    form: str, size: float, curves: dict[str, Any], begun: dict[str, torch.Tensor], ended: dict[str, torch.Tensor]
) -> list[str]:
    moved = sum(int((ended[name] != each).sum()) for name, each in begun.items())
    share = moved / sum(each.numel() for each in begun.values())
    margins, losses = np.array(curves[form]["rewards/margin"]), np.array(curves[form]["loss"])
    distance = np.abs(margins - np.array(curves["float32, passes too"]["rewards/margin"])).mean()
    steps = len(margins)
    found = (margins[steps // 2 :].mean(), losses[-(steps // 4) :].mean(), distance)
    return [form, f"{size:.1f}", f"{share:.2%}", *(f"{number:.4f}" for number in found)]


if __name__ == "__main__":
    main()
