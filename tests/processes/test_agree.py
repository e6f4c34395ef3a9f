"""Two processes, and a fault on one of them: both decide alike, or raise the same line, which names it. None waits in vain."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.errors import CacheMismatch, ConfigError, Difference, FullMemory
from minicache.options.dictionaries import fill
from minicache.options.train import TrainConfig
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring import layout
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import make_rows, one_process, precompute_into, tiny_llama, write_jsonl
from tests.helpers.worlds import start_world
from tests.processes.test_parallel import assert_same_curve, cut
from tests.scoring.test_scoring import random_pairs

SETTINGS: dict[str, Any] = {"batch_size": 6, "epochs": 2, "log_every": 1, "save_every": 2, "keep_last": 9}
# fault -> rank that has it, stage, options, what both end with
ERRORS: dict[str, tuple[int, str, dict[str, Any], str]] = {
    "layout is full": (
        1,
        "train",
        {},
        "FullMemory: process 1 of 2: out of memory: trying layout packed on a few pairs",
    ),
    "a bug": (1, "precompute", {}, "process 1 of 2: it failed with ZeroDivisionError: a bug"),
    "budget is full": (1, "precompute", {}, "FullMemory: process 1 of 2: out of memory: "),
    "no cache": (1, "train", {}, "CacheNotFound: process 1 of 2: no cache here"),
    "other pairs": (1, "train", {}, "ConfigError: the pairs in the cache, their digest: process 1 of 2 has "),
    "other weights": (1, "precompute", {}, "the digest of its weights: process 1 of 2 has "),
    "other start": (1, "train", {"init_from": "MODEL"}, "ConfigError: the policy's weights: process 1 of 2 has "),
    "no compiler": (1, "train", {}, "OutputError: process 1 of 2: not installed here"),
    "no checkpoint": (1, "resumed", {"resume": True}, "OutputError: process 1 of 2: no checkpoint"),
    "no room": (0, "train", {}, "OutputError: process 0 of 2: the disk is full"),
}
DECISIONS = ("layout", "less memory", "no head", "none")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A cache, the run of one process in `padded`, and a run to resume."""
    place = tmp_path_factory.mktemp("agree")
    precompute_into(place / "cache", model_dir, write_jsonl(place / "pairs.jsonl", make_rows(20)))
    options = {**SETTINGS, "ref_cache": str(place / "cache"), "out": str(place / "one"), "layout": "padded"}
    train(fill(TrainConfig, options), one_process(), Silent())
    cut(place / "one", place / "resumed", 2)
    return place


@pytest.fixture(scope="module")
def ended(place: Path, model_dir: Path) -> dict[str, list[tuple[str, list[str]]]]:
    """By fault: what each rank's stage ended with, and its notes. One world runs them all: it is sound after every error."""
    jobs = []
    for name, (rank, stage, more, _) in {**ERRORS, **{name: (1, "train", {}, "") for name in DECISIONS}}.items():
        options: dict[str, Any] = {"model": str(model_dir), "data": [str(place / "pairs.jsonl")]}
        options["ref_cache"] = str(place / f"made {name}")
        if stage != "precompute":
            out = place / ("resumed" if stage == "resumed" else name)
            options = {**SETTINGS, "ref_cache": str(place / "cache"), "out": str(out)}
            options |= {key: str(model_dir) if value == "MODEL" else value for key, value in more.items()}
            if stage == "resumed":
                options["layout"] = "padded"
        jobs.append((name, rank, "precompute" if stage == "precompute" else "train", options))
    (place / "jobs.json").write_text(json.dumps(jobs))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = start_world(2, "-m", "tests.processes.faulty_worker", place / "jobs.json", **pipes)
    said = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), said[0][1][-2000:] + said[1][1][-2000:]
    lines = [[json.loads(line) for line in out.splitlines()] for out, _ in said]
    return {job[0]: [tuple(each) for each in both] for job, *both in zip(jobs, *lines, strict=True)}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_process_is_that_of_all(name: str, ended: dict[str, list[tuple[str, list[str]]]]) -> None:
    (first, _), (second, _) = ended[name]
    # a bug shows its traceback where it is
    assert (second == "ZeroDivisionError: a bug") if name == "a bug" else (first == second)
    assert ERRORS[name][3] in first
    assert "\n" not in first


def test_a_layout_that_one_process_cannot_use_is_used_by_none(
    place: Path, ended: dict[str, list[tuple[str, list[str]]]]
) -> None:
    """Else the processes would share out the pairs of a step by other costs: some would be trained on twice, others never."""
    for state, notes in ended["layout"]:
        assert state == "done"
        assert "layout packed is not used: process 1 of 2: no such kernel here" in notes
    assert json.loads((place / "layout" / "run.json").read_text())["layout_used"] == "padded"
    assert json.loads((place / "none" / "run.json").read_text())["layout_used"] == "packed"
    assert_same_curve(place / "one", place / "layout")


@pytest.mark.parametrize("name", DECISIONS[1:])
def test_other_decisions_are_one_process_weakest(
    name: str, place: Path, ended: dict[str, list[tuple[str, list[str]]]]
) -> None:
    assert [state for state, _ in ended[name]] == ["done", "done"]
    assert_same_curve(place / "one", place / name)
    slots = {line for _, notes in ended[name] for line in notes if "token slots a micro-batch" in line}
    assert len(slots) == 1


def test_a_full_memory_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    scorer = Scorer(model, "float32")
    attention = model.config._attn_implementation

    def fail(trial: Any, name: str, kernel: str) -> None:
        trial.scorer.use_layout("packed")
        trial.scorer(trial._batch(name, trial.shortest)).logp_sum.sum().backward()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(layout._Trial, "_try", fail)
    table = PairTable.from_pairs(random_pairs(8), "int32")
    with pytest.raises(
        FullMemory, match=r"trying layout packed on a few pairs does not fit \(2.00 GiB more were asked"
    ):
        settle_layout(scorer, table, "auto", one_process(), Silent())
    assert all(parameter.grad is None for parameter in scorer.parameters())
    assert scorer.layout_name == "padded" and model.config._attn_implementation == attention


@pytest.mark.parametrize(("before", "taken"), [("", "packed"), ("sequences", "sequences"), ("no such", "packed")])
def test_a_run_that_goes_on_tries_its_own_layout_first(before: str, taken: str) -> None:
    """What it has learned may have moved the model to where another one passes or fails."""
    scorer = Scorer(tiny_llama(), "float32")
    table = PairTable.from_pairs(random_pairs(8), "int32")
    settle_layout(scorer, table, "auto", one_process(), Silent(), before)
    assert scorer.layout_name == taken


class Two(World):
    """Rank 0 of two whose other rank says what it is told to."""

    def __init__(self, other: Any) -> None:
        super().__init__(0, 2, torch.device("cpu"))
        object.__setattr__(self, "other", other)

    def gather(self, value: Any) -> list[Any]:
        return [value, self.other]  # type: ignore[attr-defined]


def test_a_table_of_differences_comes_with_another_processs_error() -> None:
    error = CacheMismatch("another cache", [Difference("dtype", 1, 2, True)])
    with pytest.raises(CacheMismatch, match=r"^process 1 of 2: another cache$") as caught:
        Two((None, error)).together(lambda: 1)
    assert caught.value.differences == error.differences


def test_the_line_names_the_odd_one() -> None:
    with pytest.raises(ConfigError, match=r"^--lr: process 1 of 2 has 2, process 0 has 1; expected the same"):
        Two(({"--lr": 2}, None)).agree(lambda: {"--lr": 1})
