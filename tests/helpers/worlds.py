"""Several real processes over gloo, started as `--nproc` starts them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from minicache.processes.launch import meeting

ROOT = Path(__file__).parents[2]


def start_world(size: int, *words: object, per_node: int | None = None, **options: Any) -> list[subprocess.Popen[str]]:
    """The processes of `python WORDS…`, by rank."""
    command = [sys.executable, *map(str, words)]
    with meeting(size, per_node) as ranks:
        return [
            subprocess.Popen(
                command,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                pass_fds=inherited,
                text=True,
                cwd=ROOT,
                **options,
            )
            for environment, inherited in ranks
        ]
