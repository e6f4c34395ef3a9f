"""Numbers that no run and no cache has, at each place where one stands: a result, or one line."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Cli
from tests.torture.conftest import Orderly
from tests.torture.test_run import flags, whole

__all__ = ["whole"]  # a fixture
WILD = {
    "400 digits": "1" * 400,
    "minus 400 digits": "-" + "1" * 400,
    "1e308": "1e308",
    "NaN": "NaN",
    "2**63": str(2**63),
    "-1": "-1",
    "0": "0",
    "text": '"7"',
    "an object": '{"3": 3}',
}
MARK = "here comes the number"


def numbers_of(facts: Any) -> Iterator[tuple[tuple[Any, ...], float]]:
    """Each number in it with the keys that lead there."""
    if isinstance(facts, dict | list):
        for key, value in facts.items() if isinstance(facts, dict) else enumerate(facts):
            yield from (((key, *rest), number) for rest, number in numbers_of(value))
    elif isinstance(facts, int | float) and not isinstance(facts, bool):
        yield (), facts


def with_number(facts: Any, keys: tuple[Any, ...], text: str) -> str:
    """As JSON, with the text in place of the number that these keys lead to."""
    changed = json.loads(json.dumps(facts))
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = MARK
    return json.dumps(changed).replace(f'"{MARK}"', text)


def tried(file: Path, facts: Any, text: str, commands: Callable[[], object]) -> None:
    places = [keys for keys, _ in numbers_of(facts)]
    assert places
    for keys in places:
        file.write_text(with_number(facts, keys, text) + "\n")
        try:
            commands()
        except Exception as error:
            raise AssertionError(f"{file.name}: {keys} is {text[:20]}") from error


@pytest.mark.parametrize("wild", WILD)
def test_in_run_json(whole: Path, ref_cache: Path, tmp_path: Path, orderly: Orderly, wild: str) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    facts = json.loads((run / "run.json").read_text())

    def commands() -> None:
        orderly("report", run, "--out", tmp_path / "page.html")
        orderly("evaluate", "--policy", run, "--ref-cache", ref_cache)
        orderly("train", *flags(ref_cache, run), "--resume")

    tried(run / "run.json", facts, WILD[wild], commands)


@pytest.mark.parametrize("wild", WILD)
def test_in_a_line_of_metrics(whole: Path, tmp_path: Path, orderly: Orderly, wild: str) -> None:
    run = shutil.copytree(whole, tmp_path / "run")
    first, *others = (run / "metrics.jsonl").read_text().splitlines()
    file = run / "metrics.jsonl"
    page, picture = tmp_path / "page.html", tmp_path / "plot.svg"

    def commands() -> None:
        file.write_text("\n".join([file.read_text().strip(), *others]) + "\n")
        orderly("report", run, "--out", page)
        orderly("plot", run, "--out", picture)

    tried(file, json.loads(first), WILD[wild], commands)


@pytest.mark.parametrize("wild", WILD)
def test_in_the_manifest(small: tuple[Path, Path], tmp_path: Path, orderly: Orderly, wild: str) -> None:
    cache = shutil.copytree(small[0], tmp_path / "cache")
    facts = json.loads((cache / "zarr.json").read_text())

    def commands() -> None:
        orderly("inspect-cache", cache)
        orderly("export", "--ref-cache", cache, "--out", tmp_path / "table.jsonl")
        (tmp_path / "table.jsonl").unlink(missing_ok=True)

    tried(cache / "zarr.json", facts, WILD[wild], commands)


@pytest.mark.parametrize("wild", WILD)
def test_in_sweep_json(ref_cache: Path, tmp_path: Path, orderly: Orderly, wild: str) -> None:
    call = ["sweep", "--ref-cache", ref_cache, "--beta", "0.1,1", "--max-steps", 1, "--holdout", 0.2]
    call += ["--out", tmp_path / "sweep"]
    assert orderly(*call) == (0, "")
    file = tmp_path / "sweep" / "sweep.json"
    facts = json.loads(file.read_text())
    file.write_text(with_number(facts, ("reference_pairs_per_second",), WILD[wild]))
    orderly(*call)


@pytest.mark.parametrize("value", ["1e300", "1e18", "9" * 400, "inf", "nan", "-0", "1e-320", "1_0", "٣"])
@pytest.mark.parametrize("option", ["epochs", "lr", "beta", "warmup", "max-steps", "seed", "batch-size", "holdout"])
def test_in_an_option(ref_cache: Path, tmp_path: Path, cli: Cli, option: str, value: str) -> None:
    """Refused in one line or as a wrong use before anything begins, or done."""
    steps = [] if option == "max-steps" else ["--max-steps", 1]
    if option == "max-steps" and value == "٣":
        return
    code, _, said = cli("train", "--ref-cache", ref_cache, "--out", tmp_path / "run", *steps, f"--{option}", value)
    assert (code, said.count("error: "), "Usage: " in said) in {(0, 0, False), (1, 1, False), (2, 0, True)}, said
