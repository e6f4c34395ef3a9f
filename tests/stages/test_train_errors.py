"""`minidpo train` as a tired person types it: recipes, options that win, and one line for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minicache.cache.reader import ReferenceCache
from minicache.options.dictionaries import flat
from minicache.options.recipes import RECIPES
from minicache.options.train import TrainConfig
from minicache.training import checkpoints
from tests.conftest import Cli

STAGE_ONE = {"loss_on", "max_length", "think"}


def facts(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    return found


# --- recipes ---


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fills_both_stages(model_dir: Path, data_file: Path, tmp_path: Path, cli: Cli, name: str) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    asked = ("--model", model_dir, "--data", data_file, "--ref-cache", cache, "--recipe", name)
    code, _, stderr = cli("precompute-ref", *asked)
    assert code == 0, stderr
    identity = ReferenceCache(cache).identity
    own = RECIPES[name].options
    assert (identity.loss_on, identity.max_length) == (own["loss_on"], own["max_length"])
    code, _, stderr = cli("train", "--ref-cache", cache, "--out", run, "--recipe", name, "--max-steps", 1)
    assert code == 0, stderr
    expected = {key: value for key, value in RECIPES[name].options.items() if key not in STAGE_ONE}
    assert expected.items() <= facts(run).items() and {"lr", "beta", "logps", "batch_size"} <= expected.keys()


def test_every_option_wins_over_the_recipe_even_at_its_own_default(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    of_recipe = RECIPES["minimind-3"].options
    own = {name: value for name, value in flat(TrainConfig(Path(), Path()).settled()).items() if name in of_recipe}
    # without values: a flag, and what the model itself says
    own = {name: value for name, value in own.items() if name not in ("decay_norms", "balance")}
    assert len(own) > 6 and own["lr"] != of_recipe["lr"]
    words = [str(word) for name, value in own.items() for word in (f"--{name.replace('_', '-')}", value)]
    run = tmp_path / "run"
    arguments = ("--ref-cache", ref_cache, "--out", run, "--max-steps", 1)
    code, _, stderr = cli("train", *arguments, "--recipe", "minimind-3", *words)
    assert code == 0, stderr
    assert own.items() <= facts(run).items()


def test_what_another_loss_leaves_unused_of_a_recipe_is_listed(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("train", "--ref-cache", ref_cache, "--out", tmp_path / "run", "--max-steps", 1, "--recipe", "simpo")
    code, _, stderr = cli(*arguments, "--loss", "sigmoid")
    assert code == 0 and "--simpo-gamma of the recipe is not used: --loss sigmoid does not read it" in stderr
    code, _, stderr = cli(*arguments[:3], "--out", tmp_path / "own", *arguments[5:])
    assert code == 0 and "not used" not in stderr


def test_what_no_run_of_a_sweep_uses_of_a_recipe_is_listed(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("sweep", "--ref-cache", ref_cache, "--max-steps", 1, "--recipe", "simpo", "--holdout", 0.2, "--out")
    code, _, stderr = cli(*arguments, tmp_path / "none", "--loss", "sigmoid,ipo")
    assert code == 0 and stderr.count("of the recipe is not used") == 1
    assert "--simpo-gamma of the recipe is not used: --loss sigmoid does not read it" in stderr
    code, _, stderr = cli(*arguments, tmp_path / "one", "--loss", "sigmoid,simpo")
    assert code == 0 and "not used" not in stderr


def test_a_recipe_and_resume(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    run = tmp_path / "run"
    arguments = ("train", "--ref-cache", ref_cache, "--out", run, "--max-steps", 1, "--recipe", "minimind-3")
    assert cli(*arguments)[0] == 0
    code, _, stderr = cli(*arguments, "--resume")
    assert code == 0 and "nothing to resume" in stderr
    code, _, stderr = cli("train", "--out", run, "--resume", "--recipe", "minimind-2504")
    assert code == 1 and "this run was started with" in stderr


# --- mistakes ---

MISTAKES = {
    "no cache": (
        ["--ref-cache", "gone"],
        "gone: no such directory; `minidpo precompute-ref --ref-cache gone …` makes a",
    ),
    "a run for a cache": (["--ref-cache", "run"], "run: no reference cache (it has no zarr.json); name the directory"),
    "nothing to resume": (["--resume"], "new: no run to resume (it has no run.json); check --out, or begin with"),
    "patience alone": (["--patience", "3"], "need pairs to validate on: add --holdout 0.05 or --eval-cache"),
    "min gain alone": (["--holdout", "0.2", "--min-gain", "0.1"], "--min-gain: is used with --patience only"),
    "holdout of nearly all": (["--holdout", "0.9999"], "--holdout 0.9999: of 40 pairs 40 would be held out; expected"),
    "holdout in percent": (["--holdout", "5"], "--holdout: expected a share of the pairs from 0 to below 1, got 5"),
    "holdout twice": (
        ["--holdout", "0.2", "--eval-cache", "x"],
        "--holdout, --eval-cache: expected one of them, got both",
    ),
    "no eval cache": (["--eval-cache", "gone"], "gone: no such directory"),
    "negative rank": (["--lora-rank", "-1"], "--lora-rank: expected 0 or more, got -1"),
    "alpha alone": (["--lora-alpha", "4"], "--lora-alpha: is used with --lora-rank only; expected both"),
    "targets alone": (["--lora-targets", "q_proj"], "--lora-targets: is used with --lora-rank only; expected both"),
    "targets misspelt": (["--lora-rank", "2", "--lora-targets", "q_prj"], "no linear modules named q_prj; expected"),
    "optimizer": (
        ["--optimizer", "adam"],
        "--optimizer: expected one of adamw, adamw-8bit, paged-adamw-8bit, adamw-cpu, got 'adam'",
    ),
    "loss": (["--loss", "dpo"], "--loss: expected sigmoid, robust,"),
    "schedule": (["--schedule", "cos"], "--schedule: expected one of cosine, linear,"),
    "dtype": (["--dtype", "fp16"], "--dtype: expected one of auto, bfloat16, float16, float32, got 'fp16'"),
    "recipe": (
        ["--recipe", "minimind"],
        "--recipe: expected one of minimind-2504, minimind-2505,",
    ),
    "tracker": (["--tracker", "wandbd"], "--tracker: expected one of wandb,"),
    "stop at no kl": (["--on-max-kl", "stop"], "--on-max-kl: is used with --max-kl only; expected both"),
    "max kl": (["--max-kl", "0"], "--max-kl: expected a number above 0, got 0"),
    "ld alpha": (["--ld-alpha", "2"], "--ld-alpha: expected a share from 0 to 1, got 2"),
    "ld alpha's cache": (["--ld-alpha", "0.5"], "run precompute-ref with --per-token into another cache"),
    "wpo over the batch": (["--wpo", "--loss", "aot"], "--wpo: weights single pairs, which --loss aot sorts apart"),
    "batch": (["--batch-size", "0"], "--batch-size: expected 1 or more, got 0"),
    "lr": (["--lr", "0"], "--lr: expected a number above 0, got 0"),
    "model": (["--model", "./gone"], "gone: expected a model directory, a .gguf or .pth file, or a hub id"),
    "file for a run": (["--out", "file"], "file: exists already, and is no run; name another --out or remove it"),
    "run again": (["--out", "run"], "run: exists already; --resume goes on with it, or name another --out"),
    "run within a file": (["--out", "file/run"], "file/run: cannot be written: Not a directory"),
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a run and a file in it."""
    directory = tmp_path_factory.mktemp("desk")
    (directory / "run").mkdir()
    (directory / "run" / "run.json").write_text(json.dumps({"beta": 0.1}))
    (directory / "file").write_text("")
    return directory


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line(
    ref_cache: Path, desk: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    monkeypatch.chdir(desk)
    given, message = MISTAKES[mistake]
    arguments = [] if "--ref-cache" in given or mistake == "nothing to resume" else ["--ref-cache", ref_cache]
    code, stdout, stderr = cli("train", "--out", "new", "--max-steps", 1, *arguments, *given)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 1 and len(errors) == 1 and message in errors[0], stderr
    assert errors[0] == stderr.splitlines()[-1] and not stdout and not (desk / "new").exists()


def test_a_misspelt_option_is_named(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, stderr = cli("train", "--ref-cache", ref_cache, "--out", tmp_path / "new", "--hold-out", "0.2")
    assert code == 2 and "--hold-out" in stderr and "--holdout" in stderr  # did you mean
    code, _, stderr = cli("train", "--out", tmp_path / "new")
    assert code == 2 and "--ref-cache" in stderr


@pytest.mark.slow
def test_interrupted_twice_it_ends_at_once_and_says_what_is_left(ref_cache: Path, tmp_path: Path) -> None:
    """The second request comes in a step that lasts: here the whole process is as good as stuck in it."""
    stuck = (
        "import sys, time; from minicache.training import loop; step = loop.take_step\n"
        "def slow(run, training, indices):\n"
        "    if training.progress.step == 2: print('stuck', file=sys.stderr, flush=True); time.sleep(60)\n"
        "    return step(run, training, indices)\n"
        "loop.take_step = slow; from minicache.cli import main; main()"
    )
    words = [
        "train",
        "--ref-cache",
        str(ref_cache),
        "--out",
        str(tmp_path / "run"),
        "--batch-size",
        "4",
        "--save-every",
        "1",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", stuck, *words],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    seen = ""
    assert process.stderr is not None
    while "stuck" not in seen:
        seen = process.stderr.readline()
        assert seen, "the run ended"
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1.3)  # beyond what counts as one request
    assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    told = " ".join(stderr.split())
    assert process.returncode == 130 and "interrupted; train --resume goes on from the newest checkpoint" in told
    assert "Traceback" not in told and checkpoints.steps(tmp_path / "run") == [2]
