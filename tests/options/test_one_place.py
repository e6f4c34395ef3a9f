"""A format, loss, divergence, schedule, optimizer, layout, tracker: a function or class, and a line in a dict.

Each is added to a copy of its dict in a process of its own and driven through the command line; help, checks, training and
errors follow from the line alone.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import make_rows, write_jsonl

OURS = f"""
import sys, types
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from minicache.options import catalog
from minicache.options.catalog import *
from minicache.data import formats
from minicache import trackers

def code(name, thing):
    module = sys.modules.setdefault("somebodys", types.ModuleType("somebodys"))
    setattr(module, name, thing)
    return f"somebodys:{{name}}"
"""
THEN = "\nfrom minicache.cli import main; main()"

LOSS = """
def twice(logps, beta, options):
    from minicache.training.losses import sigmoid
    return 2 * sigmoid(logps, beta, options)
catalog.LOSSES["twice"] = LossEntry(code("twice", twice), ("label_smoothing",))
"""
DIVERGENCE = """
catalog.DIVERGENCES["half"] = DivergenceEntry(code("half", lambda ratios, alpha: ratios / 2))
"""
SCHEDULE = """
catalog.SCHEDULES["stairs"] = ScheduleEntry(code("stairs", lambda progress, floor: 1.0 if progress < 0.5 else 0.25))
"""
OPTIMIZER = """
def sgd(groups, lr):
    import torch
    return torch.optim.SGD(groups, lr=lr, momentum=0.5)
catalog.OPTIMIZERS["sgd"] = OptimizerEntry(code("sgd", sgd), 4, by_name=True)
"""
LAYOUT = """
catalog.LAYOUTS["rows"] = LayoutEntry("minicache.scoring.layouts:PADDED", "rows again")
"""
TRACKER = """
class Csv(trackers.libraries.Library):
    package, help, advice = "csv", "A file", "nothing helps"
    def start(self, title, facts): self.stream = (self.run.directory / "log.csv").open("w")
    def write(self, step, metrics): print(step, metrics.get("loss"), sep=",", file=self.stream, flush=True)
    def close(self): self.stream.close()
trackers.TRACKERS["csv"] = Csv
"""
TRAINED = {
    "loss": (LOSS, ["--loss", "twice", "--label-smoothing", "0.1"]),
    "divergence": (DIVERGENCE, ["--f-divergence", "half"]),
    "schedule": (SCHEDULE, ["--schedule", "stairs", "--warmup", "0"]),
    "optimizer": (OPTIMIZER, ["--optimizer", "sgd", "--save-every", "1"]),
    "layout": (LAYOUT, ["--layout", "rows"]),
    "tracker": (TRACKER, ["--tracker", "csv"]),
}


def minidpo(added: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", OURS + added + THEN, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def metrics_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def trained(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run with each, and one with none of them."""
    runs = {}
    for kind, (added, options) in {"none": ("", []), **TRAINED}.items():
        runs[kind] = out = tmp_path_factory.mktemp(kind) / "run"
        usual = ["--batch-size", "8", "--max-steps", "4", "--lr", "1e-2", "--log-every", "1"]
        done = minidpo(added, "train", "--ref-cache", ref_cache, "--out", out, *usual, *options)
        assert done.returncode == 0, (kind, done.stderr)
    return runs


@pytest.mark.slow
def test_a_new_one_of_each_kind_trains(trained: dict[str, Path]) -> None:
    losses = {kind: [line["loss"] for line in metrics_of(run)] for kind, run in trained.items()}
    assert losses["loss"][0] == pytest.approx(2 * losses["none"][0], rel=1e-4)
    assert losses["divergence"][0] == pytest.approx(losses["none"][0], rel=1e-4)
    assert losses["divergence"][1:] != pytest.approx(losses["none"][1:], rel=1e-4)
    rates = [line["lr"] for line in metrics_of(trained["schedule"])]
    assert rates == pytest.approx([1e-2, 1e-2, 2.5e-3, 2.5e-3])
    assert losses["optimizer"][2:] != pytest.approx(losses["none"][2:], rel=1e-6)
    assert losses["layout"] == pytest.approx(losses["none"], rel=1e-4)
    assert json.loads((trained["layout"] / "run.json").read_text())["layout_used"] == "rows"
    told = (trained["tracker"] / "log.csv").read_text().splitlines()
    assert [float(line.split(",")[1]) for line in told] == losses["tracker"]


@pytest.mark.slow
def test_a_run_with_a_new_optimizer_goes_on(trained: dict[str, Path], ref_cache: Path, tmp_path: Path) -> None:
    out = trained["optimizer"]
    (out / "run.json").write_text(json.dumps({**json.loads((out / "run.json").read_text()), "outcome": None}))
    facts = json.loads((out / "run.json").read_text())
    del facts["outcome"]
    (out / "run.json").write_text(json.dumps(facts))
    done = minidpo(OPTIMIZER, "train", "--resume", "--out", out)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("added", "command", "name"),
    [
        (DIVERGENCE, "train", "half"),
        (SCHEDULE, "train", "stairs"),
        (OPTIMIZER, "train", "sgd"),
        (LAYOUT, "precompute-ref", "rows (rows again)"),
        (TRACKER, "train", "csv"),
    ],
)
def test_the_help_names_a_new_one(added: str, command: str, name: str) -> None:
    shown = minidpo(added, command, "--help").stdout
    assert name in " ".join(shown.replace("│", " ").split())


def test_a_new_option_of_a_loss_that_another_does_not_read_is_refused(ref_cache: Path, tmp_path: Path) -> None:
    options = ("--loss", "hinge", "--label-smoothing", "0.1")
    done = minidpo(LOSS, "train", "--ref-cache", ref_cache, "--out", tmp_path / "run", *options)
    assert done.returncode == 1 and "twice" in done.stderr  # among those that read it


FORMAT = """
def from_question(columns):
    good, bad = ([formats.Turn("assistant", columns[side])] for side in ("good", "bad"))
    return formats.Sample([formats.Turn("user", columns["ask"])], [(good, bad)])
formats.FORMATS["question"] = formats.Format({"ask", "good", "bad"}, from_question)
"""


@pytest.mark.parametrize("asked", [pytest.param(each, marks=pytest.mark.slow) for each in ("auto", "question")])
def test_a_new_format_is_read_by_name_and_by_its_fields(asked: str, model_dir: Path, tmp_path: Path) -> None:
    rows = [
        {
            "ask": row["chosen"][0]["content"],
            "good": row["chosen"][-1]["content"],
            "bad": row["rejected"][-1]["content"],
        }
        for row in make_rows(6)
    ]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    options = ("--model", model_dir, "--data", data, "--format", asked)
    done = minidpo(FORMAT, "precompute-ref", *options, "--ref-cache", tmp_path / "cache")
    assert done.returncode == 0 and "6 pairs" in done.stdout, done.stderr
    without = minidpo("", "precompute-ref", *options, "--ref-cache", tmp_path / "none")
    assert without.returncode == 1 and len(without.stderr.splitlines()[-1]) > 20
