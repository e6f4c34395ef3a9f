"""A training run as one self-contained page: how it went, its curves, held-out figures, answers, options. No torch."""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minicache.json_lines import as_text
from minicache.options.declare import flag
from minicache.options.loss import BETAS
from minicache.options.objective import starts_at_ln_2
from minicache.pages.charts import Line, curves
from minicache.pages.markup import Table, report
from minicache.pages.run_answers import Answer, answers_part
from minicache.reports.curves import Curve
from minicache.reports.figures import end_of, held_out_figures, objective_of
from minicache.reports.held_out import figures_of_run, words_on_run
from minicache.reports.names import EVAL, METRICS, PANELS, SUMMARY, Metric, model_name
from minicache.text import Phrase, phrase
from minicache.training.run_directory import DEFAULTS, NEEDED

PAGE = "report.html"
ANSWERS = ("answers.jsonl", "compare.jsonl")  # looked for in the run


@dataclass(frozen=True)
class Place:
    """A path. href: where a page of what lies there is."""

    path: str
    href: str | None


def run_page(run: Path, known: dict[str, Any], logged: dict[str, Curve], answers: list[Answer], beside: Path) -> str:
    """The page's HTML. known: run.json. logged: metric -> steps and values. beside: the folder the page will lie in."""
    parts = [
        ("summary", "Summary", _summary(known, logged, beside)),
        ("curves", "Curves", _curves(known, logged)),
        ("held-out", "Held-out pairs", _held_out(known, logged)),
        ("answers", "Answers before and after", answers_part(run, answers)),
        ("options", "Options", _options(known)),
    ]
    begun = model_name(known.get("started_from", "")) or phrase("A policy")
    on = "{model} trained on {pairs:,} pairs" if "pairs" in known else "{model} in training"
    return report("run.html", phrase(on, model=begun, pairs=known.get("pairs")), str(run), parts)


# --- how it went ---


def _summary(known: dict[str, Any], logged: dict[str, Curve], beside: Path) -> dict[str, Any]:
    rows: list[tuple[str, str | list[Place]]] = []
    if "started_from" in known:
        rows.append(("started from", _places(known["started_from"], beside)))
    if "ref_cache" in known:
        rows.append(("reference cache", _places(known["ref_cache"], beside)))
    if "pairs" in known:
        pairs = "{pairs:,} trained on, {held_out:,} held out" if known.get("held_out") else "{pairs:,} trained on"
        rows.append(("pairs", phrase(pairs, pairs=known["pairs"], held_out=known.get("held_out"))))
    if "loss" in known:
        rows.append(("objective", objective_of(known)))
    if "handshake" in known:
        rows.append(("handshake", _handshake(known)))
    rows.append(("before the first step", _first(known, logged)))
    rows += [(METRICS[name].name, _change(logged[name], METRICS[name])) for name in SUMMARY if name in logged]
    rows += [
        (phrase("held out, saved policy: {name}", name=phrase(name)), line) for name, line in figures_of_run(known)
    ]
    last = max(steps[-1] for steps, _ in logged.values())
    good, state = end_of(known, last)
    return {"good": good, "state": state, "facts": rows, "words": words_on_run(known) if known.get("outcome") else []}


def _handshake(known: dict[str, Any]) -> Phrase:
    worst = known["handshake"]
    if known.get("init_from"):
        text = "started from other weights: they differ from the cache by up to {worst:.2g} nats per token"
    elif worst:
        text = "the policy reproduced the cache's logprobs within {worst:.1g} nats per token"
    else:
        text = "the policy reproduced the cache's logprobs exactly"
    return phrase(text, worst=worst)


def _first(known: dict[str, Any], logged: dict[str, Curve]) -> Phrase:
    steps, values = logged.get("loss", ([], []))
    if not steps or steps[0] != 0:
        return phrase("not logged")
    text = "loss {loss:.6f}, reward margin {margin:+.4f}"
    if starts_at_ln_2(known):
        text = "loss {loss:.6f} (ln 2 is {ln_2:.6f}), reward margin {margin:+.4f}"
    margin = logged.get("rewards/margin", ([], [math.nan]))[1][0]
    return phrase(text, loss=values[0], ln_2=math.log(2), margin=margin)


def _change(curve: Curve, metric: Metric) -> Phrase:
    steps, (first, last) = curve[0], (format(curve[1][at], metric.form) for at in (0, -1))
    text = "{first} at step {begin:,}, {last} at step {end:,}"
    return phrase(text, first=first, begin=steps[0], last=last, end=steps[-1])


def _places(name: object, beside: Path) -> list[Place]:
    """A path, or several, each with the page of the cache, or of the run that the model is of, if one lies there."""
    return [Place(str(one), _page_of(Path(str(one)), beside)) for one in (name if isinstance(name, list) else [name])]


def _page_of(path: Path, beside: Path) -> str | None:
    for folder in (path, path.parent) if path.name == "model" else (path,):
        if folder.name and (folder / PAGE).is_file():
            page = (folder / PAGE).resolve()
            # from one of Windows' drives to another there is no relative path
            return (
                quote(Path(os.path.relpath(page, beside)).as_posix())
                if page.drive == beside.absolute().drive
                else page.as_uri()
            )
    return None


# --- figures ---


def _curves(known: dict[str, Any], logged: dict[str, Curve]) -> dict[str, Any]:
    from_ln_2 = starts_at_ln_2(known)
    charts = []
    for panel in PANELS:
        lines = [
            Line(_name(metric, prefix, len(panel.metrics)), _kind(metric, prefix), *logged[prefix + metric])
            for metric in panel.metrics
            for prefix in ("", EVAL)
            if prefix + metric in logged
        ]
        if lines:
            title = panel.title[0].upper() + panel.title[1:]
            charts.append(curves(title, panel.unit_of([known]), lines, panel.level_of(from_ln_2)))
    return {"from_ln_2": from_ln_2, "charts": charts}


def _name(metric: str, prefix: str, of: int) -> str:
    side = phrase(metric.rpartition("/")[2] if of > 1 else "training")
    return side if not prefix else phrase("held out" if of == 1 else "{side}, held out", side=side)


def _kind(metric: str, prefix: str) -> str:
    """Classes of the style."""
    side = metric.rpartition("/")[2]
    return " ".join([*([side] if side in ("chosen", "rejected") else []), *(["heldout"] if prefix else [])])


def _held_out(known: dict[str, Any], logged: dict[str, Curve]) -> Table | None:
    """The first validation, that of the saved model and the last."""
    found = held_out_figures(known, logged)
    return Table("Held-out pairs, before and after", found.head, found.rows, captioned=False) if found else None


# --- options ---


def _options(known: dict[str, Any]) -> list[Table] | None:
    """Options that are not the defaults, those that are, and the values derived from them."""
    if not known:
        return None
    usual = {**dict.fromkeys(NEEDED), **DEFAULTS, "beta": BETAS.get(known.get("logps", ""))}
    given = {name: value for name, value in known.items() if name in usual}
    changed = [[flag(name), as_text(value)] for name, value in given.items() if value != usual[name]]
    same = [[flag(name), as_text(value)] for name, value in given.items() if value == usual[name]]
    rest = [
        [name.replace("_", " "), as_text(value)]
        for name, value in known.items()
        if name not in usual and name != "outcome"
    ]
    return [
        Table("Not the defaults", ["option", "value"], changed, numbers_from=2),
        Table("Defaults", ["option", "value"], same, numbers_from=2),
        Table("Derived from the options", ["what", "value"], rest, numbers_from=2),
    ]
