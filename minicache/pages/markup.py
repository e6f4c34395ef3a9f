"""Pages of one file that ask nothing of any network, made of the templates in this folder. No torch.

A template escapes every text it is given (autoescape) and fails where a value is missing (StrictUndefined).
"""

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING

from minicache.pages.chinese import chinese
from minicache.text import Phrase, phrase, visible

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup


@dataclass(frozen=True)
class Where:
    """The file and line of a row. pair: its number in the cache, if known; has_text: the page shows the pair's text."""

    row: str
    pair: int | None
    has_text: bool


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row is the row's header.

    numbers_from: columns from here on are numbers, and stand at the right. captioned: False where a heading above says the
    same: then only a screen reader has the caption.
    """

    caption: str
    head: list[str]
    rows: Sequence[Sequence[str | Where]]
    numbers_from: int = 1
    captioned: bool = True


def report(template: str, title: str, about: str, parts: Iterable[tuple[str, str, object]], data: object = None) -> str:
    """A page in parts. about: a line below its title. parts: name, heading, content; those without content are left out."""
    shown = {name: (heading, content) for name, heading, content in parts if content}
    return render(template, title=title, about=about, parts=shown, data=data)


def render(template: str, **values: object) -> str:
    """What a template makes of the values. data: what the page's script reads, as JSON.

    Control characters become signs here, in the finished page, so that no template can forget it.
    """
    return visible(_environment().get_template(template).render(values).replace("\r\n", "\n"))


@cache
def _environment() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    made = Environment(
        loader=FunctionLoader(_source),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["source"] = lambda name: Markup(_source(name))
    made.globals.update(phrase=phrase, zh=_attribute, zh_of=_attribute_of_phrase, label=_label)
    made.filters["embedded"] = lambda data: Markup(embedded(data))
    made.filters["sha256"] = _sha256
    return made


def _attribute(text: str, end: str = "") -> "Markup":
    """The attribute that carries the Chinese of one of this program's texts; nothing where there is none. end: of the sentence."""
    from markupsafe import Markup

    found = chinese(text)
    return Markup("") if found is None else Markup(' data-zh="{}"').format(found + end)


def _attribute_of_phrase(value: object) -> "Markup | str":
    """As `_attribute`, of what may also be a user's text: only a phrase has Chinese."""
    return _attribute(value) if isinstance(value, Phrase) else ""


def _label(text: str) -> "Markup":
    """The name of an element for a screen reader, with its Chinese."""
    from markupsafe import Markup

    found = chinese(text)
    label = Markup(' aria-label="{}"').format(text)
    return label if found is None else label + Markup(' data-zh-label="{}"').format(found)


def _source(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sha256(text: str) -> str:
    """As a content security policy writes it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def embedded(data: object) -> str:
    """JSON that is safe inside a <script> element: nothing in it can end the element or open a comment."""
    text = json.dumps(data, ensure_ascii=False)
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text
