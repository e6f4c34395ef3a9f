"""A model behind the protocol of OpenAI's chat completions: one message, its reply, repetitions where the server is busy."""

import logging
import random
from dataclasses import dataclass
from threading import Event
from typing import Any

from minicache.errors import JudgeError
from minicache.judge.connection import MOST_SHOWN, Again, Connection, Refused
from minicache.text import listed

log = logging.getLogger(__name__)

# Seconds before the first repetition; each later pause is twice as long, up to the longest.
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0


class Stopped(Exception):
    """The work ends: a request that is not under way is not sent."""


@dataclass(frozen=True)
class Reply:
    """What a model said. is_cut: it reached its limit of tokens. read, written: tokens as the server counts."""

    text: str
    is_cut: bool
    read: int = 0
    written: int = 0


class ChatServer:
    """A model on a server. stop: ends all waiting. repeated: requests that were sent again. Several threads may ask at once."""

    def __init__(self, connection: Connection, model: str, max_tokens: int) -> None:
        self.connection, self.model, self.max_tokens = connection, model, max_tokens
        self.stop, self.repeated = Event(), 0
        # Newer models of OpenAI refuse a temperature, and have another name for the limit.
        self._limit_name, self._has_temperature = "max_tokens", True

    def ask(self, text: str) -> Reply:
        """The model's reply to one message.

        Raises:
            JudgeError: the server cannot be reached or refuses. Stopped: `stop` was set before it could be sent.
        """
        failures = 0
        while not self.stop.is_set():
            body = self._body(text)
            try:
                return self._reply(self.connection.send("/chat/completions", body))
            except Refused as refused:
                if not self._adapts(refused, body):
                    raise self._with_models(refused) from None
            except Again as again:
                failures += 1
                if failures >= again.tries:
                    base = self.connection.base
                    raise JudgeError(f"{base}: {again}, {failures} times; run the same command again later") from None
                self.repeated += 1
                self._wait(again, failures)
        raise Stopped

    def look(self) -> str:
        """A line for the user where the server lists other models than this one, "" otherwise. Nothing that costs is asked.

        Some servers take names that they do not list, or any name.

        Raises:
            JudgeError: the server cannot be reached, or does not accept the key.
        """
        try:
            names = self._models()
        except Again:
            return ""
        except Refused as refused:
            # a server need not list its models, and a key need not be allowed to see the list
            if refused.code in (0, 401):
                raise
            return ""
        if not names or self.model in names or f"{self.model}:latest" in names:
            return ""
        return f"{self.connection.base} does not list {self.model}, but {self._shown(names)}"

    def _models(self) -> list[str]:
        listing = self.connection.send("/models").get("data")
        return [str(each.get("id")) for each in listing if isinstance(each, dict)] if isinstance(listing, list) else []

    def _shown(self, names: list[str]) -> str:
        return self.connection.key.hide(listed(names, 8))[:MOST_SHOWN]

    def _body(self, text: str) -> dict[str, Any]:
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], "stream": False}
        body[self._limit_name] = self.max_tokens
        return {**body, "temperature": 0} if self._has_temperature else body

    def _adapts(self, refused: Refused, body: dict[str, Any]) -> bool:
        """Whether the server refused a setting that the next request does without."""
        if refused.code == 400 and "max_tokens" in body and "max_completion_tokens" in refused.said:
            self._limit_name = "max_completion_tokens"
            return True
        if refused.code == 400 and "temperature" in body and "temperature" in refused.said:
            self._has_temperature = False
            return True
        return False

    def _with_models(self, refused: Refused) -> JudgeError:
        """The refusal, with the models that the server has where the judge is none of them."""
        if refused.code not in (400, 404):
            return refused
        try:
            names = self._models()
        except (Again, Refused):
            return refused
        if not names or self.model in names:
            return refused
        said = refused.said or refused.code
        return JudgeError(
            f"{self.connection.base}: the judge's server has no model {self.model!r} ({said}); it has {self._shown(names)}"
        )

    def _reply(self, answer: dict[str, Any]) -> Reply:
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
        except (LookupError, TypeError, AttributeError):
            keys = self.connection.key.hide(listed([str(key)[:40] for key in answer]))
            raise JudgeError(
                f"{self.connection.base}: the server answers in another form than chat completions (with {keys or 'nothing'}); "
                "expected an OpenAI-compatible server"
            ) from None
        usage = answer.get("usage")
        read, written = (_count(usage, f"{name}_tokens") for name in ("prompt", "completion"))
        return Reply(self.connection.key.hide(text), choice.get("finish_reason") == "length", read, written)

    def _wait(self, again: Again, failures: int) -> None:
        pause = min(FIRST_PAUSE * 2 ** (failures - 1), LONGEST_PAUSE) * random.uniform(1, 1.25)
        pause = pause if again.wait is None else again.wait
        log.debug("%s: %s; again in %.1f s", self.connection.base, again, pause)
        if self.stop.wait(pause):
            raise Stopped


def _count(usage: object, name: str) -> int:
    value = usage.get(name) if isinstance(usage, dict) else 0
    return value if isinstance(value, int) and 0 <= value < 2**63 else 0
