"""docs/models.md from what check.py found."""

from collections import Counter
from typing import Any

from minicache.options.catalog import LAYOUTS

Found = dict[str, Any]

# Beyond these a number is wrong: mean logprobs against float64, nats per token; the first gradient's norm, relative; losses; the
# norms of all steps, which AdamW makes of the noise in small gradients; mean logprobs of the trained policies, after steps that
# move them by 0.1 and more.
VALUES, GRADIENT, LOSSES, NORMS, POLICY, MERGED = 1e-5, 3e-5, 1e-4, 1e-2, 1e-3, 1e-3
OTHER_VERDICTS = {"wrong": "wrong", "refused": "refused", "error": "end in a library's error"}
STAGES = ("build", "cache", "plain", "train", "lora", "shards")


def failure(found: Found, *stages: str) -> str | None:
    """The line with which the first of these stages failed, as a user sees it; None if none failed."""
    return next((found[name]["failed"] for name in stages if "failed" in found.get(name, {})), None)


def wrong(found: Found) -> list[str]:
    """The numbers of a family that are not those of the plain loop."""
    cache, train = found.get("cache", {}), found.get("train", {})
    bounds = (
        ("cache", cache.get("off"), VALUES),
        ("losses", train.get("losses_off"), LOSSES),
        ("first gradient", train.get("gradient_off"), GRADIENT),
        ("gradients", train.get("norms_off"), NORMS),
        ("policy", train.get("policy_off"), POLICY),
    )
    lines = [f"{name} off by {off:.1e}" for name, off, bound in bounds if off is not None and not off <= bound]
    half = [name for part in ("scores", "gradients") for name in found.get("half", {}).get(part, [])]
    if half:
        lines.append(f"others with weights in half precision: {', '.join(half[:4])}")
    keys = train.get("keys_off")
    return lines + ([f"saved with other keys: {', '.join(keys)}"] if keys else [])


def verdict(found: Found) -> str:
    """ "right", "wrong" (accepted, with other numbers), "refused" (in one line), "error" (by an exception of a library)."""
    if failure(found, "build", "cache", "plain", "train"):
        raw = any(found.get(name, {}).get("raw") for name in ("build", "cache", "plain", "train"))
        return "error" if raw else "wrong" if wrong(found) else "refused"
    return "wrong" if wrong(found) else "right"


def is_listed_first(found: Found) -> bool:
    """Whether a family belongs to the table of causal language models: it is one, or works all the same."""
    return found["nature"] == "decoder" or verdict(found) == "right"


def sums(results: list[Found]) -> str:
    """One sentence of counts over the models of the first table."""
    models = [found for found in results if is_listed_first(found)]
    verdicts = Counter(map(verdict, models))
    layouts = Counter(found["cache"]["layout"] for found in models if verdict(found) == "right")
    used = ", ".join(f"{layouts[name]} {name}" for name in LAYOUTS if layouts[name])
    counts = [f"{verdicts['right']} right ({used})"]
    counts += [f"{verdicts[name]} {words}" for name, words in OTHER_VERDICTS.items() if verdicts[name]]
    return (
        f"{len(models)} models of {len({found['kind'] for found in models})} families: {', '.join(counts)}.\n"
        f"{len(results) - len(models)} entries of the mapping are no causal language models by themselves"
    )


def line(found: Found) -> str:
    """A family in one line, for the terminal."""
    why = "; ".join(filter(None, [failure(found, *STAGES[:4]), *wrong(found)]))
    parts = [verdict(found), layout_of(found), cache_of(found), steps_of(found), lora_of(found), shards_of(found)]
    return f"{found['name']} ({found['seconds']} s): {' | '.join(parts)}{' | ' if why else ''}{why[:200]}"


# --- the columns ---


def layout_of(found: Found) -> str:
    cache = found.get("cache", {})
    return str(cache.get("layout", "–"))


def why_of(found: Found) -> str:
    """Why the layouts before the one used were not."""
    tried = found.get("cache", {}).get("tried", {})
    reasons = [(name, problem) for name, problem in tried.items() if problem != "used"]
    if len({problem for _, problem in reasons}) == 1:
        return str(reasons[0][1])
    return "; ".join(f"{name}: {problem}" for name, problem in reasons)


def cache_of(found: Found) -> str:
    off = found.get("cache", {}).get("off")
    return "–" if off is None else f"{off:.0e}"


def steps_of(found: Found) -> str:
    """The largest differences of losses and of the policy's logprobs."""
    train = found.get("train", {})
    if "losses_off" not in train:
        return "–"
    return f"{train['losses_off']:.0e}, {train['policy_off']:.0e}"


def lora_of(found: Found) -> str:
    part = found.get("lora")
    if part is None or "failed" in part:
        return "–" if part is None else "no"
    if part["moved"] < 1e-4:
        return "trains nothing"
    return "yes" if part["merged_off"] <= MERGED else f"merged otherwise, by {part['merged_off']:.0e}"


def shards_of(found: Found) -> str:
    part = found.get("shards")
    if part is None or "failed" in part:
        return "–" if part is None else "no"
    return f"{part['layers']} layers" if part["off"] <= VALUES else f"off by {part['off']:.0e}"


def remarks_of(found: Found) -> str:
    """What failed, in the words that a user sees, and how the comparison was made."""
    remarks = [failure(found, "build", "cache", "plain", "train"), *wrong(found)]
    for name, title in (("lora", "LoRA"), ("shards", "shards")):
        if not failure(found, "build", "cache") and (why := failure(found, name)):
            remarks.append(f"{title}: {why}")
    if found["nature"] != "decoder":
        remarks.append(found["nature"])
    if found.get("cache", {}).get("attention", "sdpa") != "sdpa":
        remarks.append(f"attention: {found['cache']['attention']}")
    if found.get("plain", {}).get("double") is False:
        remarks.append("compared in float32: its code does not run in float64")
    return "; ".join(filter(None, remarks))


# --- the page ---

TITLE = """# Models

<!-- written by `make zoo`; do not edit -->

Every causal-LM family of transformers {version}, as a tiny random model of a few layers, on {pairs} pairs: `precompute-ref`,
three steps of `train`, saving, opening the policy again with transformers alone, LoRA, and shards.
Each is compared with a plain loop in float64: two live models, one answer at a time, no padding.

{sums}.

- **layout**: what `--layout auto` chose, and why nothing better: `packed` has no padding and each prompt once,
  `shared` each prompt once, `sequences` no padding, `padded` two rows a pair. All of them give the same numbers.
- **cache**: the largest difference of a mean logprob from float64, nats per token.
- **three steps**: the largest difference of a loss, and of the reopened policy's mean logprobs.
- **LoRA**: adapters on all linear layers train; opened with peft they give the logits of the merged model.
- **shards**: FSDP2 on one process finds the layers, wraps them, and gives the same logprobs; backward runs.

In rows with a window of 8, windows are narrower than the answers; in others, as wide as the family has them by default.
"""
OTHERS = """## Not for DPO here

The mapping also lists encoder-decoders, models of pictures and sound, encoders, and parts of other models.

| family | it is | what the user is told |
|---|---|---|
"""


def page(results: list[Found]) -> str:
    """The whole page."""
    from transformers import __version__

    from tests.zoo.pairs import PAIRS

    models = [found for found in results if is_listed_first(found)]
    head = TITLE.format(version=__version__, pairs=PAIRS, sums=sums(results))
    rows = "".join(map(_row, models))
    others = "".join(_other(found) for found in results if not is_listed_first(found))
    table = "| family | class | verdict | layout | why not better | cache | three steps | LoRA | shards | remarks |\n"
    return f"{head}\n{table}|{'---|' * 10}\n{rows}\n{OTHERS}{others}"


def _row(found: Found) -> str:
    cells = [
        found["name"],
        f"`{found.get('build', {}).get('class', '–')}`",
        verdict(found),
        layout_of(found),
        why_of(found),
    ]
    cells += [cache_of(found), steps_of(found), lora_of(found), shards_of(found), remarks_of(found)]
    return f"| {' | '.join(map(_cell, cells))} |\n"


def _other(found: Found) -> str:
    problem = failure(found, "build", "cache", "train")
    told = f"cannot be made here: {problem}" if failure(found, "build") else problem or "; ".join(wrong(found))
    return f"| {found['name']} | {_cell(found['nature'])} | {_cell(told)} |\n"


def _cell(text: str) -> str:
    """A text that a table cell can hold."""
    shown = " ".join(text.split())[:300].replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return shown.replace("https://", "").replace("_", "\\_") if "`" not in shown else shown
