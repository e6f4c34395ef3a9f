"""What the torture tests judge by, from both sides: a difference is seen, a time is none, lost work is counted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import one_process
from tests.helpers.runs import assert_same_files, done_steps, gone
from tests.torture.counting import Figures
from tests.torture.table import added, table
from tests.torture.writers import Writer, judge


@pytest.fixture(scope="module")
def made(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with two checkpoints."""
    out = tmp_path_factory.mktemp("run") / "run"
    config = TrainConfig(ref_cache, out, max_steps=4, save_every=1, keep_last=2, log_every=1, batch_size=8)
    train(config, one_process(), Silent())
    return out


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def edit(file: Path, *keys: str, value: object = 7) -> None:
    content = json.loads(file.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    file.write_text(json.dumps(content))


def edit_tensor(file: Path) -> None:
    tensors = load_file(file)
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, file)


def edit_state(file: Path) -> None:
    state = torch.load(file, weights_only=True)
    state["means"][0] += 1
    torch.save(state, file)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


LAST = "checkpoints/step-000003"
DIFFERENCES: dict[str, Callable[[Path], object]] = {
    "a file less": lambda run: (run / "model/generation_config.json").unlink(),
    "a file more": lambda run: (run / "model/more").touch(),
    "a tokenizer": lambda run: flip(run / "model/tokenizer.json"),
    "a template": lambda run: flip(run / "model/chat_template.jinja"),
    "the model's config": lambda run: edit(run / "model/config.json", "hidden_size"),
    "an option": lambda run: edit(run / "run.json", "lr"),
    "a result": lambda run: edit(run / "run.json", "outcome", "progress", "step"),
    "a weight": lambda run: edit_tensor(run / "model/model.safetensors"),
    "a weight of a checkpoint": lambda run: edit_tensor(run / LAST / "model/model.safetensors"),
    "an optimizer": lambda run: flip(next((run / LAST / "optimizer").glob("*.distcp"))),
    "an optimizer's index": lambda run: shutil.copy(run / LAST / "state.pt", run / LAST / "optimizer/.metadata"),
    "a state": lambda run: edit_state(run / LAST / "state.pt"),
    "a line": lambda run: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 9}\n'),
    "a checkpoint": lambda run: shutil.rmtree(run / LAST),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_difference_between_runs_is_seen(run: Path, made: Path, what: str) -> None:
    assert_same_files(made, run)
    DIFFERENCES[what](run)
    with pytest.raises((AssertionError, ValueError)):
        assert_same_files(made, run)


def test_times_and_places_are_no_difference(run: Path, made: Path) -> None:
    edit(run / "run.json", "out")
    for name in ("total_seconds", "seconds"):
        edit(run / "run.json", "outcome", "progress", name)
    lines = [
        json.loads(line) | {"tokens_per_second": 7, "memory_gb": 7}
        for line in (run / "metrics.jsonl").read_text().splitlines()
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert_same_files(made, run)


def without_line(run: Path, step: int) -> None:
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(b"".join(lines[:step] + lines[step + 1 :]))


def test_work_that_a_run_has_lost(run: Path) -> None:
    edit(run / "run.json", "outcome", value=None)
    shutil.rmtree(run / "checkpoints/step-000002", ignore_errors=True)
    before = done_steps(run)
    assert ("", "step", 3) in before and ("", "line", 2) in before and ("", "line", 3) not in before
    assert not gone({}, before) and not gone(before, before)
    # what came after the newest checkpoint is made again
    without_line(run, 3)
    assert not gone(before, done_steps(run))
    # an older checkpoint makes room for a newer one
    newer = run / "checkpoints/step-000004"
    (run / LAST).rename(newer)
    assert not gone(before, done_steps(run))
    newer.rename(run / LAST)
    flip(run / LAST / "model/model.safetensors")
    assert gone(before, done_steps(run)) == [("", "checkpoint", 3)]
    flip(run / LAST / "model/model.safetensors")
    without_line(run, 1)
    assert gone(before, done_steps(run)) == [("", "line", 1)]
    shutil.rmtree(run / LAST)
    assert ("", "step", 3) in gone(before, done_steps(run))


def test_what_no_trial_looked_for_is_not_0(run: Path, made: Path, tmp_path: Path) -> None:
    """Neither in the figures of a command that keeps nothing, nor in the table."""
    kept = Writer([[]], assert_same_files, done_steps, name="run")
    figures = {"keeps": Figures("killed: keeps"), "keeps nothing": Figures("killed: keeps nothing")}
    for name, writer in (("keeps", kept), ("keeps nothing", replace(kept, done=None))):
        writer.watch(figures[name], writer.kept(run.parent), run.parent)
        (tmp_path / "scratch").mkdir()
        judge(figures[name], writer, made.parent, run.parent, tmp_path / "scratch")
    shutil.rmtree(run / "checkpoints")
    edit(run / "run.json", "outcome", value=None)
    kept.watch(figures["keeps"], done_steps(made), run.parent)
    found = {name: (each.lost, each.wrong, each.hangs) for name, each in figures.items()}
    assert found == {"keeps": (1, 0, None), "keeps nothing": (None, 0, None)}
    lines = table(added(vars(each) for each in figures.values())).splitlines()
    assert [line.split(" | ")[3] for line in lines[2:]] == ["1", "–", "1"]
