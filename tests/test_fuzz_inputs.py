"""What reads files of others, given what once was a fault: see tests/fuzz."""

from pathlib import Path

import pytest

from tests.fuzz.targets import Target, kept, made

KEPT = kept(Path(__file__).parent / "fuzz" / "kept")


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return made(tmp_path_factory.mktemp("targets"))


def test_every_target_reads_what_it_begins_with(targets: dict[str, Target], tmp_path: Path) -> None:
    """And what is empty, or cut somewhere."""
    for target in targets.values():
        target.read(target.inputs[0], tmp_path)
        for content in target.inputs:
            target(content, tmp_path)
            for part in (b"", content[:1], content[: len(content) // 2], content[: len(content) - 3], bytes(20)):
                target(part, tmp_path)


@pytest.mark.parametrize(("name", "content"), KEPT, ids=[f"{name}-{number}" for number, (name, _) in enumerate(KEPT)])
def test_what_once_was_a_fault(targets: dict[str, Target], tmp_path: Path, name: str, content: bytes) -> None:
    targets[name](content, tmp_path)
