"""JSON to and from the server of a judge, with the standard library: no redirects, no cookies; failures sorted into two kinds.

Not with httpx, which only comes along with another library, in versions that are not ours to choose.
"""

import json
import ssl
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from minicache.errors import JudgeError
from minicache.judge.key import Key, is_loopback
from minicache.text import one_line

# Seconds without a byte: of a verdict, for which a judge on a CPU reads two long answers in minutes, and of a list of models.
PATIENCE, PATIENCE_OF_LIST = 300.0, 30.0
# Times that a request is sent where the server is busy or the network breaks, and where it is silent or answers no JSON.
TRIES, FEW_TRIES = 7, 3
# Seconds that a server may ask to wait.
LONGEST_WAIT = 600.0
MOST_BYTES, MOST_OF_ERROR, MOST_SHOWN = 2**23, 2**16, 300
BUSY = (408, 409, 425, 429)
EXAMPLES = "http://localhost:8000/v1 (vLLM), http://localhost:11434/v1 (Ollama), http://localhost:8080/v1 (llama.cpp)"


class Again(Exception):
    """The request may be sent again, `tries` times in all. wait: seconds that the server asks for, None if it does not say."""

    def __init__(self, message: str, tries: int = TRIES, wait: float | None = None) -> None:
        super().__init__(message)
        self.tries, self.wait = tries, wait


class Refused(JudgeError):
    """The same request would fail again. code: of HTTP, 0 where there was no answer. said: what the server said of it."""

    def __init__(self, message: str, code: int = 0, said: str = "") -> None:
        super().__init__(message)
        self.code, self.said = code, said


class _NoRedirect(HTTPRedirectHandler):
    """A redirect is an error: the key would go to another address."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Connection:
    """The way to a server. base: its URL with `/v1` or the like. No message holds the key. Several threads may use it."""

    def __init__(self, base: str, key: Key) -> None:
        self.base, self.key = base, key
        # a proxy of the environment leads to other machines only
        proxy = ProxyHandler({}) if is_loopback(urlsplit(base).hostname or "") else ProxyHandler()
        self._opener = build_opener(proxy, _NoRedirect)

    def send(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """What the server answers to a POST of `body`, or to a GET without one.

        Raises:
            Again: the server is busy, or the network broke. Refused: anything else.
        """
        data = None if body is None else json.dumps(body).encode()
        patience = PATIENCE_OF_LIST if body is None else PATIENCE
        headers = {"Content-Type": "application/json", "User-Agent": "minidpo", **self.key.headers}
        try:
            with self._opener.open(Request(self.base + path, data, headers), timeout=patience) as answer:
                content = _whole(answer)
        except HTTPError as error:
            raise self._of_code(error, path) from None
        except URLError as error:
            raise self._unreachable(error.reason) from None
        except (OSError, HTTPException) as error:
            raise self._broken(error, patience) from None
        except ValueError as error:
            # a host or path that no request can hold
            raise self._unreachable(error) from None
        return self._object(content)

    def _object(self, content: bytes) -> dict[str, Any]:
        try:
            found = json.loads(content)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise Again(f"the server answers no JSON object but {self._shown(content)!r}", FEW_TRIES)
        # some gateways report the failure of the server behind them in an answer that is none
        if found.get("error") and "choices" not in found and "data" not in found:
            code = found["error"].get("code") if isinstance(found["error"], dict) else None
            said = self._shown(content)
            if isinstance(code, int) and (code in BUSY or code >= 500):
                raise Again(f"the server says: {said}")
            raise Refused(f"{self.base}: the judge's server says: {said}", code if isinstance(code, int) else 0, said)
        return found

    def _of_code(self, error: HTTPError, path: str) -> Again | Refused:
        """What an answer with a code of HTTP other than 200 means."""
        code = error.code
        try:
            with error:
                content = error.read(MOST_OF_ERROR)
        except (OSError, HTTPException):
            content = b""
        said = self._shown(content) or self.key.hide(str(error.reason))
        if (code in BUSY or code >= 500) and b"insufficient_quota" not in content:
            wait = _seconds(error.headers.get("Retry-After"))
            if wait is not None and wait > LONGEST_WAIT:
                return Refused(
                    f"{self.base}: the judge's server asks to wait {wait:,.0f} s ({code}); run the same command then",
                    code,
                )
            return Again(f"the judge's server answers {code} ({said})", wait=wait)
        return Refused(f"{self.base}: {self._advice(code, said, path, error.headers.get('Location'))}", code, said)

    def _advice(self, code: int, said: str, path: str, location: str | None) -> str:
        variable = self.key.variable
        if code == 401 and self.key.value:
            return f"the judge's server does not accept the key in {variable} (401); check it"
        if code == 401:
            return (
                f"the judge's server wants a key (401); put it into the environment variable {variable}, or name another with "
                "--judge-key"
            )
        if code == 403:
            return f"the judge's server refuses (403: {said}); check what the key in {variable} allows"
        if code == 404:
            return (
                f"{path} is not there (404: {said}); expected --judge as {EXAMPLES}, and a --judge-model of that server"
            )
        if 300 <= code < 400:
            to = self.key.hide(location or "another address")[:MOST_SHOWN]
            return f"the judge's server redirects to {to!r} ({code}); name that address, if it is the right one"
        return f"the judge's server refuses the request ({code}: {said})"

    def _unreachable(self, reason: object) -> Again | Refused:
        if isinstance(reason, ConnectionResetError | BrokenPipeError):
            return self._broken(reason, 0)
        what = one_line(reason, MOST_SHOWN) if isinstance(reason, Exception) else str(reason)
        if isinstance(reason, ssl.SSLError):
            return Refused(
                f"{self.base}: no secure connection to the judge's server: {what}; check the URL and its https"
            )
        return Refused(
            f"{self.base}: the judge's server cannot be reached: {what}; start it, or check --judge: {EXAMPLES}"
        )

    def _broken(self, error: Exception, patience: float) -> Again:
        if isinstance(error, TimeoutError):
            return Again(f"the judge's server sent nothing for {patience:g} s", FEW_TRIES)
        return Again(f"the connection to the judge's server broke ({one_line(error, MOST_SHOWN)})")

    def _shown(self, content: bytes) -> str:
        """What a server says of a failure, in one line, without the key."""
        text = content.decode(errors="replace")
        try:
            found = json.loads(text)
            while isinstance(found, dict) and (
                inner := next(filter(None, map(found.get, ("error", "message", "detail"))), None)
            ):
                found = inner
            text = found if isinstance(found, str) else text
        except (ValueError, RecursionError):
            pass
        return " ".join(self.key.hide(text).split())[:MOST_SHOWN]


def _whole(answer: HTTPResponse) -> bytes:
    """The body of an answer. Raises HTTPException: it ended early, or is larger than any answer."""
    content, due = answer.read(MOST_BYTES + 1), answer.headers["Content-Length"]
    if len(content) > MOST_BYTES:
        raise HTTPException(f"an answer of more than {MOST_BYTES:,} bytes")
    if due is not None and due.isdecimal() and len(content) < int(due):
        raise HTTPException(f"{len(content):,} of {due} bytes came")
    return content


def _seconds(after: str | None) -> float | None:
    """The value of a `Retry-After` header, which is a number of seconds or a date; None for none."""
    try:
        return max(0.0, float(after or ""))
    except ValueError:
        pass
    try:
        date = parsedate_to_datetime(after or "")
        return max(0.0, (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return None
