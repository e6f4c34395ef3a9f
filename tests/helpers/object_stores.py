"""An S3 server on loopback, and where this process and those that it starts look for object stores."""

import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import pytest

from minicache import objects
from minicache.cache.places import bucket, leases, opening
from minicache.cache.places.bucket import bucket_at
from minicache.cache.places.claims import CLAIM_FILE
from tests.helpers.stores import contents

# Of a test: failures show soon.
RETRY_SECONDS, PATIENCE_SECONDS, LEASE_SECONDS, POLL_SECONDS = 5.0, 10.0, 0.5, 0.1


@contextmanager
def s3_server(log: Path) -> Iterator[int]:
    """The port of moto's server, which has the bucket `bucket`. log: a file for what it prints."""
    port = _free_port()
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with log.open("w") as file, subprocess.Popen(command, stdout=file, stderr=file) as server:
        try:
            for _ in range(600):
                with suppress(OSError):
                    put_bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(put_bucket, timeout=10).close()
                    break
                assert server.poll() is None, log.read_text()
                time.sleep(0.1)
            yield port
        finally:
            server.terminate()


def _free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def set_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def set_times(
    monkeypatch: pytest.MonkeyPatch,
    retry: float = RETRY_SECONDS,
    patience: float = PATIENCE_SECONDS,
    lease: float = LEASE_SECONDS,
) -> None:
    """How long requests are repeated, how long one may take, and how long a claim lasts, in seconds; in this process."""
    backoff = {
        "init_backoff": timedelta(seconds=0.05),
        "base": 3,
        "max_backoff": timedelta(seconds=min(1.0, retry / 4)),
    }
    retries = {"max_retries": 1000, "retry_timeout": timedelta(seconds=retry), "backoff": backoff}
    for module in (objects, bucket, leases):
        monkeypatch.setattr(module, "RETRIES", retries)
    monkeypatch.setattr(objects, "PATIENCE", timedelta(seconds=patience))
    monkeypatch.setattr(bucket, "HASTY", {**retries, "retry_timeout": timedelta(seconds=min(retry, lease / 4))})
    monkeypatch.setattr(bucket, "HASTY_LONGEST", timedelta(seconds=min(patience, max(lease / 6, 1.0))))
    monkeypatch.setattr(leases, "LEASE_SECONDS", lease)
    for module in (bucket, opening):
        monkeypatch.setattr(module, "POLL_SECONDS", POLL_SECONDS)
    bucket_at.cache_clear()


def look_at(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """Where S3 is from now on."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    bucket_at.cache_clear()


def downloaded(url: str, to: Path) -> dict[str, bytes]:
    """As `contents`; without the file that only a directory needs."""
    shutil.rmtree(to, ignore_errors=True)
    place = bucket_at(url)
    for name in place._names():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(place.read(name) or b"")
    return without_claim(contents(to))


def without_claim(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if name != CLAIM_FILE}
