"""The card of a policy on the Hub, made from its run and, where they can be read, from the caches it was trained on. No torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minicache import __version__
from minicache.cache.manifest import Manifest
from minicache.hub import page_of
from minicache.json_lines import as_text
from minicache.options.declare import flag
from minicache.pages.card import card, code, facts, link, plain, table
from minicache.reports.curves import Curve
from minicache.reports.figures import end_of, held_out_figures, objective_of
from minicache.reports.held_out import figures_of_run, words_on_run
from minicache.reports.public import data_set_of, hub_id, public_name, public_options
from minicache.training.run_directory import DEFAULTS

PICTURE = "curves.png"
# Options that say where things lie or how a call went on, and nothing about the policy.
NOT_SHOWN = (
    "out",
    "scratch",
    "resume",
    "tracker",
    "trust_remote_code",
    "ref_cache",
    "log_every",
    "keep_last",
    "async_save",
)
USE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""
USE_ADAPTER = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
```"""
UNMOVED = (
    "**No step of this run was better on the held-out pairs than the start: the weights here are those of the model that "
    "training started from.**"
)


@dataclass(frozen=True)
class PolicyFacts:
    """What a card is made of.

    known: run.json. logged: metric -> steps and values. caches: of those trained on, as far as they can be read. base: the Hub's
    name of the model that training started from, or None. adapter: whether the model is an adapter. has_picture: whether the
    curves lie beside the card.
    """

    known: Mapping[str, Any]
    logged: Mapping[str, Curve]
    caches: Sequence[Manifest]
    base: str | None
    adapter: bool
    has_picture: bool
    licence: str | None = None


def model_card(repo: str, run: PolicyFacts) -> str:
    """The text of the card of a policy that will be `repo` on the Hub."""
    known = run.known
    front = {
        "license": run.licence,
        "base_model": run.base,
        "base_model_relation": ("adapter" if run.adapter else "finetune") if run.base else None,
        "datasets": _data_sets(run),
        "library_name": "peft" if run.adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "preference-optimization", "minidpo", *(["lora"] if run.adapter else [])],
    }
    base = link(run.base, page_of("model", run.base)) if run.base else plain(public_name(known["started_from"]))
    about = (
        f"A policy trained on preference pairs, {plain(objective_of(known))}. Training started from {base}. The reference's "
        "logprobs came from a cache, so that the policy alone was in memory."
    )
    unmoved = UNMOVED if known["outcome"]["model_step"] == 0 else None
    use = (USE_ADAPTER if run.adapter else USE).format(repo=repo, base=run.base or "DIRECTORY OF THE BASE")
    parts = [about, unmoved, "## Use", use, "## Training", _training(run, base)]
    return card(
        front, repo.rpartition("/")[2], [*parts, *_held_out(run), *_recipe(run), f"Made with minidpo {__version__}."]
    )


def _data_sets(run: PolicyFacts) -> list[str]:
    names = [source.name for manifest in run.caches for source in manifest.log.sources]
    return sorted({found for name in [*names, *_cache_names(run)] if (found := data_set_of(name))})


def _cache_names(run: PolicyFacts) -> list[str]:
    named = run.known["ref_cache"]
    return list(map(str, named if isinstance(named, list) else [named]))


def _cache(name: str) -> str:
    """A cache by its public name, which leads to its page if it lies on the Hub."""
    found = data_set_of(name)
    return link(name, page_of("dataset", found)) if found else code(public_name(name))


def _training(run: PolicyFacts, base: str) -> str:
    known = run.known
    held_out = f", {known['held_out']:,} held out" if known.get("held_out") else ""
    last = max((steps[-1] for steps, _ in run.logged.values()), default=0)
    rows = [("started from", base), ("reference cache", ", ".join(map(_cache, _cache_names(run))))]
    for manifest in run.caches:
        reference = public_name(manifest.log.model)
        name = link(reference, page_of("model", reference)) if hub_id(reference) else plain(reference)
        rows.append(("reference", f"{name}, weights {code(manifest.identity.weights)}"))
        files = ", ".join(f"{code(public_name(each.name))} ({each.kept:,} pairs)" for each in manifest.log.sources)
        rows.append(("data", files))
    rows.append(("pairs", f"{known['pairs']:,} trained on{held_out}"))
    rows.append(("objective", plain(objective_of(known))))
    rows.append(("how it ended", plain(end_of(known, last)[1])))
    return facts(rows)


def _held_out(run: PolicyFacts) -> list[str]:
    found = held_out_figures(run.known, run.logged)
    figures = (
        table([plain(name) for name in found.head], [[plain(cell) for cell in row] for row in found.rows])
        if found
        else "This run was not validated on held-out pairs."
    )
    with_intervals = [f"- {plain(name)}: {plain(line)}" for name, line in figures_of_run(run.known)]
    # of a policy that is the start, the card says so at its top
    words = words_on_run(run.known) if run.known["outcome"]["model_step"] else []
    lines = "\n".join([*with_intervals, *(f"- {plain(line)}" for line in words)])
    picture = [f"![curves of the training]({PICTURE})"] if run.has_picture else []
    return ["## Held-out pairs, before and after", figures, *([lines] if lines else []), *picture]


def _recipe(run: PolicyFacts) -> list[str]:
    """The options that are not the defaults, and the version's own for what makes a recipe."""
    options = {name: value for name, value in run.known.items() if name in DEFAULTS and name not in NOT_SHOWN}
    always = ("loss", "logps", "beta", "lr", "schedule", "warmup", "batch_size", "epochs", "optimizer", "seed")
    shown = {name: value for name, value in options.items() if value != DEFAULTS[name] or name in always}
    rows = [(code(flag(name)), code(as_text(value))) for name, value in public_options(shown).items()]
    return [
        "## Recipe",
        "Options of `minidpo train`; those that are not here had their defaults.",
        table(["option", "value"], rows),
    ]
