"""A training run as one self-contained page: how it went, its curves, held-out figures, answers, options. No torch."""

import json
import math
import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from minicache.options.declare import flag as option
from minicache.options.dictionaries import flat
from minicache.options.train import TrainConfig
from minicache.pages.charts import Line, curves
from minicache.pages.markup import Child, Html, e, facts, page, table, together
from minicache.pages.run_answers import answers_part
from minicache.pictures.runs import EVAL, LOGPS_UNITS, PANELS
from minicache.reports.curves import Curve
from minicache.training.run_directory import starts_at_ln_2

PAGE = "report.html"
ANSWERS = ("answers.jsonl", "compare.jsonl")  # looked for in the run
HELD_OUT = {
    "loss": "loss",
    "accuracy/policy": "chosen is likelier",
    "rewards/accuracy": "moved towards chosen",
    "rewards/margin": "reward margin",
    "kl": "moved from the reference (KL), nats a token",
}
KINDS = {"chosen": "chosen", "rejected": "rejected"}


def run_page(
    run: Path, known: dict[str, Any], logged: dict[str, Curve], answers: list[dict[str, Any]], beside: Path
) -> str:
    """The page's HTML. known: run.json. logged: metric -> steps and values. beside: the folder the page will lie in."""
    parts = [
        ("summary", "Summary", _summary(known, logged, beside)),
        ("curves", "Curves", _curves(known, logged)),
        ("held-out", "Held-out pairs", _held_out(known, logged)),
        ("answers", "Answers before and after", answers_part(run, answers)),
        ("options", "Options", _options(known)),
    ]
    return page(f"Training run {run.resolve().name}", str(run), parts)


# --- how it went ---


def _summary(known: dict[str, Any], logged: dict[str, Curve], beside: Path) -> Html:
    last = max(steps[-1] for steps, _ in logged.values())
    rows: list[tuple[str, Child]] = []
    if "started_from" in known:
        rows.append(("started from", _place(known["started_from"], beside)))
    if "ref_cache" in known:
        rows.append(("reference cache", _place(known["ref_cache"], beside)))
    if "pairs" in known:
        held_out = f", {known['held_out']:,} held out" if known.get("held_out") else ""
        rows.append(("pairs", f"{known['pairs']:,} trained on{held_out}"))
    if "loss" in known:
        rows.append(("objective", _objective(known)))
    if "handshake" in known:
        rows.append(("handshake", _handshake(known)))
    rows.append(("before the first step", _first(known, logged)))
    rows += [(name, _change(logged[metric], form)) for metric, (name, form) in _CHANGES.items() if metric in logged]
    return together(_state(known, last), facts(rows))


_CHANGES = {
    "loss": ("loss", ".4f"),
    "rewards/accuracy": ("reward accuracy", ".0%"),
    "rewards/margin": ("reward margin", "+.4f"),
    "kl": ("KL, nats a token", ".4f"),
}


def _state(known: dict[str, Any], last: int) -> Html:
    steps = f" of {known['steps']:,}" if "steps" in known else ""
    outcome = known.get("outcome")
    if not known:
        return e("p", "run.json is missing: what the run was asked to do is not known.", class_="state bad")
    if not outcome:
        return e(
            "p",
            f"Not finished: last logged after step {last:,}{steps}. train --resume goes on with it.",
            class_="state bad",
        )
    done, kept = outcome["progress"]["step"], outcome["model_step"]
    best = f" The saved model is the best one, after step {kept:,}." if kept != done else ""
    if outcome.get("stopped"):
        return e("p", f"Stopped after step {done:,}{steps}: {outcome['stopped']}.{best}", class_="state bad")
    return e("p", f"Finished after step {done:,}{steps}.{best}", class_="state good")


def _objective(known: dict[str, Any]) -> str:
    return (
        f"{known['loss']} loss on {known.get('logps', 'mean')} logprobs, beta {known.get('beta')}, lr {known.get('lr')}"
    )


def _handshake(known: dict[str, Any]) -> str:
    worst = known["handshake"]
    if known.get("init_from"):
        return f"started from other weights: they differ from the cache by up to {worst:.2g} nats a token"
    return (
        f"the policy gave the cache's logprobs within {worst:.1g} nats a token"
        if worst
        else "the policy gave the cache's logprobs exactly"
    )


def _starts_at_ln2(known: dict[str, Any]) -> bool:
    return starts_at_ln_2(known) and not known.get("init_from")


def _first(known: dict[str, Any], logged: dict[str, Curve]) -> str:
    steps, values = logged.get("loss", ([], []))
    if not steps or steps[0] != 0:
        return "not logged"
    expected = f" (ln 2 is {math.log(2):.6f})" if _starts_at_ln2(known) else ""
    margin = logged.get("rewards/margin", ([], [math.nan]))[1][0]
    return f"loss {values[0]:.6f}{expected}, reward margin {margin:+.4f}"


def _change(curve: Curve, form: str) -> str:
    steps, values = curve
    return f"{values[0]:{form}} at step {steps[0]:,}, {values[-1]:{form}} at step {steps[-1]:,}"


def _place(name: object, beside: Path) -> Child:
    """A path, or several; a link where a page of the cache, or of the run that the model is of, lies in it."""
    if isinstance(name, list):
        return [e("div", _place(one, beside)) for one in name]
    text = str(name)
    for folder in (Path(text), Path(text).parent):
        if folder.name and (folder / PAGE).is_file() and (folder == Path(text) or Path(text).name == "model"):
            target = os.path.relpath((folder / PAGE).resolve(), beside)
            return e("a", text, href=quote(Path(target).as_posix()))
    return e("code", text)


# --- figures ---


def _curves(known: dict[str, Any], logged: dict[str, Curve]) -> Html:
    figures = []
    for panel in PANELS:
        lines = [
            Line(_name(metric, prefix, len(panel.metrics)), _kind(metric, prefix), *logged[prefix + metric])
            for metric in panel.metrics
            for prefix in ("", EVAL)
            if prefix + metric in logged
        ]
        if lines:
            unit = panel.unit.format(logps=LOGPS_UNITS.get(str(known.get("logps")), "nats"))
            level = math.log(2) if panel.title == "loss" and _starts_at_ln2(known) else panel.level
            figures.append(curves(panel.title[0].upper() + panel.title[1:], unit, lines, level))
    says = "The dashed line of the loss is ln 2: the policy is the reference." if _starts_at_ln2(known) else ""
    return together(e("p", says, class_="dim") if says else None, e("div", figures, class_="charts"))


def _name(metric: str, prefix: str, of: int) -> str:
    side = metric.rpartition("/")[2] if of > 1 else "training"
    return side if not prefix else ("held out" if of == 1 else f"{side}, held out")


def _kind(metric: str, prefix: str) -> str:
    side = KINDS.get(metric.rpartition("/")[2], "")
    return f"{side} heldout".strip() if prefix else side


def _held_out(known: dict[str, Any], logged: dict[str, Curve]) -> Html | None:
    """The first validation, that of the saved model and the last."""
    if EVAL + "loss" not in logged:
        return None
    steps = logged[EVAL + "loss"][0]
    kept = (known.get("outcome") or {}).get("model_step")
    columns = [step for step in steps if step in (steps[0], kept, steps[-1])]
    notes = {0: " (before)", kept: " (saved)"}
    names = [f"step {step:,}{notes.get(step, '')}" for step in columns]
    rows: list[list[Child]] = []
    for metric, name in HELD_OUT.items():
        if EVAL + metric in logged:
            at = dict(zip(*logged[EVAL + metric], strict=True))
            form = ".1%" if "accuracy" in metric else ".4f"
            rows.append([name, *(f"{at[step]:{form}}" if step in at else "–" for step in columns)])
    return table("Held-out pairs, before and after", ["metric", *names], rows, captioned=False)


# --- options ---


def _options(known: dict[str, Any]) -> Html | None:
    """Those that are not the defaults first."""
    if not known:
        return None
    usual = flat(TrainConfig(ref_cache="", out=Path("run")))
    given = {name: value for name, value in known.items() if name in usual}
    changed = [_option(name, value) for name, value in given.items() if value != usual[name]]
    same = [_option(name, value) for name, value in given.items() if value == usual[name]]
    rest = [_option(name, value, name) for name, value in known.items() if name not in usual and name != "outcome"]
    parts = [
        table("Not the defaults", ["option", "value"], changed, numbers_from=2),
        e(
            "details",
            e("summary", f"{len(same)} options at their defaults"),
            table("Defaults", ["option", "value"], same, 2),
        ),
        e("details", e("summary", "What followed from them"), table("Found at the start", ["what", "value"], rest, 2)),
    ]
    return e("div", parts, class_="options")


def _option(name: str, value: object, shown: str = "") -> list[Child]:
    return [
        shown.replace("_", " ") or option(name),
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False),
    ]
