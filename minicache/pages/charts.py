"""Charts of a page, computed: every point and number in its place. `macros.html` draws them as SVG."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from minicache.pages.markup import Table
from minicache.text import Phrase, joined, phrase

WIDTH, HEIGHT = 330, 200  # about the size at which it is shown, so that its letters are as large as the page's
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 8, 10, HEIGHT - 38  # edges of the axes; the left one gives way to long numbers
DIGIT = 7  # width of a digit in the widest of usual fonts
DRAWN = 400  # points of a curve
LISTED = 24  # rows of the table beside it
FEW = 30  # steps up to which each value is a dot
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
    """The data's bounds from left to right, the ticks from bottom to top; x, y: pixels of a value. named: a name stands beside."""

    left: float
    right: float
    ticks: list[float]
    named: bool = False

    @property
    def edge(self) -> int:
        """The left edge: the ticks' numbers stand between it and the name beside."""
        longest = max(len(short(tick)) for tick in self.ticks)
        return max(LEFT, DIGIT * longest + 5 + (18 if self.named else 2))

    def x(self, value: float) -> float:
        return round(self.edge + (value - self.left) / (self.right - self.left) * (RIGHT - self.edge), 1)

    def y(self, value: float) -> float:
        low, high = self.ticks[0], self.ticks[-1]
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)


@dataclass
class Chart:
    """What is drawn, in pixels, and the same numbers as a table. below, beside: names of the axes.

    lines: x1, y1, x2, y2, class. labels: x, y, anchor, text. bars: x, y, width, height, class. curves: points, class.
    dots: x, y, class. legend: name, class.
    """

    title: str
    description: str
    below: str
    beside: str
    numbers: Table
    legend: list[tuple[str, str | Sequence[str]]]
    lines: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    labels: list[tuple[float, float, str, str]] = field(default_factory=list)
    bars: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    curves: list[tuple[str, str]] = field(default_factory=list)
    dots: list[tuple[float, float, str]] = field(default_factory=list)
    box = f"0 0 {WIDTH} {HEIGHT}"
    beside_at = (10, (TOP + BOTTOM) // 2)

    def frame(self, axes: _Axes) -> None:
        """Add the axes, their ticks and the name of the one below."""
        for tick in axes.ticks:
            y = axes.y(tick)
            self.lines.append((axes.edge, y, RIGHT, y, "grid"))
            self.labels.append((axes.edge - 5, round(y + 3.5, 1), "end", short(tick)))
        for tick in _ticks(axes.left, axes.right, whole=self.below in ("step", "tokens")):
            if axes.left <= tick <= axes.right:
                self.labels.append((axes.x(tick), BOTTOM + 14, "middle", short(tick)))
        self.lines.append((axes.edge, BOTTOM, RIGHT, BOTTOM, "axis"))
        if axes.left < 0 < axes.right:
            self.lines.append((axes.x(0), TOP, axes.x(0), BOTTOM, "axis"))
        self.labels.append(((axes.edge + RIGHT) / 2, HEIGHT - 6, "middle", self.below))

    def stroke(self, line: Line, axes: _Axes) -> None:
        """Add a curve for each stretch of numbers; a dot where one stands alone, and at each value of a short curve."""
        stretches: list[list[tuple[float, float]]] = [[]]
        for step, value in thinned(list(zip(line.steps, line.values, strict=True)), DRAWN):
            if math.isfinite(value):
                stretches[-1].append((axes.x(step), axes.y(value)))
            elif stretches[-1]:
                stretches.append([])
        for points in stretches:
            if len(points) > 1:
                self.curves.append((" ".join(f"{x},{y}" for x, y in points), line.kind))
            if len(points) == 1 or len(line.steps) <= FEW:
                self.dots += [(x, y, line.kind) for x, y in points]


def histogram(title: str, unit: str, edges: Sequence[float], bars: Sequence[Bars], whole: bool = False) -> Chart:
    """Bars between edges, several kinds over each other. whole: edges lie half-way between whole numbers."""
    most = max(max(one.counts) for one in bars)
    names = [f"{edge + 0.5:,.0f}" if whole else f"{edge:,.2f}" for edge in edges]
    total = sum(bars[0].counts)
    bounds = "Histogram of {pairs:,} pairs, from {first} to {last} {unit}; most in one bar: {most:,}."
    rows = [
        [phrase("from {edge}", edge=names[at]), *(str(one.counts[at]) for one in bars)] for at in range(len(edges) - 1)
    ]
    chart = Chart(
        title=title,
        description=phrase(bounds, pairs=total, first=names[0], last=names[-1], unit=phrase(unit), most=most),
        below=unit,
        beside="pairs",
        numbers=Table(title, [unit, *(one.name for one in bars)], rows),
        legend=[(one.name, one.kind) for one in bars],
    )
    axes = _Axes(edges[0], edges[-1], _ticks(0, most, whole=True), named=True)
    chart.frame(axes)
    for one in bars:
        for at, count in enumerate(one.counts):
            if count:
                kind = one.kind if isinstance(one.kind, str) else one.kind[at]
                x, y, end = axes.x(edges[at]), axes.y(count), axes.x(edges[at + 1])
                chart.bars.append((x, y, round(end - x, 1), round(BOTTOM - y, 1), kind))
    return chart


def curves(title: str, unit: str, lines: Sequence[Line], level: float | None = None) -> Chart:
    """Curves over the steps. level: a value to compare with, drawn as a dashed line."""
    steps = sorted({step for line in lines for step in line.steps})
    first, last = steps[0], steps[-1]
    at = [dict(zip(line.steps, line.values, strict=True)) for line in lines]
    rows = [[f"{step:,}", *(f"{of[step]:.4g}" if step in of else "–" for of in at)] for step in thinned(steps, LISTED)]
    chart = Chart(
        title=title,
        description=phrase(
            "Curve over steps {first:,} to {last:,}: {ends}.", first=first, last=last, ends=_ends(lines)
        ),
        below="step",
        beside=unit,
        numbers=Table(title, ["step", *(line.name for line in lines)], rows),
        legend=[(line.name, line.kind) for line in lines],
    )
    values = [value for line in lines for value in line.values if math.isfinite(value)] or [0.0]
    values += [] if level is None else [level]
    axes = _Axes(first, last if last > first else first + 1, _ticks(min(values), max(values)), named=bool(unit))
    chart.frame(axes)
    if level is not None:
        chart.lines.append((axes.edge, axes.y(level), RIGHT, axes.y(level), "level"))
    for line in lines:
        chart.stroke(line, axes)
    return chart


def _ends(lines: Sequence[Line]) -> Phrase:
    """Of each curve its name, its first value and its last."""
    each = [
        phrase(
            "{name} from {first:.4g} to {last:.4g}", name=phrase(line.name), first=line.values[0], last=line.values[-1]
        )
        for line in lines
    ]
    return joined("; ", each)


def thinned(values: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the values, evenly spread, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(at * (len(values) - 1) / (most - 1))] for at in range(most)]


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round values that enclose both bounds."""
    if high <= low:
        low, high = (low, low + 1) if low >= 0 else (low - 1, low + 1)
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    times = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(time * power for time in times if time * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(at * step, 12) for at in range(first, last + 1)]


def short(value: float) -> str:
    """A tick's number, in few characters."""
    if value and (abs(value) >= 1e5 or abs(value) < 1e-3):
        return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e").replace(".0e", "e")
    return f"{value:,.3f}".rstrip("0").rstrip(".") if value % 1 else f"{value:,.0f}"
