"""A cache in an object store: against a real S3 server on loopback, through a proxy that cuts the connection; and in memory.

What all kinds of places have in common is tested in test_places.py.
"""

import asyncio
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import obstore
import obstore.store
import pytest

from minicache.cache.manifest import Log, Manifest
from minicache.cache.places import bounded, leases
from minicache.cache.places.bucket import bucket_at
from minicache.cache.places.claims import CLAIM_FILE
from minicache.cache.places.leases import Lease, _holder
from minicache.cache.places.opening import claimed, place_at
from minicache.cache.reader import ReferenceCache
from minicache.cache.writer import CacheWriter
from minicache.errors import CacheDamaged, CacheNotFound, ConfigError, OutputError, StoreError
from minicache.options.others import MergeConfig
from minicache.options.where import local_path
from minicache.stages.merge import merge
from minicache.trackers import Silent
from tests.cache.test_cache import IDENTITY, build
from tests.conftest import Cli, make_rows, precompute_into, write_jsonl
from tests.helpers.faulty_proxy import (
    CUT_REQUEST,
    FAULTS,
    LOSE_ANSWER,
    REFUSE,
    SILENCE,
    Fault,
    FaultyProxy,
    Plan,
    Request,
    faulty_proxy,
)
from tests.helpers.loopback import at_work
from tests.helpers.object_stores import downloaded, set_times, without_claim
from tests.helpers.stores import contents
from tests.stages.test_crash import FORKS, kill_all, run_here, wait_for

NUMBERS = count()


@pytest.fixture
def proxy(url: str, s3_port: int, endpoint: Callable[[int], None]) -> Iterator[FaultyProxy]:
    """The only way to the S3 server from now on."""
    with faulty_proxy(s3_port) as between:
        endpoint(between.port)
        yield between


@pytest.mark.parametrize("content", [b"[" * 60_000, b"[]", b"{", b"\xff", b'{"id": 1}'])
def test_the_object_of_a_lease_that_says_no_id_is_nobodys(content: bytes) -> None:
    store = obstore.store.MemoryStore()
    obstore.put(store, "lease", content)
    seen, id = asyncio.run(_holder(store, "lease"))
    assert seen and id is None


def cutting(at: str) -> Plan:
    """The connection is cut once an object is put whose name contains this: half of the request goes on, then nothing."""
    is_cut = False

    def fault(request: Request) -> Fault | None:
        nonlocal is_cut
        if is_cut:
            return REFUSE
        is_cut = request.method == "PUT" and at in request.name
        return CUT_REQUEST if is_cut else None

    return fault


def once(fault: Fault, at: str) -> Plan:
    """Does this to the first PUT of an object whose name contains `at`."""
    done: list[int] = []

    def plan(request: Request) -> Fault | None:
        if done or request.method != "PUT" or at not in request.name:
            return None
        done.append(request.number)
        return fault

    return plan


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
    url: str,
    proxy: FaultyProxy,
    model_dir: Path,
    data_file: Path,
    ref_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut_at: str,
    scored: int,
) -> None:
    set_times(monkeypatch, retry=0.5)
    proxy.plan = cutting(cut_at)
    with pytest.raises(StoreError, match="cannot be reached or refuses; check network") as told:
        precompute_into(url, model_dir, data_file)
    assert "\n" not in str(told.value)
    proxy.plan = None
    if place_at(url).has("zarr.json"):
        cache = ReferenceCache(url)
        assert len(cache.blocks) - len(cache.blocks.unscored()) == scored
    else:
        assert cut_at == "tokenizer/"
    precompute_into(url, model_dir, data_file)
    assert downloaded(url, tmp_path / "copy") == without_claim(contents(ref_cache))


@pytest.mark.parametrize("fault", FAULTS)
def test_what_happens_to_one_request_is_not_even_noticed(url: str, proxy: FaultyProxy, fault: str) -> None:
    """But for a refusal that no repetition changes."""
    for at in ("ref/token_count/c/1/", "ledger/pairs/zarr.json", CLAIM_FILE):
        proxy.plan = once(FAULTS[fault], at)
        begun = time.monotonic()
        if fault.startswith("expired"):
            with pytest.raises(
                StoreError, match="the credentials have expired; renew them, then run the same command"
            ) as told:
                build(f"{url}/{at}")
            assert "\n" not in str(told.value)
        else:
            build(f"{url}/{at}")
            assert not list(ReferenceCache(f"{url}/{at}").verify())
        assert time.monotonic() - begun < 60


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
        assert time.monotonic() - begun < 60


def test_a_claim_is_ours_though_the_answer_was_lost(
    url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the library gave up repeating, and the next renewal finds the object as its own last one left it."""
    set_times(monkeypatch, lease=4.0)
    place = bucket_at(url)
    claim = Lease(place, CLAIM_FILE)
    proxy.plan = once(LOSE_ANSWER, CLAIM_FILE)
    assert claim.take(alone=True)
    stored, renewals = place.read(CLAIM_FILE), claim._count
    # one renewal is stored and given up all the same, and another is refused
    proxy.plan = lambda request: LOSE_ANSWER if request.method == "PUT" else None
    while claim._count < renewals + 2:
        time.sleep(0.01)
    proxy.plan = None
    assert place.read(CLAIM_FILE) != stored
    while claim._count < renewals + 3:
        time.sleep(0.01)
    place.write("x", b"still ours")
    claim.release()
    assert not place.has(CLAIM_FILE)


def test_who_writes_under_another_s_claim_loses_it_with_that_one(
    url: str, proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of a run whose rank 0 was stopped: it replaces nothing of what the run wrote that took over."""
    set_times(monkeypatch, lease=3.0)
    first, second, third = (bucket_at.__wrapped__(url) for _ in range(3))
    claim = Lease(first, CLAIM_FILE)
    assert claim.take(alone=True) and first.held() == [(CLAIM_FILE, claim.id)]
    with second.following(first.held()):
        second.write("x", b"of rank 1")
        assert claim._renewing
        claim._renewing.cancel()
        other = Lease(third, CLAIM_FILE)
        while not other.take(alone=True):
            time.sleep(0.1)
        third.write("x", b"of the other")
        with pytest.raises(StoreError, match="another run went on with this cache"):
            second.write("x", b"of rank 1, later")
        assert third.read("x") == b"of the other"
    other.release()
    second.write("x", b"of a run of its own")
    assert not second.held()


def test_a_signal_is_heard_while_a_request_waits(url: str, proxy: FaultyProxy) -> None:
    """The library's own calls would hear it only when they end."""
    heard: list[float] = []

    def ends_it(request: Request) -> Fault:
        heard.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)
        return SILENCE

    def raises(*_: object) -> None:
        raise KeyboardInterrupt

    proxy.plan, before = ends_it, signal.signal(signal.SIGINT, raises)
    try:
        with pytest.raises(KeyboardInterrupt):
            place_at(url).has("x")
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - heard[0] < 3


def test_one_who_was_stopped_replaces_nothing_of_the_one_who_went_on(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even in the moment before it can know: its own clock stood still, as that of a machine that slept."""
    set_times(monkeypatch, lease=600.0)
    bucket_at.cache_clear()
    sleeper, other = bucket_at(url), bucket_at.__wrapped__(url)
    claim = sleeper.claim(CLAIM_FILE)
    assert claim.take(alone=True)
    sleeper.write("known", b"1")
    # the other has waited for as long as it must
    other.write(CLAIM_FILE, b"another's")
    for name in ("known", "new"):
        other.write(name, b"the other's")
    for name in ("known", "new"):
        with pytest.raises(StoreError, match="another run went on with this cache"):
            sleeper.write(name, b"too late")
        assert other.read(name) == b"the other's"
    with pytest.raises(StoreError, match="another run went on with this cache"):
        sleeper.remove()
    claim.release()
    assert other.read(CLAIM_FILE) == b"another's" and other.has("new")


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


@pytest.mark.slow
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


def test_what_is_wrong_is_one_line(
    cli: Cli, url: str, endpoint: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_times(monkeypatch, retry=0.5)

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


class Endless(http.server.BaseHTTPRequestHandler):
    """Objects of 2^40 bytes, which it states or, with `is_lying`, does not; sent: how many bytes went out."""

    protocol_version = "HTTP/1.1"
    is_lying = False
    sent = 0

    def do_GET(self) -> None:
        self.send_response(200)
        size = "10" if self.is_lying else str(2**40)
        for name, value in (
            ("ETag", '"x"'),
            ("Last-Modified", "Mon, 30 Nov 2026 00:00:00 GMT"),
            ("Content-Length", size),
        ):
            self.send_header(name, value)
        if self.is_lying:
            self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        piece = bytes(2**16)
        with suppress(OSError):
            while self.command == "GET":
                self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece) if self.is_lying else piece)
                type(self).sent += len(piece)
        self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.mark.parametrize("is_lying", [False, True])
def test_an_object_without_end_is_not_received(
    endpoint: Callable[[int], None], cli: Cli, monkeypatch: pytest.MonkeyPatch, is_lying: bool
) -> None:
    """Neither as a chunk, nor as metadata, a list or a file of the tokenizer; with a size that is stated, or another one."""
    monkeypatch.setattr(Endless, "is_lying", is_lying)
    monkeypatch.setattr(Endless, "sent", 0)
    monkeypatch.setattr(bounded, "MOST_IN_A_LIST", 2**24)
    monkeypatch.setattr(bounded, "MOST_BYTES", 2**24)
    with at_work(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)) as address:
        endpoint(int(address.rpartition(":")[2]))
        code, _, stderr = cli("inspect-cache", "s3://bucket/endless")
        assert code == 1 and "zarr.json: cannot be read as a zarr group:" in " ".join(stderr.split())
        place = place_at("s3://bucket/endless")
        with pytest.raises(
            CacheDamaged, match=r"refused\.jsonl: cannot be used: .*expected 16,777,216 or fewer; move it away"
        ):
            place.read("refused.jsonl")
    # what fits into the buffers of the connections beside what is allowed
    assert Endless.sent < 2 * (2**24 if is_lying else 0) + 3 * 2**24


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
