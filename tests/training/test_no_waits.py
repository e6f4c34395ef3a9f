"""A step waits for its device only where it writes a line of the log: on a device that raises at whatever a GPU would wait for."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import precompute_into
from tests.training.no_waits_worker import WAITS

ROOT = Path(__file__).parents[2]
SETTINGS: dict[str, Any] = {
    "batch_size": 4,
    "layout": "padded",
    "max_steps": 9,
    "lr": 1e-3,
    "log_every": 100,
    "dtype": "float32",
    "tokens_per_micro_batch": 250,
}
# every loss that knows single pairs, at once
LOSSES = "sigmoid,robust,hinge,ipo,exo_pair,discopop,sigmoid_norm,simpo,nca_pair,bco_pair,sppo_hard,apo_zero,apo_down"
CASES: dict[str, dict[str, Any]] = {
    "padded": {},
    "shared": {
        "layout": "shared",
        "logps": "sum",
        "beta": 0.01,
        "beta_end": 0.02,
        "sft_weight": 0.5,
        "max_grad_norm": 0,
    },
    "packed": {"layout": "packed", "activation_checkpointing": True},
    "padded, adapters, weights of pairs": {"lora_rank": 4, "wpo": True},
    "packed, adapters, weights of tokens": {"lora_rank": 4, "layout": "packed", "ld_alpha": 0.5, "sft_weight": 0.5},
    "half precision": {"dtype": "bfloat16"},
    "packed, as sequences": {"layout": "packed", "dtype": "bfloat16", "kernel": "varlen"},
    "a scaled loss": {"dtype": "float16"},
    "all losses": {"loss": LOSSES, "label_smoothing": 0.1, "f_divergence": "js"},
    "a loss that sorts": {"loss": "aot", "tokens_per_micro_batch": 4000},
}


@pytest.fixture(scope="module")
def found(
    ref_cache: Path, model_dir: Path, data_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The result of each case and of each injected wait, by name."""
    directory = tmp_path_factory.mktemp("waits")
    tokens = precompute_into(directory / "tokens", model_dir, data_file, per_token=True)
    cases = CASES | {f"injected: {name}": {"wait": name} for name in WAITS}
    jobs = {
        name: {"ref_cache": str(tokens if "ld_alpha" in options else ref_cache), "out": str(directory / "none")}
        | SETTINGS
        | options
        for name, options in cases.items()
    }
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.training.no_waits_worker", json.dumps(jobs)],
        capture_output=True, text=True, cwd=ROOT, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing_and_computes_what_it_does_on_a_cpu(found: dict[str, Any], name: str) -> None:
    assert isinstance(found[name], float), found[name]
    # in half precision AdamW steps the other way where rounding turns the sign of a small gradient
    assert found[name] < 5e-5 or CASES[name].get("dtype", "float32") != "float32"


@pytest.mark.parametrize("wait", WAITS)
def test_whatever_waits_is_found(found: dict[str, Any], wait: str) -> None:
    assert isinstance(found[f"injected: {wait}"], str)
