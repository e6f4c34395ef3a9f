"""HTML that text can never break out of, and pages of one file that ask nothing of any network. Standard library only."""

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable
from importlib.resources import files
from typing import TypeAlias

from minicache.text import visible

TEMPLATE = "report.html"
EMPTY = frozenset({"br", "hr", "meta"})  # elements without an end


class Html(str):
    """Markup that is ready: it is not escaped again."""

    __slots__ = ()


Child: TypeAlias = "str | int | Iterable[Child] | None"


def e(name: str, *children: Child, **attributes: object) -> Html:
    """An element. Children that are no `Html` are text and escaped; None is left out, a list is taken apart.

    attributes: `class_` is class, `aria_label` aria-label; True stands without a value, None and False are left out.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    end = "" if name in EMPTY else f"{together(*children)}</{name}>"
    return Html(f"<{name}{written}>{end}")


def together(*children: Child) -> Html:
    return Html("".join(map(_child, children)))


def _child(child: Child) -> str:
    if child is None or isinstance(child, Html):
        return child or ""
    if isinstance(child, (str, int)):
        return escaped(str(child))
    return together(*child)


def escaped(text: str) -> str:
    """Text as it may stand in an element or an attribute; control characters as signs."""
    return html.escape(visible(text.replace("\r\n", "\n")))


def _attribute(key: str, value: object) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escaped(str(value))}"'


def table(
    caption: str, head: list[str], rows: Iterable[list[Child]], numbers_from: int = 1, captioned: bool = True
) -> Html:
    """A table that scrolls within itself where it is too wide. The first cell of a row is its header.

    numbers_from: columns from here on are numbers, and stand at the right. captioned: False where a heading above says the
    same; then only a screen reader has the caption.
    """

    def row(cells: list[Child]) -> Html:
        first = e("th", cells[0], scope="row")
        rest = [e("td", cell, class_="n" if at >= numbers_from else None) for at, cell in enumerate(cells[1:], 1)]
        return e("tr", first, rest)

    headings = [e("th", text, scope="col", class_="n" if at >= numbers_from else None) for at, text in enumerate(head)]
    title = e("caption", caption, class_=None if captioned else "hidden")
    body = e("table", title, e("thead", e("tr", headings)), e("tbody", [row(cells) for cells in rows]))
    return e("div", body, class_="scroll", role="region", aria_label=caption, tabindex="0")


def facts(pairs: Iterable[tuple[str, Child]]) -> Html:
    """Names and what they are, as a description list."""
    return e("dl", [e("div", e("dt", name), e("dd", value)) for name, value in pairs])


def page(title: str, about: str, parts: Iterable[tuple[str, str, Html | None]], data: object = None) -> str:
    """A whole page. about: a line below its title. parts: name, heading, content, if any. data: what its script reads, as JSON.

    Its policy allows the page's own style and script, by their hashes, and nothing else: no network, no attribute that runs.
    """
    template = files("minicache.pages").joinpath(TEMPLATE).read_text(encoding="utf-8")
    hashes = {kind: _hash(template, kind) for kind in ("style", "script")}
    policy = f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; base-uri 'none'; form-action 'none'"
    shown = [(name, heading, content) for name, heading, content in parts if content]
    nav = e(
        "nav", e("ul", [e("li", e("a", heading, href=f"#{name}")) for name, heading, _ in shown]), aria_label="Parts"
    )
    sections = [
        e("section", e("h2", heading), content, id=name, aria_label=heading) for name, heading, content in shown
    ]
    body = together(e("header", e("h1", title), e("p", about, class_="dim"), nav), e("main", sections))
    filled = {"POLICY": policy, "TITLE": escaped(title), "BODY": body, "DATA": embedded(data)}
    # in one pass: what a text says of {{DATA}} stays text
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda mark: filled[mark[1]], template)


def _hash(template: str, kind: str) -> str:
    """Of the element's content, as a content security policy names it."""
    (content,) = re.findall(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def embedded(data: object) -> str:
    """JSON that is safe inside a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
