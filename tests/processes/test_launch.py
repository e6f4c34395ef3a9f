"""Threads and processes are counted by the cores that a job, a container or taskset leaves to this process."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

import minicache
from minicache.machine import cores
from minicache.processes import launch


def test_processes_share_the_cores_that_this_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5, 7}, raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = []

    class Started:
        pid = 0

        def __init__(self, command: list[str], env: dict[str, str], **_: Any) -> None:
            threads.append(env["OMP_NUM_THREADS"])

    monkeypatch.setattr(subprocess, "Popen", Started)
    launch._start([], 2, [])
    assert cores() == 4 and threads == ["2", "2"]


def test_nothing_else_counts_the_cores_of_the_whole_machine() -> None:
    root = Path(minicache.__file__).parent
    using = {file.name for file in root.rglob("*.py") if re.search("cpu_count|sched_getaffinity", file.read_text())}
    # `minidpo env` shows the machine as it is
    assert using == {"machine.py", "environment.py"}
