"""Draws the README's pictures from what `make demo` leaves behind: `make pictures`."""

import io
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from minicache.options.others import InspectConfig
from minicache.reports.contents import inspect_pair, read_cache
from minicache.screen.inspect import show_inspection, show_pair
from minicache.screen.live import metrics_table

DEMO, DOCS = Path("demo"), Path(__file__).parent


def save(name: str, title: str, draw: Callable[[Console], object]) -> None:
    console = Console(record=True, width=96, file=io.StringIO(), force_terminal=True)
    draw(console)
    console.save_svg(str(DOCS / f"{name}.svg"), title=title)


def main() -> None:
    cache = DEMO / "cache"
    lines = [json.loads(line) for line in (DEMO / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    inspection, view = read_cache(cache).inspection, inspect_pair(InspectConfig(cache, pair=3))
    save("inspect", f"minidpo inspect-cache {cache}", lambda console: show_inspection(console, inspection))
    save("pair", f"minidpo inspect-cache {cache} --pair 3", lambda console: show_pair(console, view))
    table = metrics_table([(line["step"], line) for line in lines])
    save("train", f"minidpo train --ref-cache {cache} --out {DEMO / 'run'}", lambda console: console.print(table))


if __name__ == "__main__":
    main()
