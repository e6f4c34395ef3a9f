"""The commands that write, each with what it reads and how its result is compared with an undisturbed one."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_rows, precompute_into, tiny_llama, write_jsonl
from tests.helpers.stores import assert_same_store
from tests.stages.test_crash import finished
from tests.torture.counting import Figures
from tests.training.test_resume import assert_same_run

Same = Callable[[Path, Path], None]
# Of files that hold dates, times or places: what is compared is what they say besides.
TIMED: tuple[str, ...] = (
    "tokens_per_second",
    "memory_gb",
    "seconds",
    "total_seconds",
    "eval_seconds",
    "reference_pairs_per_second",
)
TIMED += ("seconds_not_spent", "stage_one_seconds", "out", "created")


@dataclass(frozen=True)
class Writer:
    """A command that writes. calls: its command lines, of which each is given the place as `option`; several run at once.

    resumes: whether the same call goes on where a killed one was; else it begins again, and refuses where one had finished.
    """

    calls: list[list[str]]
    same: Same
    option: str = "--out"
    resumes: bool = True
    name: str = "result"

    def at(self, place: Path) -> list[list[str]]:
        return [[*call, self.option, str(place / self.name)] for call in self.calls]

    def done(self, place: Path) -> dict[tuple[str, int], bytes]:
        """What is finished at a place and may not be lost."""
        return finished(place / self.name) if self.option == "--ref-cache" and self.resumes else {}


def judge(figures: Figures, writer: Writer, whole: Path, place: Path, scratch: Path, said: str = "") -> None:
    """Count what is not as an undisturbed call left it at `whole`: the result, and what lies beside it or in `scratch`, which is
    emptied. said: by the command."""
    try:
        writer.same(whole / writer.name, place / writer.name)
    except (AssertionError, OSError, ValueError) as error:
        figures.add("wrong", True, f"not as undisturbed: {error!r}"[:2000] + said)
    usual = {file.relative_to(whole) for file in whole.rglob("*")}
    left = [file for file in place.rglob("*") if file.relative_to(place) not in usual] + list(scratch.iterdir())
    figures.add("leftovers", bool(left), ", ".join(str(file) for file in left[:10]) + said)
    shutil.rmtree(scratch)


def plain(value: Any) -> Any:
    """JSON without what measures time and names places."""
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items() if name not in TIMED}
    return [plain(each) for each in value] if isinstance(value, list) else value


def files(place: Path) -> Iterator[Path]:
    return (file.relative_to(place) for file in sorted(place.rglob("*")) if file.is_file())


def assert_same_files(left: Path, right: Path) -> None:
    """Byte for byte, JSON but for times and places."""
    if left.is_file():
        assert left.read_bytes() == right.read_bytes()
        return
    assert list(files(left)) == list(files(right))
    for file in files(left):
        a, b = (left / file).read_bytes(), (right / file).read_bytes()
        if file.suffix == ".json" and a != b:
            a, b = (json.dumps(plain(json.loads(each))).encode() for each in (a, b))
        if file.suffix != ".png" and file.name != "README.md":
            assert a == b, file


def assert_same_sweep(left: Path, right: Path) -> None:
    a, b = (plain(json.loads((place / "sweep.json").read_text())) for place in (left, right))
    assert a == b
    for run in a["runs"]:
        assert_same_run(left / run["name"], right / run["name"])


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
        return Writer([["train", "--ref-cache", str(cache), *TRAIN, "--epochs", "3", *options]], assert_same_run)

    one = Writer([stage_one], assert_same_store, "--ref-cache")
    return {
        "stage one": one,
        "stage one, two shards at once": Writer(
            [[*stage_one, "--shard", f"{k}/2"] for k in (1, 2)], assert_same_store, "--ref-cache"
        ),
        "stage one, two processes": Writer([[*stage_one, "--nproc", "2"]], assert_same_store, "--ref-cache"),
        "train": Writer([train], assert_same_run),
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
            assert_same_sweep,
        ),
        "merge": Writer([["merge", str(ref_cache), str(other)]], assert_same_store, "--ref-cache", resumes=False),
        "import-cache": Writer(
            [["import-cache", str(home / "table.parquet"), "--model", str(model_dir)]],
            assert_same_store,
            "--ref-cache",
            resumes=False,
        ),
        "export of a policy": Writer([["export", "--policy", str(home / "run")]], assert_same_files, resumes=False),
        "export of a cache": Writer(
            [["export", "--ref-cache", str(ref_cache)]], assert_same_files, resumes=False, name="table.jsonl"
        ),
        "report": Writer([["report", str(home / "run")]], assert_same_files, name="page.html"),
    }
