"""A run directory damaged in every way: `train --resume`, `evaluate`, `plot` and `export` work, or say one line."""

import json
import shutil
from pathlib import Path

import pytest

from tests.cache.test_cache import DAMAGE
from tests.helpers.runs import assert_same_files
from tests.torture.conftest import Orderly
from tests.torture.counting import asserted
from tests.training.test_resume import SETTINGS, killed_at
from tests.training.test_resume import run as train_run

FACTS = [b"", b"{", b"null", b"[]", b'"x"', b"{}", b"\xff\xfe{}", bytes(100), b"[" * 100_000, b'{"loss": 3}']


@pytest.fixture(scope="session")
def stopped(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after two checkpoints."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 60, ref_cache, out)
    return out


@pytest.fixture(scope="session")
def whole(ref_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    train_run(ref_cache, out)
    return out


def flags(ref_cache: Path, out: Path) -> list[str]:
    given = {"ref-cache": ref_cache, "out": out, **SETTINGS}
    return [word for name, value in given.items() for word in ("--" + name.replace("_", "-"), str(value))]


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_file_of_the_newest_checkpoint(
    stopped: Path, whole: Path, ref_cache: Path, tmp_path: Path, orderly: Orderly, damage: str
) -> None:
    """It is named, and without it the run goes on from the one before to the same end; or the damage did not matter."""
    newest = max((stopped / "checkpoints").iterdir())
    refused = 0
    figures = asserted(f"each file of a checkpoint damaged: {damage}")
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        with figures.trial(faults=1):
            out = shutil.copytree(stopped, tmp_path / "run")
            DAMAGE[damage](out / file.relative_to(stopped))
            code, said = orderly("train", *flags(ref_cache, out), "--resume")
            if code:
                refused += 1
                assert newest.name in said, (file, said)
                shutil.rmtree(out / newest.relative_to(stopped))
                assert orderly("train", *flags(ref_cache, out), "--resume") == (0, "")
            # a checkpoint's files have no digests: a bit of a tensor goes unseen, and transformers does without this config
            is_seen = file.suffix not in (".safetensors", ".distcp") or damage != "flip"
            if code or (is_seen and file.name != "generation_config.json"):
                assert_same_files(whole, out)
            shutil.rmtree(out)
    assert refused >= (2 if damage == "flip" else 4)
    figures.end()


@pytest.mark.parametrize("content", FACTS)
def test_run_json(
    whole: Path, stopped: Path, ref_cache: Path, tmp_path: Path, orderly: Orderly, content: bytes
) -> None:
    for name, source in (("whole", whole), ("stopped", stopped)):
        out = shutil.copytree(source, tmp_path / name)
        (out / "run.json").write_bytes(content)
        assert orderly("train", *flags(ref_cache, out), "--resume")[0] == 1
        orderly("train", "--out", out, "--resume")
        orderly("evaluate", "--policy", out, "--ref-cache", ref_cache)
        orderly("compare", "--policy", out, "--prompt", "why", "--max-new-tokens", 2)
        orderly("export", "--policy", out, "--out", tmp_path / f"{name}-export")


@pytest.mark.parametrize("entry", ["absent", None, "x", [], {}, -1])
def test_every_entry_of_run_json(whole: Path, ref_cache: Path, tmp_path: Path, orderly: Orderly, entry: object) -> None:
    facts = json.loads((whole / "run.json").read_text())
    out = shutil.copytree(whole, tmp_path / "run")
    for name in facts:
        changed = {
            key: value if key != name else entry for key, value in facts.items() if key != name or entry != "absent"
        }
        (out / "run.json").write_text(json.dumps(changed))
        orderly("train", *flags(ref_cache, out), "--resume")
        orderly("evaluate", "--policy", out, "--ref-cache", ref_cache)


def test_metrics_cut_anywhere(stopped: Path, whole: Path, ref_cache: Path, tmp_path: Path, orderly: Orderly) -> None:
    """At any byte of its last lines, or with what a power loss leaves: the lines after the checkpoint are written anew."""
    journal = (stopped / "metrics.jsonl").read_bytes()
    cuts = [journal[: len(journal) - cut] for cut in (1, 2, 50, 300, len(journal) - 1)]
    for number, content in enumerate(
        [*cuts, journal + bytes(50), journal + b"\xff\n", journal + b"null\n3\n[]\n{}\n", b""]
    ):
        out = shutil.copytree(stopped, tmp_path / str(number))
        (out / "metrics.jsonl").write_bytes(content)
        orderly("plot", out, "--out", tmp_path / "before.svg")
        assert orderly("train", *flags(ref_cache, out), "--resume") == (0, "")
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        kept = {
            line["step"]: line["loss"] for line in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
        }
        assert lines and all(kept[line["step"]] == line["loss"] for line in lines)
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines})
        assert orderly("plot", out, "--out", tmp_path / "after.svg") == (0, "")


def test_the_model_of_a_finished_run(whole: Path, ref_cache: Path, tmp_path: Path, orderly: Orderly) -> None:
    for file in sorted(path for path in (whole / "model").rglob("*") if path.is_file()):
        for damage, change in DAMAGE.items():
            out = shutil.copytree(whole, tmp_path / "run")
            change(out / file.relative_to(whole))
            code, said = orderly("evaluate", "--policy", out, "--ref-cache", ref_cache)
            assert code or file.suffix != ".safetensors" or damage == "flip", (file, damage, said)
            orderly("compare", "--policy", out, "--prompt", "why", "--max-new-tokens", 2)
            shutil.rmtree(out)
