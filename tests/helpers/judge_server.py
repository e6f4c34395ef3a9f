"""A server on loopback that speaks the protocol of chat completions, and fails as it is told."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock
from typing import Any

from tests.helpers.loopback import at_work

Headers = dict[str, str]


@dataclass
class Fault:
    """What happens to one request. cut: so many bytes of the answer are sent, then the connection ends. wait: seconds before."""

    code: int = 200
    body: bytes | None = None
    headers: Headers = field(default_factory=dict)
    cut: int | None = None
    wait: float = 0.0


class JudgeServer:
    """A model that says what `reply` makes of a message. faults: of the next requests for a completion, in order.

    needs_key: the only key that it accepts. asked: the bodies of all requests for a completion; headers: those of all requests.
    refused: settings in a body that it refuses, as some models do. most_at_once: requests that were under way together.
    """

    def __init__(self, reply: Callable[[str], str] = lambda _: "A") -> None:
        self.reply, self.faults, self.models = reply, list[Fault](), ["judge"]
        self.needs_key, self.address, self.finish = "", "", "stop"
        self.asked: list[dict[str, Any]] = []
        self.headers: list[Headers] = []
        self.refused: dict[str, str] = {}
        self.most_at_once = self.at_once = 0
        self.slow = 0.0
        self.lock = Lock()

    @property
    def base(self) -> str:
        return f"{self.address}/v1"


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        judge = self.server.judge
        judge.headers.append(dict(self.headers))
        if judge.needs_key and self.headers["Authorization"] != f"Bearer {judge.needs_key}":
            self._send(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif self.path == "/v1/models":
            self._send(200, {"object": "list", "data": [{"id": name} for name in judge.models]})
        else:
            self._send(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        judge = self.server.judge
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with judge.lock:
            judge.headers.append(dict(self.headers))
            judge.asked.append(body)
            fault = judge.faults.pop(0) if judge.faults else Fault()
            judge.at_once += 1
            judge.most_at_once = max(judge.most_at_once, judge.at_once)
        time.sleep(fault.wait + judge.slow)
        with judge.lock:
            judge.at_once -= 1
        with suppress(BrokenPipeError, ConnectionResetError):
            self._answer(judge, body, fault)

    def _answer(self, judge: JudgeServer, body: dict[str, Any], fault: Fault) -> None:
        unknown = next((name for name in judge.refused if name in body), None)
        if fault.code != 200 or fault.body is not None or fault.cut is not None:
            self._send(fault.code, fault.body if fault.body is not None else {}, fault.headers, fault.cut)
        elif judge.needs_key and self.headers["Authorization"] != f"Bearer {judge.needs_key}":
            self._send(401, {"error": {"message": f"Incorrect API key: {self.headers['Authorization']}"}})
        elif self.path != "/v1/chat/completions":
            self._send(404, {"detail": "Not Found"})
        elif body["model"] not in judge.models:
            self._send(404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": 404}})
        elif unknown:
            self._send(400, {"error": {"message": judge.refused[unknown]}})
        else:
            (message,) = body["messages"]
            choice = {"message": {"role": "assistant", "content": judge.reply(message["content"])}}
            usage = {"prompt_tokens": 100, "completion_tokens": 1}
            self._send(200, {"choices": [{**choice, "finish_reason": judge.finish}], "usage": usage})

    def _send(self, code: int, body: object, headers: Headers | None = None, cut: int | None = None) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content[:cut])
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    judge: JudgeServer


@contextmanager
def judge_server(reply: Callable[[str], str] = lambda _: "A") -> Iterator[JudgeServer]:
    """A server at work within the block."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.judge = JudgeServer(reply)
    with at_work(server) as server.judge.address:
        yield server.judge
