"""The consoles of this program: whatever is printed is shown, and only rich's own codes reach the terminal."""

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.file_proxy import FileProxy
from rich.segment import Segment
from rich.style import Style

from minicache.text import visible

# Before the line that says what a command has made.
CHECK = ("✓", "bold green")
# The same of a policy that is the model it started from, which is no success.
UNMOVED = ("–", "yellow")


class SafeConsole(Console):
    """A console that shows control characters in texts, tables and panels, from wherever they come, and makes no links.

    No string is read as markup: what has a style is a `rich.text.Text`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As `rich.console.Console.render`, from which everything that it prints comes."""
        for segment in super().render(renderable, options):
            # its own codes, as to move the cursor
            yield segment if segment.control else Segment(visible(segment.text), _without_link(segment.style))


class Lines(FileProxy):
    """stdout or stderr below a live display: what libraries write is printed above it, without their colours."""

    def __init__(self, console: Console, stream: Any) -> None:
        # rich's consoles write to what is behind
        super().__init__(console, getattr(stream, "rich_proxied_file", stream))

    def write(self, text: str) -> int:
        return super().write(visible(text))


def _without_link(style: Style | None) -> Style | None:
    return style.update_link(None) if style and style.link else style
