"""What reads files of others, given what once was a fault: see tests/fuzz."""

from pathlib import Path

import pytest

from minicache.data.files import read_rows
from minicache.data.formats import FORMATS
from tests.fuzz.targets import SUFFIXES, Target, forms, kept, made

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


def test_rows_of_every_form_and_tables_of_every_kind_are_begun_with(targets: dict[str, Target], tmp_path: Path) -> None:
    """Each is read as what it is."""
    seen = {
        name for row in forms() for name, known in FORMATS.items() if known.fields <= row.keys() and known.fits(row)
    }
    assert seen == set(FORMATS)
    for content in targets["rows"].inputs:
        file = tmp_path / f"rows{SUFFIXES[content[0]]}"
        file.write_bytes(content[1:])
        found = [row for _, row in read_rows(str(file))]
        assert found and all(isinstance(row, dict) for row in found), content[:60]
    assert {content[0] for content in targets["rows"].inputs} == set(range(len(SUFFIXES)))
    for content in targets["table"].inputs:
        targets["table"].read(content, tmp_path)
