"""What `compare` prints: the answers, and what a judge says of them. rich only; no torch."""

from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from minicache.judge.rate import WinRate, remarks
from minicache.screen.results import show_answers

if TYPE_CHECKING:
    from minicache.stages.compare import Compared


def show_compared(console: Console, compared: "Compared") -> None:
    show_answers(console, compared.answers)
    if compared.judge:
        show_win_rate(console, compared.judge)


def show_win_rate(console: Console, rate: WinRate) -> None:
    """Print the rate with its interval, what it is made of, and what a person should know before believing it."""
    judge = rate.model
    if rate.rate is None:
        console.print(Text(f"{judge}: no prompt could be judged", style="yellow"), soft_wrap=True)
    else:
        shares = f"{rate.rate:.1%} (95% interval {rate.low:.1%} to {rate.high:.1%}, Wilson; a tie is half a win)"
        console.print(Text(f"{judge}: the policy's win rate is {shares}", style="bold"), soft_wrap=True)
    alike = f" (the same answer twice: {rate.same_answers:,})" if rate.same_answers else ""
    counts = f"wins {rate.wins:,}, ties {rate.ties:,}{alike}, losses {rate.losses:,}, unreadable {rate.unreadable:,}"
    sure = f"the same choice in both orders in {rate.asked_twice - rate.changed:,} of {rate.asked_twice:,} prompts"
    lines = [counts, *([sure] if rate.asked_twice else [])]
    if rate.read or rate.written:
        lines.append(f"its server counted {rate.read:,} tokens read and {rate.written:,} written for these verdicts")
    for line in [*lines, f"verdicts in {rate.file}"]:
        console.print(Text(f"  {line}"), soft_wrap=True, highlight=False)
    for line in remarks(rate):
        console.print(Text(f"  {line}", style="yellow"), soft_wrap=True)
