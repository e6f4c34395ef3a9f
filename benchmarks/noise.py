"""Measure the noise between the stages: the same weights and pairs in other batches. `python -m benchmarks.noise --help`

The first forward pass of stage two has other batches than stage one, and maybe another layout. In exact arithmetic the values
agree and the loss is ln 2. Results are written to benchmarks/results/noise.json.
"""

import argparse
import math
import sys

import numpy as np
import torch
from rich.console import Console

from benchmarks.case import Case, make_case
from benchmarks.measure import command_line, machine
from benchmarks.results import publish
from benchmarks.tables import short_name
from minicache.errors import MinicacheError
from minicache.models.huggingface import quiet
from minicache.processes.world import World
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table
from minicache.trackers import Silent
from minicache.training.losses import Logps

COLUMNS = ["stage one", "stage two", "mean |difference|", "largest", "loss at step 0 - ln 2", "accuracy at step 0"]
# A budget that no two pairs fit, so that each is a batch of its own.
PAIRS_ALONE = 1
STAGE_ONE = ("auto", 16384)
STAGE_TWO = (("auto", 4096), ("auto", PAIRS_ALONE), ("shared", 4096), ("padded", 4096))


def main() -> None:
    options, console = parse(), Console()
    quiet()
    try:
        case = make_case(options, options.model)
        rows = measure(case, console)
    except MinicacheError as error:
        sys.exit(f"noise: {error}")
    report = {
        "what": f"{short_name(options.model)}, {len(case.table)} pairs of {options.data}, at most {options.max_length} tokens a "
        "side; beta 0.1, mean logprobs. Differences of a side's mean logprob, nats per token, between stage one and the first "
        "forward pass of stage two, by layout and token slots per batch. Without noise the accuracy is 0: nothing is "
        "preferred.",
        "note": options.note,
        "machine": machine(),
        "command": command_line("noise"),
        "table": [COLUMNS, rows],
    }
    publish("noise", report, console)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="noise", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="minicache/sample/train.jsonl")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"), help="measured beside float32")
    parser.add_argument("--note", help="a remark to print with the figures")
    options = parser.parse_args()
    vars(options).update(tokenizer=options.model, layout="auto", micro_pairs=1, budget=None)
    return options


def measure(case: Case, console: Console) -> list[list[str]]:
    """Rows of COLUMNS for both precisions, and for a float32 reference with a policy in half precision."""
    rows, first = [], {}
    for dtype in ("float32", case.dtype):
        first[dtype] = score(case, dtype, *STAGE_ONE)
        for layout, budget in STAGE_TWO:
            console.print(f"{dtype}, {layout}, {budget} …")
            second = score(case, dtype, layout, budget)
            rows.append(compare(case, (dtype, *STAGE_ONE), first[dtype], (dtype, layout, budget), second))
    mixed = ("float32", *STAGE_ONE), (case.dtype, *STAGE_ONE)
    return [*rows, compare(case, mixed[0], first["float32"], mixed[1], first[case.dtype])]


def score(case: Case, dtype: str, layout: str, budget: int) -> np.ndarray:
    """(N, 2) mean logprobs, nats per token."""
    scorer, means = Scorer(case.model, dtype), np.zeros((len(case.table), 2), np.float32)
    settle_layout(scorer, case.table, layout, World(0, 1, case.device), Silent())
    for indices, _, scores in score_table(scorer, case.table, case.everything, budget, case.device):
        means[indices] = scores.logp_mean.cpu().numpy()
    return means


def compare(case: Case, one: tuple, reference: np.ndarray, two: tuple, policy: np.ndarray) -> list[str]:
    """A row of COLUMNS. one, two: (dtype, layout, budget) of the stages. reference, policy: (N, 2) mean logprobs."""
    difference = policy - reference
    counts = torch.from_numpy(case.table.token_counts).float()
    losses = case.objective(Logps(torch.from_numpy(policy), torch.from_numpy(reference), counts, True), 1.0)
    margins = difference[:, 0] - difference[:, 1]
    found = (np.abs(difference).mean(), np.abs(difference).max(), float(losses.mean()) - math.log(2))
    return [_name(*one), _name(*two), *(f"{number:.1e}" for number in found), f"{(margins > 0).mean():.2f}"]


def _name(dtype: str, layout: str, budget: int) -> str:
    return f"{dtype}, {layout}, {'pairs alone' if budget == PAIRS_ALONE else f'{budget:,}'}"


if __name__ == "__main__":
    main()
