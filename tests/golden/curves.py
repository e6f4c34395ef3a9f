"""Loss curves of tiny runs, recorded by 0.1.0 in curves.json."""

import json
from contextlib import chdir
from pathlib import Path

from tests.golden.command import minidpo
from tests.golden.handmade import write_model

NAMES = ("loss", "rewards/margin", "rewards/accuracy", "grad_norm")
COMMON = "--dtype float32 --batch-size 4 --max-steps 10 --log-every 1 --save-every 0"
# name -> kind of model, options of `train`. The mixture's balance loss is over the tokens of a micro-batch, a shared prefix once
# where it lies once in memory: so it gets whole batches and a layout.
CURVES = {
    "dense-mean": ("dense", "--logps mean --beta 2 --lr 1e-3 --tokens-per-micro-batch 400"),
    "dense-sum": (
        "dense",
        "--logps sum --beta 0.1 --lr 2e-4 --schedule linear --warmup 2 --weight-decay 0.1 --tokens-per-micro-batch 400",
    ),
    "mixture": ("mixture", "--logps mean --beta 2 --lr 1e-3 --layout packed --tokens-per-micro-batch 4000"),
    "lora": (
        "dense",
        "--logps mean --beta 2 --lr 3e-3 --lora-rank 2 --lora-targets q_proj,v_proj,down_proj "
        "--tokens-per-micro-batch 400",
    ),
    "ipo-sum": ("dense", "--loss ipo --logps sum --beta 0.2 --lr 2e-4 --sft-weight 0.1 --tokens-per-micro-batch 400"),
}


def make_caches(directory: Path, golden: Path) -> None:
    """A model and a reference cache of each kind, with the tokenizer and the pairs of a golden set."""
    names = ("tokenizer.json", "tokenizer_config.json")
    tokenizer = {name: (golden / "model" / name).read_bytes() for name in names}
    for kind in sorted({kind for kind, _ in CURVES.values()}):
        model = write_model(directory / kind, kind, seed=1, tokenizer=tokenizer)
        asked = ("--max-length", 128, "--dtype", "float32")
        with chdir(golden):
            minidpo("precompute-ref", "--model", model, "--data", "pairs.jsonl", "--ref-cache", cache_of(model), *asked)


def cache_of(model: Path) -> Path:
    """Where `make_caches` puts the cache of a model."""
    return model.with_name(f"{model.name}-cache")


def record(name: str, directory: Path) -> dict[str, list[float]]:
    """Train, and return the metrics by name, a number a step."""
    kind, options = CURVES[name]
    out = directory / f"{name}-run"
    minidpo("train", "--ref-cache", cache_of(directory / kind), "--out", out, *COMMON.split(), *options.split())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = (*NAMES, "aux_loss") if kind == "mixture" else NAMES
    return {each: [line[each] for line in lines] for each in names}
