"""What `kl` and `kl_tokens` say of the exact divergence of policy and reference. `python -m benchmarks.kl --help`

Exact: the KL divergence of the policy's next-token distribution from the reference's, summed over the vocabulary at each counted
token of the same answers, which needs both models. Results: benchmarks/results/kl.json.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.case import qwen3_config, random_model
from benchmarks.measure import command_line, machine
from benchmarks.results import publish
from benchmarks.tables import short_name
from minicache.cache.reader import ReferenceCache
from minicache.errors import MinicacheError
from minicache.models import load_model, save_tokenizer
from minicache.models.huggingface import quiet
from minicache.options.others import EvaluateConfig
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.pairs import EncodedPair
from minicache.processes.world import World
from minicache.stages.evaluate import evaluate
from minicache.stages.precompute import precompute
from minicache.stages.train import train
from minicache.trackers import Silent

COLUMNS = ["model", "learning rate", "exact KL", "kl_tokens", "kl"]
WORLD = World(0, 1, torch.device("cpu"))


def main() -> None:
    options, console = parse(), Console()
    quiet()
    try:
        with tempfile.TemporaryDirectory() as directory:
            rows = measure(options, Path(directory))
    except MinicacheError as error:
        sys.exit(f"kl: {error}")
    report = {
        "what": f"Policies after {options.steps} steps of 4 pairs on the {options.pairs} shortest pairs of {options.data}, means, "
        f"beta {options.beta:g}, constant rate; measured on the pairs they were trained on. nats per token: means over the counted "
        "tokens of a side, then over sides and pairs.",
        "machine": machine(),
        "command": command_line("kl"),
        "table": [COLUMNS, rows],
    }
    publish("kl", report, console)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="kl", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a model with a tokenizer; the second one is a random Qwen3")
    parser.add_argument("--data", default="minicache/sample/train.jsonl")
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--beta", type=float, default=5.0)
    parser.add_argument("--lr", type=float, nargs="+", default=[1e-6, 5e-6, 2e-5])
    return parser.parse_args()


def measure(options: argparse.Namespace, place: Path) -> list[list[str]]:
    """Rows of COLUMNS."""
    rows_file, small = place / "pairs.jsonl", place / "random-qwen3"
    shortest = sorted(Path(options.data).read_text(encoding="utf-8").splitlines(), key=len)[: options.pairs]
    rows_file.write_text("\n".join(shortest) + "\n", encoding="utf-8")
    random_model(qwen3_config(256, 4, 8, 4, 768, load_model(options.model).vocabulary)).save_pretrained(small)
    save_tokenizer(options.model, small, None)
    rows = []
    for model in (options.model, str(small)):
        cache = place / f"cache-{len(rows)}"
        precompute(PrecomputeConfig(model, (str(rows_file),), cache, per_token=True), WORLD, Silent())
        for lr in options.lr:
            rows.append(
                [short_name(model), format(lr, "g"), *row(options, model, cache, place / f"run-{len(rows)}", lr)]
            )
    return rows


def row(options: argparse.Namespace, model: str, cache: Path, out: Path, lr: float) -> list[str]:
    """The figures of one run."""
    chosen: dict[str, Any] = {"max_steps": options.steps, "batch_size": 4, "schedule": "constant", "warmup": 0.0}
    train(TrainConfig(cache, out, lr=lr, beta=options.beta, save_every=0, **chosen), WORLD, Silent())
    metrics = evaluate(EvaluateConfig(str(out), cache), WORLD, Silent()).metrics
    exact = exact_kl(str(out / "model"), model, cache)
    figures = (exact, metrics["kl_tokens"], metrics["kl"])
    return [format(each, ".3g") for each in figures]


@torch.no_grad()
def exact_kl(policy: str, reference: str, cache: Path) -> float:
    """The mean over sides and pairs of the mean over counted tokens of KL(policy || reference), nats."""
    models = [load_model(each).model.float().eval() for each in (policy, reference)]
    table = ReferenceCache(cache).load().table
    means = [_of_side(models, table[index], side) for index in range(len(table)) for side in (0, 1)]
    return sum(means) / len(means)


def _of_side(models: list[Any], pair: EncodedPair, side: int) -> float:
    ids, mask = (torch.from_numpy(values.astype("int64")) for values in pair.side(side))
    policy, reference = (model(ids[None]).logits[0, :-1][mask[1:].bool()].double().log_softmax(-1) for model in models)
    return (policy.exp() * (policy - reference)).sum(-1).mean().item()


if __name__ == "__main__":
    main()
