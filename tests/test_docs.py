"""The documentation: no link or path leads nowhere, the command reference is the program's own, the two READMEs keep step."""

import importlib.util
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from minicache.cli import app
from tests.torture.table import BEGIN, END, section

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md"), *(ROOT / ".github").rglob("*.md")])
MOST_WIDE = 120  # characters of a line of prose; README_LINES: five minutes of reading
README_LINES = 120
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]*))?\)")
TARGET = re.compile(r"\]\([^)]*\)")
PATH = re.compile(r"`((?:minicache|tests|benchmarks|examples|docs)/[\w./*{}-]*)`")


def prose(page: Path) -> str:
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target, anchor in LINK.findall(prose(page)):
        file = page.parent / target if target else page
        assert file.exists(), f"{page.name}: no {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: no #{anchor} in {file.name}"
        if page.parent == DOCS and file.suffix == ".md":
            assert file.resolve().parent == DOCS, f"{page.name}: {target} is no part of the site"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_that_is_named_exists(page: Path) -> None:
    for path in PATH.findall(page.read_text(encoding="utf-8")):
        assert list(ROOT.glob(path.rstrip("/"))), f"{page.name}: no {path}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "commands.md"], ids=lambda page: page.name)
def test_a_change_of_a_page_shows_as_a_change_of_few_words(page: Path) -> None:
    """Lines are short, but for tables, code and what is long because of an address."""
    for number, line in enumerate(prose(page).splitlines(), start=1):
        is_prose = line and not line.startswith(("|", "    ", "<!--"))
        if is_prose and len(line) > MOST_WIDE:
            assert len(TARGET.sub("]", line)) <= MOST_WIDE, (
                f"{page.name}: {len(line)} characters: {line[:60]} (line {number})"
            )


def test_the_command_reference_is_what_the_program_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.reference() == module.PAGE.read_text(encoding="utf-8"), "run make commands"
    assert module.names() == module.NAMES.read_text(encoding="utf-8"), "run make commands"


def test_the_readmes_have_the_same_sections_commands_and_links() -> None:
    english, chinese = (ROOT / name for name in ("README.md", "README.zh.md"))

    def shape(page: Path) -> tuple[int, list[str], list[int], set[str]]:
        text = page.read_text(encoding="utf-8")
        first_cells = "\n".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))
        rows = [section.count("\n|") for section in text.split("\n## ")]
        links = {target.replace(".zh.md", ".md") for target, _ in LINK.findall(prose(page))} - {"README.md"}
        return text.count("\n## "), re.findall("`(.*?)`", first_cells), rows, links

    assert shape(english) == shape(chinese)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_a_readme_takes_five_minutes(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) <= README_LINES


def readme_figures(name: str) -> list[str]:
    """The numbers of the table of what was measured: all with a unit or a fraction."""
    section = (ROOT / name).read_text(encoding="utf-8").split("\n## ")[1]
    cells = [cell for row in re.findall(r"^\| (.*) \|$", section, re.MULTILINE)[2:] for cell in row.split(" | ")[1:3]]
    return re.findall(r"\d+(?:\.\d+)?", " ".join(cells))


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_figures_of_the_readme_are_those_of_the_benchmark(name: str) -> None:
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    figures = readme_figures(name)
    assert len(figures) == 10
    for figure in figures:
        assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.])", results), (
            f"{figure} is not in benchmarks/RESULTS.md"
        )


def test_the_figures_of_reliability_are_those_of_the_torture() -> None:
    page = (DOCS / "reliability.md").read_text(encoding="utf-8")
    assert f"{BEGIN}{section()}{END}" in page, "python -m tests.torture.table"


def test_the_tests_that_security_names_are_there() -> None:
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8")))
    assert len(named) > 20 and named <= {file.stem for file in (ROOT / "tests").rglob("test_*.py")}


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="the docs extra is not installed")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "--nitpicky", "--quiet", "--fresh-env"]
    done = subprocess.run([*command, DOCS, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {file.stem for file in DOCS.glob("*.md")}
    assert pages <= {file.stem for file in tmp_path.glob("*.html")}
    contents = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{page}.html"' in contents for page in pages - {"index"})


def shell_commands(page: Path) -> list[list[str]]:
    """The words of each command in a page's blocks of shell, lines that go on joined, comments left out."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    whole = [block.replace("\\\n", " ").replace("…", "") for block in blocks]
    # a text in quotes may have several lines
    lines = [
        line
        for block in whole
        for line in re.sub(r"'[^']*'", lambda text: text[0].replace("\n", " "), block).splitlines()
    ]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_can_be_typed_as_they_stand(page: Path) -> None:
    """Each begins with a program, and has options that its command knows."""
    known = get_command(app).commands  # type: ignore[attr-defined]
    for words in shell_commands(page):
        assert re.match(r"[a-z~.][\w./~-]*$|[A-Za-z_]+=", words[0]), f"{page.name}: no program: {' '.join(words)}"
        at = next((place for place, word in enumerate(words) if word in ("minidpo", "minicache")), None)
        if at is None or words[at + 1].startswith("-"):
            continue
        options = {
            name for parameter in known[words[at + 1]].params for name in [*parameter.opts, *parameter.secondary_opts]
        }
        given = {word.partition("=")[0] for word in words[at + 2 :] if word.startswith("--")}
        assert given <= {*options, "--help"}, f"{page.name}: {given - options} in {' '.join(words)}"
