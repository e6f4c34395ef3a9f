"""The memory of a step of a model in shards, counted from shapes, against what each of two real processes allocates."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from minicache.scoring.head import Head
from minicache.scoring.spread import _may_part
from tests.conftest import tiny_llama
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


def test_ends_that_other_code_reads_are_no_units_of_their_own() -> None:
    def may(model: Any) -> bool:
        before = {name: each.clone() for name, each in model.state_dict().items()}
        found = _may_part(model, Head(model.lm_head, 1.0, None))
        assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
        return found

    assert may(tiny_llama())
    tied = tiny_llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    assert may(tied)
    shared = tiny_llama()
    shared.register_parameter("also", shared.lm_head.weight)
    assert not may(shared)
    read = tiny_llama()
    read.model.norm.register_forward_pre_hook(lambda *_: read.model.embed_tokens.weight[0] * 1)
    assert not _may_part(read, Head(read.lm_head, 1.0, None))
