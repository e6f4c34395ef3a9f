"""One family through both stages, as a user runs them, and beside the plain loop. Returns plain data: see `check`."""

import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minicache.cache.reader import ReferenceCache
from minicache.cache.schema import CachedPairs
from minicache.errors import MinicacheError
from minicache.models import load_model
from minicache.options.stage_one import PrecomputeConfig
from minicache.options.train import LoraOptions, TrainConfig
from minicache.stages.precompute import precompute
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import one_process
from tests.zoo import plain
from tests.zoo.families import Family, nature
from tests.zoo.half import compare_half
from tests.zoo.pairs import MAX_LENGTH
from tests.zoo.shards import score_in_shards
from tests.zoo.weights import save_tiny

Found = dict[str, Any]
IDS = torch.arange(3, 43)[None]


class Notes(Silent):
    """Keeps what a stage notes."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


@contextmanager
def layouts_tried(into: dict[str, str]) -> Iterator[None]:
    """Keep why each layout was not used, or "used", by its name."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.msg.startswith("layout ") and isinstance(record.args, tuple):
                into[str(record.args[0])] = str(record.args[-1])

    logger, handler = logging.getLogger("minicache.scoring.layout"), Keep()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def check(family: Family, tokenizer: Path, data: Path, place: Path) -> Found:
    """What happens to a model of this family.

    name, kind, class, parameters; for each of `build`, `cache`, `train`, `lora`, `half`, `shards`: numbers, or "failed" with the
    line that a user sees ("raw": it is no error of ours); seconds of each.
    """
    found: Found = {"name": family.name, "kind": family.kind, "nature": nature(family)}

    def step(name: str, do: Callable[[], Found]) -> bool:
        started = time.perf_counter()
        try:
            part = do()
        except Exception as error:
            line = " ".join(str(error).split())
            raw = not isinstance(error, MinicacheError)
            part = {"failed": f"{type(error).__name__}: {line}" if raw else line.replace(str(place), ""), "raw": raw}
            if raw:
                logging.getLogger(__name__).exception("%s: %s", family.name, name)
        found[name] = {**part, "seconds": round(time.perf_counter() - started, 2)}
        return "failed" not in part

    model, cache, run = place / "model", place / "cache", place / "run"
    if not step("build", lambda: _build(family, tokenizer, model)):
        return found
    if not step("cache", lambda: _cache(model, data, cache)):
        return found
    cached = ReferenceCache(cache).load()
    expected: list[plain.Computed] = []
    if step("plain", lambda: _plain(model, cached, expected)):
        found["cache"] |= _values(cached, expected[0])
    step("train", lambda: _train(cache, run, cached, expected))
    step("lora", lambda: _lora(model, cache, place / "lora"))
    step("half", lambda: compare_half(load_model(str(model)).model, cached.table))
    step("shards", lambda: score_in_shards(load_model(str(model)).model, cached))
    return found


def _build(family: Family, tokenizer: Path, directory: Path) -> Found:
    model = save_tiny(family, tokenizer, directory)
    return {"class": type(model).__name__, "parameters": sum(each.numel() for each in model.parameters())}


def _cache(model: Path, data: Path, cache: Path) -> Found:
    """Stage one, and the layout that it chose."""
    notes, tried = Notes(), dict[str, str]()
    config = PrecomputeConfig(
        str(model), (str(data),), cache, max_length=MAX_LENGTH, block_pairs=8, loss_on="assistant"
    )
    with layouts_tried(tried):
        report = precompute(config, one_process(), notes)
    used = next(name for name, problem in tried.items() if problem == "used")
    attention = ReferenceCache(cache).identity.attention
    return {"pairs": report.pairs, "layout": used, "tried": tried, "notes": notes.lines, "attention": attention}


def _plain(model: Path, cached: CachedPairs, into: list[plain.Computed]) -> Found:
    into.append(plain.compute(str(model), cached.table))
    return {"double": into[0].double, "moved": into[0].moved}


def _values(cached: CachedPairs, expected: plain.Computed) -> Found:
    off = np.abs(cached.reference.logp_mean - expected.logp_mean).max()
    return {"off": float(off), "spread": float(np.std(expected.logp_mean))}


def _settings(**more: Any) -> dict[str, Any]:
    fixed = {"schedule": "constant", "warmup": 0.0, "log_every": 1, "save_every": 0, "logps": "sum"}
    steps = {
        "batch_size": plain.BATCH,
        "max_steps": plain.STEPS,
        "lr": plain.LR,
        "beta": plain.BETA,
        "seed": plain.SEED,
    }
    return {**fixed, **steps, "tokens_per_micro_batch": 400, **more}


def _curve(run: Path, name: str) -> np.ndarray:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)[name] for line in lines])


def _train(cache: Path, run: Path, cached: CachedPairs, expected: list[plain.Computed]) -> Found:
    """Stage two, its curve and its policy beside those of the plain loop."""
    notes = Notes()
    report = train(TrainConfig(cache, run, **_settings()), one_process(), notes)
    layout = json.loads((run / "run.json").read_text())["layout_used"]
    found: Found = {
        "layout": layout,
        "noise": report.noise,
        "notes": notes.lines,
        "losses": _curve(run, "loss").tolist(),
    }
    if expected:
        (loop,) = expected
        norms = np.abs(_curve(run, "grad_norm") / np.array(loop.norms) - 1)
        found |= {
            "losses_off": float(np.abs(_curve(run, "loss") - loop.losses).max()),
            "gradient_off": float(norms[0]),
            "norms_off": float(norms.max()),
            **_reopened(report.model_dir, cached, loop),
        }
    return found


def _reopened(directory: Path, cached: CachedPairs, loop: plain.Computed) -> Found:
    """The saved policy, opened by transformers alone, beside the policy of the plain loop."""
    from transformers import AutoModelForCausalLM

    opened: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    _, loading = opened
    missing = sorted({*loading["missing_keys"], *loading["unexpected_keys"]})
    policy = plain.means_of(plain.open_plain(str(directory), loop.double), cached.table, plain.PROBED)
    return {"policy_off": float(np.abs(policy - loop.policy).max()), "keys_off": [str(key) for key in missing[:4]]}


def _lora(model: Path, cache: Path, run: Path) -> Found:
    """Two steps of adapters; the saved one is opened by peft alone, and merged by this project."""
    from peft import PeftModel

    options = LoraOptions(lora_rank=4)
    report = train(TrainConfig(cache, run, **_settings(max_steps=2, lora=options, lr=1e-2)), one_process(), Notes())
    with torch.no_grad():
        base = plain.open_plain(str(model), double=False)
        before = base(input_ids=IDS, use_cache=False).logits
        alone = PeftModel.from_pretrained(base, report.model_dir)(input_ids=IDS, use_cache=False).logits
        merged = load_model(str(report.model_dir)).model(input_ids=IDS, use_cache=False).logits
    return {
        "losses": _curve(run, "loss").tolist(),
        "merged_off": float((alone - merged).abs().max()),
        "moved": float((alone - before).abs().max()),
    }
