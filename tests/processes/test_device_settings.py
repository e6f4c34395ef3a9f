"""What is settled before a device is used: how its memory is given out, and that products of float32 are computed in float32."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.commands.running import ALLOCATOR, _let_segments_grow
from minicache.processes.world import join_world

ROOT = Path(__file__).parents[2]
BACKENDS: Any = torch.backends
GROWING = "expandable_segments:True"
# In every process that starts with this: the variable as it is when torch is first looked for.
SPY = """
import os, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            with open(os.environ["SPY"], "a") as file:
                print(os.environ.get("PYTORCH_ALLOC_CONF"), file=file)
sys.meta_path.insert(0, Spy())
"""


NONE = ("--ref-cache", "none")


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("minicache", "train", *NONE, "--out", "run"), [GROWING]),
        (("minicache", "precompute-ref", *NONE, "--model", "none", "--data", "none", "--nproc", "2"), [GROWING] * 2),
        # torchrun itself imports torch, and uses no device
        pytest.param(
            (
                "torch.distributed.run",
                "--nproc-per-node",
                "1",
                "-m",
                "minicache",
                "evaluate",
                *NONE,
                "--policy",
                "none",
            ),
            ["None", GROWING],
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one process", "two", "torchrun"],
)
def test_segments_grow_in_every_process_before_torch_is_imported(
    command: tuple[str, ...], expected: list[str], tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(SPY)
    environment = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    environment |= {"PYTHONPATH": f"{tmp_path}:{ROOT}", "SPY": str(tmp_path / "seen")}
    done = subprocess.run(
        [sys.executable, "-m", *command], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and "none" in done.stderr, done.stderr[-2000:]
    assert (tmp_path / "seen").read_text().split() == expected


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_setting_of_the_allocator_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for each in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    _let_segments_grow()
    assert {each: os.environ[each] for each in os.environ if each.endswith("ALLOC_CONF")} == {
        name: "max_split_size_mb:64"
    }


@pytest.mark.parametrize(
    ("system", "release", "grows"),
    [
        ("win32", "11", False),
        ("linux", "5.15.167.4-microsoft-standard-WSL2", False),
        ("linux", "4.4.0-19041-Microsoft", False),
        ("linux", "6.8.0-45-generic", True),
    ],
)
def test_windows_and_wsl_have_no_segments_that_grow(
    system: str, release: str, grows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for each in ALLOCATOR:
        # so that what is set here is undone
        monkeypatch.setenv(each, "")
        monkeypatch.delenv(each)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "release", lambda: release)
    _let_segments_grow()
    assert (os.environ.get("PYTORCH_ALLOC_CONF") == GROWING) == grows


def _all_in_tf32() -> None:
    for each in (BACKENDS, BACKENDS.cuda.matmul, BACKENDS.cudnn.conv, BACKENDS.mkldnn.conv):
        each.fp32_precision = "tf32"


def _older_interface() -> None:
    BACKENDS.cuda.matmul.allow_tf32 = BACKENDS.cudnn.allow_tf32 = True


@pytest.fixture
def settled() -> Iterator[None]:
    yield
    join_world()


@pytest.mark.parametrize(
    "switch_on",
    [lambda: None, lambda: torch.set_float32_matmul_precision("medium"), _older_interface, _all_in_tf32],
    ids=["torch's own", "matrices", "the older interface", "the newer"],
)
def test_products_of_float32_are_in_float32(switch_on: Callable[[], None], settled: None) -> None:
    switch_on()
    join_world()
    cudnn, mkldnn = BACKENDS.cudnn, BACKENDS.mkldnn
    parts = (BACKENDS.cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv)
    assert {each.fp32_precision for each in parts} == {"ieee"}
    # each raises where the two interfaces differ
    assert not BACKENDS.cuda.matmul.allow_tf32 and not cudnn.allow_tf32
    assert torch.get_float32_matmul_precision() == "highest"
