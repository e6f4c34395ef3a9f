"""Text for a terminal, a page or a message."""

import codecs
import io
import re
import sys
from collections.abc import Iterable, Sequence

# Signs that this program prints and some encodings lack, and what stands for them there: GBK has no check mark.
PLAIN = {
    **dict.fromkeys("✓╭╮╰╯┌┐└┘├┤┬┴┼", "+"), "✗": "x", "×": "x", "→": ">", "…": ".", "·": ".", "⟦": "[", "⟧": "]",
    **dict.fromkeys("–—−─━╶╴╸╺░", "-"), **dict.fromkeys("│┃", "|"), **dict.fromkeys("▏▎▍▌▋▊▉█", "#"),
}  # fmt: skip


def print_in_any_encoding() -> None:
    """Let stdout and stderr replace characters that their encoding lacks, as of a pipe on Windows, instead of raising an error."""
    codecs.register_error("minidpo", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="minidpo")


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
    """The text with control characters shown as symbols (ESC as ␛), so that a user's data never controls the terminal."""
    shown = {code: 0x2400 + code for code in range(32) if code not in (9, 10)}
    c1 = dict.fromkeys((*range(128, 160), 8234, 8235, 8237, 8238, 8294, 8295, 8296), "�")
    # a file name that is not UTF-8 holds surrogates, which cannot be sent to a terminal
    return text.translate({**shown, 0x7F: 0x2421, **c1}).encode("utf-8", "replace").decode()


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
