"""Text for a terminal, a page or a message, and the one function that it passes on its way there: `visible`."""

import codecs
import io
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

# Signs that this program prints and some encodings lack, and what stands for them there: GBK has no check mark.
PLAIN = {
    **dict.fromkeys("✓╭╮╰╯┌┐└┘├┤┬┴┼", "+"), "✗": "x", "×": "x", "→": ">", "…": ".", "·": ".", "⟦": "[", "⟧": "]",
    **dict.fromkeys("–—−─━╶╴╸╺░", "-"), **dict.fromkeys("│┃", "|"), **dict.fromkeys("▏▎▍▌▋▊▉█", "#"),
}  # fmt: skip
# What a terminal obeys, turns text around or breaks a line: C0 but for tab and line feed, DEL, C1, the marks of direction
# (Unicode's Bidi_Control), the separators of lines and paragraphs; and surrogates, which no encoding has: a file's name that is
# not UTF-8 holds some.
UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def guard_output() -> None:
    """Let stdout and stderr show control characters, and replace what their encoding lacks, as of a pipe on Windows."""
    codecs.register_error("minidpo", _plain)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="minidpo")
            setattr(sys, name, GuardedStream(stream))


class GuardedStream:
    """stdout or stderr for whoever writes there: libraries, Python's warnings and tracebacks, logging.

    Consoles of rich write past it: `minicache.screen.console` guards theirs, in which rich's own colours are to stay.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        # the name by which rich finds what is behind a stream
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        self.rich_proxied_file.write(visible(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(each, "?") for each in error.object[error.start : error.end]), error.end


class Phrase(str):
    """One of this program's own texts, which a page can show in another language. template, values: what it was made of."""

    template: str
    values: dict[str, object]


def phrase(template: str, /, **values: object) -> Phrase:
    """The template, as of `str.format`, with the values in it; without values the text as it is."""
    if isinstance(template, Phrase):
        return template
    made = Phrase(template.format(**values) if values else template)
    made.template, made.values = template, values
    return made


def joined(separator: str, parts: Sequence[str]) -> Phrase:
    """As `separator.join`, of texts that are phrases or hold them."""
    named = {f"part{number}": text for number, text in enumerate(parts)}
    return phrase(separator.join(f"{{{name}}}" for name in named), **named)


def read_back(text: str, templates: Iterable[str]) -> str:
    """A text of a file as a phrase again, if it was made of one of the templates; else as it is."""
    for template in templates:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.+)", re.escape(template))
        if found := re.fullmatch(pattern, text):
            return phrase(template, **found.groupdict())
    return text


def visible(text: str) -> str:
    """The text with what a terminal would obey shown as symbols (ESC as ␛, C1 as �), so that a user's data never controls it."""
    return UNSAFE.sub(_symbol, text)


def _symbol(found: re.Match[str]) -> str:
    code = ord(found[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else "�"


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers as text, consecutive ones as ranges: "0-3, 7"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def listed(names: Sequence[str], most: int = 4) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_line(error: BaseException, most: int | None = None) -> str:
    """An error's message without its line breaks, or the error's kind if it has none. most: characters of the message to keep."""
    return " ".join(str(error).split())[:most] or type(error).__name__
