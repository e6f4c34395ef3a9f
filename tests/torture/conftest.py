"""A small cache and a short run to damage, and what every command owes a user whatever was done to them."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Cli, make_rows, precompute_into, write_jsonl
from tests.torture.counting import known

PAIRS, BLOCK = 10, 4
Orderly = Callable[..., tuple[int, str]]
StageOne = Callable[..., tuple[int, str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Hours of work may be interrupted: what stands in the table already, without a problem, is not made again."""
    done = known(Path(os.environ.get("TORTURE_TABLE", os.devnull)))
    items[:] = [item for item in items if done.get(item.nodeid, {"problems": 1})["problems"]]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> tuple[Path, Path]:
    """A cache of three blocks with every array there is, and its data. Copy it before changing it."""
    place = tmp_path_factory.mktemp("small")
    data = write_jsonl(place / "data.jsonl", make_rows(PAIRS))
    return precompute_into(place / "cache", model_dir, data, block_pairs=BLOCK, per_token=True), data


@pytest.fixture
def orderly(cli: Cli) -> Orderly:
    """Run a command: it works, or says one line and nothing else. (exit code, that line).

    Any exception that is not one of ours fails the test: `cli` raises it.
    """

    def run(*arguments: object) -> tuple[int, str]:
        code, out, err = cli(*arguments)
        said = [line.removeprefix("error: ") for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in out + err
        assert (code, len(said)) in {(0, 0), (1, 1)}, (code, err)
        return code, "".join(said)

    return run


@pytest.fixture
def stage_one(orderly: Orderly, model_dir: Path, small: tuple[Path, Path]) -> StageOne:
    """The command that made `small`, on a cache."""

    def run(cache: object, *options: object, model: Path = model_dir) -> tuple[int, str]:
        given = ["--model", model, "--data", small[1], "--ref-cache", cache, "--block-pairs", BLOCK, "--per-token"]
        return orderly("precompute-ref", *given, *options)

    return run
