"""A server on loopback that speaks the Hub's protocol for data sets, as far as huggingface_hub asks for it."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.helpers.loopback import at_work

COMMIT, OLD = "a" * 40, "b" * 40
Files = dict[str, bytes]


class Hub:
    """Data sets by id and revision. asked: the paths of all requests. cut_at: of a file so named only half is sent."""

    def __init__(self) -> None:
        self.sets: dict[str, dict[str, Files]] = {}
        self.asked: list[str] = []
        self.cut_at = ""
        self.address = ""

    def add(self, id: str, files: Files, old: Files | None = None) -> None:
        """A data set with these files at `main`, and perhaps others at the tag `v1`."""
        self.sets[id] = {COMMIT: files, OLD: old or {}}


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"

    def do_GET(self) -> None:
        hub = self.server.hub
        hub.asked.append(self.path)
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._listing(found[1], found[2] or "main")
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(hub.sets[found[1]][found[2]].get(found[3]), found[2], found[3])
        elif path == "/file.csv.gz" or path == "/page":
            self._file(hub.sets["web/files"][COMMIT].get(path[1:]), COMMIT, path)
        else:
            self._refuse("RepoNotFound")

    do_HEAD = do_GET

    def _listing(self, id: str, revision: str) -> None:
        commits = {"main": COMMIT, "v1": OLD, COMMIT: COMMIT, OLD: OLD}
        if id not in self.server.hub.sets or revision not in commits:
            self._refuse("RevisionNotFound" if id in self.server.hub.sets else "RepoNotFound")
            return
        commit = commits[revision]
        names = [{"rfilename": name} for name in self.server.hub.sets[id][commit]]
        self._send(
            json.dumps({"id": id, "sha": commit, "siblings": names}).encode(), {"Content-Type": "application/json"}
        )

    def _file(self, content: bytes | None, commit: str, name: str) -> None:
        if content is None:
            self._refuse("EntryNotFound")
            return
        kind = "text/html" if name == "/page" else "application/octet-stream"
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Content-Type": kind}, name)

    def _refuse(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send(self, content: bytes, headers: dict[str, str], name: str = "") -> None:
        start = int(found[1]) if (found := re.search(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self.send_response(206 if start else 200)
        for key, value in {**headers, "Content-Length": str(len(content) - start)}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            cut = self.server.hub.cut_at and self.server.hub.cut_at in name
            self.wfile.write(content[start : len(content) // 2 if cut else None])
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None: ...


class _Server(ThreadingHTTPServer):
    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at its `address` as long as the block lasts."""
    hub = Hub()
    with at_work(_Server(hub)) as hub.address:
        yield hub
