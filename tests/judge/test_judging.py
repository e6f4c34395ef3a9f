"""A judge over answers: both orders, ties, what cannot be read; verdicts that outlive a failure; and what the rate says."""

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from minicache.cache.places.claims import FileClaim
from minicache.errors import DataError, JudgeError, OutputError
from minicache.judge import asking, server
from minicache.judge.judging import Judge
from minicache.judge.question import Answered
from minicache.judge.rate import WinRate, remarks, win_rate
from minicache.judge.verdicts import Ruling, Verdicts, read_verdicts
from minicache.options.judge import JudgeOptions
from minicache.processes.signals import Interruptible
from minicache.reports.intervals import wilson
from minicache.trackers import Silent
from tests.helpers.judge_server import Fault, JudgeServer, judge_server

SECRET = "sk-very-secret-0123456789"


def sides(question: str) -> tuple[str, str]:
    """The answers A and B of a question."""
    found = re.search(r"ANSWER A =+\n(.*?)\n=+ ANSWER B =+\n(.*?)\n=+ END", question, re.DOTALL)
    assert found
    return found[1], found[2]


def fair(question: str) -> str:
    """A judge that prefers the answer with more `+`."""
    a, b = (text.count("+") for text in sides(question))
    return "A" if a > b else "B" if b > a else "C"


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    with judge_server(fair) as one:
        yield one


class Heard(Silent):
    def __init__(self) -> None:
        self.notes: list[str] = []
        self.begun: list[tuple[str, int | None]] = []
        self.done = self.tokens = 0

    def begin(self, phase: str, pairs: int | None) -> None:
        self.begun.append((phase, pairs))

    def advance(self, pairs: int, tokens: int) -> None:
        self.done += pairs
        self.tokens += tokens

    def note(self, text: str) -> None:
        self.notes.append(text)


def answer(number: int, reference: str, policy: str, **cut: bool) -> Answered:
    return Answered(f"prompt {number}", reference, policy, cut.get("r", False), cut.get("p", False))


FOUR = [answer(0, "r", "p+"), answer(1, "r+", "p"), answer(2, "r+", "p+"), answer(3, "same", "same")]


def run(
    judge: JudgeServer, answers: list[Answered], file: Path, tracker: Heard | None = None, **options: Any
) -> WinRate | None:
    tracker = tracker or Heard()
    one = Judge(JudgeOptions(judge=judge.base, judge_model="judge", **options), file, tracker.note)
    return one.judge(answers, lambda texts: sum(len(text.split()) for text in texts), tracker)


# --- the rate ---


def test_each_pair_is_asked_in_both_orders_and_equal_answers_not_at_all(judge: JudgeServer, tmp_path: Path) -> None:
    heard = Heard()
    rate = run(judge, FOUR, tmp_path / "v.jsonl", heard)
    assert rate and [each.outcome for each in rate.prompts] == ["win", "loss", "tie", "tie"]
    assert [each.replies for each in rate.prompts] == [["B", "A"], ["A", "B"], ["C", "C"], []]
    assert (rate.wins, rate.ties, rate.losses, rate.unreadable, rate.judged) == (1, 2, 1, 0, 4)
    assert rate.rate == 0.5 and (rate.low, rate.high) == wilson(2, 4) and rate.same_answers == 1
    assert (rate.asked_twice, rate.changed, rate.order_decides, rate.verdicts, rate.chose_a) == (3, 0, 0, 6, 2)
    asked = sorted(sides(body["messages"][0]["content"]) for body in judge.asked)
    assert asked == sorted([("r", "p+"), ("p+", "r"), ("r+", "p"), ("p", "r+"), ("r+", "p+"), ("p+", "r+")])
    assert (rate.read, rate.written) == (600, 6)
    assert heard.begun == [("judging by judge", 3)] and (heard.done, heard.tokens) == (3, 606)


def test_the_cost_is_known_before_the_first_request(judge: JudgeServer, tmp_path: Path) -> None:
    heard = Heard()
    assert run(judge, FOUR, tmp_path / "v.jsonl", heard, judge_dry_run=True) is None
    words = sum(len(each.question(order).split()) for each in FOUR[:3] for order in (False, True))
    assert heard.notes == [
        f"judge at {judge.base} judges in 6 requests, two a prompt; prompts with the same answer twice, a tie: 1. To send: "
        f"6 requests, about {words:,} tokens in (counted with the policy's tokenizer), at most 96 out"
    ]
    assert not judge.asked and not judge.headers and not list(tmp_path.iterdir())
    judge.faults = [Fault(403)]
    told = Heard()
    with pytest.raises(JudgeError):
        run(judge, FOUR, tmp_path / "v.jsonl", told, judge_concurrency=1)
    assert told.notes[0] == heard.notes[0] and len(judge.asked) == 1


def test_a_judge_that_goes_by_the_order_gives_ties_and_is_told(judge: JudgeServer, tmp_path: Path) -> None:
    judge.reply = lambda _: "A"
    rate = run(judge, FOUR, tmp_path / "v.jsonl")
    assert rate and (rate.wins, rate.ties, rate.losses) == (0, 4, 0)
    assert (rate.asked_twice, rate.changed, rate.order_decides, rate.chose_a) == (3, 3, 3, 6)
    assert any("goes by the order" in line for line in remarks(rate))
    half = replace(rate, order_decides=1)
    assert not any("goes by the order" in line for line in remarks(half))


def test_a_verdict_beside_a_tie_is_a_tie(judge: JudgeServer, tmp_path: Path) -> None:
    judge.reply = lambda text: "C" if sides(text)[0] == "r" else "A"
    rate = run(judge, FOUR[:1], tmp_path / "v.jsonl")
    assert rate and rate.prompts[0].outcome == "tie" and (rate.changed, rate.order_decides) == (1, 0)


def test_what_cannot_be_read_is_counted_and_never_invented(judge: JudgeServer, tmp_path: Path) -> None:
    judge.reply = lambda text: "hm, let me think" if "prompt 1" in text and sides(text)[0] == "p" else fair(text)
    rate = run(judge, FOUR, tmp_path / "v.jsonl")
    assert rate and [each.outcome for each in rate.prompts] == ["win", "unreadable", "tie", "tie"]
    assert (rate.judged, rate.unreadable, rate.rate, rate.verdicts) == (3, 1, 2 / 3, 5)
    assert "hm, let me think" in rate.prompts[1].replies
    assert any(line.startswith("1 of 4 prompts do not count") for line in remarks(rate))
    assert rate.cut == 0 and not any("--judge-max-tokens" in line for line in remarks(rate))
    judge.reply = lambda _: "no"
    nothing = run(judge, FOUR[:2], tmp_path / "other.jsonl")
    assert nothing and (nothing.judged, nothing.rate, nothing.low, nothing.high) == (0, None, None, None)


def test_an_interval_that_holds_a_half_is_told(tmp_path: Path) -> None:
    def rulings(policy_wins: bool) -> list[Ruling]:
        both = ((False, "B" if policy_wins else "A"), (True, "A" if policy_wins else "B"))
        return [Ruling("d", "m", order, verdict, verdict, False, 16) for order, verdict in both]  # type: ignore[arg-type]

    for wins, losses, is_told in ((9, 1, False), (6, 4, True), (1, 9, False)):
        rate = win_rate("u", "m", "f", [rulings(True)] * wins + [rulings(False)] * losses)
        assert rate.rate == wins / 10
        assert any("do not tell" in line for line in remarks(rate)) == is_told


def test_requests_go_out_several_at_once_and_as_many_as_asked(judge: JudgeServer, tmp_path: Path) -> None:
    judge.slow = 0.05
    many = [answer(number, "r", "p+" * (number + 1)) for number in range(10)]
    rate = run(judge, many, tmp_path / "v.jsonl", judge_concurrency=5)
    assert rate and rate.wins == 10 and 2 <= judge.most_at_once <= 5
    judge.most_at_once = 0
    run(judge, many, tmp_path / "w.jsonl", judge_concurrency=1)
    assert judge.most_at_once == 1


# --- what is kept ---


def test_the_same_command_asks_only_for_what_is_missing(judge: JudgeServer, tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    whole = run(judge, FOUR, file)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 6 and len(judge.asked) == 6
    again = Heard()
    assert run(judge, FOUR, file, again) == whole and len(judge.asked) == 6
    assert "6 of them already in" in again.notes[0] and "None is to be sent" in again.notes[0]
    file.write_text("".join(lines[:2]) + lines[2][:30])  # as a kill leaves it
    assert run(judge, FOUR, file) == whole and len(judge.asked) == 10
    assert sorted(file.read_text(encoding="utf-8").splitlines()) == sorted(line.strip() for line in lines)


def test_other_answers_another_judge_and_another_limit_are_asked_anew(judge: JudgeServer, tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    run(judge, FOUR[:1], file)
    run(judge, [answer(0, "r", "p++")], file)
    assert len(judge.asked) == 4
    judge.models.append("other")
    Judge(JudgeOptions(judge=judge.base, judge_model="other"), file, print).judge(FOUR[:1], len, Heard())
    assert len(judge.asked) == 6
    run(judge, FOUR[:1], file, judge_max_tokens=500)
    assert len(judge.asked) == 6, "a verdict that was read stays"
    judge.reply, judge.finish = lambda _: "<think>well", "length"
    cut = run(judge, FOUR[1:2], file)
    assert cut and cut.cut == 1 and any("cut: 1, which a higher --judge-max-tokens" in line for line in remarks(cut))
    run(judge, FOUR[1:2], file)
    assert len(judge.asked) == 8, "the same limit would cut it again"
    judge.reply, judge.finish = fair, "stop"
    rate = run(judge, FOUR[1:2], file, judge_max_tokens=500)
    assert rate and rate.losses == 1 and len(judge.asked) == 10


def test_a_prompt_that_stands_there_twice_is_judged_once(judge: JudgeServer, tmp_path: Path) -> None:
    rate = run(judge, [FOUR[0], FOUR[0]], tmp_path / "v.jsonl")
    assert rate and rate.wins == 2 and len(judge.asked) == 2


def test_an_error_keeps_what_came(judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)
    heard, file = Heard(), tmp_path / "v.jsonl"
    judge.faults = [Fault(), Fault(), Fault(503), Fault(), Fault(403, b'{"error": {"message": "no more"}}')]
    with pytest.raises(JudgeError, match="no more"):
        run(judge, FOUR, file, heard, judge_concurrency=1)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    assert heard.notes[-1] == f"3 of 6 verdicts came and are kept in {file}; the same command goes on"
    again = Heard()
    rate = run(judge, FOUR, file, again)
    assert rate and rate.judged == 4 and "3 of them already in" in again.notes[0]
    judge.faults = [Fault(429, headers={"Retry-After": "0"})]
    run(judge, [answer(7, "r", "p")], file, again)
    assert again.notes[-1] == "requests sent again, as the server was busy or the network broke: 1"


def test_an_interruption_takes_seconds_and_loses_nothing_that_came(
    judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests are answered, one takes a little longer than the signal, one hangs."""
    monkeypatch.setattr(asking, "GRACE", 1.0)
    judge.faults = [Fault(), Fault(), Fault(wait=0.8), Fault(wait=20)]
    threading.Timer(0.4, os.kill, (os.getpid(), signal.SIGINT)).start()
    file, began = tmp_path / "v.jsonl", time.monotonic()
    with (
        pytest.raises(KeyboardInterrupt, match=r"3 of 6 verdicts came and are kept in .*; the same command goes on"),
        Interruptible(),
    ):
        run(judge, FOUR, file, judge_concurrency=2)
    assert time.monotonic() - began < 3
    assert len(read_verdicts(file)) == 3 and len(judge.asked) == 4
    assert not list(tmp_path.glob(".*"))
    rate = run(judge, FOUR, file)
    assert rate and rate.judged == 4 and len(judge.asked) == 7


def test_a_full_disk_is_one_line_and_ends_the_work(
    judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    with pytest.raises(OutputError, match="the disk is full"):
        verdicts = Verdicts(tmp_path / "v.jsonl")
        with verdicts.alone():
            monkeypatch.setattr(verdicts, "file", Path("/dev/full"))
            verdicts.add(Ruling("d", "m", False, "A", "A", False, 16))


def test_two_processes_never_add_to_one_file(judge: JudgeServer, tmp_path: Path) -> None:
    other = FileClaim(tmp_path / ".v.jsonl.lock")
    assert other.take(alone=True)
    with pytest.raises(OutputError, match="another process adds verdicts"):
        run(judge, FOUR, tmp_path / "v.jsonl")
    other.remove()
    assert run(judge, FOUR, tmp_path / "v.jsonl")


def test_what_another_process_has_asked_meanwhile_is_not_asked_again(judge: JudgeServer, tmp_path: Path) -> None:
    """It ends between this one's count and its first request."""
    file = tmp_path / "v.jsonl"

    class Slow(Heard):
        def note(self, text: str) -> None:
            if "To send" in text:
                assert run(judge, FOUR, file)

    rate = run(judge, FOUR, file, tracker=Slow())
    assert rate and rate.judged == 4 and len(judge.asked) == 6
    assert len(file.read_text(encoding="utf-8").splitlines()) == 6


@pytest.mark.parametrize(
    "content",
    [
        b'{"prompt": "x"}\n',
        b"some text",
        b"text\n",
        b"[1]\n",
        b'{"digest": "torn\n{"digest": "x"}\n',
        b'{"digest":"d","model":"m","policy_is_a":true,"verdict":"D","reply":"","is_cut":false,"max_tokens":1}\n',
        b'{"digest":"d","model":"m","policy_is_a":1,"verdict":"A","reply":"","is_cut":false,"max_tokens":1}\n',
        b'{"digest":"d","model":"m","policy_is_a":true,"verdict":"A","reply":"","is_cut":false,"max_tokens":-1}\n',
        b'{"digest":"d"}',
    ],
)
def test_a_file_of_other_things_is_refused_and_stays(content: bytes, judge: JudgeServer, tmp_path: Path) -> None:
    file = tmp_path / "v.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"--verdicts .*v\.jsonl, line 1: expected a verdict that compare wrote"):
        run(judge, FOUR, file)
    assert file.read_bytes() == content and not judge.headers


def test_the_key_is_in_no_file_and_no_note(judge: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    judge.needs_key, heard = SECRET, Heard()
    judge.reply = lambda text: f"{fair(text)}\n\nYour key is {SECRET}."
    rate = run(judge, FOUR, tmp_path / "v.jsonl", heard)
    assert rate and rate.wins == 1
    assert SECRET not in (tmp_path / "v.jsonl").read_text(encoding="utf-8")
    assert SECRET not in json.dumps([str(rate), heard.notes])
