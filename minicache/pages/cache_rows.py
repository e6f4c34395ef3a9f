"""The parts of a cache's page that are about single rows: those to look at, the extreme ones, their texts."""

from minicache.pages.cache_report import LISTED, MOST_TOKENS, CacheReport, Suspect, Suspects
from minicache.pages.markup import Child, Html, e, facts, table, together
from minicache.reports.inspection import PairLine
from minicache.reports.suspects import AGREEING, FEWEST, FLIPPED, NEARLY, SKETCH

RULES = {  # rule -> heading, what it finds
    "contradicting": (
        "Contradicting labels",
        "Two rows hold the same two answers to the same prompt, and each prefers the other one.",
    ),
    "perhaps-flipped": (
        "Label perhaps flipped",
        "The reference prefers rejected far more strongly than in other pairs: its margin lies "
        f"{-FLIPPED} or more robust standard deviations (median, 1.4826 × MAD) below the median.",
    ),
    "nearly-identical": (
        "Nearly identical sides",
        f"Apart from a common beginning and end, the sides differ in at most {NEARLY:.0%} of the longer answer's tokens.",
    ),
    "near-duplicates": (
        "Near-duplicate answers",
        f"Two rows whose counted tokens are almost the same: {AGREEING} or more of {SKETCH} minhashes of their 4-token "
        f"shingles agree. Pairs with fewer than {FEWEST} such shingles are not compared.",
    ),
}


def look_part(report: CacheReport) -> Html:
    found = report.suspects
    parts: list[Child] = []
    if found.unread:
        parts.append(e("p", f"{found.unread:,} pairs were not compared: {_why(found)}.", class_="state bad"))
    if not any(found.found.values()):
        parts.append(e("p", "None found by these rules:"))
        return together(parts, facts(RULES.values()))
    for rule, (heading, says) in RULES.items():
        count = found.found.get(rule, 0)
        parts.append(e("h3", f"{heading}: {count:,}"))
        parts.append(e("p", says, class_="dim"))
        if count:
            rows = found.rows[rule]
            parts.append(_suspect_table(heading, rows, report))
            if count > len(rows):
                parts.append(e("p", f"The first {LISTED} of {count:,}.", class_="dim"))
    return together(parts)


def _why(found: Suspects) -> str:
    return "their blocks are damaged" if found.damage else f"only the first {MOST_TOKENS:,} tokens of a cache are"


def _suspect_table(caption: str, rows: list[Suspect], report: CacheReport) -> Html:
    two = any(len(row.lines) > 1 for row in rows)
    head = ["row", "same as row", "found"] if two else ["row", "found"]

    def cells(row: Suspect) -> list[Child]:
        return [*(_where(line, report) for line in row.lines), row.note]

    return table(caption, head, [cells(row) for row in rows], numbers_from=len(head), captioned=False)


def _where(line: PairLine, report: CacheReport) -> Html:
    """File and line; the pair's number leads to its text."""
    number = None if line.index is None else _link(line.index, report)
    return together(
        f"{report.short_name(line.source)}:{line.line} ", e("span", number, class_="pair") if number else None
    )


def _link(index: int, report: CacheReport) -> Html:
    return e("a", f"pair {index}", href=f"#pair-{index}") if index in report.texts else Html(f"pair {index}")


# --- extreme pairs ---


def extremes_part(report: CacheReport) -> Html | None:
    parts = [_pair_table(heading, lines, report) for heading, lines in report.extremes.items() if lines]
    says = "Logprobs are means, in nats a token; of tokens, the shared beginning is counted apart from each side's own."
    return together(e("p", says, class_="dim"), parts) if parts else None


def _pair_table(heading: str, lines: list[PairLine], report: CacheReport) -> Html:
    head = ["row", "chosen nats", "rejected nats", "margin", "shared tokens", "chosen tokens", "rejected tokens"]

    def cells(line: PairLine) -> list[Child]:
        logps = [f"{logp:.3f}" for logp in line.logp_mean] if line.logp_mean else ["–", "–"]
        margin = "–" if line.margin is None else f"{line.margin:+.3f}"
        return [_where(line, report), *logps, margin, *(f"{length:,}" for length in line.lengths)]

    return table(heading, head, map(cells, lines))


# --- texts ---


def texts_part(report: CacheReport) -> Html | None:
    """A place for each text; the page's script fills it when it is opened."""
    if report.no_texts:
        return e("p", f"Texts cannot be shown: {report.no_texts}", class_="state bad")
    if not report.texts:
        return None
    it = report.inspection
    if it.identity["per_token"]:
        levels = ("above −0.1", "to −0.7", "to −1.6", "to −3", "to −5", "to −8", "below")
        swatches = [e("span", text, class_=f"tok s{level}") for level, text in enumerate(levels)]
        says = e(
            "p",
            "Counted tokens are underlined and shaded by their logprob, in nats (a character of several tokens by their sum): ",
            swatches,
            class_="legend",
        )
    else:
        says = e(
            "p",
            "Counted tokens are underlined. This cache holds only their mean logprob: made with ",
            e("code", "precompute-ref --per-token"),
            ", a cache holds each token's, and the page shades it.",
        )
    known = {line.index: line for line in _all_lines(report)}
    pairs = [_pair_text(index, known[index], report.short_name(known[index].source)) for index in report.texts]
    return together(
        says, e("noscript", e("p", "The texts are drawn by the page's script, which is switched off.")), pairs
    )


def _all_lines(report: CacheReport) -> list[PairLine]:
    lines = [line for lines in report.extremes.values() for line in lines]
    return lines + [line for rows in report.suspects.rows.values() for row in rows for line in row.lines]


def _pair_text(index: int, line: PairLine, file: str) -> Html:
    margin = "" if line.margin is None else f", margin {line.margin:+.3f}"
    summary = e("summary", e("b", f"Pair {index}"), f" · {file}:{line.line}{margin}")
    means = [f"{logp:.3f} nats a token" for logp in line.logp_mean] if line.logp_mean else ["not scored"] * 2
    titles = ["Shared by both sides", f"Chosen: {means[0]}", f"Rejected: {means[1]}"]
    kinds = ("shared", "chosen", "rejected")
    parts = [e("div", e("h3", title), class_=f"part {kind}") for title, kind in zip(titles, kinds, strict=True)]
    return e("details", summary, parts, id=f"pair-{index}", class_="text", data_pair=str(index))
