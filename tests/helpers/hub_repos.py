"""A server on loopback that speaks the Hub's protocol for repositories: made, written in commits, listed, read.

What the library asks of the real one is answered as the real one does, as far as it asks: creation, the check of a card's front
matter, the choice between a commit's own text and LFS, LFS objects, commits, trees, files with ranges.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event
from typing import Any
from urllib.parse import unquote

import yaml

from tests.helpers.loopback import at_work

Files = dict[str, bytes]
TOKEN = "hf_of_a_test"


@dataclass
class Repository:
    """private: as it was made. commits: names and files of all commits, in their order. ignored: never listed."""

    private: bool
    commits: list[tuple[str, Files]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    @property
    def files(self) -> Files:
        """The files of the newest commit."""
        return self.commits[-1][1] if self.commits else {}

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit of a revision: `main`, a commit's name, or a tag v1, which is the first commit."""
        if revision == "main":
            return self.commits[-1]
        if revision == "v1":
            return self.commits[0]
        return next((each for each in self.commits if each[0] == revision), None)

    def commit(self, files: Files, message: str = "by hand") -> str:
        name = hashlib.sha1(repr((sorted(files.items()), len(self.commits))).encode()).hexdigest()
        self.commits.append((name, files))
        self.messages.append(message)
        return name


class Hub:
    """repos: by kind and name. lfs: objects by sha256. asked: method and path of all requests. refuse: path -> status.

    slow: if set, the upload of an object waits for it. may: namespaces that the token may write to.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.refuse: dict[str, int] = {}
        self.may = ("org",)
        self.slow: Event | None = None
        self.uploading = Event()
        self.address = ""

    def add(self, kind: str, id: str, files: Files, private: bool = True) -> Repository:
        repository = self.repos[kind, id] = Repository(private)
        repository.commit({".gitattributes": b"", **files})
        return repository

    def dataset(self, id: str = "org/name") -> Repository:
        return self.repos["dataset", id]

    def model(self, id: str = "org/name") -> Repository:
        return self.repos["model", id]

    @property
    def written(self) -> list[str]:
        """The requests that could change something."""
        return [each for each in self.asked if not each.startswith(("GET", "HEAD"))]


class _Handler(BaseHTTPRequestHandler):
    server: "_Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self._path()
        if path is None:
            return
        if found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._info(found[1], found[2], unquote(found[3] or "main"))
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/tree/([^/]+)(?:/.*)?", path):
            self._tree(found[1], found[2], unquote(found[3]))
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file("dataset" if found[1] else "model", found[2], unquote(found[3]), unquote(found[4]))
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body, path = self._body(), self._path()
        if path is None:
            return
        if path == "/api/validate-yaml":
            self._validate(json.loads(body)["content"])
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "", "Invalid credentials")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/main", path):
            self._json({"files": [self._mode(found[1], found[2], each) for each in json.loads(body)["files"]]})
        elif re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._json({"transfer": "basic", "objects": [self._action(each) for each in json.loads(body)["objects"]]})
        elif found := re.fullmatch(r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._refuse(404, "EntryNotFound")

    def do_PUT(self) -> None:
        body, path = self._body(), self._path()
        hub = self.server.hub
        if path is None:
            return
        hub.uploading.set()
        if hub.slow:
            hub.slow.wait()
        assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
        hub.lfs[path.rpartition("/")[2]] = body
        self._send(b"", {})

    # --- what is asked ---

    def _create(self, asked: dict[str, Any]) -> None:
        hub, id = self.server.hub, f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in hub.may:
            self._refuse(403, "", f"you may not write to {asked['organization']}")
        elif (asked.get("type", "model"), id) in hub.repos:
            self._refuse(409, "", "You already created this repository")
        else:
            private = asked.get("private") or asked.get("visibility") == "private"
            hub.add(asked.get("type", "model"), id, {}, bool(private))
            self._json({"url": f"{hub.address}/{id}"})

    def _validate(self, card: str) -> None:
        """As the Hub does: front matter is a YAML mapping, and a licence one that it knows."""
        front = yaml.safe_load(card.split("---")[1]) if card.startswith("---\n") else {}
        errors = [] if isinstance(front, dict) else [{"message": "no mapping"}]
        if isinstance(front, dict) and front.get("license", "mit") not in ("mit", "apache-2.0", "cc-by-4.0", "other"):
            errors = [{"message": '"license" must be one of [apache-2.0, …]'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _mode(self, kind: str, id: str, asked: dict[str, Any]) -> dict[str, Any]:
        """Text below a bound goes into the commit; all else is LFS."""
        text = b"\0" not in base64.b64decode(asked["sample"]) and asked["size"] < 2**16
        before = self.server.hub.repos[kind, id].files.get(asked["path"])
        mode = "regular" if text and not asked["path"].endswith(".safetensors") else "lfs"
        oid = None if before is None else (_git(before) if mode == "regular" else hashlib.sha256(before).hexdigest())
        return {"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid}

    def _action(self, asked: dict[str, Any]) -> dict[str, Any]:
        hub = self.server.hub
        href = f"{hub.address}/lfs/{asked['oid']}"
        return {**asked, **({} if asked["oid"] in hub.lfs else {"actions": {"upload": {"href": href}}})}

    def _commit(self, kind: str, id: str, lines: list[dict[str, Any]]) -> None:
        hub = self.server.hub
        repository = hub.repos[kind, id]
        files = dict(repository.files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.lfs[value["oid"]]
            else:
                assert line["key"] == "deletedFile" and value["path"] in files, line
                del files[value["path"]]
        name = repository.commit(files, lines[0]["value"]["summary"])
        self._json({"commitUrl": f"{hub.address}/{id}/commit/{name}", "commitOid": name, "success": True})

    def _found(self, kind: str, id: str, revision: str) -> tuple[str, Files] | None:
        repository = self.server.hub.repos.get((kind, id))
        mine = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repository is None or (repository.private and not mine):
            # as the Hub does, which does not say what a stranger may not know
            self._refuse(404 if mine else 401, "RepoNotFound")
            return None
        if not (found := repository.at(revision)):
            self._refuse(404, "RevisionNotFound")
        return found

    def _info(self, kind: str, id: str, revision: str) -> None:
        if found := self._found(kind, id, revision):
            names = [{"rfilename": name} for name in found[1]]
            private = self.server.hub.repos[kind, id].private
            self._json({"id": id, "sha": found[0], "siblings": names, "private": private, "tags": [], "downloads": 0})

    def _tree(self, kind: str, id: str, revision: str) -> None:
        if found := self._found(kind, id, revision):
            self._json([{"type": "file", "path": n, "size": len(c), "oid": _git(c)} for n, c in found[1].items()])

    def _file(self, kind: str, id: str, revision: str, name: str) -> None:
        if not (found := self._found(kind, id, revision)):
            return
        if name not in found[1]:
            self._refuse(404, "EntryNotFound")
            return
        content = found[1][name]
        headers = {"ETag": f'"{_git(content)}"', "X-Repo-Commit": found[0], "Accept-Ranges": "bytes"}
        start = int(part[1]) if (part := re.search(r"bytes=(\d+)-", self.headers.get("Range") or "")) else 0
        self._send(content[start:], headers, 206 if start else 200)

    # --- HTTP ---

    def _path(self) -> str | None:
        """The path asked for; None if it is refused."""
        hub = self.server.hub
        path = self.path.partition("?")[0]
        hub.asked.append(f"{self.command} {path}")
        for begin, status in hub.refuse.items():
            if begin in path:
                self._refuse(status, "", "not today")
                return None
        return path

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length")
        return self.rfile.read(int(length)) if length else b""

    def _json(self, value: object, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), {"Content-Type": "application/json"}, status)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message} if code else {"X-Error-Message": message}
        self._send(json.dumps({"error": message}).encode(), headers, status)

    def _send(self, content: bytes, headers: dict[str, str], status: int = 200) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None: ...


def _git(content: bytes) -> str:
    """The name of a file's content in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers at its `address` as long as the block lasts."""
    hub = Hub()
    with at_work(_Server(hub)) as hub.address:
        try:
            yield hub
        finally:
            if hub.slow:
                hub.slow.set()
