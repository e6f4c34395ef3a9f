"""A card of the Hub: a README.md with YAML front matter. One that a person has changed is told from one as it was written."""

import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import Any

from minicache.text import visible

FILE = "README.md"
MARK = "<!-- written by minidpo, digest {}: a card that was changed afterwards is kept -->\n"
FOUND = re.compile(MARK.replace("{}", "([0-9a-f]{32})").replace("\n", "\r?\n"))


def card(front: Mapping[str, Any], title: str, parts: Iterable[str | None]) -> str:
    """The text of a card. front: its front matter, of which empty values are left out. parts: those that are None likewise."""
    import yaml

    filled = {name: value for name, value in front.items() if value not in (None, [], "")}
    head = yaml.safe_dump(filled, sort_keys=False, allow_unicode=True, width=10_000)
    body = "\n\n".join(part.strip() for part in [f"# {plain(title)}", *filter(None, parts)])
    return _marked(f"---\n{head}---\n", f"\n{visible(body)}\n")


def is_unchanged(text: str) -> bool:
    """Whether a card is as this program wrote it, in any version."""
    found = FOUND.search(text)
    if not found:
        return False
    return found[1] == _digest(text[: found.start()], text[found.end() :])


def _marked(head: str, body: str) -> str:
    return head + MARK.format(_digest(head, body)) + body


def _digest(head: str, body: str) -> str:
    return blake2b((head + body).replace("\r\n", "\n").encode(), digest_size=16).hexdigest()


# --- Markdown ---


def plain(text: object) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]|#~<>$&])", r"\\\1", " ".join(str(text).split()))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; cells may hold Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def facts(rows: Iterable[tuple[str, object]]) -> str:
    """A table of names and values without headings."""
    return table(["", ""], rows)


def code(text: object) -> str:
    """Text as code, in a table too."""
    shown = " ".join(str(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`" if shown else ""


def link(name: str, address: str) -> str:
    return f"[{plain(name)}]({address})"
