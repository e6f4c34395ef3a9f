"""Answers as one self-contained page on which a person votes without knowing which model wrote which. No torch, no network."""

import base64
import json
import random
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from minicache.judge.rate import WinRate
from minicache.pages.markup import render
from minicache.text import visible


@dataclass(frozen=True)
class Answers:
    """Both models' answers to one prompt. messages: its turns, [] for a prompt of a cache; *_cut: cut at --max-new-tokens."""

    prompt: str
    messages: list[dict[str, str]]
    reference: str
    policy: str
    reference_cut: bool
    policy_cut: bool


def page(
    answers: list[Answers], names: dict[str, str], settings: dict[str, Any], seed: int, judge: WinRate | None = None
) -> str:
    """The page's HTML. names: of `reference` and `policy`, shown once revealed, as what a judge says. seed: decides who is A."""
    return render("compare.html", title="minidpo compare", data=page_data(answers, names, settings, seed, judge))


def page_data(
    answers: list[Answers], names: dict[str, str], settings: dict[str, Any], seed: int, judge: WinRate | None = None
) -> dict[str, Any]:
    """What the page's script reads.

    items: prompt, a, b, and whether each was cut. key: base64 of JSON with the names and, for each item, the policy's letter:
    hidden from a glance at the source, no secret. judge: what a judge says, likewise, on pages of one that was judged.
    digest: the browser stores votes under it. It leaves the judge out: a page that was voted on may be judged later.
    """
    sides = policy_sides(len(answers), seed)
    items = [_item(answer, side) for answer, side in zip(answers, sides, strict=True)]
    sealed = {**{name: visible(text) for name, text in names.items()}, "sides": sides}
    data = {"items": items, "settings": settings, "key": _sealed(sealed)}
    content = json.dumps(data, sort_keys=True).encode()
    verdicts = {"judge": _sealed(_judge_data(judge))} if judge else {}
    return {**data, "digest": blake2b(content, digest_size=16).hexdigest(), **verdicts}


def _sealed(value: object) -> str:
    return base64.b64encode(json.dumps(value, ensure_ascii=False).encode()).decode()


def _judge_data(judge: WinRate) -> dict[str, Any]:
    """The judge's name and, for each item, the outcome for the policy and both replies; none where nobody was asked."""
    prompts = [{"outcome": each.outcome, "replies": [_shown(text) for text in each.replies]} for each in judge.prompts]
    return {"model": visible(judge.model), "prompts": prompts}


def policy_sides(count: int, seed: int) -> str:
    """For each item "a" or "b", the policy's side: both equally often, in an order drawn from the seed."""
    sides = [*"ab"] * ((count + 1) // 2)
    # one letter too many where the count is odd: the shuffle decides which one is left out
    random.Random(seed).shuffle(sides)
    return "".join(sides[:count])


def _item(answer: Answers, policy_side: str) -> dict[str, Any]:
    turns = answer.messages or [{"role": "", "content": answer.prompt}]
    sides = {"policy": (answer.policy, answer.policy_cut), "reference": (answer.reference, answer.reference_cut)}
    a, b = ("policy", "reference") if policy_side == "a" else ("reference", "policy")
    return {
        "prompt": [{"role": turn["role"], "content": _shown(turn["content"])} for turn in turns],
        "a": _shown(sides[a][0]),
        "b": _shown(sides[b][0]),
        "a_cut": sides[a][1],
        "b_cut": sides[b][1],
    }


def _shown(text: str) -> str:
    return visible(text.replace("\r\n", "\n"))
