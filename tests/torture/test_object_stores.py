"""Commands at work on an object store whose connections break, which answers late or refuses; two writers; killed and stopped ones.

After each trial the same command, undisturbed, ends with what it makes anyway, and what was finished before is as it was. TRIALS
says how many of each kind: three, or fifty in `make torture LONG=1`. The times of docs/cluster.md are made shorter.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Event

import obstore
import pytest
from obstore.store import from_url

from minicache.cache.places.claims import CLAIM_FILE
from minicache.cache.reader import ReferenceCache
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.helpers.faulty_proxy import (
    CUT_ANSWER,
    CUT_REQUEST,
    FAULTS,
    LOSE_ANSWER,
    REFUSE,
    SILENCE,
    Fault,
    FaultyProxy,
    Plan,
    Planned,
    Request,
    faulty_proxy,
)
from tests.helpers.object_stores import set_times
from tests.helpers.stores import contents
from tests.stages.test_crash import FORKS, finished, kill_all, run_here
from tests.torture.conftest import Orderly
from tests.torture.counting import Figures

TRIALS = int(os.environ.get("TRIALS", "3"))
PAIRS, BLOCK = 20, 4
# Seconds: as RETRIES, PATIENCE and LEASE_SECONDS, which are 180, 60 and 60. A fault that lasts is given up sooner.
RETRY, RETRY_IN_VAIN, PATIENCE, LEASE = 30.0, 1.5, 3.0, 4.0
# Of docs/cluster.md: how long a store that does not answer may hold a command up, and how long it is asked again at least.
MOST_SECONDS, LEAST_SECONDS = 300.0, 180.0
# What else a trial may take: the command itself on a busy machine.
OWN_TIME = 60.0
Files = dict[str, bytes]


@dataclass
class Kind:
    """faults: one is drawn for a trial. methods: of requests that meet it. passes: whether the library's repetitions get by."""

    faults: tuple[Fault, ...]
    methods: tuple[str, ...] = ("PUT", "GET", "HEAD", "DELETE", "POST")
    passes: bool = True


KINDS = {
    "PUT cut": Kind((CUT_REQUEST, CUT_ANSWER, LOSE_ANSWER), ("PUT",)),
    "GET cut": Kind((CUT_REQUEST, CUT_ANSWER, LOSE_ANSWER), ("GET",)),
    "slow answers": Kind((0.2, 1.5 * PATIENCE)),
    "throttled": Kind((FAULTS["SlowDown"], FAULTS["SlowDown, Retry-After"])),
    "credentials expired": Kind((FAULTS["expired, 400"], FAULTS["expired, 403"]), passes=False),
}
ADVICE = ("run the same command again", "wait for its end", "check the credentials")


class Bucket:
    """The server as it is, without a proxy between."""

    def __init__(self, port: int) -> None:
        self.port = port

    def files(self, url: str) -> Files:
        """All objects, but claims."""
        store = from_url(url, endpoint=f"http://127.0.0.1:{self.port}")
        names = [item["path"] for items in obstore.list(store) for item in items]
        files = {name: bytes(obstore.get(store, name).bytes()) for name in names}
        return {name: content for name, content in files.items() if not name.endswith(CLAIM_FILE)}

    def comparable(self, url: str, scratch: Path) -> Files:
        """As `contents` of a directory."""
        save(self.files(url), scratch)
        return contents(scratch) if (scratch / "zarr.json").exists() else {}


def save(files: Files, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def blocks_of(files: Files, scratch: Path) -> Files:
    """The objects of all finished blocks."""
    cache, found = save(files, scratch), {}
    for what, block in finished(cache) if (cache / "zarr.json").exists() else ():
        for name, content in files.items():
            parts = name.split("/")
            if "c" in parts and parts[parts.index("c") + 1] == str(block) and what in parts[:2]:
                found[name] = content
    return found


@dataclass
class Work:
    """A command on the bucket. out: the URL that it writes to, if any. result: what it made; equal to `expected` if it was all."""

    name: str
    command: list[object]
    result: Callable[[], object]
    expected: object
    out: str = ""


@pytest.fixture
def scene(
    s3_port: int, endpoint: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[FaultyProxy, Bucket]]:
    """The proxy through which commands reach the server, and the server itself."""
    with faulty_proxy(s3_port) as proxy:
        endpoint(proxy.port)
        set_times(monkeypatch, RETRY, PATIENCE, LEASE)
        yield proxy, Bucket(s3_port)


Works = Callable[[int], Work]


@pytest.fixture
def works(scene: tuple[FaultyProxy, Bucket], model_dir: Path, tmp_path: Path, orderly: Orderly) -> Works:
    """Makes the n-th work: stage one every other time."""
    _, bucket = scene
    base = f"s3://bucket/{os.urandom(6).hex()}"
    halves = [write_jsonl(tmp_path / f"{seed}.jsonl", make_rows(PAIRS // 2, seed=seed)) for seed in (1, 2)]
    data = write_jsonl(tmp_path / "data.jsonl", make_rows(PAIRS))
    stage_one: list[object] = ["precompute-ref", "--model", model_dir, "--block-pairs", BLOCK, "--data", data]
    for half in halves:
        precompute_into(f"{base}/{half.stem}", model_dir, half, block_pairs=BLOCK)
    precompute_into(f"{base}/whole", model_dir, data, block_pairs=BLOCK)
    table, run = tmp_path / "table.parquet", tmp_path / "run"
    assert orderly("export", "--ref-cache", f"{base}/whole", "--out", table)[0] == 0
    train = [
        "train",
        "--ref-cache",
        f"{base}/whole",
        "--max-steps",
        2,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--resume",
        "--out",
    ]
    merge: list[object] = ["merge", f"{base}/1", f"{base}/2", "--ref-cache"]
    bring_in: list[object] = ["import-cache", table, "--model", model_dir, "--ref-cache"]

    def made(url: str) -> Files:
        return bucket.comparable(url, tmp_path / "copy")

    def weights(folder: Path) -> bytes:
        return (folder / "model" / "model.safetensors").read_bytes()

    expected: dict[str, object] = {}
    for name, command in (("stage one", [*stage_one, "--ref-cache"]), ("merge", merge), ("import-cache", bring_in)):
        url = f"{base}/expected {name}"
        assert orderly(*command, url) == (0, "")
        expected[name] = made(url)
    assert orderly(*train, run) == (0, "")
    expected["training"] = weights(run)

    def work(number: int) -> Work:
        url, name = (
            f"{base}/trial {number}",
            ("merge", "training", "import-cache", "inspect-cache --verify")[number // 2 % 4],
        )
        name = "stage one" if number % 2 == 0 else name
        if name == "training":
            return Work(
                name, [*train, tmp_path / f"run {number}"], lambda: weights(tmp_path / f"run {number}"), expected[name]
            )
        if name == "inspect-cache --verify":
            return Work(name, ["inspect-cache", f"{base}/whole", "--verify"], lambda: None, None)
        command = {"stage one": [*stage_one, "--ref-cache"], "merge": merge, "import-cache": bring_in}[name]
        return Work(name, [*command, url], lambda: made(url), expected[name], url)

    return work


@pytest.mark.parametrize("name", KINDS)
def test_faults(
    name: str,
    scene: tuple[FaultyProxy, Bucket],
    works: Works,
    orderly: Orderly,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (proxy, bucket), kind, figures = scene, KINDS[name], Figures(f"object store, {name}")
    # how many such requests each work makes when nothing disturbs it
    usual: dict[str, int] = {}
    for number in range(TRIALS):
        chance, work = random.Random(f"{name} {number}"), works(number)
        if work.name not in usual:
            plain, since = works(1000 + number), len(proxy.served)
            assert orderly(*plain.command) == (0, "")
            usual[work.name] = sum(method in kind.methods for method, _, _ in proxy.served[since:])
        is_lasting = not kind.passes or chance.random() < 0.5
        set_times(monkeypatch, RETRY_IN_VAIN if is_lasting else RETRY, PATIENCE, LEASE)
        plan = Planned.drawn(chance, usual[work.name], kind.faults, is_lasting, methods=kind.methods)
        proxy.plan, begun = plan, time.monotonic()
        code, said = attempt(orderly, work, figures)
        limit = (RETRY_IN_VAIN if is_lasting else 5 * RETRY) + 2 * PATIENCE + LEASE + OWN_TIME
        figures.add("hangs", time.monotonic() - begun > limit, f"{work.name}: {time.monotonic() - begun:.0f} s")
        figures.trials, figures.faults = figures.trials + 1, figures.faults + plan.done
        proxy.plan = None
        figures.add("wrong", bool(code) and not is_lasting, f"{work.name} did not get by {plan}: {said}")
        figures.add("wrong", bool(code) and not any(each in said for each in ADVICE), f"{work.name}: no advice: {said}")
        figures.add("wrong", "damage" in said or "missing" in said, f"{work.name}: blames the cache: {said}")
        done = blocks_of(bucket.files(work.out), tmp_path / "scratch") if work.out else {}
        since = len(proxy.served)
        if code:
            code, said = attempt(orderly, work, figures)
            figures.add("wrong", bool(code), f"{work.name}, when repeated: {said}")
        figures.seconds = max(figures.seconds, time.monotonic() - begun)
        judge(figures, work, done, bucket, proxy.written(since) if code == 0 and done else [])
    figures.end()


def attempt(orderly: Orderly, work: Work, figures: Figures) -> tuple[int, str]:
    try:
        return orderly(*work.command)
    # whatever is no line for a user
    except Exception as error:
        figures.add("tracebacks", True, f"{work.name}: {type(error).__name__}: {error}")
        return 1, ADVICE[0]


def judge(figures: Figures, work: Work, done: Files, bucket: Bucket, written: list[str]) -> None:
    """Count what is not as it should be after a work that came to its end. done: of finished blocks before; written: since."""
    if work.out and work.name == "stage one":
        now, again = (
            bucket.files(work.out),
            {name.removeprefix(f"/{work.out.removeprefix('s3://')}/") for name in written},
        )
        changed = [name for name, content in done.items() if now.get(name) != content or name in again]
        figures.add("lost", bool(changed), f"{work.name}: finished blocks were lost or rewritten: {changed[:3]}")
    result = work.result()
    figures.add("wrong", result != work.expected, f"{work.name}: another result than an undisturbed call")
    if isinstance(result, dict) and isinstance(work.expected, dict):
        more = sorted(result.keys() - work.expected.keys())
        figures.add("leftovers", bool(more), f"{work.name}: {more[:3]}")


# --- several processes ---


def work_here(environment: dict[str, str], times: bool, moved: float, arguments: list[str], output: Path) -> None:
    """The program in a process of its own. times: shortened ones. moved: is added to the logprobs that it stores."""
    os.environ.update(environment)
    if times:
        set_times(pytest.MonkeyPatch(), RETRY, PATIENCE, LEASE)
    if moved:
        from dataclasses import replace

        from minicache.cache.schema import RefBlock
        from minicache.cache.writer import CacheWriter

        write_ref = CacheWriter.write_ref

        def moving(self: CacheWriter, block: int, scores: RefBlock) -> None:
            write_ref(self, block, replace(scores, logp_mean=scores.logp_mean + moved))

        CacheWriter.write_ref = moving  # type: ignore[method-assign]
    run_here(arguments, output)


@dataclass
class Writers:
    """Processes that write into one bucket, each by a proxy of its own."""

    port: int
    model: Path
    data: Path
    folder: Path
    started: list[ForkServerProcess] = field(default_factory=list)

    def start(self, name: str, url: str, proxy: int, moved: float = 0.0, times: bool = True) -> ForkServerProcess:
        aws = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        aws["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{proxy}"
        command = ["precompute-ref", "--model", str(self.model), "--data", str(self.data), "--block-pairs", str(BLOCK)]
        arguments = (aws, times, moved, [*command, "--ref-cache", url], self.folder / name)
        process = FORKS.Process(target=work_here, args=arguments)
        process.start()
        self.started.append(process)
        return process

    def ends(self, process: ForkServerProcess, name: str, figures: Figures) -> tuple[int, str]:
        process.join(RETRY + LEASE + OWN_TIME)
        figures.add("hangs", process.is_alive(), f"{name} is still at work")
        if process.is_alive():
            kill_all(process.pid)
            process.join()
        said = " ".join((self.folder / name).read_text().split()) if (self.folder / name).exists() else ""
        figures.add("tracebacks", "Traceback" in said, f"{name}: {said[-300:]}")
        return process.exitcode or 0, said


@pytest.fixture
def writers(s3_port: int, scene: object, model_dir: Path, tmp_path: Path) -> Iterator[Writers]:
    data = write_jsonl(tmp_path / "data.jsonl", make_rows(PAIRS))
    at_work = Writers(s3_port, model_dir, data, tmp_path)
    yield at_work
    for process in at_work.started:
        if process.is_alive():
            kill_all(process.pid)
        process.join()


@pytest.fixture
def undisturbed(writers: Writers, s3_port: int, tmp_path: Path) -> tuple[Files, int]:
    """What one writer makes, and the number of its requests."""
    with faulty_proxy(s3_port) as proxy:
        url, figures = f"s3://bucket/{os.urandom(6).hex()}", Figures("")
        code, said = writers.ends(writers.start("whole", url, proxy.port), "whole", figures)
        assert code == 0, said
        return Bucket(s3_port).comparable(url, tmp_path / "copy"), proxy.asked


Trial = Callable[[random.Random, str, Figures], None]


def try_each(what: str, trial: Trial) -> None:
    """Make TRIALS trials, each at a new URL."""
    figures = Figures(f"object store, {what}")
    for number in range(TRIALS):
        begun = time.monotonic()
        trial(random.Random(number), f"s3://bucket/{os.urandom(6).hex()}", figures)
        figures.trials, figures.seconds = figures.trials + 1, max(figures.seconds, time.monotonic() - begun)
    figures.end()


def wait_until(event: Event, process: ForkServerProcess) -> None:
    """The event has come, or the process has ended."""
    while not event.wait(0.05) and process.is_alive():
        pass


def test_two_writers_at_once(writers: Writers, undisturbed: tuple[Files, int], s3_port: int, tmp_path: Path) -> None:
    """One does it, and the other is told so, or finds it done."""
    bucket = Bucket(s3_port)

    def trial(chance: random.Random, url: str, figures: Figures) -> None:
        with faulty_proxy(s3_port) as proxy:
            at, reached = chance.randrange(undisturbed[1]), Event()
            proxy.plan = at_request(at, reached.set)
            first = writers.start("first", url, proxy.port)
            wait_until(reached, first)
            second = writers.start("second", url, s3_port)
            ended = [writers.ends(process, name, figures) for process, name in ((first, "first"), (second, "second"))]
        figures.faults += 1
        told = all(code == 0 or "another precompute-ref is writing into this cache" in said for code, said in ended)
        figures.add("wrong", not told or 0 not in [code for code, _ in ended], f"{at}: {ended}")
        same = bucket.comparable(url, tmp_path / "copy") == undisturbed[0]
        figures.add("wrong", not same, f"{at}: another result than that of one writer")

    try_each("two writers", trial)


def test_a_writer_is_killed_and_another_takes_over(
    writers: Writers, undisturbed: tuple[Files, int], s3_port: int, tmp_path: Path
) -> None:
    bucket = Bucket(s3_port)

    def trial(chance: random.Random, url: str, figures: Figures) -> None:
        with faulty_proxy(s3_port) as proxy, faulty_proxy(s3_port) as other:
            at, how = chance.randrange(undisturbed[1]), chance.choice([None, CUT_REQUEST, LOSE_ANSWER])

            def kill() -> Fault | None:
                kill_all(first.pid)
                return how

            proxy.plan = at_request(at, kill)
            first = writers.start("first", url, proxy.port)
            first.join(RETRY + OWN_TIME)
            done = blocks_of(bucket.files(url), tmp_path / "scratch")
            code, said = writers.ends(writers.start("second", url, other.port), "second", figures)
            written = other.written()
        figures.faults += first.exitcode == -signal.SIGKILL
        figures.add("wrong", code != 0, f"killed at {at}: {said}")
        work = Work("stage one", [], lambda: bucket.comparable(url, tmp_path / "copy"), undisturbed[0], url)
        judge(figures, work, done, bucket, written)

    try_each("a writer killed", trial)


def test_a_writer_stops_for_longer_than_its_lease_and_wakes_up(
    writers: Writers, undisturbed: tuple[Files, int], s3_port: int, tmp_path: Path
) -> None:
    """Its last request arrives with it, or only when the other has done everything. Its values are others: they would show."""
    bucket = Bucket(s3_port)

    def trial(chance: random.Random, url: str, figures: Figures) -> None:
        at, is_late, stopped, awake = chance.randrange(undisturbed[1]), chance.random() < 0.5, Event(), Event()

        def stop() -> Fault | None:
            kill_all(first.pid, signal.SIGSTOP)
            stopped.set()
            if is_late:
                awake.wait()
            return None

        with faulty_proxy(s3_port) as proxy:
            proxy.plan = at_request(at, stop)
            first = writers.start("first", url, proxy.port, moved=1e-5)
            wait_until(stopped, first)
            done = blocks_of(bucket.files(url), tmp_path / "scratch")
            code, said = writers.ends(writers.start("second", url, s3_port), "second", figures)
            figures.add("wrong", code != 0, f"stopped at {at}: the other: {said}")
            before = bucket.files(url)
            awake.set()
            kill_all(first.pid, signal.SIGCONT)
            code, said = writers.ends(first, "first", figures)
        figures.faults += stopped.is_set()
        told = code == 0 or any(each in said for each in ADVICE)
        figures.add("wrong", not told, f"stopped at {at}, it ended with {code}: {said}")
        require_unchanged(before, bucket.files(url), done, figures, f"stopped at {at}, {is_late=}")
        found = bucket.comparable(url, tmp_path / "copy")
        own = {name: content for name, content in undisturbed[0].items() if name not in done}
        wrong = sorted(name for name, content in own.items() if found.get(name) != content)
        figures.add("wrong", bool(wrong), f"stopped at {at}: {wrong[:4]} are others than those of one writer")
        more = sorted(found.keys() ^ undisturbed[0].keys())
        figures.add("leftovers", bool(more), f"stopped at {at}: {more[:4]}")
        damaged = [str(error) for _, error in ReferenceCache(tmp_path / "copy").verify()]
        figures.add("wrong", bool(damaged), f"stopped at {at}: {damaged[:2]}")

    try_each("a writer stopped", trial)


@pytest.mark.timeout(900)
def test_times_are_those_that_the_docs_state(
    writers: Writers, undisturbed: tuple[Files, int], s3_port: int, tmp_path: Path
) -> None:
    """Not shortened: from the moment when the store is gone, silent, or refuses for good, to the line that says so."""
    figures, gone = Figures("object store, gone for good"), {}
    with ExitStack() as stack:
        for name, fault in (("refuses", REFUSE), ("is silent", SILENCE), ("throttles", FAULTS["SlowDown"])):
            proxy, url = stack.enter_context(faulty_proxy(s3_port)), f"s3://bucket/{os.urandom(6).hex()}"
            gone[name] = writers.start(name, url, proxy.port, times=False), proxy, time.monotonic()
            proxy.plan = Planned((fault,), frozenset({undisturbed[1] // 2}), lasting=True)
        for name, (process, proxy, begun) in gone.items():
            process.join(MOST_SECONDS + OWN_TIME)
            seconds = time.monotonic() - begun
            code, said = writers.ends(process, name, figures)
            figures.trials, figures.faults = figures.trials + 1, figures.faults + proxy.plan.done  # type: ignore[union-attr]
            figures.seconds = max(figures.seconds, seconds)
            figures.add("hangs", seconds > MOST_SECONDS + OWN_TIME, f"it {name}: {seconds:.0f} s")
            figures.add("wrong", seconds < LEAST_SECONDS, f"it {name}: given up after {seconds:.0f} s")
            is_told = code == 1 and ADVICE[0] in said
            figures.add("wrong", not is_told, f"it {name}: {said[-300:]}")
            print(f"it {name}: {seconds:.0f} s: {said[-300:]}")
    figures.end()


def require_unchanged(before: Files, now: Files, done: Files, figures: Figures, when: str) -> None:
    """Nothing is other than it was before the stopped writer woke up, and its own blocks are as it left them."""
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    figures.add("lost", bool(changed), f"{when}: it wrote over {changed[:4]}")
    kept = sorted(name for name, content in done.items() if now.get(name) != content)
    figures.add("lost", bool(kept), f"{when}: its finished blocks were rewritten: {kept[:4]}")


def at_request(number: int, act: Callable[[], Fault | None]) -> Plan:
    """Acts at the first request with at least this number."""
    done: list[int] = []

    def plan(request: Request) -> Fault | None:
        if done or request.number < number:
            return None
        done.append(request.number)
        return act()

    return plan
