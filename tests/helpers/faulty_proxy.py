"""A proxy in front of an HTTP server on loopback that cuts, delays and refuses requests by a plan."""

import random
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock
from typing import Any, NamedTuple
from urllib.parse import unquote

from tests.helpers.loopback import at_work

REFUSAL = '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{}</Code><Message>{}</Message><RequestId>1</RequestId></Error>'
SLOW_DOWN = REFUSAL.format("SlowDown", "Please reduce your request rate.")
EXPIRED = REFUSAL.format("ExpiredToken", "The provided token has expired.")


class Request(NamedTuple):
    """method, name: of the object, without the query. number: among all requests, from 0."""

    method: str
    name: str
    number: int


class Answer(NamedTuple):
    """Takes the place of the server's answer, which does not see the request."""

    status: int
    body: str
    headers: tuple[tuple[str, str], ...] = ()


# What can be done to a request; a number delays the server's answer by so many seconds.
CUT_REQUEST, CUT_ANSWER, LOSE_ANSWER, REFUSE, SILENCE = "cut request", "cut answer", "lose answer", "refuse", "silence"
Fault = str | float | Answer
FAULTS: dict[str, Fault] = {
    "cut request": CUT_REQUEST,
    "cut answer": CUT_ANSWER,
    "lost answer": LOSE_ANSWER,
    "SlowDown": Answer(503, SLOW_DOWN),
    "SlowDown, Retry-After": Answer(503, SLOW_DOWN, (("Retry-After", "1"),)),
    "expired, 400": Answer(400, EXPIRED),
    "expired, 403": Answer(403, EXPIRED),
}
Plan = Callable[[Request], Fault | None]


@dataclass
class Planned:
    """Does one of `faults` to the requests `at` (of those with these methods, counted from 0), and with `lasting` to all after."""

    faults: tuple[Fault, ...]
    at: frozenset[int]
    lasting: bool = False
    methods: tuple[str, ...] = ("PUT", "GET", "HEAD", "DELETE", "POST")
    met: int = 0
    done: int = 0

    @classmethod
    def drawn(
        cls, chance: random.Random, among: int, faults: tuple[Fault, ...], lasting: bool, **more: Any
    ) -> "Planned":
        """At random places among the first `among` requests: one if it lasts, else up to five, which are not neighbours."""
        count = 1 if lasting else min(chance.randint(1, 5), max(1, among // 2))
        places = chance.sample(range(0, max(among, 1), 1 if lasting else 2), count)
        return cls(tuple(chance.sample(faults, 1)), frozenset(places), lasting, **more)

    def __call__(self, request: Request) -> Fault | None:
        if request.method not in self.methods:
            return None
        number, self.met = self.met, self.met + 1
        if number in self.at or (self.lasting and number > min(self.at)):
            self.done += 1
            return self.faults[number % len(self.faults)]
        return None


@dataclass
class FaultyProxy:
    """port: where it listens. plan: may be changed at any time. served: method, name and status of what the server answered."""

    port: int
    plan: Plan | None = None
    asked: int = 0
    served: list[tuple[str, str, int]] = field(default_factory=list)
    ended: Event = field(default_factory=Event)
    lock: Lock = field(default_factory=Lock)

    def fault_of(self, method: str, name: str) -> Fault | None:
        with self.lock:
            number, self.asked = self.asked, self.asked + 1
            return self.plan(Request(method, name, number)) if self.plan else None

    def written(self, since: int = 0) -> list[str]:
        """The names of all objects that were put or deleted, from the `since`-th answer on."""
        return [
            name for method, name, status in self.served[since:] if method in ("PUT", "DELETE", "POST") and status < 300
        ]


@contextmanager
def faulty_proxy(target: int) -> Iterator[FaultyProxy]:
    """A proxy before the server at the port `target`, at work as long as the block lasts."""

    class Handler(_Handler):
        to = target

    server = _Server(("127.0.0.1", 0), Handler)
    server.proxy = Handler.proxy = FaultyProxy(server.server_port)
    with at_work(server):
        try:
            yield server.proxy
        finally:
            server.proxy.ended.set()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 100
    proxy: FaultyProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that gives up, or is killed, closes its connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    to: int
    proxy: FaultyProxy

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        fault = self.proxy.fault_of(self.command, unquote(self.path.partition("?")[0]))
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(fault, float | int):
            self.proxy.ended.wait(fault)
        if fault == SILENCE:
            self.proxy.ended.wait()
        if fault in (REFUSE, SILENCE):
            return self._hang_up()
        if isinstance(fault, Answer):
            return self._answer(
                fault.status, [*fault.headers, ("Content-Type", "application/xml")], fault.body.encode()
            )
        if fault == CUT_REQUEST:
            self._send_half(body)
            return self._hang_up()
        status, headers, content = self._forward(body)
        if fault == LOSE_ANSWER:
            return self._hang_up()
        return self._answer(status, headers, content, half=fault == CUT_ANSWER)

    do_PUT = do_HEAD = do_DELETE = do_POST = do_GET

    def _head(self) -> list[tuple[str, str]]:
        return [(name, value) for name, value in self.headers.items() if name.lower() not in ("connection", "expect")]

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = HTTPConnection("127.0.0.1", self.to, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self._head():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            answer: HTTPResponse = connection.getresponse()
            content = answer.read()
        finally:
            connection.close()
        bucket = unquote(self.path.partition("?")[0])
        # The library deletes by a list of names.
        listed = re.findall(r"<Key>(.*?)</Key>", body.decode()) if self.command == "POST" else []
        for name in [f"{bucket}/{key}" for key in listed] or [bucket]:
            self.proxy.served.append((self.command, name, answer.status))
        dropped = ("connection", "transfer-encoding", "keep-alive", "date", "server")
        return answer.status, [each for each in answer.getheaders() if each[0].lower() not in dropped], content

    def _send_half(self, body: bytes) -> None:
        """The request's head and half of its body; of one without a body half of the head."""
        head = f"{self.command} {self.path} HTTP/1.1\r\n" + "".join(
            f"{name}: {value}\r\n" for name, value in self._head()
        )
        sent = (
            head.encode("latin-1") + b"\r\n" + body[: len(body) // 2]
            if body
            else head.encode("latin-1")[: len(head) // 2]
        )
        with socket.create_connection(("127.0.0.1", self.to)) as server:
            server.sendall(sent)

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes, half: bool = False) -> None:
        self.send_response(status)
        names = {name.lower() for name, _ in headers}
        for name, value in headers:
            self.send_header(name, value)
        if "content-length" not in names and status not in (204, 304):
            self.send_header("Content-Length", str(len(content)))
        if half and not (content and self.command != "HEAD"):
            # Half of the head.
            self._headers_buffer: list[bytes] = [
                b"".join(self._headers_buffer)[: len(b"".join(self._headers_buffer)) // 2]
            ]
            self.flush_headers()
            return self._hang_up()
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
        return self._hang_up() if half else None

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
