"""Process groups: the error that each process has in one line, with what NCCL gives as the cause; how long they wait."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from minicache.commands.running import _errors_of_libraries
from minicache.errors import ProcessLost
from minicache.processes.launch import LISTENING
from minicache.processes.world import STEP, World, join_world
from minicache.scoring import spread

CPU = torch.device("cpu")
CAUSE = "ncclInternalError: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 4b000"
OF_NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:94, invalid usage (run with NCCL_WARN=INFO for details), "
    "NCCL version 2.28.9\nncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\n" + CAUSE
)


def raising(error: Exception) -> Callable[..., None]:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (OF_NCCL, CAUSE),
        ("The client socket has timed out", "The client socket has timed out"),
        ("Last error:\n", "Last error:"),
    ],
)
def test_what_nccl_gives_as_the_cause_is_shown(text: str, shown: str) -> None:
    with (
        pytest.raises(ProcessLost, match="another process of this run has ended or cannot be reached") as told,
        _errors_of_libraries(),
    ):
        raise dist.DistBackendError(text)
    assert str(told.value).endswith(f"The network said: {shown}")


@pytest.mark.parametrize("where", ["init_process_group", "new_group", "TCPStore"])
def test_a_process_that_cannot_join_blames_no_other(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    if where == "TCPStore":
        monkeypatch.setenv(LISTENING, "3")
    monkeypatch.setattr(dist, "init_process_group", lambda *arguments, **options: None)
    monkeypatch.setattr(dist, where, raising(dist.DistBackendError(OF_NCCL)))
    with pytest.raises(ProcessLost) as told, _errors_of_libraries():
        join_world("cpu")
    line = str(told.value)
    assert line.startswith(f"process 1 of 2: cannot join the others by gloo: {CAUSE}; expected all of them started")
    assert "has ended" not in line


def test_another_error_while_joining_is_shown_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(dist, "init_process_group", raising(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        join_world("cpu")


def test_the_groups_of_hybrid_wait_as_long_as_all_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a mesh of this one process."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    # of torch's own 30 minutes, as those that it splits off
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = spread._mesh("hybrid", World(0, 1, CPU))
        for name in ("nodes", "shards"):
            assert mesh.get_group(name)._get_backend(CPU).options._timeout == STEP
    finally:
        dist.destroy_process_group()
