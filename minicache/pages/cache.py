"""A reference cache as one self-contained page: what is in it, what the reference prefers, which rows to look at."""

import json
from pathlib import Path
from typing import Any

from minicache.pages.cache_report import MOST_FILES, CacheReport, Group
from minicache.pages.cache_rows import extremes_part, look_part, texts_part
from minicache.pages.charts import Bars, histogram
from minicache.pages.markup import Child, Html, e, facts, page, table, together
from minicache.reports.inspection import Inspection
from minicache.text import ranges

SHOWN_PROBLEMS = 20
LENGTHS = {
    "prefix": "shared beginning",
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_counted": "counted, chosen",
    "rejected_counted": "counted, rejected",
}
STATISTICS = (("min", 0), ("median", 1), ("mean", 1), ("p95", 0), ("max", 0))


def cache_page(report: CacheReport) -> str:
    """The page's HTML."""
    it = report.inspection
    parts = [
        ("summary", "Summary", _summary(report)),
        ("look", "Rows to look at", look_part(report)),
        ("distribution", "Lengths and logprobs", _distribution(it)),
        ("preference", "Whom the reference prefers", _preference(report)),
        ("extremes", "Extreme pairs", extremes_part(report)),
        ("texts", "Texts", texts_part(report)),
        ("sources", "Files read", _sources(report)),
        ("manifest", "Manifest", _manifest(it)),
    ]
    return page(f"Reference cache {Path(it.path).name}", it.path, parts, {"pairs": report.texts})


def _summary(report: CacheReport) -> Html:
    it = report.inspection
    rows: list[tuple[str, Child]] = [
        ("pairs", f"{it.pairs:,}, of which {it.pairs_scored:,} scored"),
        ("blocks", f"{it.blocks_scored:,} of {it.blocks:,} finished"),
        ("tokens", f"{it.tokens:,} stored, {it.counted[0]:,} counted in chosen, {it.counted[1]:,} in rejected"),
        ("on disk", f"{it.bytes_on_disk / 1e6:,.2f} MB"),
        ("rows of the files", f"{it.truncated:,} truncated, {it.refused_rows:,} refused"),
    ]
    if it.reference_prefers_chosen and it.reference_margin is not None:
        by = it.reference_prefers_chosen
        rows.append(("reference prefers chosen", f"{by['mean']:.1%} of pairs by mean logprob, {by['sum']:.1%} by sum"))
        rows.append(("mean margin", f"{it.reference_margin:+.4f} nats a token"))
    return together(_state(report), _problems(it, report.suspects.damage), facts(rows))


def _state(report: CacheReport) -> Html:
    again = "Run the same precompute-ref again to"
    if report.suspects.damage:
        return e("p", f"Damaged: training refuses it. {again} make the damaged blocks anew.", class_="state bad")
    if not report.inspection.complete:
        return e("p", f"Not complete: training refuses it. {again} go on.", class_="state bad")
    return e("p", "Complete: training may use it.", class_="state good")


def _problems(it: Inspection, damage: list[str]) -> Html | None:
    lines = [it.problem] if it.problem else []
    lines += [problem for problem in damage if problem not in it.unfinished.values()]
    if it.unfinished:
        lines.append(f"unfinished: block {ranges(map(int, it.unfinished))}")
    if it.shards_missing:
        lines.append(
            f"shards missing: {ranges(it.shards_missing)} of {it.shards} (precompute-ref --shard K/{it.shards})"
        )
    lines += [f"block {block}: {why}" for block, why in it.unfinished.items()]
    more = len(lines) - SHOWN_PROBLEMS
    shown = [*lines[:SHOWN_PROBLEMS], *([f"… and {more:,} more; inspect-cache --json lists all"] if more > 0 else [])]
    return e("ul", [e("li", line) for line in shown], class_="problems") if shown else None


# --- figures ---


def _distribution(it: Inspection) -> Html | None:
    if not it.lengths:
        return None
    figures = []
    if of := it.length_histogram:
        bars = [Bars("chosen", "chosen", of.chosen), Bars("rejected", "rejected", of.rejected)]
        figures.append(histogram("Tokens of a side", "tokens", of.edges, bars, whole=True))
    if of := it.logp_histogram:
        bars = [Bars("chosen", "chosen", of.chosen), Bars("rejected", "rejected", of.rejected)]
        figures.append(histogram("Reference's mean logprob", "nats a token", of.edges, bars))
    if margins := it.margin_histogram:
        kinds = ["chosen" if edge >= 0 else "rejected" for edge in margins.edges[:-1]]
        bars = [Bars("pairs", kinds, margins.pairs)]
        figures.append(histogram("Reference's margin, chosen − rejected", "nats a token", margins.edges, bars))
    rows: list[list[Child]] = [
        [name, *(f"{it.lengths[part][key]:,.{places}f}" for key, places in STATISTICS)]
        for part, name in LENGTHS.items()
    ]
    head = ["tokens", *(key for key, _ in STATISTICS)]
    return together(e("div", figures, class_="charts"), table("Tokens of the sides and their parts", head, rows))


def _preference(report: CacheReport) -> Html | None:
    tables = [_group_table(heading, groups) for heading, groups in report.groups.items() if groups]
    if not tables:
        return None
    says = (
        "The share of pairs whose chosen answer the reference finds likelier, before any training. "
        "By sum, the shorter answer has it easier; by mean, length counts less."
    )
    return together(e("p", says, class_="dim"), tables)


def _group_table(heading: str, groups: list[Group]) -> Html:
    head = [heading, "pairs", "by mean", "by sum", "mean margin"]
    rows: list[list[Child]] = [
        [of.name, f"{of.pairs:,}", f"{of.by_mean:.1%}", f"{of.by_sum:.1%}", f"{of.margin:+.3f}"] for of in groups
    ]
    return table(f"Prefers chosen, by {heading}", head, rows)


# --- where it came from ---


def _sources(report: CacheReport) -> Html:
    columns = ("rows", "kept", "duplicates", "truncated")
    every: list[dict[str, Any]] = report.inspection.log["sources"]
    sources = every[:MOST_FILES]
    rows: list[list[Child]] = [
        [
            of["name"],
            *(f"{of[key]:,}" for key in columns),
            f"{sum(of['refused'].values()):,}",
            "yes" if of["complete"] else "no",
        ]
        for of in sources
    ]
    parts: list[Child] = [table("Files", ["file", *columns, "refused", "read to its end"], rows)]
    if len(every) > len(sources):
        says = f"The first {MOST_FILES} of {len(every):,} files, here and in the preferences; inspect-cache --json lists all."
        parts.append(e("p", says, class_="dim"))
    reasons: list[list[Child]] = [
        [of["name"], reason, f"{count:,}"] for of in sources for reason, count in sorted(of["refused"].items())
    ]
    if reasons:
        parts.append(table("Refused rows by reason", ["file", "reason", "rows"], reasons, numbers_from=2))
    if listed := [row for row in map(_refusal, report.refusals) if row]:
        title = f"Refused rows, the first {len(listed)}"
        some = table(title, ["row", "reason", "what was wrong"], listed, numbers_from=3, captioned=False)
        where = e("p", f"All are listed in {report.inspection.refused_file}.", class_="dim")
        parts.append(e("details", e("summary", title), some, where))
    return together(parts)


def _refusal(line: str) -> list[Child] | None:
    try:
        row = json.loads(line)
        return [f"{row['file']}:{row['line']}", str(row["reason"]), str(row["message"])]
    except (ValueError, KeyError, TypeError):  # a list that a person has edited is no reason to stop
        return None


def _manifest(it: Inspection) -> Html:
    identity, log = it.identity, it.log
    versions = ", ".join(f"{name} {version}" for name, version in log["versions"].items())
    plain: list[tuple[str, Child]] = [
        ("model", f"{log['model']} ({identity['family']})"),
        ("scored in", f"{identity['dtype']}, {identity['attention']} attention"),
        ("sides cut at", f"{identity['max_length']:,} tokens, truncated on the {identity['truncate']}"),
        ("counted tokens", f"--loss-on {identity['loss_on']}"),
        ("each token's logprob", "kept" if identity["per_token"] else "not kept (--per-token)"),
        ("block", f"{identity['block_pairs']:,} pairs"),
        ("identity", it.identity_digest),
        ("made", f"{log['created']} with {versions}"),
    ]
    fields = table(
        "Identity, field by field", ["field", "value"], [[name, str(value)] for name, value in identity.items()], 2
    )
    says = "What the values depend on: caches of one identity hold the same values for the same pairs."
    return together(
        facts(plain), e("details", e("summary", "Identity, field by field"), e("p", says, class_="dim"), fields)
    )
