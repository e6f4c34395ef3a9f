"""What `inspect-cache` prints. rich only."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from minicache.reports.names import LENGTHS, SHOWN_PROBLEMS, STATISTICS, template_values
from minicache.screen.console import CHECK
from minicache.screen.results import show_notes, sources_table
from minicache.text import visible

if TYPE_CHECKING:
    from minicache.reports.inspection import Histogram, Inspection, PairLine, PairView, Segment

BAR = " ▏▎▍▌▋▊▉█"
BAR_WIDTH = 14
# Around special tokens where a style would be lost. Those that a row holds are doubled, so that it cannot imitate the mark.
LEFT, RIGHT = "⟦⟧"
NARROW = 70  # columns: a narrower terminal gets only the columns that one acts on


def show_inspection(console: Console, it: "Inspection") -> None:
    """Print the report: what the cache is, how complete, what was read, how it is distributed, which pairs stand out."""
    narrow = console.width < NARROW
    console.print(Panel(_header(it), title=Text(it.path), title_align="left", border_style="cyan"))
    console.print(_sources_list(it.log["sources"]) if narrow else sources_table(it.log["sources"]))
    show_notes(console, it.log["sources"])
    console.print(_figures(it))
    if it.lengths:
        console.print(_lengths(it.lengths))
    histograms = [
        _histogram(f"{title}: chosen │ rejected", histogram, form)
        for title, histogram, form in (
            ("tokens", it.length_histogram, ",.0f"),
            ("nats per token", it.logp_histogram, ".2f"),
        )
        if histogram
    ]
    console.print(Columns(histograms, padding=(0, 3)))
    for title, lines in (
        ("longest pairs", it.longest),
        ("reference prefers chosen most", it.highest_margin),
        ("reference prefers rejected most", it.lowest_margin),
        ("least likely answers", it.lowest_logp),
    ):
        if lines:
            console.print(_pair_table(title, lines, narrow))
    for line in it.missing:
        console.print(Text(line, style="bold yellow"))
    for problem in it.problems[:SHOWN_PROBLEMS]:
        console.print(Text(problem, style="yellow"))
    if len(it.problems) > SHOWN_PROBLEMS:
        console.print(Text(f"… and {len(it.problems) - SHOWN_PROBLEMS:,} more; --json lists all", style="yellow"))


def show_pair(console: Console, view: "PairView") -> None:
    """Print one pair: counted tokens coloured and underlined, the others dim; special tokens inverted or in brackets."""
    styled = console.color_system is not None
    prefix, chosen, rejected = view.line.lengths
    console.print(Text(f"pair {view.line.index}, {view.line.source} line {view.line.line}", style="bold"))
    console.print(Text.assemble("shared ", (f"{prefix} tokens", "bold"), "; ", _legend(styled)))
    shared = [segment for segment in view.segments[0] if segment.shared]
    if shared:
        text = _text(shared, "yellow", styled)
        console.print(Panel(text, title="shared by both sides", title_align="left", border_style="dim"))
    for side, name, colour in ((0, "chosen", "green"), (1, "rejected", "red")):
        title = f"{name}: {(chosen, rejected)[side]} tokens of its own, {view.token_count[side]} counted"
        if view.line.logp_mean:
            title += f", reference {view.line.logp_mean[side]:.4f} nats per token"
        own = [segment for segment in view.segments[side] if not segment.shared]
        console.print(Panel(_text(own, colour, styled), title=title, title_align="left", border_style=colour))
    if view.line.margin is not None:
        console.print(Text(f"reference margin {view.line.margin:+.4f} nats per token"))


def _legend(styled: bool) -> Text:
    """What the marks in the texts mean. styled: whether the output shows styles."""
    if not styled:
        return Text(
            "--json says which tokens count\n"
            f"special tokens are in {LEFT} {RIGHT}; the same text typed in a row is in none, or in {2 * LEFT} {2 * RIGHT}"
        )
    counted = (("counted tokens", "underline"), " are underlined\n")
    return Text.assemble(*counted, ("special tokens", "reverse"), " are inverted; the same text typed in a row is not")


def show_problems(console: Console, path: str, problems: Sequence[str]) -> None:
    """Print the outcome of --verify."""
    if not problems:
        console.print(Text.assemble(CHECK, f" {path}: every chunk, ledger row and pair digest is as written"))
    for problem in problems:
        console.print(Text(f"✗ {problem}", style="red"), soft_wrap=True)


def _header(it: "Inspection") -> Group:
    identity = it.identity
    # of blocks, not of pairs: how many pairs an unwritten block will hold is not known
    done = it.blocks_scored / max(1, it.blocks)
    bar = "█" * int(30 * done) + "░" * (30 - int(30 * done))
    state = ("complete", "bold green") if it.complete else ("NOT COMPLETE", "bold yellow")
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    rows = {
        "model": f"{_near(it.log['model'])} ({identity['family']}, weights {identity['weights'][:12]}…)",
        "scored in": f"{identity['dtype']}, {identity['attention']} attention",
        "pairs cut at": f"{identity['max_length']:,} tokens a side, truncate {identity['truncate']}",
        "counted": f"loss on {identity['loss_on']}",
        **template_values(identity),
        "identity": it.identity_digest,
        "made": f"{it.log['created']} with "
        + ", ".join(f"{name} {version}" for name, version in it.log["versions"].items()),
    }
    for name, value in rows.items():
        table.add_row(name, Text(value))
    line = Text.assemble(f"{bar} {int(100 * done)}%  ", state, f"  {it.blocks_scored} of {it.blocks} blocks")
    return Group(table, line)


def _near(path: str) -> str:
    """The path from the working directory, if it lies below."""
    # the working directory may have been removed
    with suppress(ValueError, OSError):
        return str(Path(path).relative_to(Path.cwd()))
    return path


def _figures(it: "Inspection") -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    rows = [
        ("pairs", f"{it.pairs:,}, scored {it.pairs_scored:,}"),
        (
            "tokens",
            f"{it.tokens:,} stored (shared beginnings once), {it.counted[0]:,} counted in chosen, {it.counted[1]:,} in rejected",
        ),
        ("on disk", f"{it.bytes_on_disk / 1e6:,.2f} MB"),
    ]
    if it.reference_prefers_chosen:
        by = it.reference_prefers_chosen
        rows.append(("reference prefers chosen", f"{by['mean']:.1%} of pairs by mean, {by['sum']:.1%} by sum"))
        rows.append(("reference margin", f"{it.reference_margin:+.4f} nats per token on average"))
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(it.refused.items()))
    refused = f" ({reasons})" if reasons else ""
    listed = f"; listed in {it.refused_file}" if it.refused_rows and it.refused_file else ""
    rows.append(("rows", f"{it.truncated:,} truncated, {it.refused_rows:,} refused{refused}{listed}"))
    for name, value in rows:
        table.add_row(name, Text(value))
    return table


def _lengths(lengths: Mapping[str, Mapping[str, float]]) -> Table:
    """Tokens of the sides and their parts, a row each."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("tokens", style="dim")
    for heading in STATISTICS:
        table.add_column(heading, justify="right", no_wrap=True)
    for part, name in LENGTHS.items():
        table.add_row(name, *(format(lengths[part][key], form) for key, form in STATISTICS.items()))
    return table


def _sources_list(sources: Sequence[Mapping[str, Any]]) -> Text:
    """What was read of each file, as sentences, for a terminal too narrow for the table's six columns."""
    text = Text()
    for source in sources:
        text.append(source["name"] + "\n", style="bold")
        numbers = ", ".join(f"{source[key]:,} {key}" for key in ("rows", "kept", "duplicates", "truncated"))
        text.append(f"  {numbers}, {sum(source['refused'].values()):,} refused\n")
    return text


def _histogram(title: str, histogram: "Histogram", form: str) -> Table:
    """Two bars a bin: chosen grows to the left of the middle, rejected to the right."""
    table = Table(
        box=None, title=title, title_justify="left", title_style="bold", pad_edge=False, padding=0, show_header=False
    )
    table.add_column(justify="right", style="dim")
    # Bars that leave room free must not narrow the heading, which would wrap.
    table.add_column(justify="right", style="green", min_width=BAR_WIDTH)
    table.add_column()
    table.add_column(style="red", min_width=BAR_WIDTH)
    most = max(*histogram.chosen, *histogram.rejected, 1)
    bins = zip(histogram.edges, histogram.chosen, histogram.rejected, strict=False)
    for edge, chosen, rejected in bins:
        left = "█" * round(BAR_WIDTH * chosen / most) or ("·" if chosen else "")
        table.add_row(
            f"{edge + (0.5 if form == ',.0f' else 0):{form}} ",
            left,
            "│",
            _bar(rejected / most) or ("·" if rejected else ""),
        )
    return table


def _bar(share: float) -> str:
    eighths = round(8 * BAR_WIDTH * share)
    return "█" * (eighths // 8) + BAR[eighths % 8].strip()


def _pair_table(title: str, lines: Sequence["PairLine"], narrow: bool) -> Table:
    """Pairs, one a row. Where room is short the file is cut; the pair's number, which `--pair` takes, never is."""
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1, 0, 0))
    if not narrow:
        table.add_column("file", overflow="ellipsis", header_style="dim")
        table.add_column("line", justify="right", no_wrap=True, header_style="dim")
    wide = ("pair", "shared", "chosen", "rejected", "chosen\nnats", "rejected\nnats", "margin")
    headings = ("pair", "chosen", "rejected", "margin") if narrow else wide
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True, header_style="dim")
    for line in lines:
        shared, *own = (f"{n:,}" for n in line.lengths)
        logps = [f"{logp:.3f}" for logp in line.logp_mean] if line.logp_mean else ["–", "–"]
        index = f"{line.index:,}" if line.index is not None else "–"
        margin = f"{line.margin:+.3f}" if line.margin is not None else "–"
        if narrow:
            table.add_row(index, *own, margin)
        else:
            name = Text(Path(line.source).name)
            table.add_row(name, f"{line.line:,}", index, shared, *own, *logps, margin)
    return table


def _text(segments: Sequence["Segment"], colour: str, styled: bool) -> Text:
    text = Text()
    for segment in segments:
        style = f"{colour} underline" if segment.counted else "dim"
        # As many characters as the text; rich drops some of those that are no signs, which is not what a row looks like.
        shown, done = visible(segment.text), 0
        for begin, end in [*segment.special, [len(shown)] * 2]:
            typed, token = shown[done:begin], shown[begin:end]
            if not styled:
                typed = typed.replace(LEFT, 2 * LEFT).replace(RIGHT, 2 * RIGHT)
                token = token and LEFT + token + RIGHT
            text.append(typed, style=style).append(token, style=f"{style} reverse")
            done = end
    return text
