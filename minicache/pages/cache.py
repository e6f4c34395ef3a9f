"""A reference cache as one self-contained page: what is in it, what the reference prefers, which rows to look at."""

from typing import Any

from minicache.pages.cache_report import MOST_FILES, CacheReport, Group
from minicache.pages.cache_rows import extremes, rows_to_look_at, texts
from minicache.pages.charts import Bars, Chart, histogram
from minicache.pages.chinese import SCRIPT
from minicache.pages.markup import Table, report
from minicache.reports.inspection import Inspection
from minicache.reports.names import LENGTHS, SHOWN_PROBLEMS, STATISTICS, model_name, template_values
from minicache.reports.notes import notes_on
from minicache.text import phrase


def cache_page(found: CacheReport) -> str:
    """The page's HTML."""
    it = found.inspection
    parts = [
        ("summary", "Summary", _summary(found)),
        ("look", "Rows to look at", rows_to_look_at(found)),
        ("distribution", "Lengths and logprobs", _distribution(it)),
        ("preference", "Which answers the reference prefers", _preference(found)),
        ("extremes", "Extreme pairs", extremes(found)),
        ("texts", "Texts", texts(found)),
        ("sources", "Files read", _sources(found)),
        ("manifest", "Manifest", _manifest(it)),
    ]
    title = phrase("{pairs:,} pairs scored by {model}", pairs=it.pairs, model=model_name(it.log["model"]))
    return report("cache.html", title, it.path, parts, {"pairs": found.texts, "chinese": SCRIPT})


def _summary(found: CacheReport) -> dict[str, Any]:
    it = found.inspection
    chosen, rejected = it.counted
    tokens = "{tokens:,} stored, {chosen:,} counted in chosen, {rejected:,} in rejected"
    left = "{truncated:,} truncated, {refused:,} refused"
    rows: list[tuple[str, str]] = [
        ("pairs", phrase("{pairs:,}, of which {scored:,} scored", pairs=it.pairs, scored=it.pairs_scored)),
        ("blocks", phrase("{scored:,} of {blocks:,} finished", scored=it.blocks_scored, blocks=it.blocks)),
        ("tokens", phrase(tokens, tokens=it.tokens, chosen=chosen, rejected=rejected)),
        ("on disk", f"{it.bytes_on_disk / 1e6:,.2f} MB"),
        ("rows of the files", phrase(left, truncated=it.truncated, refused=it.refused_rows)),
    ]
    if it.reference_prefers_chosen and it.reference_margin is not None:
        by = it.reference_prefers_chosen
        rows.append(("reference prefers chosen", phrase("{mean:.1%} of pairs by mean logprob, {sum:.1%} by sum", **by)))
        rows.append(("mean margin", phrase("{margin:+.4f} nats per token", margin=it.reference_margin)))
    damage = found.suspects.damage
    return {"damaged": bool(damage), "complete": it.complete, "problems": _problems(it, damage), "facts": rows}


def _problems(it: Inspection, damage: list[str]) -> list[str]:
    """The first problems, and how many more there are. damage: found in the tokens and scores, which the inspection leaves out."""
    damage = [problem for problem in damage if problem not in it.unfinished.values()]
    lines = [*damage, *it.missing, *it.problems]
    more = len(lines) - SHOWN_PROBLEMS
    rest = phrase("… and {more:,} more; inspect-cache --json lists all", more=more)
    return [*lines[:SHOWN_PROBLEMS], *([rest] if more > 0 else [])]


# --- figures ---


def _distribution(it: Inspection) -> dict[str, Any] | None:
    if not it.lengths:
        return None
    rows = [
        [phrase(name), *(format(it.lengths[part][key], form) for key, form in STATISTICS.items())]
        for part, name in LENGTHS.items()
    ]
    lengths = Table("Tokens of the sides and their parts", ["tokens", *STATISTICS], rows)
    return {"charts": _histograms(it), "lengths": lengths}


def _histograms(it: Inspection) -> list[Chart]:
    drawn = []
    for title, unit, of, whole in (
        ("Tokens of a side", "tokens", it.length_histogram, True),
        ("Reference's mean logprob", "nats per token", it.logp_histogram, False),
    ):
        if of:
            bars = [Bars("chosen", "chosen", of.chosen), Bars("rejected", "rejected", of.rejected)]
            drawn.append(histogram(title, unit, of.edges, bars, whole))
    if margins := it.margin_histogram:
        kinds = ["chosen" if edge >= 0 else "rejected" for edge in margins.edges[:-1]]
        bars = [Bars("pairs", kinds, margins.pairs)]
        drawn.append(histogram("Reference's margin, chosen − rejected", "nats per token", margins.edges, bars))
    return drawn


def _preference(found: CacheReport) -> list[Table]:
    return [_group_table(heading, groups) for heading, groups in found.groups.items() if groups]


def _group_table(heading: str, groups: list[Group]) -> Table:
    head = [heading, "pairs", "by mean", "by sum", "mean margin"]
    rows = [[of.name, f"{of.pairs:,}", f"{of.by_mean:.1%}", f"{of.by_sum:.1%}", f"{of.margin:+.3f}"] for of in groups]
    return Table(phrase("Prefers chosen, by {heading}", heading=phrase(heading)), head, rows)


# --- where it came from ---


def _sources(found: CacheReport) -> dict[str, Any]:
    columns = ("rows", "kept", "duplicates", "truncated")
    every: list[dict[str, Any]] = found.inspection.log["sources"]
    sources = every[:MOST_FILES]
    rows = [
        [
            of["name"],
            *(f"{of[key]:,}" for key in columns),
            f"{sum(of['refused'].values()):,}",
            phrase("yes" if of["complete"] else "no"),
        ]
        for of in sources
    ]
    notes = [[of["name"], line] for of in sources for line in notes_on(of)]
    reasons = [[of["name"], reason, f"{count:,}"] for of in sources for reason, count in sorted(of["refused"].items())]
    refusals = [row for row in map(_refusal, found.refusals) if row]
    title = phrase("Refused rows, the first {count}", count=len(refusals))
    return {
        "files": Table("Files", ["file", *columns, "refused", "read to the end"], rows),
        "listed": len(sources),
        "files_read": len(every),
        "notes": Table("What was not used, and the like", ["file", "what"], notes, numbers_from=2),
        "reasons": Table("Refused rows by reason", ["file", "reason", "rows"], reasons, numbers_from=2),
        "refusals": Table(title, ["row", "reason", "what was wrong"], refusals, numbers_from=3, captioned=False),
        "refused_file": found.inspection.refused_file,
    }


def _refusal(row: Any) -> list[str] | None:
    try:
        return [f"{row['file']}:{row['line']}", str(row["reason"]), str(row["message"])]
    except (KeyError, TypeError, RecursionError):  # a list that a person has edited is no reason to stop
        return None


def _manifest(it: Inspection) -> dict[str, Any]:
    identity, log = it.identity, it.log
    versions = ", ".join(f"{name} {version}" for name, version in log["versions"].items())
    rows = [
        ("model", f"{log['model']} ({identity['family']})"),
        ("scored in", phrase("{dtype}, {attention} attention", **identity)),
        ("sides cut at", phrase("{max_length:,} tokens, truncated on the {truncate}", **_named(identity, "truncate"))),
        ("counted tokens", f"--loss-on {identity['loss_on']}"),
        ("each token's logprob", phrase("kept" if identity["per_token"] else "not kept (--per-token)")),
        ("block", phrase("{block_pairs:,} pairs", **identity)),
        *template_values(identity).items(),
        ("identity", it.identity_digest),
        ("made", phrase("{created} with {versions}", created=log["created"], versions=versions)),
    ]
    fields = [[name, str(value)] for name, value in identity.items()]
    return {"facts": rows, "identity": Table("Identity, field by field", ["field", "value"], fields, numbers_from=2)}


def _named(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values with one of them as a phrase."""
    return {**values, name: phrase(values[name])}
