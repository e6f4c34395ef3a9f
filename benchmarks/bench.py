"""Compare both stages with other trainers on the same pairs: `make bench`, or `python -m benchmarks.bench --help`.

The others are a plain live-reference trainer (baseline.py) and TRL with and without precomputed reference logprobs
(trl_baseline.py). Times are medians of rounds in which all contestants take turns in one process. Memory is measured in a process
for each. Results are written to benchmarks/results/.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.baseline import LiveReference
from benchmarks.case import (
    LIVE,
    OURS,
    SHAPES,
    TRL,
    TRL_PRECOMPUTED,
    Case,
    Contestant,
    Optimizer,
    heaviest,
    make_case,
    padding,
)
from benchmarks.exact import errors
from benchmarks.flops import Product, counted, useful_flops
from benchmarks.gates import gates
from benchmarks.measure import alternate, command_line, machine, peak_gb, ratio
from benchmarks.ours import Ours
from benchmarks.picture import draw
from benchmarks.results import RESULTS, write_results
from benchmarks.tables import screen_tables, short_name
from benchmarks.trl_baseline import Trl, as_on_a_gpu
from minicache.errors import MinicacheError, ModelError
from minicache.models.huggingface import quiet

# Takes its turn among the contestants.
PRODUCT = "a product of matrices"
CONTESTANTS: dict[str, Callable[[Case, Optimizer], Contestant]] = {
    OURS: Ours,
    LIVE: LiveReference,
    TRL: partial(Trl, precompute=False),
    TRL_PRECOMPUTED: partial(Trl, precompute=True),
}


def main() -> None:
    options, console = parse(), Console()
    quiet()
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    try:
        if options.memory_of:
            print(json.dumps(memory_of(options)))
            return
        for model in options.model:
            report = bench(options, model, console)
            save(report)
            console.print(*screen_tables(report), sep="\n", markup=False)
    except MinicacheError as error:
        sys.exit(f"bench: {error}")
    for path in (draw(), write_results()):
        if path:
            console.print(f"written: {os.path.relpath(path)}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, nargs="+", help=f"as minidpo names it, or random: {', '.join(SHAPES)}"
    )
    parser.add_argument("--tokenizer", help="a model whose tokenizer encodes the pairs; default: the first --model")
    parser.add_argument("--data", default="minicache/sample/train.jsonl")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--micro-pairs", type=int, default=4, help="pairs in a micro-batch of the padded trainers")
    parser.add_argument(
        "--budget", type=int, help="token slots in a micro-batch of ours; default: as many as --micro-pairs pairs take"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--layout", default="auto")
    parser.add_argument("--note", help="a remark to print with the figures")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokenizer = options.tokenizer or options.model[0]
    return options


def bench(options: argparse.Namespace, model: str, console: Console) -> dict[str, Any]:
    """The report on one model: machine, case, both stages, absent contestants, exactness, gates."""
    # before this process loads a model itself
    peaks = {} if options.no_memory else memory(options, model, console)
    console.print(f"[bold]{short_name(model)}[/]: reading; values and gradients against float64 …")
    case, conditions = make_case(options, model), machine()
    exact = errors(case)
    optimizer, contestants, absent = Optimizer(case.model), {}, {}
    for name, make in CONTESTANTS.items():
        try:
            contestants[name] = make(case, optimizer)
        except ImportError as error:
            absent[name] = f"{error}; pip install '.[bench]'"
    console.print(f"stage one: {options.rounds} rounds after one to warm up …")
    stages = {"stage one": stage_one(case, contestants, options.rounds)}
    console.print(f"stage two: {options.rounds} rounds …")
    stages["stage two"] = stage_two(case, contestants, options.rounds)
    facts = facts_of(case, options)
    ours = contestants[OURS]
    assert isinstance(ours, Ours)
    # the layout that `auto` chose
    facts["layout"] = ours.scorer.layout_name
    for name, found in peaks.items():
        for stage, gb in found.items():
            stages[stage][name]["peak_gb"] = gb
    report = {"machine": conditions, "case": facts, **stages, "absent": absent, "exact": vars(exact)}
    return report | {"gates": gates(report)}


def stage_one(case: Case, contestants: dict[str, Contestant], rounds: int) -> dict[str, dict[str, Any]]:
    """Contestant -> figures of stage one, which live TRL does not have. Runs before any step, so that all use the same weights."""
    runs = {name: one.reference for name, one in contestants.items() if name != TRL}
    values: dict[str, np.ndarray] = {}
    found = figures(case, {name: partial(_keep, values, name, run) for name, run in runs.items()}, rounds, False)
    for name, numbers in found.items():
        numbers["largest_difference"] = float(np.abs(values[name] - values[OURS]).max())
    return found


def _keep(values: dict[str, np.ndarray], name: str, run: Callable[[], np.ndarray]) -> None:
    values[name] = run()


def stage_two(case: Case, contestants: dict[str, Contestant], rounds: int) -> dict[str, dict[str, Any]]:
    """Contestant -> figures of stage two."""
    runs = {name: partial(one.step, case.everything) for name, one in contestants.items()}
    return figures(case, runs, rounds, True)


def figures(case: Case, runs: dict[str, Callable[[], None]], rounds: int, training: bool) -> dict[str, dict[str, Any]]:
    """Contestant -> its speed, the operations of its products over ours, and ours' share of the rate of a plain product.

    A run of each comes before the rounds: its operations are counted.
    """
    flops = {name: counted(run) for name, run in runs.items()}
    product = Product(case.device, case.dtype)
    product.run()
    seconds = alternate({**runs, PRODUCT: product.run}, rounds)
    of_product = seconds.pop(PRODUCT)
    found = speeds(case, seconds)
    for name, numbers in found.items():
        numbers["flops"] = flops[name]
        numbers["flops_over_ours"] = flops[name] / flops[OURS]
        if name in (TRL, TRL_PRECOMPUTED):
            with as_on_a_gpu():
                numbers["flops_over_ours_on_a_gpu"] = counted(runs[name]) / flops[OURS]
    useful = useful_flops(case.model, case.table, case.everything, training)
    found[OURS]["share_of_product"] = product.share(useful, seconds[OURS], of_product)
    return found


def speeds(case: Case, seconds: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Contestant -> pairs and useful tokens (both sides whole, no padding) per second, and our time as a share of its time.

    seconds: contestant -> seconds of each round.
    """
    tokens, found = int(case.table.side_lengths.sum()), {}
    for name, times in seconds.items():
        median = statistics.median(times)
        found[name] = {
            "seconds": times,
            "pairs_per_second": len(case.table) / median,
            "tokens_per_second": tokens / median,
            "our_time_over_its": ratio(seconds[OURS], times),
        }
    return found


def facts_of(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    table = case.table
    return {
        "model": case.name,
        "parameters": sum(parameter.numel() for parameter in case.model.parameters()),
        "vocabulary": case.model.get_input_embeddings().num_embeddings,
        "random_weights": case.name in SHAPES,
        "data": options.data,
        "pairs": len(table),
        "tokens_of_both_sides": int(table.side_lengths.sum()),
        "stored_tokens": int(table.lengths.sum()),
        "padding": padding(table, case.micro_pairs),
        "file_padding": case.file_padding,
        "max_length": options.max_length,
        "dtype": case.dtype,
        "micro_pairs": case.micro_pairs,
        "budget": case.budget,
        "rounds": options.rounds,
        "note": options.note,
        "command": command_line("bench"),
    }


def save(report: dict[str, Any]) -> None:
    """Write the report to results/MODEL-cpu.json or results/MODEL-gpu.json."""
    model = short_name(report["case"]["model"]).lower()
    file = RESULTS / f"{model}-{'gpu' if report['machine']['gpu'] else 'cpu'}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def memory_of(options: argparse.Namespace) -> dict[str, float]:
    """Stage -> peak GB of one contestant above the loaded weights, in this process.

    It runs on the heaviest micro-batch only: the others need less memory.
    """
    case = heaviest(make_case(options, options.model[0]))
    one = CONTESTANTS[options.memory_of](case, Optimizer(case.model))
    peaks = {"stage one": peak_gb(one.reference)} if options.memory_of != TRL else {}
    return peaks | {"stage two": peak_gb(partial(one.step, case.everything))}


def memory(options: argparse.Namespace, model: str, console: Console) -> dict[str, dict[str, float]]:
    """Contestant -> stage -> peak GB above its loaded weights; without TRL if it is not installed."""
    present = [name for name in CONTESTANTS if name not in (TRL, TRL_PRECOMPUTED) or find_spec("trl")]
    found = {}
    for name in present:
        console.print(f"memory: {name}, in a process of its own …")
        found[name] = memory_in_a_process(options, model, name)
    return found


def memory_in_a_process(options: argparse.Namespace, model: str, name: str) -> dict[str, float]:
    # the last value of an option holds
    changed = ["--model", model, "--tokenizer", options.tokenizer, "--memory-of", name]
    command = [sys.executable, "-m", "benchmarks.bench", *sys.argv[1:], *changed]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ModelError(f"memory of {name}: its process ended with {done.returncode}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
