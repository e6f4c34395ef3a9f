"""A page as a browser would take it apart, and what must be true of every one."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import Any

VOID = {"meta", "br", "hr"}


class Page(HTMLParser):
    """tags, ids, links, text (outside scripts and styles), data: the JSON its script reads."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {}
        self.pieces: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = "".join(self.pieces)
        self.ids = [found["id"] for _, found in self.attributes if "id" in found]
        self.links = [found["href"] for _, found in self.attributes if "href" in found]
        self.data: Any = json.loads(self.inside["script"][0])

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.inside.setdefault(self.open[-1], []).append(data)
        else:
            self.pieces.append(data)

    def check(self) -> None:
        """Sound structure, one policy that names the page's own script and style, nothing from elsewhere, names for all."""
        self._check_policy()
        assert len(set(self.ids)) == len(self.ids)
        assert {link[1:] for link in self.links if link and link.startswith("#")} <= set(self.ids)
        for tag, found in self.attributes:
            assert not [name for name in found if name.startswith("on") or name in ("src", "style")], (tag, found)
            assert ":" not in (found.get("href") or "") and not (found.get("href") or "").startswith("//")
            if tag == "svg":
                assert found["role"] == "img" and found["aria-label"]
            if tag == "th":
                assert found["scope"] in ("row", "col")
        assert self.tags.count("caption") == self.tags.count("table")
        assert self.tags.count("summary") == self.tags.count("details")
        assert [self.tags.count(tag) for tag in ("h1", "main", "header", "title")] == [1, 1, 1, 1]
        levels = [int(tag[1]) for tag in self.tags if re.fullmatch("h[1-6]", tag)]
        assert all(after <= before + 1 for before, after in pairwise(levels)), levels

    def _check_policy(self) -> None:
        (policy,) = [found["content"] for _, found in self.attributes if found.get("http-equiv")]
        assert policy and policy.startswith("default-src 'none'; ") and "unsafe" not in policy
        for kind, text in (("script", self.inside["script"][1]), ("style", self.inside["style"][0])):
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{kind}-src 'sha256-{digest}'" in policy
        own = self.inside["script"][1] + self.inside["style"][0]
        assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp|innerHTML\s*[+=]|eval\(", own)
