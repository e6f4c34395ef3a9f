"""Somebody else's run directory: `train --resume` reads what its checkpoints say, and runs none of it."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from minicache.errors import OutputError
from minicache.training import checkpoints
from minicache.training.run_directory import read_record
from minicache.training.shard_index import INDEX, read_index
from tests.conftest import Cli
from tests.training.test_resume import killed_at, run


class Evil:
    """Makes a file when it is unpickled by somebody who trusts it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture(scope="module")
def stopped(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after a checkpoint."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 41, ref_cache, out)
    return out


@pytest.fixture
def theirs(stopped: Path, tmp_path: Path) -> Path:
    return shutil.copytree(stopped, tmp_path / "run")


def newest(out: Path) -> Path:
    return checkpoints.place(out, checkpoints.steps(out)[-1])


def index_of(out: Path) -> tuple[Path, Metadata]:
    file = newest(out) / checkpoints.OPTIMIZER / INDEX
    return file, pickle.loads(file.read_bytes())


def whole_is_evil(index: Metadata, marker: Path) -> Any:
    return Evil(marker)


def plan_is_evil(index: Metadata, marker: Path) -> Any:
    index.planner_data = Evil(marker)
    return index


def outside(marker: Path) -> Path:
    """A copy of the shard outside the run directory, which torch would read without a word."""
    (shard,) = marker.parent.glob("run/checkpoints/*/optimizer/__0_0.distcp")
    return Path(shutil.copy(shard, marker.parent / "outside.distcp"))


def path_is_evil(index: Metadata, marker: Path) -> Any:
    next(iter(index.storage_data.values())).relative_path = f"../../../../{outside(marker).name}"
    return index


def absolute_path(index: Metadata, marker: Path) -> Any:
    next(iter(index.storage_data.values())).relative_path = str(outside(marker))
    return index


def bytes_are_evil(index: Metadata, marker: Path) -> Any:
    """An entry that torch would read by torch.load, with everything allowed."""
    name = next(iter(index.state_dict_metadata))
    index.state_dict_metadata[name] = BytesStorageMetadata()
    return index


def transformed(index: Metadata, marker: Path) -> Any:
    next(iter(index.storage_data.values())).transform_descriptors = ["zstd"]
    return index


def negative(index: Metadata, marker: Path) -> Any:
    next(iter(index.storage_data.values())).offset = -1
    return index


CRAFTED = [whole_is_evil, plan_is_evil, path_is_evil, absolute_path, bytes_are_evil, transformed, negative]


@pytest.mark.parametrize("craft", CRAFTED)
def test_a_crafted_index_is_refused_and_nothing_in_it_runs(
    theirs: Path, ref_cache: Path, tmp_path: Path, craft: Callable[[Metadata, Path], Any]
) -> None:
    marker = tmp_path / "marker"
    file, index = index_of(theirs)
    file.write_bytes(pickle.dumps(craft(index, marker)))
    with pytest.raises(OutputError, match="the checkpoint cannot be read") as error:
        run(ref_cache, theirs, resume=True)
    assert "\n" not in str(error.value) and str(file.parent) in str(error.value)
    assert not marker.exists()


def test_nothing_in_an_index_changes_torchs_own_classes(tmp_path: Path) -> None:
    """A pickle may set attributes of what it names, of a class as well."""
    file, before = tmp_path / INDEX, TensorStorageMetadata.__init__
    for name in ("TensorStorageMetadata", "TensorProperties", "MetadataIndex"):
        named = f"ctorch.distributed.checkpoint.metadata\n{name}\n".encode()
        file.write_bytes(named + b"(N}S'__init__'\nI1\nstb.")
        with pytest.raises(ValueError, match="metadata"):
            read_index(file)
        file.write_bytes(named + b"}S'__init__'\nI1\nsb.")
        with pytest.raises(ValueError, match="metadata"):
            read_index(file)
    assert TensorStorageMetadata.__init__ is before


SIZED = """
import resource, sys
from minicache.training.shard_index import read_index
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_index(__import__("pathlib").Path(sys.argv[1]))
except ValueError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def layers_of_tuples(names: int) -> bytes:
    """A tuple of two tuples of two tuples, as a pickle: each layer is a few bytes."""
    return b"N" + b"".join(b"q" + bytes([at]) + b"h" + bytes([at]) + b"\x86" for at in range(names))


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02Nr\xff\xff\xff\x07.",
        b"\x80\x02ctorch.serialization\n_get_layout\n" + layers_of_tuples(60) + b"\x85R.",
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}X\x13\0\0\0state_dict_metadata"
        + layers_of_tuples(60)
        + b"sb.",
    ],
    ids=["a large number", "text of tuples", "tuples for a dict"],
)
def test_a_few_bytes_of_an_index_take_no_memory(tmp_path: Path, content: bytes) -> None:
    """What the pickle gives a number of 2**27 took 2 GB."""
    (tmp_path / INDEX).write_bytes(content)
    command = [sys.executable, "-c", SIZED, str(tmp_path / INDEX)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    line, kilobytes = done.stdout.splitlines()
    assert INDEX in line and int(kilobytes) < 100_000, done.stdout


@pytest.mark.parametrize("where", ["progress", "means"])
def test_a_state_of_endless_lists_is_refused(theirs: Path, ref_cache: Path, where: str) -> None:
    endless: Any = "x"
    for _ in range(60):
        endless = [endless, endless]
    file = newest(theirs) / checkpoints.STATE
    value = {"step": endless} if where == "progress" else endless
    torch.save({**torch.load(file, weights_only=True), where: value}, file)
    with pytest.raises(OutputError, match="the checkpoint cannot be read"):
        run(ref_cache, theirs, resume=True)


def test_what_is_read_of_an_honest_index_is_what_torch_reads(stopped: Path) -> None:
    file, theirs = index_of(stopped)
    ours = read_index(file)
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    assert len(ours.storage_data) > 10


@pytest.mark.parametrize("cut", [0, 1, 100, 1000])
def test_an_index_that_was_cut_is_refused(theirs: Path, ref_cache: Path, cut: int) -> None:
    file, _ = index_of(theirs)
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(OutputError, match="the checkpoint cannot be read"):
        run(ref_cache, theirs, resume=True)


def test_a_shard_that_holds_a_payload_is_refused_and_nothing_in_it_runs(
    theirs: Path, ref_cache: Path, tmp_path: Path
) -> None:
    """Each tensor in a shard is a file of torch.save of its own, at the place that the index says."""
    marker = tmp_path / "marker"
    file, index = index_of(theirs)
    with BytesIO() as stream:
        torch.save(Evil(marker), stream)
        payload = stream.getvalue()
    shard = file.with_name("__0_0.distcp")
    for place in index.storage_data.values():
        place.offset, place.length = shard.stat().st_size, len(payload)
    shard.write_bytes(shard.read_bytes() + payload)
    file.write_bytes(pickle.dumps(index))
    with pytest.raises(OutputError, match="the checkpoint cannot be read") as error:
        run(ref_cache, theirs, resume=True)
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize(
    "name", [checkpoints.STATE, f"{checkpoints.OPTIMIZER}/{INDEX}", f"{checkpoints.OPTIMIZER}/__0_0.distcp"]
)
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused_and_not_waited_for(theirs: Path, ref_cache: Path, name: str, kind: str) -> None:
    file = newest(theirs) / name
    file.unlink()
    if kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero")
    with pytest.raises(OutputError, match=r"the checkpoint cannot be read .*expected a file"):
        run(ref_cache, theirs, resume=True)


def test_a_run_whose_record_is_a_pipe_is_no_run(theirs: Path, ref_cache: Path) -> None:
    (theirs / "run.json").unlink()
    os.mkfifo(theirs / "run.json")
    with pytest.raises(OutputError, match="is no run"):
        run(ref_cache, theirs, resume=True)


@pytest.mark.parametrize("changed", [{"seed": "x"}, {"model": 3}, {"ref_cache": 5}, {"steps": 2**64}])
def test_a_record_with_other_numbers_is_one_line(theirs: Path, ref_cache: Path, changed: dict[str, Any]) -> None:
    file = theirs / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    with pytest.raises(OutputError, match="not as `train` writes it") as error:
        read_record(theirs)
    assert "\n" not in str(error.value)


def test_a_seed_that_no_generator_takes_is_one_line(theirs: Path, ref_cache: Path, cli: Cli) -> None:
    file = theirs / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "seed": 2**64}))
    code, _, err = cli("train", "--ref-cache", ref_cache, "--out", theirs, "--resume")
    assert code == 1 and "seed: expected 0 to 9223372036854775807" in " ".join(err.split())


@pytest.mark.parametrize("name", sorted(checkpoints.ENTRIES))
@pytest.mark.parametrize("kind", ["evil", "absent", "list"])
def test_a_crafted_state_is_refused_and_nothing_in_it_runs(
    theirs: Path, ref_cache: Path, tmp_path: Path, name: str, kind: str
) -> None:
    marker, file = tmp_path / "marker", newest(theirs) / checkpoints.STATE
    state = torch.load(file, weights_only=True)
    del state[name]
    if kind != "absent":
        state[name] = Evil(marker) if kind == "evil" else [1, 2]
    torch.save(state, file)
    with pytest.raises(OutputError, match="the checkpoint cannot be read") as error:
        run(ref_cache, theirs, resume=True)
    assert "\n" not in str(error.value) and not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        {"progress": {"step": 3}},
        {"progress": {"step": -4}},
        {"progress": {"step": 4, "best": "low"}},
        {"means": torch.zeros(3)},
        {"rng": torch.zeros(3)},
        {"optimizer": {"state": {}}},
    ],
)
def test_a_state_that_does_not_fit_is_refused(theirs: Path, ref_cache: Path, change: dict[str, Any]) -> None:
    file = newest(theirs) / checkpoints.STATE
    torch.save({**torch.load(file, weights_only=True), **change}, file)
    with pytest.raises(OutputError, match="the checkpoint cannot be read") as error:
        run(ref_cache, theirs, resume=True)
    assert "\n" not in str(error.value)
