"""Waiting for an object store that accepts a connection and never answers: a signal is heard, and what is waited for is said."""

import asyncio
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicache import objects
from minicache.errors import StoreError
from minicache.objects import in_one_line, wait_for

SOON = 10.0  # seconds, also on a slow machine; the library would wait for 30 and try again


@pytest.fixture
def silent() -> Iterator[tuple[dict[str, str], threading.Event]]:
    """The variables by which the store is found, and whether somebody has connected."""
    came, kept = threading.Event(), []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def accept() -> None:
            while True:
                try:
                    kept.append(listening.accept()[0])
                except OSError:
                    return
                came.set()

        threading.Thread(target=accept, daemon=True).start()
        variables = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{listening.getsockname()[1]}", "AWS_ALLOW_HTTP": "true"}
        variables |= {f"AWS_{name}": "test" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "REGION")}
        yield {**variables, "NO_PROXY": "127.0.0.1"}, came
        # ends the thread that waits
        listening.shutdown(socket.SHUT_RDWR)
    for each in kept:
        each.close()


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    "words",
    [
        ("inspect-cache", "s3://bucket/cache"),
        ("diff", "{cache}", "s3://bucket/cache"),
        pytest.param(("train", "--ref-cache", "s3://bucket/cache", "--out", "{out}"), marks=pytest.mark.slow),
    ],
    ids=lambda words: words[0] if isinstance(words, tuple) else None,
)
def test_a_signal_is_heard_while_a_store_is_silent(
    silent: tuple[dict[str, str], threading.Event],
    ref_cache: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    kind: signal.Signals,
) -> None:
    variables, came = silent
    given = [word.format(cache=ref_cache, out=tmp_path / "run") for word in words]
    process = subprocess.Popen(
        [sys.executable, "-m", "minicache", *given],
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not came.wait(0.05):
        assert process.poll() is None, process.communicate()
    began = time.monotonic()
    process.send_signal(kind)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and "interrupted; " in stderr and "Traceback" not in stderr, stderr
    assert time.monotonic() - began < SOON and not (tmp_path / "run").exists()


def test_what_is_waited_for_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(objects, "SILENCE", 0.0)
    monkeypatch.setattr(objects, "_said", {})
    with caplog.at_level(logging.WARNING, "minicache.objects"):
        for _ in range(2):
            wait_for("s3://bucket/a", lambda: asyncio.sleep(0.2))
    assert [record.getMessage() for record in caplog.records] == [
        "s3://bucket/a: the object store has not answered for 0 s; waiting for it"
    ]


def test_what_a_request_returns_or_raises_comes_through() -> None:
    async def broken() -> int:
        raise FileNotFoundError("none")

    async def good() -> int:
        return 3

    assert wait_for("s3://a", good) == 3
    with pytest.raises(FileNotFoundError, match="none"):
        wait_for("s3://a", broken)
    with pytest.raises(StoreError, match="there is no such bucket"), in_one_line("s3://a"):
        wait_for("s3://a", broken)


def test_a_wait_has_an_end_where_one_is_asked_for() -> None:
    with pytest.raises(TimeoutError):
        wait_for("s3://a", lambda: asyncio.sleep(60), 0.01)
