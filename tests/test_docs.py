"""The documentation: no link leads nowhere, the command reference is the program's own, the two READMEs keep step."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([^)\s]*))?\)")


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


def test_the_command_reference_is_what_the_program_says() -> None:
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.reference() == module.PAGE.read_text(encoding="utf-8"), "run make commands"


def test_the_readmes_have_the_same_sections_commands_and_links() -> None:
    english, chinese = (ROOT / name for name in ("README.md", "README.zh.md"))

    def shape(page: Path) -> tuple[int, list[str], set[str]]:
        text = page.read_text(encoding="utf-8")
        first_cells = "\n".join(re.findall(r"^\| (.*?) \|", text, re.MULTILINE))
        links = {target.replace(".zh.md", ".md") for target, _ in LINK.findall(prose(page))} - {"README.md"}
        return text.count("\n## "), re.findall("`(.*?)`", first_cells), links

    assert shape(english) == shape(chinese)


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
