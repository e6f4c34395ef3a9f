"""Make a golden set: model, pairs, caches, unfinished runs, exports, and what was true of them.

    python -m tests.golden.make

`v0.1.0/` and `curves.json` were made by release 0.1.0, by the commit that added them. They are never made again: a test that
fails on them has found a version that no longer reads what 0.1.0 wrote, and the version is to be mended, not the files.

A later release that writes something new (an array, a field, an option of a checkpoint) adds a set of its own beside the
others: bring what is new into `make_rows`, `CACHES` or `RUNS`, run the command at the release's commit, add the new directory to
git (`git status --ignored` shows whether all of it is there), and see that the tests, which go over all sets, pass. The
directory is named by the release; one that exists is never written over. `curves.json` only gets curves that it lacks.

Models' places are stored as absolute paths. So that no set names a directory of the machine that made it, everything is made
in `WORKPLACE`, which must be free, and moved here.
"""

import json
import os
import shutil
import subprocess
import sys
from contextlib import chdir
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
WORKPLACE = Path("/golden")

PRECOMPUTE = "precompute-ref --model model --data pairs.jsonl --max-length 128"
# Name of a cache -> options. Those of the first are the defaults, but for the size of blocks.
CACHES = {
    "cache": "--dtype float32 --block-pairs 8",
    "cache-per-token": "--dtype float32 --block-pairs 5 --per-token --truncate left",
    "cache-options": "--dtype bfloat16 --block-pairs 16 --loss-on assistant --think drop --special-text allow --truncate refuse",
}
COMMON = (
    "--model model --dtype float32 --batch-size 4 --epochs 3 --log-every 2 --save-every 5 --tokens-per-micro-batch 400"
)
# Name of a run -> options, optimizer steps after which it is killed.
RUNS = {
    "run": ("--ref-cache cache --beta 1 --lr 1e-3 --holdout 0.2 --eval-every 4", 12),
    "run-lora": (
        "--ref-cache cache-per-token --logps sum --beta 0.1 --beta-end 0.2 --loss sigmoid:0.7,hinge:0.3 --sft-weight 0.1 "
        "--ld-alpha 0.5 --lr 3e-3 --schedule linear --warmup 2 --min-lr 0.1 --weight-decay 0.1 --seed 7 "
        "--lora-rank 2 --lora-targets q_proj,v_proj",
        7,
    ),
}
OUTPUTS = [
    *(f"inspect-cache {name} --json" for name in CACHES),
    "inspect-cache cache --pair 3 --json",
    "inspect-cache cache --verify --model model --json",
    "diff cache cache-options --json",
    "diff cache cache-per-token --json",
    "evaluate --policy run/checkpoints/step-000010 --ref-cache cache --dtype float32 --json",
    "evaluate --policy run/checkpoints/step-000010 --ref-cache cache-per-token --loss ipo --logps sum --dtype float32 --json",
]
# Runs the command line until so many optimizer steps are done, then dies without a word.
KILLED_AFTER = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
left = iter(range({steps} - 1, -1, -1))
register_optimizer_step_post_hook(lambda *_: next(left) or os.kill(os.getpid(), signal.SIGKILL))
from minicache.cli import main
main()
"""


def minidpo(arguments: str) -> str:
    """Run one command; return its stdout."""
    return subprocess.run(
        [sys.executable, "-m", "minicache", *arguments.split()], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


def make_unfinished(name: str, options: str, steps: int) -> None:
    """Make the run directory of a run that was killed, and NAME-finished-metrics.jsonl of one that was not."""
    train = f"train {options} {COMMON} --out"
    minidpo(f"{train} {name}-finished")
    shutil.move(f"{name}-finished/metrics.jsonl", f"{name}-finished-metrics.jsonl")
    shutil.rmtree(f"{name}-finished")
    program = KILLED_AFTER.format(steps=steps)
    killed = subprocess.run([sys.executable, "-c", program, *f"{train} {name}".split()])
    assert killed.returncode < 0, killed


def make_set(directory: Path) -> None:
    """Make everything but expected.json in an empty directory, which must be the working directory: paths are stored."""
    from tests.golden.handmade import make_rows, make_tokenizer, more_rows, write_model, write_rows

    write_model(directory / "model", "dense", seed=0, tokenizer=make_tokenizer())
    write_rows(directory / "pairs.jsonl", make_rows())
    write_rows(directory / "more.jsonl", more_rows())
    for name, options in CACHES.items():
        minidpo(f"{PRECOMPUTE} --ref-cache {name} {options}")
    for name, (options, steps) in RUNS.items():
        make_unfinished(name, options, steps)
    for ending in ("parquet", "jsonl"):
        minidpo(f"export --ref-cache cache --out export.{ending}")
    minidpo("export --ref-cache cache-per-token --out export-per-token.jsonl")


def what_is_true(directory: Path) -> dict[str, dict[str, Any]]:
    """What expected.json says of a set.

    files: sha256 of each. caches: see `facts_of`. made_by: the command that made each cache. outputs: what commands print with
    --json, run in the set's directory.
    """
    from tests.golden.facts import facts_of

    outputs = {command: json.loads(minidpo(command)) for command in OUTPUTS}
    for output in outputs.values():
        output.pop("bytes_on_disk", None)  # of the file system too
    return {
        "files": {
            file.relative_to(directory).as_posix(): sha256(file.read_bytes()).hexdigest()
            for file in sorted(directory.rglob("*"))
            if file.is_file()
        },
        "caches": {name: facts_of(Path(name)) for name in CACHES},
        "made_by": {name: f"{PRECOMPUTE} --ref-cache {name} {options}" for name, options in CACHES.items()},
        "outputs": outputs,
    }


def refuse_private(directory: Path) -> None:
    """Raises AssertionError: a file of the set names a place of this machine."""
    places = {str(ROOT), str(ROOT.parent), gettempdir(), str(Path.home())} - {"/"}
    for file in directory.rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        found = [place for place in places if place.encode() in content]
        assert not found, f"{file} contains {found}"


def write_json(file: Path, content: dict[str, dict[str, Any]]) -> None:
    """Write JSON with a line for each entry of the inner objects."""
    parts = []
    for name, entries in content.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in entries.items()]
        parts.append(f"{json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n}")
    file.write_bytes(("{\n" + ",\n".join(parts) + "\n}\n").encode())


def make_curves(golden: Path) -> None:
    """Add to curves.json the curves that it lacks."""
    from tests.golden.curves import CURVES, make_caches, record

    file = HERE / "curves.json"
    curves: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    with TemporaryDirectory() as directory:
        make_caches(Path(directory), golden)
        curves |= {name: record(name, Path(directory)) for name in CURVES if name not in curves}
    write_json(file, curves)


def main() -> None:
    from minicache import __version__

    target = HERE / f"v{__version__}"
    if target.exists():
        raise SystemExit(f"{target} exists: a golden set is made once")
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    directory = WORKPLACE / target.name
    directory.mkdir(parents=True)
    with chdir(directory):
        make_set(directory)
        write_json(directory / "expected.json", what_is_true(directory))
    refuse_private(directory)
    shutil.move(directory, target)
    WORKPLACE.rmdir()
    make_curves(HERE / "v0.1.0")


if __name__ == "__main__":
    main()
