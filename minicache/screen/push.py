"""What `push` prints at its end. rich only; no torch."""

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from minicache.screen.console import CHECK, UNMOVED

if TYPE_CHECKING:
    from minicache.stages.push import PushReport


def show_push(console: Console, report: "PushReport") -> None:
    if report.commit is None:
        console.print(Text(report.card), soft_wrap=True)
        folders = Counter(f"{name.partition('/')[0]}/" if "/" in name else name for name in report.names)
        for folder, count in folders.items():
            console.print(Text(f"  {folder}" + (f": {count:,} files" if folder.endswith("/") else "")))
    size = f"{report.files:,} files, {report.bytes / 1e6:,.1f} MB"
    state = "would be sent to" if report.commit is None else f"commit {report.commit[:12]} of"
    readers = "" if report.private is None else " (private)" if report.private else " (public)"
    mark = CHECK if report.learned else UNMOVED
    console.print(Text.assemble(mark, f" {size}, {state} ", (report.url, "bold"), readers), soft_wrap=True)
