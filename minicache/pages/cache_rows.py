"""The parts of a cache's page that are about single rows: those to look at, the extreme ones, their texts."""

from typing import Any

from minicache.pages.cache_report import LISTED, MOST_TOKENS, CacheReport, Suspect
from minicache.pages.markup import Table, Where
from minicache.reports.inspection import PairLine
from minicache.reports.suspects import AGREEING, FEWEST, FLIPPED, NEARLY, SKETCH
from minicache.text import Phrase, phrase

RULES = {  # rule -> heading, what it finds
    "contradicting": (
        "Contradicting labels",
        "Two rows hold the same two answers to the same prompt, and each prefers the other one.",
    ),
    "perhaps-flipped": (
        "Label perhaps flipped",
        phrase(
            "The reference prefers rejected far more strongly than in other pairs: its margin lies "
            "{z} or more robust standard deviations (median, 1.4826 × MAD) below the median.",
            z=-FLIPPED,
        ),
    ),
    "nearly-identical": (
        "Nearly identical sides",
        phrase(
            "Apart from a common beginning and end, the sides differ in at most {share:.0%} of the longer answer's tokens.",
            share=NEARLY,
        ),
    ),
    "near-duplicates": (
        "Near-duplicate answers",
        phrase(
            "Two rows whose counted tokens are almost the same: {agreeing} or more of {hashes} minhashes of their 4-token "
            "shingles agree. Pairs with fewer than {fewest} such shingles are not compared.",
            agreeing=AGREEING,
            hashes=SKETCH,
            fewest=FEWEST,
        ),
    ),
}
SHADES = ("above −0.1", "to −0.7", "to −1.6", "to −3", "to −5", "to −8", "below")  # as LEVELS in report.js


def rows_to_look_at(report: CacheReport) -> dict[str, Any]:
    found = report.suspects
    rules = [
        {
            "heading": heading,
            "meaning": meaning,
            "found": found.found[rule],
            "rows": _suspect_table(heading, found.rows[rule], report),
        }
        for rule, (heading, meaning) in RULES.items()
        if any(found.found.values())
    ]
    if found.damage:
        why = phrase("their blocks are damaged")
    else:
        why = phrase("only the first {most:,} tokens of a cache are", most=MOST_TOKENS)
    return {"unread": found.unread, "why": why, "rules": rules, "meanings": RULES.values(), "most": LISTED}


def _suspect_table(caption: str, rows: list[Suspect], report: CacheReport) -> Table:
    two = any(len(row.lines) > 1 for row in rows)
    head = ["row", "same as row", "found"] if two else ["row", "found"]
    cells: list[list[str | Where]] = [[*(_where(line, report) for line in row.lines), row.note] for row in rows]
    return Table(caption, head, cells, numbers_from=len(head), captioned=False)


def _where(line: PairLine, report: CacheReport) -> Where:
    return Where(f"{report.short_name(line.source)}:{line.line}", line.index, line.index in report.texts)


# --- extreme pairs ---


def extremes(report: CacheReport) -> list[Table]:
    return [_pair_table(heading, lines, report) for heading, lines in report.extremes.items() if lines]


def _pair_table(heading: str, lines: list[PairLine], report: CacheReport) -> Table:
    head = ["row", "chosen nats", "rejected nats", "margin", "shared tokens", "chosen tokens", "rejected tokens"]

    def cells(line: PairLine) -> list[str | Where]:
        logps = [f"{logp:.3f}" for logp in line.logp_mean] if line.logp_mean else ["–", "–"]
        margin = "–" if line.margin is None else f"{line.margin:+.3f}"
        return [_where(line, report), *logps, margin, *(f"{length:,}" for length in line.lengths)]

    return Table(heading, head, [cells(line) for line in lines])


# --- texts ---


def texts(report: CacheReport) -> dict[str, Any] | None:
    """A place for each text; the page's script fills it when it is opened."""
    if not report.texts and not report.no_texts:
        return None
    lines = [line for lines in report.extremes.values() for line in lines]
    lines += [line for rows in report.suspects.rows.values() for row in rows for line in row.lines]
    known = {line.index: line for line in lines}
    shades = SHADES if report.inspection.identity["per_token"] else ()
    pairs = [_pair_text(known[index], report) for index in report.texts]
    return {"why_none": report.no_texts, "shades": shades, "pairs": pairs}


def _pair_text(line: PairLine, report: CacheReport) -> dict[str, Any]:
    text = "{where}" if line.margin is None else "{where}, margin {margin:+.3f}"
    about = phrase(text, where=f"{report.short_name(line.source)}:{line.line}", margin=line.margin)
    parts = [
        ("shared", phrase("Shared by both sides")),
        ("chosen", phrase("Chosen: {mean}", mean=_mean(line, 0))),
        ("rejected", phrase("Rejected: {mean}", mean=_mean(line, 1))),
    ]
    return {"index": line.index, "name": phrase("Pair {number}", number=line.index), "about": about, "parts": parts}


def _mean(line: PairLine, side: int) -> Phrase:
    """The side's mean logprob, in words."""
    return phrase("{logp:.3f} nats per token", logp=line.logp_mean[side]) if line.logp_mean else phrase("not scored")
