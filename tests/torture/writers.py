"""The commands that write, each with what it reads and how its result is compared with an undisturbed one."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.conftest import make_rows, precompute_into, tiny_llama, write_jsonl
from tests.helpers.runs import Done, assert_same_files, done_steps, gone
from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import finished
from tests.torture.counting import Figures

Same = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Writer:
    """A command that writes. calls: its command lines, of which each is given the place as `option`; several run at once.

    done: what is finished at a place and may not be lost; None of a command that keeps nothing for the next call. resumes: whether
    a call refuses what an earlier one finished.
    """

    calls: list[list[str]]
    same: Same
    done: Callable[[Path], Done] | None = None
    option: str = "--out"
    resumes: bool = True
    name: str = "result"

    def at(self, place: Path) -> list[list[str]]:
        return [[*call, self.option, str(place / self.name)] for call in self.calls]

    def kept(self, place: Path) -> Done:
        return self.done(place / self.name) if self.done else {}

    def watch(self, figures: Figures, before: Done, place: Path) -> Done:
        """What is finished now; what was finished before and is no more is counted."""
        now = self.kept(place)
        if self.done:
            lost = gone(before, now)
            figures.add("lost", bool(lost), f"finished work is gone: {lost[:10]}")
        return now


def done_runs(sweep: Path) -> Done:
    runs = (done_steps(file.parent, file.parent.name) for file in sorted(sweep.glob("*/run.json")))
    return {key: value for run in runs for key, value in run.items()}


def judge(figures: Figures, writer: Writer, whole: Path, place: Path, scratch: Path, said: str = "") -> None:
    """Count what is not as an undisturbed call left it at `whole`: the result, and what lies beside it or in `scratch`, which is
    emptied. said: by the command."""
    differs = ""
    try:
        writer.same(whole / writer.name, place / writer.name)
    # of a damaged file a library raises anything
    except Exception as error:
        differs = repr(error)[:2000]
    figures.add("wrong", bool(differs), f"not as undisturbed: {differs}{said}")
    usual = {file.relative_to(whole) for file in whole.rglob("*")}
    left = [file for file in place.rglob("*") if file.relative_to(place) not in usual] + list(scratch.iterdir())
    figures.add("leftovers", bool(left), ", ".join(str(file) for file in left[:10]) + said)
    shutil.rmtree(scratch)


TRAIN = [
    "--batch-size",
    "8",
    "--lr",
    "1e-3",
    "--log-every",
    "1",
    "--tokens-per-micro-batch",
    "70",
    "--save-every",
    "2",
    "--resume",
]
LORA = ["--lora-rank", "2"]


@pytest.fixture(scope="session")
def writers(
    tmp_path_factory: pytest.TempPathFactory, model_dir: Path, tokenizer_dir: Path, ref_cache: Path
) -> dict[str, Writer]:
    """By name. Each takes about a second when nothing disturbs it."""
    home = tmp_path_factory.mktemp("writers")
    data = write_jsonl(home / "pairs.jsonl", make_rows(200))
    half = home / "half"
    torch.nn.Module.to(tiny_llama(width=64), torch.bfloat16).save_pretrained(half)
    for file in tokenizer_dir.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    few = write_jsonl(home / "few.jsonl", make_rows(40))
    from minicache.options.base import BaseOptions
    from minicache.options.exchange import ExportCacheConfig
    from minicache.stages.export_cache import export_cache
    from minicache.trackers import Silent
    from tests.training.test_resume import run

    held = {
        kind: precompute_into(home / kind, half, few, base=BaseOptions(**{kind: True}))
        for kind in ("base_4bit", "base_8bit")
    }
    other = precompute_into(home / "other", model_dir, write_jsonl(home / "other.jsonl", make_rows(60, seed=5)))
    run(ref_cache, home / "run")
    export_cache(ExportCacheConfig(ref_cache, home / "table.parquet"), Silent())
    stage_one = [
        "precompute-ref",
        "--model",
        str(model_dir),
        "--data",
        str(data),
        "--block-pairs",
        "8",
        "--tokens-per-batch",
        "500",
    ]
    train = ["train", "--ref-cache", str(ref_cache), *TRAIN, "--epochs", "4"]

    def trained(*options: str, cache: Path = ref_cache) -> Writer:
        return Writer(
            [["train", "--ref-cache", str(cache), *TRAIN, "--epochs", "3", *options]], assert_same_files, done_steps
        )

    one = Writer([stage_one], assert_same_store, finished, "--ref-cache")
    return {
        "stage one": one,
        "stage one, two shards at once": Writer(
            [[*stage_one, "--shard", f"{k}/2"] for k in (1, 2)], assert_same_store, finished, "--ref-cache"
        ),
        "stage one, two processes": Writer([[*stage_one, "--nproc", "2"]], assert_same_store, finished, "--ref-cache"),
        "train": Writer([train], assert_same_files, done_steps),
        "train, asynchronous saves": trained("--async-save"),
        "train, held-out pairs": trained("--holdout", "0.2", "--eval-every", "2"),
        "train, LoRA": trained(*LORA),
        "train, 8-bit optimizer": trained("--optimizer", "adamw-8bit"),
        "train, 8-bit base": trained(*LORA, cache=held["base_8bit"]),
        "train, 4-bit base": trained(*LORA, cache=held["base_4bit"]),
        "train, two processes": trained("--nproc", "2"),
        "sweep": Writer(
            [
                [
                    "sweep",
                    "--ref-cache",
                    str(ref_cache),
                    "--beta",
                    "0.1,1",
                    *TRAIN[:-1],
                    "--max-steps",
                    "4",
                    "--holdout",
                    "0.2",
                ]
            ],
            assert_same_files,
            done_runs,
        ),
        "merge": Writer(
            [["merge", str(ref_cache), str(other)]], assert_same_store, option="--ref-cache", resumes=False
        ),
        "import-cache": Writer(
            [["import-cache", str(home / "table.parquet"), "--model", str(model_dir)]],
            assert_same_store,
            option="--ref-cache",
            resumes=False,
        ),
        "export of a policy": Writer([["export", "--policy", str(home / "run")]], assert_same_files, resumes=False),
        "export of a cache": Writer(
            [["export", "--ref-cache", str(ref_cache)]], assert_same_files, resumes=False, name="table.jsonl"
        ),
        "report": Writer([["report", str(home / "run")]], assert_same_files, name="page.html"),
    }
