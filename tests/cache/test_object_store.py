"""A cache in an object store: against a real S3 server on loopback, through a proxy that cuts the connection; and in memory."""

import http.server
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minicache.cache.manifest import Log, Manifest
from minicache.cache.places import bucket as objects
from minicache.cache.places import leases, opening
from minicache.cache.places.bucket import bucket_at
from minicache.cache.places.claims import CLAIM_FILE
from minicache.cache.places.opening import claimed, place_at
from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheNotFound, ConfigError, OutputError, StoreError
from minicache.options.others import MergeConfig
from minicache.options.where import local_path
from minicache.stages.merge import merge
from minicache.trackers import Silent
from tests.cache.test_cache import IDENTITY, build
from tests.conftest import Cli, make_rows, precompute_into, write_jsonl
from tests.helpers.stores import contents
from tests.stages.test_crash import FORKS, kill_all, run_here, wait_for

NUMBERS = count()


class Proxy:
    """Passes bytes on to a server.

    Once an object is put whose name holds `cut_at`, half of the request goes on, then nothing. Of one whose name holds
    `lose_answer_to` the whole request, but no answer comes back; that once.
    """

    def __init__(self, port: int) -> None:
        self.target, self.cut_at, self.is_cut, self.lose_answer_to = port, "", False, ""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                if self.is_cut:
                    client.close()
                    continue
                server = socket.create_connection(("127.0.0.1", self.target))
                lost = threading.Event()
                for way in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._pass_on, args=(*way, lost), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_request: bool, lost: threading.Event) -> None:
        def puts(name: str) -> bool:
            return is_request and bool(name) and re.search(rb"PUT \S*" + name.encode(), sent) is not None

        with suppress(OSError):
            while (sent := source.recv(65536)) and not self.is_cut:
                if puts(self.cut_at):
                    self.is_cut = True
                    sink.sendall(sent[: len(sent) // 2])
                    break
                if puts(self.lose_answer_to):
                    self.lose_answer_to = ""
                    lost.set()
                if lost.is_set() and not is_request:
                    break
                sink.sendall(sent)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture(scope="module")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("s3") / "log").open("w")
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        for _ in range(600):
            with suppress(OSError):
                put_bucket = urllib.request.Request(f"http://127.0.0.1:{port}/bucket", method="PUT")
                urllib.request.build_opener(urllib.request.ProxyHandler({})).open(put_bucket, timeout=10).close()
                break
            assert server.poll() is None, Path(log.name).read_text()
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait()
        log.close()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Where the object store is to be looked for from now on. Failures show soon."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.setenv(f"AWS_{name}", "test")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(objects, "RETRIES", {"max_retries": 1, "retry_timeout": timedelta(seconds=5)})
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)
    for module in (objects, opening):
        monkeypatch.setattr(module, "POLL_SECONDS", 0.1)

    def look_at(port: int) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        bucket_at.cache_clear()

    yield look_at
    bucket_at.cache_clear()


@pytest.fixture
def url(s3_port: int, endpoint: Callable[[int], None]) -> str:
    """A place on the S3 server where nothing is yet."""
    endpoint(s3_port)
    return f"s3://bucket/a folder/{next(NUMBERS)}"


@pytest.fixture
def proxy(url: str, s3_port: int, endpoint: Callable[[int], None]) -> Iterator[Proxy]:
    """The only way to the S3 server from now on."""
    between = Proxy(s3_port)
    endpoint(between.port)
    yield between
    between.listener.close()


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


def assert_same_values(left: ReferenceCache, right: ReferenceCache) -> None:
    loaded: Iterable[tuple[Any, Any]] = zip(left.load(), right.load(), strict=True)
    for a, b in loaded:
        for item in fields(a):
            one, other = getattr(a, item.name), getattr(b, item.name)
            assert (one is None) == (other is None)
            assert one is None or one.tobytes() == other.tobytes(), item.name


def test_the_whole_story_on_s3(
    cli: Cli, url: str, model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path
) -> None:
    """Every command that knows a cache takes the URL; what lies there is what lies in a directory, and trains the same policy."""
    make = ("--model", model_dir, "--data", data_file, "--block-pairs", 8)
    code, stdout, stderr = cli("precompute-ref", *make, "--ref-cache", url)
    assert code == 0 and "40 scored now" in stdout, stderr
    assert "nothing left to score" in cli("precompute-ref", *make, "--ref-cache", f"{url}/")[1]
    assert downloaded(url, tmp_path / "copy") == without_claim(contents(ref_cache))
    assert_same_values(ReferenceCache(url), ReferenceCache(ref_cache))
    code, stdout, _ = cli("inspect-cache", url, "--json")
    found = json.loads(stdout)
    assert code == 0 and found["complete"] and found["path"] == url and found["bytes_on_disk"] > 1000
    assert cli("inspect-cache", url, "--verify")[0] == 0 and cli("inspect-cache", url, "--pair", 3)[0] == 0
    assert cli("inspect-cache", url, "--html", tmp_path / "page.html")[0] == 0
    assert url in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert cli("export", "--ref-cache", url, "--out", tmp_path / "pairs.jsonl")[0] == 0
    assert len((tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()) == len(ReferenceCache(url))
    for cache, run in ((url, "a"), (ref_cache, "b")):
        options = ("--out", tmp_path / run, "--max-steps", 3, "--batch-size", 4, "--eval-cache", cache)
        code, _, stderr = cli("train", "--ref-cache", cache, *options)
        assert code == 0, stderr
    weights = [(tmp_path / run / "model" / "model.safetensors").read_bytes() for run in "ab"]
    assert weights[0] == weights[1]
    assert (tmp_path / "a" / "model" / "tokenizer.json").is_file()
    code, stdout, _ = cli("evaluate", "--policy", tmp_path / "a", "--ref-cache", url, "--json")
    assert code == 0 and json.loads(stdout)["pairs"] == 40
    prompts = ("--ref-cache", url, "--pairs", 2, "--max-new-tokens", 2, "--json")
    code, stdout, _ = cli("compare", "--policy", tmp_path / "a", *prompts)
    assert code == 0 and len(json.loads(stdout)) == 2


@pytest.mark.parametrize(
    ("cut_at", "scored"),
    [
        ("tokenizer/", 0),  # the cache is being made
        ("pairs/lengths/c/2/", 0),  # a block of pairs; some of its arrays are there
        ("ledger/pairs/c/3/", 0),  # all its data is there, its ledger is not
        ("ref/token_count/c/2/", 2),  # scores
        ("ledger/ref/c/1/", 1),
    ],
)
def test_a_connection_cut_in_the_middle_of_a_block_costs_that_block(
    url: str, proxy: Proxy, model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path, cut_at: str, scored: int
) -> None:
    proxy.cut_at = cut_at
    with pytest.raises(StoreError, match="cannot be reached or refuses; check network") as told:
        precompute_into(url, model_dir, data_file)
    assert proxy.is_cut and "\n" not in str(told.value)
    proxy.cut_at, proxy.is_cut = "", False
    if place_at(url).has("zarr.json"):
        cache = ReferenceCache(url)
        assert len(cache.blocks) - len(cache.blocks.unscored()) == scored
    else:
        assert cut_at == "tokenizer/"
    precompute_into(url, model_dir, data_file)
    assert downloaded(url, tmp_path / "copy") == without_claim(contents(ref_cache))


def test_a_connection_that_comes_back_is_not_even_noticed(
    url: str, proxy: Proxy, endpoint: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RETRIES", {"max_retries": 10, "retry_timeout": timedelta(seconds=30)})
    endpoint(proxy.port)
    proxy.cut_at = "ref/token_count/c/1/"

    def heal() -> None:
        while not proxy.is_cut:
            time.sleep(0.01)
        proxy.cut_at, proxy.is_cut = "", False

    healer = threading.Thread(target=heal, daemon=True)
    healer.start()
    build(url)
    assert not healer.is_alive() and not list(ReferenceCache(url).verify())


def test_a_killed_run_holds_up_the_next_for_a_while_only(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 2.0)
    build(url)
    code = (
        "import sys, time; from minicache.cache.places import leases; from minicache.cache.places.opening import claimed\n"
        "leases.LEASE_SECONDS = 2.0\n"
        "with claimed(sys.argv[1]): print('held', flush=True); time.sleep(100)"
    )
    with subprocess.Popen([sys.executable, "-c", code, url], stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="another precompute-ref is writing"), claimed(url):
            pass
        holder.send_signal(signal.SIGKILL)
    begun = time.monotonic()
    with claimed(url):
        assert time.monotonic() - begun > 1.9
    with claimed(url):
        assert time.monotonic() - begun < 10


def test_a_claim_is_ours_though_the_answer_was_lost(
    url: str, proxy: Proxy, endpoint: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objects, "RETRIES", {"max_retries": 10, "retry_timeout": timedelta(seconds=30)})
    endpoint(proxy.port)
    place = bucket_at(url)
    claim = place.claim(CLAIM_FILE)
    proxy.lose_answer_to = CLAIM_FILE
    assert claim.take(alone=True) and not proxy.lose_answer_to
    proxy.lose_answer_to = CLAIM_FILE  # of a renewal
    while proxy.lose_answer_to:
        time.sleep(0.01)
    time.sleep(1)
    place.write("x", b"still ours")
    claim.release()
    assert not place.has(CLAIM_FILE)


def test_of_many_who_make_a_cache_at_once_one_does(url: str) -> None:
    def make(_: int) -> str:
        try:
            CacheWriter.create(url, Manifest(IDENTITY, Log("m", "d", {})), lambda place: place.mkdir()).grow(3)
        except OutputError:
            return "refused"
        return "made"

    with ThreadPoolExecutor(4) as threads:
        said = list(threads.map(make, range(4)))
    assert sorted(said) == ["made", "refused", "refused", "refused"]
    assert len(ReferenceCache(url).blocks) == 3


def test_who_is_taken_for_dead_writes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.6)
    place = bucket_at(f"memory://{next(NUMBERS)}")
    claim = place.claim(CLAIM_FILE)
    assert claim.take(alone=True)
    place.write(CLAIM_FILE, b"another run has taken it over")
    time.sleep(0.5)
    with pytest.raises(StoreError, match="another run went on with this cache"):
        place.write("x", b"y")
    claim.release()
    assert place.read(CLAIM_FILE) == b"another run has taken it over"


def test_claims_are_taken_alone_or_together() -> None:
    place = place_at(f"memory://{next(NUMBERS)}")
    first, second = place.claim(CLAIM_FILE), place.claim(CLAIM_FILE)
    assert first.take(alone=True) and not second.take(alone=True) and not second.take(alone=False)
    assert first.take(alone=False) and second.take(alone=False)
    assert second.take(alone=True) and not first.take(alone=True)
    second.release()
    assert first.take(alone=True)
    first.release()
    assert not place.has(CLAIM_FILE)


def test_shards_make_the_cache_of_one_run(model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path) -> None:
    url = f"memory://{next(NUMBERS)}"
    for shard in ("2/3", "1/3", "3/3"):
        precompute_into(url, model_dir, data_file, shard=shard)
    assert downloaded(url, tmp_path / "copy") == without_claim(contents(ref_cache))


def work_at_shard(environment: dict[str, str], arguments: list[str], output: Path) -> None:
    """A job in a process of its own, whose lease is short enough for a test."""
    os.environ.update(environment)
    leases.LEASE_SECONDS = 3.0
    run_here(arguments, output)


def test_shards_started_at_once_of_which_one_is_killed_make_the_cache_of_one_run(
    url: str, model_dir: Path, tmp_path: Path
) -> None:
    """Who takes in the data is killed; another goes on with that after a while, and all but the killed one end well."""
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(60))
    options = ("--model", model_dir, "--data", data, "--block-pairs", 4, "--ref-cache", url)
    aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    jobs = {}

    def start(number: int) -> None:
        arguments = ["precompute-ref", *map(str, options), "--shard", f"{number}/3"]
        jobs[number] = FORKS.Process(target=work_at_shard, args=(aws, arguments, tmp_path / str(number)))
        jobs[number].start()

    for number in (1, 2, 3):
        start(number)
    place = bucket_at(url)
    wait_for(lambda: place.has("ledger/pairs/c/2/0"), lambda: True)
    (first,) = (number for number in jobs if "encoding" in (tmp_path / str(number)).read_text())
    kill_all(jobs[first].pid)
    jobs[first].join()
    assert ReferenceCache(url).log.blocks == 0, "the data was taken in before the kill"
    for job in jobs.values():
        job.join(120)
    said = "".join((tmp_path / str(number)).read_text() for number in jobs)
    assert sorted(job.exitcode for job in jobs.values() if job.exitcode is not None) == [-signal.SIGKILL, 0, 0], said
    assert {block % 3 + 1 for block in ReferenceCache(url).blocks.unscored()} == {first}
    start(first)
    jobs[first].join(120)
    assert jobs[first].exitcode == 0, (tmp_path / str(first)).read_text()
    precompute_into(tmp_path / "whole", model_dir, data, block_pairs=4)
    assert downloaded(url, tmp_path / "copy") == without_claim(contents(tmp_path / "whole"))


def test_refused_data_leaves_no_cache_and_refused_rows_are_listed(model_dir: Path, tmp_path: Path) -> None:
    url = f"memory://{next(NUMBERS)}"
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"chosen": 1}])
    with pytest.raises(Exception, match="no row became a pair"):
        precompute_into(url, model_dir, bad)
    assert not list(bucket_at(url)._names())
    good = write_jsonl(tmp_path / "good.jsonl", [*make_rows(5), {"chosen": 1}])
    precompute_into(url, model_dir, good)
    listed = (place_at(url).read("refused.jsonl") or b"").splitlines()
    assert [json.loads(line)["line"] for line in listed] == [6]


def test_a_damaged_object_is_made_anew(model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path) -> None:
    url = f"memory://{next(NUMBERS)}"
    precompute_into(url, model_dir, data_file)
    place = bucket_at(url)
    chunk = place.read("ref/logp_mean/c/1/0/0") or b""
    place.write("ref/logp_mean/c/1/0/0", chunk[:-5] + bytes([chunk[-5] ^ 1]) + chunk[-4:])
    place._delete(["pairs/tokens/c/3/0", "tokenizer/tokenizer.json"])
    assert len(list(ReferenceCache(url).verify())) == 2
    precompute_into(url, model_dir, data_file)
    assert downloaded(url, tmp_path / "copy") == without_claim(contents(ref_cache))


def test_merged_caches_may_lie_anywhere(model_dir: Path, tmp_path: Path) -> None:
    caches = []
    for seed in (1, 2):
        data = write_jsonl(tmp_path / f"{seed}.jsonl", make_rows(9, seed=seed))
        caches.append(precompute_into(f"memory://{next(NUMBERS)}", model_dir, data))
    out = f"memory://{next(NUMBERS)}"
    merge(MergeConfig(tuple(caches), out), Silent())
    merge(MergeConfig(tuple(caches), tmp_path / "merged"), Silent())
    assert_same_values(ReferenceCache(out), ReferenceCache(tmp_path / "merged"))
    assert downloaded(out, tmp_path / "copy") == without_claim(contents(tmp_path / "merged"))
    with pytest.raises(OutputError, match="holds a reference cache"):
        merge(MergeConfig(tuple(caches), out), Silent())


def test_nothing_else_is_written_over() -> None:
    url = f"memory://{next(NUMBERS)}"
    bucket_at(url).write("pairs/tokens/c/0/0", b"of a creation that was killed")
    bucket_at(url).write("photos/1.jpg", b"!")
    with pytest.raises(OutputError, match=r"holds other objects \(photos/1\.jpg\)"):
        build(url)
    bucket_at(url)._delete(["photos/1.jpg"])
    build(url)
    assert not list(ReferenceCache(url).verify())


def test_what_is_wrong_is_one_line(
    cli: Cli, url: str, endpoint: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(where: str) -> str:
        code, _, stderr = cli("inspect-cache", where)
        assert code == 1
        return " ".join(stderr.split())

    assert "no reference cache there" in said(url)
    assert "there is no such bucket" in said("s3://absent/x")
    with pytest.raises(StoreError, match="there is no such bucket"):
        build("s3://absent/x")
    assert "expected s3://bucket/name" in said("ftp://host/x")
    assert "expected file:///a/path" in said("file://host/x")

    class Refusing(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_error(403)

        def log_message(self, *_: object) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(server.server_port)
        assert "access was refused; check the credentials" in said(url)
        server.shutdown()
    endpoint(server.server_port)
    assert "cannot be reached or refuses; check network" in said(url)
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"):
        monkeypatch.delenv(f"AWS_{name}")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    endpoint(server.server_port)
    assert "found no credentials; expected them in the environment" in said(url)


def test_a_file_url_is_a_directory(tmp_path: Path, ref_cache: Path) -> None:
    assert ReferenceCache(f"file://{ref_cache}").path == ref_cache
    assert local_path("file:///a%20b/c") == Path("/a b/c") and local_path("s3://a/b") is None
    with pytest.raises(CacheNotFound, match="no such directory"):
        ReferenceCache(f"file://{tmp_path}/absent")
    with pytest.raises(ConfigError, match="two different caches"):
        MergeConfig((f"file://{ref_cache}", ref_cache), tmp_path / "x")


def test_without_the_library_everything_else_works(ref_cache: Path) -> None:
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from minicache.cache.reader import ReferenceCache; from minicache.errors import ConfigError\n"
        "import minicache.cli, minicache.stages.merge, minicache.stages.inspect\n"
        "ReferenceCache(sys.argv[1])\n"
        "try: ReferenceCache('s3://bucket/x')\n"
        "except ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(ref_cache)], check=True, capture_output=True, text=True)
    assert "pip install 'minidpo[s3]'" in done.stdout and done.stdout.count("\n") == 1
    assert np.isfinite(ReferenceCache(ref_cache).load().reference.logp_mean).all()
