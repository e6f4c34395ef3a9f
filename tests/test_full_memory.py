"""Memory that is full, wherever that shows, is one line: what does not fit, how much was asked for and is free, what to try."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy._core._exceptions import _ArrayMemoryError

from minicache.cache.contents import Contents
from minicache.errors import FullMemory, ModelError, fits, in_words
from minicache.intake import scores
from minicache.models import precision
from minicache.scoring import budget, handshake, layout
from minicache.scoring.scorer import Scorer
from minicache.stages import evaluate, export
from minicache.training import checkpoints, loop, saving, snapshot
from tests.conftest import Cli

GPU = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 139.80 GiB of which 1.25 GiB is free."
CPU = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes."
KINDS: dict[str, tuple[BaseException, str]] = {
    "gpu": (torch.OutOfMemoryError(GPU), "2.00 GiB more were asked for, 1.25 GiB were free"),
    "cpu": (RuntimeError(CPU), "4096 bytes more were asked for"),
    "windows": (
        RuntimeError(CPU.replace("can't allocate memory", "not enough memory")),
        "4096 bytes more were asked for",
    ),
    "numpy": (_ArrayMemoryError((2**50,), np.dtype(np.float64)), "8.00 PiB more were asked for"),
    "python": (MemoryError(), "GB of the machine's memory are free now"),
    "system": (OSError(12, "Cannot allocate memory"), "GB of the machine's memory are free now"),
    "cublas": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUBLAS"),
}
TRAIN = ("train", "--ref-cache", "CACHE", "--out", "OUT", "--batch-size", 8, "--max-steps", 4, "--save-every", 2)
RESUME = ("train", "--out", "OUT", "--resume")


@contextmanager
def scoring_fails(patch: pytest.MonkeyPatch, fail: Callable[..., Any]) -> Iterator[None]:
    score = scores._score

    def scoring(*arguments: Any) -> Any:
        patch.setattr(Scorer, "forward", fail)
        return score(*arguments)

    patch.setattr(scores, "_score", scoring)
    yield


# place -> what is patched, the command, what does not fit
PLACES: dict[str, tuple[Any, str, tuple[Any, ...], str]] = {
    "loading": (transformers.AutoModelForCausalLM, "from_pretrained", TRAIN, "loading "),
    "moving to the device": (precision, "half_weights", TRAIN, "a model of 44,192 parameters"),
    "reading the cache": (Contents, "load", TRAIN, "this run"),
    "trying a layout": (layout._Trial, "_try", TRAIN, "trying layout packed on a few pairs"),
    "trying padded": (layout._Trial, "_scores", (*TRAIN, "--layout", "padded"), "scoring the longest pair"),
    "measuring": (budget, "run_pass", TRAIN, "the shortest pair"),
    "the first step": (torch.optim.AdamW, "step", TRAIN, "step 0, of"),
    "a step": (loop, "take_step", TRAIN, "try --tokens-per-micro-batch"),
    "validation": (loop, "evaluate_policy", (*TRAIN, "--holdout", 0.3), "this run"),
    "writing the optimizer": (checkpoints, "save", TRAIN, "a checkpoint"),
    "writing the policy": (snapshot, "save_model", TRAIN, "a checkpoint"),
    "a copy to write": (snapshot, "whole_weights", (*TRAIN, "--async-save"), "without --async-save"),
    "the last save": (saving, "save_model", TRAIN, "this run"),
    "reading a state": (torch, "load", RESUME, "this run"),
    "reading the optimizer": (checkpoints, "load_distributed", RESUME, "the optimizer's state"),
    "verifying": (handshake, "score_table", ("inspect-cache", "CACHE", "--verify", "--model", "MODEL"), "this run"),
    "scoring": (None, "", ("precompute-ref", "--model", "MODEL", "--data", "DATA", "--ref-cache", "OUT"), "a pair of"),
    "evaluating": (evaluate, "evaluate_policy", ("evaluate", "--policy", "MODEL", "--ref-cache", "CACHE"), "this run"),
    "exporting": (export, "save_model", ("export", "--policy", "MODEL", "--out", "OUT"), "this run"),
    "answering": (
        transformers.GenerationMixin,
        "generate",
        ("compare", "--policy", "MODEL", "--reference", "MODEL", "--ref-cache", "CACHE"),
        "answering ",
    ),
}


@pytest.fixture(scope="module")
def begun(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to resume, interrupted after step 2."""
    from minicache.options.dictionaries import fill
    from minicache.options.train import TrainConfig
    from minicache.stages.train import train
    from minicache.trackers import Silent
    from tests.conftest import one_process
    from tests.processes.test_parallel import cut

    place = tmp_path_factory.mktemp("full")
    options = {"ref_cache": str(ref_cache), "batch_size": 8, "max_steps": 4, "save_every": 2, "keep_last": 9}
    train(fill(TrainConfig, {**options, "out": place / "whole"}), one_process(), Silent())
    return cut(place / "whole", place / "run", 2)


@pytest.mark.parametrize(("place", "kind"), list(zip(PLACES, list(KINDS) * len(PLACES), strict=False)))
def test_a_full_memory_is_one_line_everywhere(
    place: str,
    kind: str,
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    ref_cache: Path,
    model_dir: Path,
    data_file: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    owner, name, command, what = PLACES[place]
    error, numbers = KINDS[kind]
    places = {"CACHE": ref_cache, "MODEL": model_dir, "DATA": data_file, "OUT": tmp_path / "out"}
    if command is RESUME:
        places["OUT"] = request.getfixturevalue("begun")

    def fail(*arguments: Any, **options: Any) -> Any:
        raise error

    if place == "measuring":
        monkeypatch.setattr(budget, "counted_pass", fail)
        monkeypatch.setattr(budget, "COUNTED", {})
    if owner is None:
        with scoring_fails(monkeypatch, fail):
            code, _, err = cli(*(places.get(word, word) for word in command))
    else:
        monkeypatch.setattr(owner, name, fail)
        code, _, err = cli(*(places.get(word, word) for word in command))
    text = " ".join(err.split())
    assert code == 1 and "Traceback" not in text, err
    assert what in text and "does not fit" in text and (numbers in text or place == "scoring"), text


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_say_it_is_known(kind: str) -> None:
    error, numbers = KINDS[kind]
    with (
        pytest.raises(FullMemory, match=r"out of memory: a step does not fit \(.*\); try less") as caught,
        fits("a step", "less"),
    ):
        raise error
    assert numbers in str(caught.value)
    with pytest.raises(FullMemory, match="out of memory: loading does not fit"), fits("loading"):
        try:
            raise error
        except Exception as inner:
            raise ModelError("it cannot be loaded") from inner


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), OSError(28, "No space left on device"), ModelError("x")]
)
def test_other_errors_pass(error: Exception) -> None:
    assert in_words(error) is None
    with pytest.raises(type(error)), fits("a step"):
        raise error
