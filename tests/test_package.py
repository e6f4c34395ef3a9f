"""What is handed out: the wheel and the source archive hold the package and its data files, and nothing else.

`make package` builds both, and runs the wheel's program in an environment that holds nothing but it.
"""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("minicache", "tests/test_package.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SPOKEN = ("*.md", "*.py", "*.toml", "*.cff", "*.yml", "*.yaml", "Makefile")
STRANGER = re.compile(r"pip install[^`\n]*\bminicache\b|\bminicache\[\w")


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The source archive, and the wheel that is built from it, of a copy of the tree."""
    for module in ("build", "setuptools"):
        pytest.importorskip(module, reason="needs build and setuptools: pip install '.[dev]'")
    copy, dist = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    for name in SOURCES:
        source, target = ROOT / name, copy / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (source_archive,), (wheel,) = dist.glob("*.tar.gz"), dist.glob("*.whl")
    return source_archive, wheel


def files_of_the_package() -> set[str]:
    files = (file for file in (ROOT / "minicache").rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {str(file.relative_to(ROOT)) for file in files}


@pytest.mark.slow
def test_the_wheel_holds_the_package_with_its_data_files_and_no_tests(archives: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
        metadata = wheel.read(f"minidpo-{PROJECT['version']}.dist-info/METADATA").decode()
        commands = wheel.read(f"minidpo-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in names} == {"minicache", f"minidpo-{PROJECT['version']}.dist-info"}
    assert {name for name in names if name.startswith("minicache/")} == files_of_the_package()
    assert {"minicache/py.typed", "minicache/sample/train.jsonl"} <= names
    assert "\nName: minidpo\n" in metadata and "minidpo = minicache.cli:main" in commands


@pytest.mark.slow
def test_the_source_archive_holds_the_package_and_no_tests(archives: tuple[Path, Path]) -> None:
    with tarfile.open(archives[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_package() <= names and {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]


def test_the_version_is_the_same_everywhere() -> None:
    import minicache

    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert PROJECT["version"] == minicache.__version__
    assert f"\nversion: {PROJECT['version']}\n" in citation
    assert f"\n## {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("[", "").replace(
        "]", ""
    )


def test_nothing_tells_users_to_install_a_stranger_s_package() -> None:
    """On the public index `minicache` is a package of 2016 that has nothing to do with this one."""
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for pattern in SPOKEN
        for file in ROOT.rglob(pattern)
        if not {".venv", "demo", "build", "site", "dist"} & set(file.relative_to(ROOT).parts) and file != Path(__file__)
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
        if STRANGER.search(line)
    ]
    assert not found, found


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_an_extra_names_this_distribution_only(extra: str) -> None:
    own = [needed for needed in PROJECT["optional-dependencies"][extra] if needed.startswith(("mini", PROJECT["name"]))]
    for needed in own:
        name, _, extras = needed.rstrip("]").partition("[")
        assert name == PROJECT["name"] and set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
