"""The documentation site: `make docs` builds it from this folder's pages into site/."""

from pathlib import Path

from sphinx.application import Sphinx

HERE = Path(__file__).parent
project = "minidpo"
copyright = "Apache-2.0"
extensions = ["myst_parser"]
myst_heading_anchors = 3  # the anchors GitHub gives headings too, so that one link works in both places
html_theme = "furo"
html_title = "minidpo"
html_show_copyright = False
smartquotes = False  # they would bend the quotes of options

NAV = {
    "Tutorials": ["minimind", "minimind.zh", "messages.zh", "trl", "llama-factory"],
    "Guides": [
        "data",
        "training",
        "howto",
        "debugging",
        "compare",
        "report",
        "sweep",
        "exchange",
        "sharing",
        "cluster",
        "trackers",
    ],
    "Reference": ["commands", "api", "cache-format", "reliability", "design"],
}


def pages_by_title() -> dict[str, list[str]]:
    """The pages in the order of NAV; a page it does not name comes last, so that none is without a way to it."""
    found = {file.stem for file in HERE.glob("*.md")} - {"index"}
    named = {title: [page for page in pages if page in found] for title, pages in NAV.items()}
    named["Reference"] += sorted(found.difference(*named.values()))
    return named


def add_contents(app: Sphinx, page: str, source: list[str]) -> None:
    """The table of contents belongs to the site alone: on GitHub its directive would show as code."""
    if page == "index":
        for title, pages in pages_by_title().items():
            source[0] += "\n".join(["", "```{toctree}", ":hidden:", f":caption: {title}", "", *pages, "```", ""])


def setup(app: Sphinx) -> None:
    app.connect("source-read", add_contents)
