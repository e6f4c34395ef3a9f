"""A judge compares answers: what is missing is counted, asked for and kept; then the rate."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from minicache.errors import JudgeError
from minicache.judge.asking import ask_all
from minicache.judge.connection import Connection
from minicache.judge.key import read_key
from minicache.judge.question import Answered, digest_of, verdict_of
from minicache.judge.rate import WinRate, win_rate
from minicache.judge.server import ChatServer, Reply
from minicache.judge.verdicts import LONGEST_REPLY, Ruling, Verdicts
from minicache.options.judge import JudgeOptions, base_url
from minicache.trackers import Tracker

# Reference as A and policy as B, then the other way round.
ORDERS = (False, True)


@dataclass(frozen=True)
class Question:
    """One request. number: of the prompt."""

    number: int
    policy_is_a: bool
    text: str
    digest: str


class Judge:
    """A judge and the file of its verdicts. Made before any model is loaded: what is wrong with them is known then."""

    def __init__(self, options: JudgeOptions, file: Path, note: Callable[[str], None]) -> None:
        """Raises MinicacheError: the key is missing, the server cannot be reached, or the file holds other things."""
        assert options.judge and options.judge_model
        self.options, self.model, self.base = options, options.judge_model, base_url(options.judge)
        self.verdicts = Verdicts(file)
        if options.judge_dry_run:
            return
        key, line = read_key(options)
        if line:
            note(line)
        self.server = ChatServer(Connection(self.base, key), self.model, options.max_tokens)
        if line := self.server.look():
            note(line)

    def judge(self, answers: Sequence[Answered], count: Callable[[list[str]], int], tracker: Tracker) -> WinRate | None:
        """The policy's win rate; None where `--judge-dry-run` only asks for the cost. count: tokens of texts, for the estimate.

        Raises:
            JudgeError: the server cannot be reached or refuses; verdicts that came are kept.
            KeyboardInterrupt: likewise, with a text that says so.
        """
        asked = [[] if each.is_same else self._questions(number, each) for number, each in enumerate(answers)]
        # by digest: a prompt that stands there twice is judged once
        missing = list({each.digest: each for both in asked for each in both if not self._known(each)}.values())
        tracker.note(self._cost(asked, missing, count([each.text for each in missing])))
        if self.options.judge_dry_run:
            return None
        if missing:
            self._ask(missing, tracker)
        rulings = [[found for each in both if (found := self._known(each))] for both in asked]
        return win_rate(self.base, self.model, str(self.verdicts.file), rulings)

    def _questions(self, number: int, answered: Answered) -> list[Question]:
        texts = [(policy_is_a, answered.question(policy_is_a)) for policy_is_a in ORDERS]
        return [Question(number, order, text, digest_of(self.model, text)) for order, text in texts]

    def _known(self, question: Question) -> Ruling | None:
        return self.verdicts.get(question.digest, self.options.max_tokens)

    def _cost(self, asked: Sequence[Sequence[Question]], missing: list[Question], tokens: int) -> str:
        """The line that says what the requests cost."""
        total, alike = len({each.digest for both in asked for each in both}), sum(not both for both in asked)
        known = f", {total - len(missing):,} of them already in {self.verdicts.file}" if total > len(missing) else ""
        same = f"; prompts with the same answer twice, a tie: {alike:,}" if alike else ""
        most, judges = len(missing) * self.options.max_tokens, f"{self.model} at {self.base} judges in"
        if not missing:
            return f"{judges} {total:,} requests, two a prompt{known}{same}. None is to be sent"
        return (
            f"{judges} {total:,} requests, two a prompt{known}{same}. To send: {len(missing):,} requests, about {tokens:,} "
            f"tokens in (counted with the policy's tokenizer), at most {most:,} out"
        )

    def _ask(self, missing: list[Question], tracker: Tracker) -> None:
        came = 0

        def heard(index: int, reply: Reply) -> None:
            nonlocal came
            question = missing[index]
            self.verdicts.add(self._ruling(question, reply))
            came += 1
            # the request that completes a pair of answers; a resumed pair may have only one
            left[question.number] -= 1
            tracker.advance(0 if left[question.number] else 1, reply.read + reply.written)

        try:
            with self.verdicts.alone():
                # another process may have asked some since they were counted
                missing = [each for each in missing if not self._known(each)]
                left = Counter(question.number for question in missing)
                tracker.begin(f"judging by {self.model}", len(left))
                ask_all(self.server, [each.text for each in missing], self.options.concurrency, heard)
        except (KeyboardInterrupt, JudgeError) as error:
            kept = f"{came:,} of {len(missing):,} verdicts came and are kept in {self.verdicts.file}; the same command goes on"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(kept) from None
            tracker.note(kept)
            raise
        if self.server.repeated:
            tracker.note(f"requests sent again, as the server was busy or the network broke: {self.server.repeated:,}")

    def _ruling(self, question: Question, reply: Reply) -> Ruling:
        return Ruling(
            digest=question.digest,
            model=self.model,
            policy_is_a=question.policy_is_a,
            verdict=verdict_of(reply.text),
            reply=reply.text[:LONGEST_REPLY],
            is_cut=reply.is_cut,
            max_tokens=self.options.max_tokens,
            read=reply.read,
            written=reply.written,
        )
