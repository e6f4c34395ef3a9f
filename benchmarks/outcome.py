"""What is learned: held-out accuracy, margin and loss by trainer, recipe and beta. `python -m benchmarks.outcome --help`

Every run trains the same weights on the same token ids. TRL's live reference takes the same pairs in the same order, as many steps,
the same rates. Results: benchmarks/results/outcome.json and outcome.png. A run that is in the file already is not made again.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.case import micro_batches
from benchmarks.measure import command_line, machine, peak_gb
from benchmarks.picture import draw_outcome
from benchmarks.results import RESULTS, publish
from benchmarks.tables import short_name
from minicache.cache.reader import ReferenceCache
from minicache.errors import MinicacheError
from minicache.models import load_model, save_model
from minicache.models.huggingface import quiet
from minicache.options.dictionaries import fill
from minicache.options.others import EvaluateConfig
from minicache.options.recipes import RECIPES
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import TrainConfig
from minicache.processes.world import World
from minicache.stages.evaluate import evaluate
from minicache.stages.precompute import precompute
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training.order import Mixture, global_batches
from minicache.training.schedules import learning_rate

DATA = ("sample", "English pairs")
WORLD = World(0, 1, torch.device("cpu"))
FILE = RESULTS / "outcome.json"
# Pairs of a step, and of TRL's micro-batch, which divides it.
BATCH, MICRO = 8, 4
# What all runs share, unless a run says otherwise; of recipes the loss, not the batch of a cluster.
SHARED: dict[str, Any] = {
    "batch_size": BATCH,
    "schedule": "cosine",
    "warmup": 0.1,
    "weight_decay": 0.0,
    "save_every": 0,
}
# Recipes that come to none of the other runs: zephyr's loss is that of sums at beta 0.01, smollm2's at 0.5.
OWN_RECIPES = ("tulu-3", "trl", "minimind-3", "simpo")
OF_RECIPE = ("loss", "logps", "beta", "simpo_gamma", "schedule", "warmup")
COLUMNS = [
    *("data", "run", "seeds", "reward accuracy", "chosen likelier, gained / lost", "reward margin", "loss"),
    *("kl of means", "CPU seconds", "GB"),
]


@dataclass(frozen=True)
class Asked:
    """A run to make. options: of train. trainer: "minidpo" or "TRL", with a live reference."""

    data: str
    name: str
    seed: int
    options: dict[str, Any]
    trainer: str = "minidpo"

    @property
    def key(self) -> str:
        return f"{self.data}, {self.name}, seed {self.seed}"


def main() -> None:
    options, console = parse(), Console()
    quiet()
    before = results_before(options)
    known, stage_one = before.get("runs", {}), before.get("stage_one_seconds", {})
    try:
        with tempfile.TemporaryDirectory() as directory:
            for name, (training, held_out) in zip(DATA, (SAMPLE, english(options, Path(directory))), strict=True):
                missing = [each for each in wanted(options, name) if options.only in each.key and each.key not in known]
                caches = Caches(options.model, Path(directory) / name.replace(" ", "-"), training, held_out)
                for asked in missing:
                    console.print(asked.key)
                    known[asked.key] = made(asked, caches)
                    stage_one.update({name: caches.seconds["train"]} if "train" in caches.seconds else {})
                    report(options, known, stage_one, console, quietly=True)
    except MinicacheError as error:
        sys.exit(f"outcome: {error}")
    draw_outcome(known)
    report(options, known, stage_one, console)


def results_before(options: argparse.Namespace) -> dict[str, Any]:
    """The results in the file, if they were made with these options: runs by key, CPU seconds of stage one by data set."""
    found = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    return found if found.get("settings") == settings_of(options) else {}


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options on which figures depend."""
    return {name: getattr(options, name) for name in ("pairs", "epochs", "lr")} | {"model": short_name(options.model)}


SAMPLE = ("minicache/sample/train.jsonl", "minicache/sample/heldout.jsonl")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="outcome", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="../shared/data/dpo_en_chat.jsonl", help="the English pairs")
    parser.add_argument("--pairs", type=int, default=96, help="of them, the shortest; a quarter is held out")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--only", default="", help="runs whose name has this in it")
    return parser.parse_args()


def english(options: argparse.Namespace, place: Path) -> tuple[str, str]:
    """Files of the shortest pairs: every fourth is held out."""
    rows = sorted(Path(options.data).read_text(encoding="utf-8").splitlines(), key=len)[: options.pairs]
    parts = {"train": [row for at, row in enumerate(rows) if at % 4], "heldout": rows[::4]}
    for name, chosen in parts.items():
        (place / f"{name}.jsonl").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return str(place / "train.jsonl"), str(place / "heldout.jsonl")


class Caches:
    """The reference caches of a data set's two parts, each made when it is first asked for. seconds: of the CPU, for training's."""

    def __init__(self, model: str, place: Path, training: str, held_out: str) -> None:
        self.model, self.place, self.files = model, place, {"train": training, "heldout": held_out}
        self.seconds: dict[str, float] = {}

    @cached_property
    def training(self) -> Path:
        return self._made("train")

    @cached_property
    def held_out(self) -> Path:
        return self._made("heldout")

    def _made(self, part: str) -> Path:
        options = PrecomputeConfig(self.model, (self.files[part],), self.place / part, max_length=512)
        started = time.process_time()
        precompute(options, WORLD, Silent())
        self.seconds[part] = time.process_time() - started
        return self.place / part


def wanted(options: argparse.Namespace, data: str) -> Iterator[Asked]:
    """All runs on a data set: each trainer and kind of logprobs by seed; of the sample, whose runs take a third of the time, also
    by beta and by recipe, with one seed."""
    shared = {**SHARED, "lr": options.lr, "epochs": options.epochs}
    for logps, beta in (("mean", 5.0), ("sum", 0.1)):
        chosen = {**shared, "logps": logps, "beta": beta}
        for seed in range(options.seeds):
            yield Asked(data, f"{logps}, beta {beta:g}", seed, chosen)
            if logps == "sum":
                yield Asked(data, f"{logps}, beta {beta:g}, TRL", seed, chosen, "TRL")
    if data != DATA[0]:
        return
    for logps, betas in (("mean", (0.1, 1.0, 20.0)), ("sum", (0.01, 0.03, 0.5))):
        for beta in betas:
            yield Asked(data, f"{logps}, beta {beta:g}", 0, {**shared, "logps": logps, "beta": beta})
    for name in OWN_RECIPES:
        recipe = {key: value for key, value in RECIPES[name].options.items() if key in OF_RECIPE}
        yield Asked(data, f"recipe {name}", 0, {**shared, **recipe})


def made(asked: Asked, caches: Caches) -> dict[str, Any]:
    """The figures of one run: of `evaluate` on the held-out pairs, its CPU seconds and its peak memory in GB."""
    with tempfile.TemporaryDirectory() as directory:
        out, trainer = Path(directory) / "run", {"minidpo": by_minidpo, "TRL": by_trl}[asked.trainer]
        run = trainer(asked, caches, out)
        started = time.process_time()
        memory = peak_gb(run)
        seconds = time.process_time() - started
        policy = out if asked.trainer == "minidpo" else out / "model"
        loss = {name: asked.options[name] for name in ("logps", "beta") if name in asked.options}
        config = EvaluateConfig(str(policy), caches.held_out, loss=asked.options.get("loss"), **loss)
        found = evaluate(config, WORLD, Silent())
    return {
        "data": asked.data,
        "name": asked.name,
        "metrics": found.metrics,
        "held_out": asdict(found.held_out),
        "words": found.words,
        "seconds": seconds,
        "memory_gb": memory,
    }


def by_minidpo(asked: Asked, caches: Caches, out: Path) -> Callable[[], object]:
    given = {**asked.options, "ref_cache": caches.training, "out": out, "seed": 42 + asked.seed}
    return lambda: train(fill(TrainConfig, given), WORLD, Silent())


def by_trl(asked: Asked, caches: Caches, out: Path) -> Callable[[], object]:
    """TRL's trainer with its reference beside it, on the same pairs in the same order, at the same rates."""
    from benchmarks.trl_baseline import rows_of, trainer_of

    cache, chosen = ReferenceCache(caches.training), asked.options
    table, lr = cache.load().table, chosen["lr"]
    rows, steps = rows_of(table), round(chosen["epochs"] * -(-len(table) // BATCH))

    def run() -> None:
        policy, reference = (load_model(caches.model).model.float() for _ in range(2))
        policy.requires_grad_(True)
        settings = {"beta": chosen["beta"], "learning_rate": lr, "use_cpu": True}
        settings["bf16"] = False  # TRL's default is True
        trainer = trainer_of(policy, reference, rows, cache.tokenizer_dir, **settings)
        policy = trainer.accelerator.prepare_model(trainer.model)
        optimizer = torch.optim.AdamW(policy.parameters(), lr=lr, weight_decay=0.0)
        order = global_batches(Mixture.of([np.arange(len(table))]), BATCH, seed=42 + asked.seed)
        for step in range(steps):
            rate = learning_rate(step, steps, lr, chosen["schedule"], chosen["warmup"], 0.0)
            for group in optimizer.param_groups:
                group["lr"] = rate
            parts = list(micro_batches(next(order), MICRO))
            trainer.current_gradient_accumulation_steps = len(parts)
            for part in parts:
                inputs = trainer.data_collator([rows[int(index)] for index in part])
                trainer.training_step(policy, trainer._prepare_inputs(inputs))
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        save_model(trainer.accelerator.unwrap_model(policy), cache.tokenizer_dir, out / "model")

    return run


def report(
    options: argparse.Namespace,
    known: dict[str, Any],
    stage_one: dict[str, float],
    console: Console,
    quietly: bool = False,
) -> None:
    """Write the table and all figures."""
    every = [asked.key for data in DATA for asked in wanted(options, data)]
    left = sum(key not in known for key in every)
    whole = {
        "note": f"{left} of {len(every)} runs are not made yet: those that the table lacks." if left else "",
        "what": f"{short_name(options.model)}, float32 on a CPU, {options.epochs:g} epochs in steps of {BATCH} pairs at "
        f"{options.lr:g}, cosine with warm-up; with recipes their loss, logps, beta and schedule. Held-out pairs that no run was "
        f"chosen by; of the English pairs the {options.pairs} shortest, a quarter of them held out. Figures of several seeds are "
        "means, with the smallest and the largest; of one seed with their 95% intervals. CPU seconds and peak memory are of "
        "training alone, above the loaded data; the micro-batch follows from the memory that was free."
        + of_stage_one(stage_one),
        "machine": machine(),
        "command": command_line("outcome"),
        "settings": settings_of(options),
        "stage_one_seconds": stage_one,
        "table": [COLUMNS, list(rows(known))],
        "runs": known,
    }
    publish("outcome", whole, Console(quiet=True) if quietly else console)


def rows(known: dict[str, Any]) -> Iterator[list[str]]:
    """Rows of COLUMNS: a line for all seeds of a run."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in known.values():
        if run:
            groups.setdefault((run["data"], run["name"]), []).append(run)
    for (data, name), runs in groups.items():
        held = [run["held_out"] for run in runs]
        accuracy = [each["right"] / each["pairs"] for each in held]
        margin = [each["margin"] for each in held]
        if len(runs) == 1:
            ends = (held[0]["accuracy_low"], held[0]["accuracy_high"]), (held[0]["margin_low"], held[0]["margin_high"])
        else:
            ends = (min(accuracy), max(accuracy)), (min(margin), max(margin))
        yield [
            data,
            name,
            str(len(runs)),
            f"{statistics.mean(accuracy):.1%} ({ends[0][0]:.0%} to {ends[0][1]:.0%})",
            ", ".join(f"{each['gained']} / {each['lost']}" for each in held),
            f"{statistics.mean(margin):+.3f} ({ends[1][0]:+.3f} to {ends[1][1]:+.3f})",
            with_ends([run["metrics"]["loss"] for run in runs]),
            f"{statistics.mean(run['metrics']['kl'] for run in runs):.2g}",
            f"{statistics.median(run['seconds'] for run in runs):.0f}",
            f"{statistics.median(run['memory_gb'] for run in runs):.2f}",
        ]


def of_stage_one(seconds: dict[str, float]) -> str:
    return "".join(
        f" Stage one over {name}, once for all runs: {each:.0f} CPU seconds." for name, each in seconds.items()
    )


def with_ends(losses: list[float]) -> str:
    """Their mean, of several with the smallest and the largest."""
    ends = f" ({min(losses):.4f} to {max(losses):.4f})" if len(losses) > 1 else ""
    return f"{statistics.mean(losses):.4f}{ends}"


if __name__ == "__main__":
    main()
