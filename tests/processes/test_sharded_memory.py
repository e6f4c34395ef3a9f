"""The memory of a step of a model in shards, counted from shapes, against what each of two real processes allocates."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.helpers.worlds import start_world

# family, rank of adapters, precision of the passes, checkpointing, training
CASES = [
    ("llama", 0, "float32", True, True),
    # most of it is the embedding and the head, whole while they compute
    ("large vocabulary", 0, "float32", False, True),
    ("large vocabulary, tied", 0, "bfloat16", True, True),
    ("large vocabulary", 4, "bfloat16", True, True),
    ("large vocabulary", 0, "bfloat16", False, False),
    ("large vocabulary, tied", 0, "float32", False, False),
]


@pytest.mark.slow
def test_a_step_of_shards_takes_what_its_shapes_say(tmp_path: Path) -> None:
    processes = start_world(2, "-m", "tests.processes.memory_worker", tmp_path / "found.json", stderr=subprocess.PIPE)
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert not any(process.returncode for process in processes), errors[0][-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == len(CASES)
    assert all(0.9 < ratio < 1.1 for ratio in found), found
