"""What verdicts come to: the outcome of each prompt, and the policy's win rate. No torch."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from minicache.judge.verdicts import Ruling
from minicache.reports.intervals import wilson

Outcome = Literal["win", "tie", "loss", "unreadable"]


@dataclass(frozen=True)
class Judged:
    """What a judge says of one prompt. replies: with the policy as B, and with the policy as A; [] for answers alike."""

    outcome: Outcome
    replies: list[str]


@dataclass(frozen=True)
class WinRate:
    """What a judge says of all prompts.

    url, model, file: the judge, and where its verdicts are kept. cut: unreadable prompts with a reply that the limit of tokens
    ended. judged: wins, ties and losses. same_answers: ties that nobody was asked about. rate: (wins + ties / 2) / judged, None
    without any; low, high: its 95% interval (Wilson). asked_twice: prompts with a verdict in both orders; changed: those with two
    different choices; order_decides: those of them that went with the place of an answer. verdicts: those that could be read;
    chose_a: of these for A. read, written: tokens, as the server counts them. prompts: in the order of the answers.
    """

    url: str
    model: str
    file: str
    wins: int
    ties: int
    losses: int
    unreadable: int
    cut: int
    judged: int
    same_answers: int
    rate: float | None
    low: float | None
    high: float | None
    asked_twice: int
    changed: int
    order_decides: int
    verdicts: int
    chose_a: int
    read: int
    written: int
    prompts: list[Judged]


def outcome_of(rulings: Sequence[Ruling]) -> Outcome:
    """The outcome of a prompt: a win or a loss takes the same choice in both orders. No rulings: the answers are alike, a tie."""
    choices = {ruling.choice for ruling in rulings}
    if None in choices:
        return "unreadable"
    if len(choices) != 1:
        return "tie"
    return {"policy": "win", "reference": "loss", "tie": "tie"}[str(choices.pop())]  # type: ignore[return-value]


def win_rate(url: str, model: str, file: str, rulings: Sequence[Sequence[Ruling]]) -> WinRate:
    """The rate over prompts. rulings: of each prompt both orders, or none where both models answered alike."""
    prompts = [Judged(outcome_of(both), [ruling.reply for ruling in both]) for both in rulings]
    counts = Counter(each.outcome for each in prompts)
    judged = counts["win"] + counts["tie"] + counts["loss"]
    score = counts["win"] + counts["tie"] / 2
    low, high = wilson(score, judged) if judged else (None, None)
    readable = [ruling for both in rulings for ruling in both if ruling.verdict]
    twice = [both for both in rulings if both and all(ruling.verdict for ruling in both)]
    return WinRate(
        url=url,
        model=model,
        file=file,
        wins=counts["win"],
        ties=counts["tie"],
        losses=counts["loss"],
        unreadable=counts["unreadable"],
        cut=sum(any(ruling.verdict is None and ruling.is_cut for ruling in both) for both in rulings),
        judged=judged,
        same_answers=sum(not both for both in rulings),
        rate=score / judged if judged else None,
        low=low,
        high=high,
        asked_twice=len(twice),
        changed=sum(len({ruling.choice for ruling in both}) > 1 for both in twice),
        order_decides=sum({ruling.verdict for ruling in both} in ({"A"}, {"B"}) for both in twice),
        verdicts=len(readable),
        chose_a=sum(ruling.verdict == "A" for ruling in readable),
        read=sum(ruling.read for both in rulings for ruling in both),
        written=sum(ruling.written for both in rulings for ruling in both),
        prompts=prompts,
    )


def remarks(rate: WinRate) -> list[str]:
    """What a person should know before believing the rate, one line each."""
    found = []
    if rate.unreadable:
        more = f"; cut: {rate.cut}, which a higher --judge-max-tokens asks again" if rate.cut else ""
        found.append(
            f"{rate.unreadable} of {len(rate.prompts)} prompts do not count: a reply was no A, B or C (see {rate.file}){more}"
        )
    if rate.order_decides * 2 > rate.asked_twice:
        found.append(
            f"in {rate.order_decides} of {rate.asked_twice} prompts the judge chose the same place, A or B, whoever stood there: "
            "it goes by the order more than by the answers; a stronger judge is needed"
        )
    if rate.low is not None and rate.high is not None and rate.low <= 0.5 <= rate.high:
        found.append("the interval holds 50%: these prompts do not tell which model is better; more of them may")
    return found
