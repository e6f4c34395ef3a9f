"""Both stages against a plain live-reference trainer, side by side: `make bench`, or `python benchmarks/bench.py --help`.

The baseline is what people run today, written out below: two models, each side of a pair a padded row, full logits.
Time: the two alternate in one process, medians and their ratio. Memory: a process each, the peak above the loaded weights.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from minicache.attention import use_spans
from minicache.cache.schema import CachedPairs, RefBlock
from minicache.config_train import LossOptions
from minicache.data.encode import Encoder
from minicache.data.formats import read_rows, to_pair
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from minicache.evaluation import pair_logps, score_table
from minicache.losses import Objective
from minicache.models import load_model
from minicache.pairs import EncodedPair, PairTable
from minicache.scoring import Scorer

BETA, LR = 0.1, 1e-6
# hidden, layers, heads, kv heads, intermediate, vocabulary
SHAPES = {
    "minimind-3": (768, 8, 8, 4, 2432, 6400),
    "qwen3-0.6b": (1024, 28, 16, 8, 3072, 151936),
    "1.7b": (2048, 28, 16, 8, 6144, 151936),
}


@dataclass
class Case:
    """One model and its pairs. dtype: of the passes, by autocast; weights are float32 on either side."""

    model: Any
    table: PairTable
    device: torch.device
    dtype: str
    micro_pairs: int
    budget: int
    layout: str


def main() -> None:
    options = parse()
    if options.memory_of:
        print(json.dumps(peak_memory(options, options.memory_of)))
        return
    case = make_case(options)
    table = case.table
    facts = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads"
        + (f", {torch.cuda.get_device_name()}" if case.device.type == "cuda" else ""),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "model": options.model,
        "pairs": len(table),
        "tokens of both sides": int(table.side_lengths.sum()),
        "stored tokens": int(table.lengths.sum()),
        "dtype": case.dtype,
        "layout": case.layout,
    }
    rows = {
        "stage one": race(case, options.repeats, baseline_reference, our_reference),
        "stage two": race(case, options.repeats, baseline_step, our_step),
    }
    if not options.no_memory:
        rows["stage two"] |= memory_ratio(options)
    rows["stage one"]["largest difference, nats a token"] = difference(case)
    report = {"facts": facts, **rows}
    print(json.dumps(report, indent=2))
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", required=True, help=f"a model as minidpo names it, or a random one: {', '.join(SHAPES)}"
    )
    parser.add_argument("--tokenizer", help="a directory; for a random model's pairs")
    parser.add_argument("--data", required=True)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--micro-pairs", type=int, default=4, help="pairs the baseline takes at once")
    parser.add_argument("--budget", type=int, default=4096, help="token slots we take at once")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layout", default="packed")
    parser.add_argument("--out")
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args()


def make_case(options: argparse.Namespace) -> Case:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES.get(options.model)
    model = random_model(*shape) if shape else load_model(options.model).model
    model = model.to(device, torch.float32).requires_grad_(True)
    tokenizer = ChatTokenizer.load(Path(options.tokenizer or options.model))
    encoder, vocabulary = Encoder(tokenizer, options.max_length), model.get_input_embeddings().num_embeddings
    pairs: list[EncodedPair] = []
    for line, row in read_rows(options.data):
        try:
            pairs.append(encoder.encode(to_pair(row, "data", line))[0])
        except RowRefused:
            continue
        if len(pairs) == options.pairs:
            break
    table = PairTable.from_pairs(pairs, "int32")
    table = PairTable(
        table.tokens % vocabulary, *(getattr(table, name) for name in ("loss_mask", "lengths", "digest", "source"))
    )
    use_spans(model)
    return Case(model, table, device, options.dtype, options.micro_pairs, options.budget, options.layout)


def random_model(hidden: int, layers: int, heads: int, kv: int, wide: int, vocabulary: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=hidden // heads if hidden < 1024 else 128, intermediate_size=wide,
            tie_word_embeddings=True, attn_implementation="sdpa",
        )
    ).eval()  # fmt: skip


# --- the baseline: MiniMind's train_dpo.py in few lines ---


def baseline_batches(case: Case) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(2n, length) ids and (2n, length - 1) mask; chosen rows first, padded to the longest of the batch, in file order."""
    batches = []
    for start in range(0, len(case.table), case.micro_pairs):
        pairs = [case.table[index] for index in range(start, min(start + case.micro_pairs, len(case.table)))]
        sides = [pair.side(side) for side in (0, 1) for pair in pairs]
        longest = max(len(ids) for ids, _ in sides)
        ids, mask = (np.stack([np.pad(side[which], (0, longest - len(side[0]))) for side in sides]) for which in (0, 1))
        batches.append((torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(mask[:, 1:].astype(np.float32))))
    return [(ids.to(case.device), mask.to(case.device)) for ids, mask in batches]


def baseline_logps(case: Case, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(2n,) mean logprobs."""
    with torch.autocast(case.device.type, getattr(torch, case.dtype), enabled=case.dtype != "float32"):
        logits = model(ids, use_cache=False).logits
    logps = logits.float().log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[:, :, 0]
    return (logps * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def baseline_reference(case: Case, state: dict) -> None:
    state["logps"] = [baseline_logps(case, case.model, ids, mask).view(2, -1).T for ids, mask in baseline_batches(case)]


def baseline_step(case: Case, state: dict) -> None:
    if "optimizer" not in state:
        state["optimizer"] = torch.optim.AdamW(case.model.parameters(), lr=LR)
    for ids, mask in baseline_batches(case):
        with torch.no_grad():  # a second model in memory; the same weights compute the same and load no file
            reference = baseline_logps(case, case.model, ids, mask).view(2, -1)
        policy = baseline_logps(case, case.model, ids, mask).view(2, -1)
        ratios = policy - reference
        (-logsigmoid(BETA * (ratios[0] - ratios[1])).sum() / len(case.table)).backward()
    finish(case, state["optimizer"])


# --- ours ---


def our_reference(case: Case, state: dict) -> None:
    scorer = Scorer(case.model, case.dtype, case.layout)
    means = np.zeros((len(case.table), 2), np.float32)
    for indices, _, scores in score_table(scorer, case.table, np.arange(len(case.table)), case.budget, case.device):
        means[indices] = scores.logp_mean.cpu().numpy()
    state["logps"] = means


def our_step(case: Case, state: dict) -> None:
    if "optimizer" not in state:
        state["optimizer"] = torch.optim.AdamW(case.model.parameters(), lr=LR, fused=True)
        state["scorer"] = Scorer(case.model, case.dtype, case.layout)
        found: dict = {}
        our_reference(case, found)
        state["cached"] = CachedPairs(case.table, RefBlock(found["logps"], case.table.token_counts, None))
        state["objective"] = Objective.parse("sigmoid", "mean", BETA, LossOptions())
    everything = np.arange(len(case.table))
    for indices, batch in state["scorer"].batches(case.table, everything, case.budget):
        moved = batch.to(case.device)
        scores = state["scorer"](moved, distribution=True)
        logps = pair_logps(scores, moved, state["cached"], indices, state["objective"])
        (state["objective"](logps, 1.0).sum() / len(case.table)).backward()
    finish(case, state["optimizer"])


def finish(case: Case, optimizer: torch.optim.Optimizer) -> None:
    torch.nn.utils.clip_grad_norm_(case.model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


# --- measuring ---


def race(case: Case, repeats: int, baseline: Callable, ours: Callable) -> dict[str, Any]:
    """Alternating, after one round to warm up; what a variant prepares once (optimizer, cache) is not timed."""
    times: dict[str, list[float]] = {"baseline": [], "ours": []}
    states: dict[str, dict] = {"baseline": {}, "ours": {}}
    for round_ in range(repeats + 1):
        for name, run in (("baseline", baseline), ("ours", ours)):
            started = time.perf_counter()
            run(case, states[name])
            if case.device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "pairs a second, baseline": len(case.table) / medians["baseline"],
        "pairs a second, ours": len(case.table) / medians["ours"],
        "time, ours / baseline": medians["ours"] / medians["baseline"],
        "speed, ours / baseline": medians["baseline"] / medians["ours"],
    }


def difference(case: Case) -> float:
    left: dict = {}
    right: dict = {}
    baseline_reference(case, left)
    our_reference(case, right)
    return float(np.abs(torch.cat(left["logps"]).cpu().numpy() - right["logps"]).max())


def peak_memory(options: argparse.Namespace, which: str) -> float:
    """GB above the loaded weights, of one training step in a process of its own; the baseline's second model is added to it."""
    case = make_case(options)
    weights = sum(parameter.numel() * 4 for parameter in case.model.parameters()) / 1e9
    if case.device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: loading had one of its own
    before = memory(case)
    (baseline_step if which == "baseline" else our_step)(case, {})
    return memory(case) - before + (weights if which == "baseline" else 0)


def memory(case: Case) -> float:
    if case.device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e9


def memory_ratio(options: argparse.Namespace) -> dict[str, float]:
    peaks = {}
    for which in ("baseline", "ours"):
        command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", which]
        peaks[which] = float(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
    return {
        "peak GB above the weights, baseline": peaks["baseline"],
        "peak GB above the weights, ours": peaks["ours"],
        "memory, ours / baseline": peaks["ours"] / peaks["baseline"],
    }


if __name__ == "__main__":
    main()
