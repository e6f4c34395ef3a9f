"""Charts of a page, as SVG without any colour of its own: the page's style gives it, for light and for dark. Each comes with
its numbers as a table, for those who do not see it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from minicache.pages.markup import Html, e, table

WIDTH, HEIGHT = 330, 200  # about the size at which it is shown, so that its letters are as large as others
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 10, 38
DRAWN = 400  # points of a curve
LISTED = 24  # rows of the table beside it
Item = TypeVar("Item")


@dataclass(frozen=True)
class Line:
    """A curve. kind: its class in the style. values: as many as steps; what is no finite number leaves a gap."""

    name: str
    kind: str
    steps: Sequence[float]
    values: Sequence[float]


@dataclass(frozen=True)
class Bars:
    """Counts between edges. kind: a class for all bars, or one for each."""

    name: str
    kind: str | Sequence[str]
    counts: Sequence[int]


@dataclass(frozen=True)
class _Axes:
    """The data's bounds from left to right, the ticks from below to above; pixels of a value."""

    left: float
    right: float
    ticks: list[float]

    def x(self, value: float) -> float:
        return LEFT + (value - self.left) / (self.right - self.left) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)


def histogram(title: str, unit: str, edges: Sequence[float], bars: Sequence[Bars], whole: bool = False) -> Html:
    """Bars between edges, several kinds over each other. whole: edges lie half-way between whole numbers."""
    most = max(max(one.counts) for one in bars)
    axes = _Axes(edges[0], edges[-1], _ticks(0, most, whole=True))
    drawn = []
    for one in bars:
        for place, count in enumerate(one.counts):
            if count:
                kind = one.kind if isinstance(one.kind, str) else one.kind[place]
                x, y, end = axes.x(edges[place]), axes.y(count), axes.x(edges[place + 1])
                drawn.append(_rect(x, y, end - x, HEIGHT - BOTTOM - y, f"bar {kind}"))
    form = (lambda edge: f"{edge + 0.5:,.0f}") if whole else (lambda edge: f"{edge:,.2f}")
    cells = [(f"from {form(edges[at])}", *(one.counts[at] for one in bars)) for at in range(len(edges) - 1)]
    total = sum(bars[0].counts)
    said = (
        f"Histogram of {total:,} pairs, from {form(edges[0])} to {form(edges[-1])} {unit}; most in one bar: {most:,}."
    )
    svg = _svg(title, said, axes, drawn, unit, "pairs")
    head = [unit, *(one.name for one in bars)]
    return _figure(title, svg, _legend([(one.name, one.kind) for one in bars]), head, [list(row) for row in cells])


def curves(title: str, unit: str, lines: Sequence[Line], level: float | None = None) -> Html:
    """Curves over the steps. level: a value to compare with, drawn as a dashed line."""
    finite = [value for line in lines for value in line.values if math.isfinite(value)] or [0.0]
    low, high = (
        min(finite + ([level] if level is not None else [])),
        max(finite + ([level] if level is not None else [])),
    )
    steps = [step for line in lines for step in line.steps]
    first, last = min(steps), max(steps)
    axes = _Axes(first, last if last > first else first + 1, _ticks(low, high))
    drawn = [_line(LEFT, axes.y(level), WIDTH - RIGHT, axes.y(level), "level")] if level is not None else []
    for line in lines:
        drawn += _strokes(line, axes)
    ends = "; ".join(f"{line.name} from {line.values[0]:.4g} to {line.values[-1]:.4g}" for line in lines)
    svg = _svg(title, f"Curve over steps {first:,} to {last:,}: {ends}.", axes, drawn, "step", unit)
    at = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    rows = [
        [f"{step:,}", *(f"{of[step]:.4g}" if step in of else "–" for of in at)]
        for step in thinned(sorted(set(steps)), LISTED)
    ]
    return _figure(
        title, svg, _legend([(line.name, line.kind) for line in lines]), ["step", *(line.name for line in lines)], rows
    )


def thinned(values: Sequence[Item], most: int) -> list[Item]:
    """At most so many of them, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(at * (len(values) - 1) / (most - 1))] for at in range(most)]


def _strokes(line: Line, axes: _Axes) -> list[Html]:
    """A line for each stretch of numbers; a dot where one stands alone, and at each value of a short curve."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for step, value in thinned(list(zip(line.steps, line.values, strict=True)), DRAWN):
        if math.isfinite(value):
            stretches[-1].append((axes.x(step), axes.y(value)))
        elif stretches[-1]:
            stretches.append([])
    dots = len(line.steps) <= 30
    drawn = []
    for points in stretches:
        if len(points) > 1:
            drawn.append(
                e("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=f"curve {line.kind}")
            )
        if dots or len(points) == 1:
            drawn += [e("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2.4", class_=f"dot {line.kind}") for x, y in points]
    return drawn


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Four or so round values that enclose both."""
    if high <= low:
        low, high = (low, low + 1) if low >= 0 else (low - 1, low + 1)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    times = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(time * power for time in times if time * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def _svg(title: str, said: str, axes: _Axes, drawn: list[Html], below: str, beside: str) -> Html:
    """role=img: a screen reader says title and description, and does not spell out the axes' numbers."""
    bottom, middle = HEIGHT - BOTTOM, (LEFT + WIDTH - RIGHT) / 2
    frame = []
    for tick in axes.ticks:
        y = axes.y(tick)
        frame += [_line(LEFT, y, WIDTH - RIGHT, y, "grid"), _text(LEFT - 5, y + 3.5, short(tick), "end")]
    whole = below in ("step", "tokens")
    inside = [tick for tick in _ticks(axes.left, axes.right, whole) if axes.left <= tick <= axes.right]
    for tick in inside:
        frame.append(_text(axes.x(tick), bottom + 14, short(tick), "middle"))
    frame.append(_line(LEFT, bottom, WIDTH - RIGHT, bottom, "axis"))
    if axes.left < 0 < axes.right:
        frame.append(_line(axes.x(0), TOP, axes.x(0), bottom, "axis"))
    labels = [_text(middle, HEIGHT - 6, below, "middle")]
    across = (TOP + bottom) / 2
    if beside:
        turned = f"rotate(-90 10 {across:.0f})"
        labels.append(e("text", beside, x="10", y=f"{across:.0f}", text_anchor="middle", transform=turned))
    box = f"0 0 {WIDTH} {HEIGHT}"
    return e("svg", frame, drawn, labels, viewBox=box, role="img", aria_label=f"{title}. {said}")


def short(value: float) -> str:
    """A tick's number in few signs."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:,.3f}".rstrip("0").rstrip(".") if value % 1 else f"{value:,.0f}"


def _legend(names: list[tuple[str, str | Sequence[str]]]) -> Html | None:
    if len(names) < 2:
        return None
    return e("p", [e("span", e("span", class_=f"swatch {kind}"), name) for name, kind in names], class_="legend")


def _figure(title: str, svg: Html, legend: Html | None, head: list[str], rows: list[list]) -> Html:
    numbers = e(
        "details", e("summary", "As a table", e("span", f": {title}", class_="hidden")), table(title, head, rows)
    )
    return e("figure", e("figcaption", title), svg, legend, numbers)


def _rect(x: float, y: float, width: float, height: float, kind: str) -> Html:
    return e("rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", class_=kind)


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> Html:
    return e("line", x1=f"{x1:.1f}", y1=f"{y1:.1f}", x2=f"{x2:.1f}", y2=f"{y2:.1f}", class_=kind)


def _text(x: float, y: float, text: str, anchor: str) -> Html:
    return e("text", text, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor)
