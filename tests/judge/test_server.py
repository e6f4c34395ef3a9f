"""The server of a judge: repetitions where they help, one line where they do not, and a key that nothing shows."""

import logging
import re
import socket
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from threading import Timer
from typing import Any

import pytest

from minicache.errors import ConfigError, JudgeError
from minicache.judge import connection, server
from minicache.judge.connection import Connection
from minicache.judge.key import Key, is_loopback, read_key
from minicache.judge.server import ChatServer, Reply, Stopped
from minicache.options.judge import JudgeOptions, base_url
from tests.helpers.judge_server import Fault, JudgeServer, judge_server

SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    with judge_server() as one:
        yield one


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_PAUSE", 0.01)


def asking(judge: JudgeServer, key: str = "", model: str = "judge", base: str = "") -> ChatServer:
    return ChatServer(Connection(base or judge.base, Key("OPENAI_API_KEY", key)), model, 16)


# --- what is asked ---


def test_a_request_asks_for_few_tokens_of_the_likeliest(judge: JudgeServer) -> None:
    assert asking(judge, SECRET).ask("which?") == Reply("A", is_cut=False, read=100, written=1)
    assert judge.asked == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "which?"}],
            "stream": False,
            "max_tokens": 16,
            "temperature": 0,
        }
    ]
    assert judge.headers[0]["Authorization"] == f"Bearer {SECRET}"
    judge.finish = "length"
    assert asking(judge).ask("which?").is_cut
    assert "Authorization" not in judge.headers[1]


def test_settings_that_a_model_refuses_are_left_out_or_named_otherwise(judge: JudgeServer) -> None:
    judge.refused = {
        "max_tokens": "Unsupported parameter: 'max_tokens' is not supported. Use 'max_completion_tokens' instead.",
        "temperature": "Unsupported value: 'temperature' does not support 0 with this model.",
    }
    one = asking(judge)
    assert one.ask("which?").text == one.ask("and now?").text == "A"
    assert [sorted(body.keys() - {"model", "messages", "stream"}) for body in judge.asked] == [
        ["max_tokens", "temperature"],
        ["max_completion_tokens", "temperature"],
        ["max_completion_tokens"],
        ["max_completion_tokens"],
    ]
    judge.refused = {"stream": "max_completion_tokens and temperature are wrong"}
    with pytest.raises(JudgeError, match="refuses the request"):
        one.ask("and now?")


def test_a_reply_without_text_is_empty_and_one_of_another_form_an_error(judge: JudgeServer) -> None:
    judge.faults = [Fault(body=b'{"choices": [{"message": {"content": null}, "finish_reason": "length"}]}')]
    assert asking(judge).ask("x") == Reply("", is_cut=True)
    for body in (b'{"choices": []}', b'{"choices": [{"message": {"content": [1]}}]}', b'{"reply": "A"}'):
        judge.faults = [Fault(body=body)]
        with pytest.raises(JudgeError, match="another form than chat completions"):
            asking(judge).ask("x")


# --- what is repeated ---


@pytest.mark.parametrize(
    "fault",
    [
        Fault(429),
        Fault(500, b"<html>oops</html>"),
        Fault(503, b'{"error": {"message": "loading"}}'),
        Fault(body=b'{"choices": []}', cut=10),
        Fault(body=b"{}", cut=0),
        Fault(body=b"<html>a proxy"),
        Fault(body=b'{"error": {"message": "upstream", "code": 502}}'),
    ],
    ids=lambda fault: f"{fault.code}-{fault.cut}-{fault.body}",
)
def test_what_may_pass_is_asked_again(fault: Fault, judge: JudgeServer) -> None:
    judge.faults = [fault, fault]
    one = asking(judge)
    assert one.ask("x").text == "A"
    assert len(judge.asked) == 3 and one.repeated == 2


def test_what_does_not_pass_ends_in_one_line(judge: JudgeServer) -> None:
    judge.faults = [Fault(500, b'{"error": {"message": "out of\\nmemory"}}')] * 20
    with pytest.raises(JudgeError, match=r"the judge's server answers 500 \(out of memory\), 7 times; run the same"):
        asking(judge).ask("x")
    assert len(judge.asked) == connection.TRIES
    judge.faults = [Fault(body=b"no json")] * 20
    with pytest.raises(JudgeError, match=r"answers no JSON object but 'no json', 3 times"):
        asking(judge).ask("x")


def test_a_silent_server_is_left(judge: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE", 0.2)
    judge.faults = [Fault(wait=1.0)] * 20
    with pytest.raises(JudgeError, match=r"sent nothing for 0\.2 s, 3 times"):
        asking(judge).ask("x")
    judge.faults = [Fault(wait=0.6)]
    assert asking(judge).ask("x").text == "A"


def test_the_server_says_how_long_to_wait(judge: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_PAUSE", 30.0)
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=1), usegmt=True)
    judge.faults = [Fault(429, headers={"Retry-After": "0.3"}), Fault(503, headers={"Retry-After": soon})]
    began = time.monotonic()
    assert asking(judge).ask("x").text == "A"
    assert 0.3 <= time.monotonic() - began < 5
    judge.faults = [Fault(429, headers={"Retry-After": "86400"})]
    with pytest.raises(JudgeError, match=r"asks to wait 86,400 s \(429\); run the same command then"):
        asking(judge).ask("x")


def test_a_pause_ends_when_the_work_does(judge: JudgeServer) -> None:
    one = asking(judge)
    judge.faults = [Fault(429, headers={"Retry-After": "60"})]
    Timer(0.3, one.stop.set).start()
    began = time.monotonic()
    for _ in range(2):
        with pytest.raises(Stopped):
            one.ask("x")
    assert len(judge.asked) == 1 and time.monotonic() - began < 10


# --- what is refused ---


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault(403, b'{"error": {"message": "no access to\\nthis model"}}'), r"\(403: no access to this model\)"),
        (Fault(400, b'{"detail": "too long"}'), r"refuses the request \(400: too long\)"),
        (Fault(413, b""), r"refuses the request \(413: .+\)"),
        (Fault(429, b'{"error": {"message": "You are out of money", "code": "insufficient_quota"}}'), "out of money"),
        (
            Fault(302, b"", {"Location": "http://elsewhere.test/v1"}),
            r"redirects to 'http://elsewhere\.test/v1' \(302\)",
        ),
        (Fault(body=b'{"error": "model crashed"}'), "says: model crashed"),
    ],
    ids=lambda value: str(getattr(value, "code", "")),
)
def test_what_cannot_pass_is_asked_once(fault: Fault, said: str, judge: JudgeServer) -> None:
    judge.faults = [fault]
    with pytest.raises(JudgeError, match=said) as raised:
        asking(judge).ask("x")
    assert len(judge.asked) == 1 and "\n" not in str(raised.value) and judge.base in str(raised.value)


def test_an_unknown_model_is_told_with_those_that_are_there(judge: JudgeServer) -> None:
    judge.models = ["llama3:latest", "qwen3"]
    one = asking(judge, model="gpt-9")
    assert one.look() == f"{judge.base} does not list gpt-9, but llama3:latest, qwen3"
    with pytest.raises(
        JudgeError, match=r"has no model 'gpt-9' \(The model `gpt-9` does not exist\.\); it has llama3:latest"
    ):
        one.ask("x")
    assert asking(judge, model="qwen3").look() == asking(judge, model="llama3").look() == ""


def test_an_address_without_chat_completions_says_which_are_usual(judge: JudgeServer) -> None:
    one = asking(judge, base=f"{judge.address}/v7")
    assert one.look() == ""
    with pytest.raises(
        JudgeError, match=r"/v7: /chat/completions is not there \(404: Not Found\); expected --judge as http"
    ):
        one.ask("x")


def test_no_server_no_name_and_no_tls_are_known_before_anything_is_asked(judge: JudgeServer) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    cases = {
        f"http://127.0.0.1:{port}/v1": "cannot be reached: .*refused; start it, or check --judge",
        "http://no-such-host.invalid/v1": "cannot be reached",
        judge.base.replace("http:", "https:"): "no secure connection",
    }
    for base, said in cases.items():
        for call in (ChatServer.look, partial(ChatServer.ask, text="x")):
            with pytest.raises(JudgeError, match=said):
                call(asking(judge, base=base))


def test_a_host_that_does_not_answer_is_told_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener whose queue is full drops what comes, as a firewall does."""
    monkeypatch.setattr(connection, "PATIENCE", 0.3)
    monkeypatch.setattr(connection, "PATIENCE_OF_LIST", 0.3)
    with ExitStack() as held:
        listening = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        base = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        for _ in range(4):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listening.getsockname())
        one = ChatServer(Connection(base, Key("K")), "judge", 16)
        for call in (ChatServer.look, partial(ChatServer.ask, text="x")):
            with pytest.raises(JudgeError, match="cannot be reached: timed out"):
                call(one)


@pytest.mark.parametrize("base", [f"http://{'a' * 70}.test/v1", "http://localhost/vé"])
def test_a_url_that_no_request_can_hold_is_one_line(base: str) -> None:
    with pytest.raises(JudgeError, match="cannot be reached"):
        ChatServer(Connection(base_url(base), Key("K")), "judge", 16).look()


# --- the key ---


def test_a_key_that_is_wrong_or_missing_is_told_without_showing_it(
    judge: JudgeServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    judge.needs_key = "another"
    for key, said in (
        (SECRET, r"does not accept the key in OPENAI_API_KEY \(401\)"),
        ("", r"wants a key \(401\); put it"),
    ):
        for call in (ChatServer.look, partial(ChatServer.ask, text="x")):
            with pytest.raises(JudgeError, match=said) as raised:
                call(asking(judge, key))
            assert SECRET not in "".join(traceback.format_exception(raised.value))
    judge.needs_key = SECRET
    assert asking(judge, SECRET).look() == "" and asking(judge, SECRET).ask("x").text == "A"
    assert SECRET not in caplog.text


def test_a_server_that_repeats_the_key_does_not_get_it_into_a_text(judge: JudgeServer) -> None:
    judge.reply = lambda _: f"B, and your key is {SECRET}"
    assert asking(judge, SECRET).ask("x").text == "B, and your key is [key]"
    echo = SECRET.encode()
    for fault in (
        Fault(400, b'{"error": {"message": "bad ' + echo + b'"}}'),
        Fault(403, echo),
        Fault(404, echo),
        Fault(302, b"", {"Location": f"http://x.test/?key={SECRET}"}),
        Fault(body=b'{"error": "' + echo + b'"}'),
        Fault(body=b'{"' + echo + b'": 1}'),
        *[Fault(500, b"x" * 290 + echo)] * connection.TRIES,
    ):
        judge.faults.append(fault)
    judge.models = [SECRET]
    while judge.faults:
        with pytest.raises(JudgeError) as raised:
            asking(judge, SECRET).ask("x")
        assert not re.search("sk-very|0123", "".join(traceback.format_exception(raised.value)))
    assert SECRET not in repr(Key("NAME", SECRET)) and SECRET not in asking(judge, SECRET).look()


def test_the_key_goes_nowhere_else(judge: JudgeServer) -> None:
    with judge_server() as other:
        judge.faults = [
            Fault(code, b"", {"Location": f"{other.base}/chat/completions"}) for code in (301, 302, 303, 307, 308)
        ]
        while judge.faults:
            with pytest.raises(JudgeError, match="redirects"):
                asking(judge, SECRET).ask("x")
        assert not other.headers


def test_a_proxy_of_the_environment_is_for_other_machines(judge: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("http_proxy", judge.address)
    with judge_server(lambda _: "B") as other:
        assert asking(other).ask("x").text == "B"
    with pytest.raises(JudgeError):  # the proxy has no such path
        asking(judge, base="http://judge.test/v1").ask("x")
    assert judge.asked


def options(url: str, **others: Any) -> JudgeOptions:
    return JudgeOptions(judge=url, judge_model="m", **others)


def test_which_key_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", f" {SECRET}\n")
    monkeypatch.setenv("MY_KEY", "mine")
    monkeypatch.delenv("NO_KEY", raising=False)
    for url in ("https://api.test/v1", "http://localhost:1", "http://127.0.0.2", "http://[::1]:8000"):
        key, note = read_key(options(url))
        assert (key.value, note) == (SECRET, "")
    key, note = read_key(options("http://gpu-box:8000/v1"))
    assert key.value == "" and note == (
        "OPENAI_API_KEY is not sent over http to another machine; --judge-key OPENAI_API_KEY sends it"
    )
    assert read_key(options("http://gpu-box:8000/v1", judge_key="OPENAI_API_KEY"))[0].value == SECRET
    assert read_key(options("https://api.test", judge_key="MY_KEY"))[0] == Key("MY_KEY", "mine")
    with pytest.raises(ConfigError, match="the environment variable NO_KEY is not set"):
        read_key(options("https://api.test", judge_key="NO_KEY"))
    monkeypatch.delenv("OPENAI_API_KEY")
    assert read_key(options("https://api.test")) == (Key("OPENAI_API_KEY"), "")
    for bad in ("two words", "new\nline", "schlüssel"):
        monkeypatch.setenv("MY_KEY", bad)
        with pytest.raises(ConfigError, match="MY_KEY: expected a key of printable ASCII") as raised:
            read_key(options("https://api.test", judge_key="MY_KEY"))
        assert bad not in str(raised.value)
    assert not is_loopback("localhost.evil.test") and not is_loopback("10.0.0.1") and is_loopback("a.localhost")


# --- the URL ---


@pytest.mark.parametrize(
    ("given", "base"),
    [
        ("http://localhost:11434", "http://localhost:11434/v1"),
        ("http://localhost:11434/", "http://localhost:11434/v1"),
        ("http://localhost:11434/v1", "http://localhost:11434/v1"),
        ("https://api.openai.com/v1/", "https://api.openai.com/v1"),
        ("https://openrouter.ai/api/v1", "https://openrouter.ai/api/v1"),
        ("https://api.test/v1beta/openai/", "https://api.test/v1beta/openai"),
        ("http://localhost:8000/v1/chat/completions", "http://localhost:8000/v1"),
        ("http://localhost/chat/completions", "http://localhost"),
    ],
)
def test_urls_work_as_people_type_them(given: str, base: str) -> None:
    assert base_url(given) == base


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("localhost:8000", "expected the base URL of a server"),
        ("ftp://x/v1", "expected the base URL"),
        ("http://", "expected the base URL"),
        ("http://x:port/v1", "expected the base URL"),
        ("http://a b/v1", "expected the base URL"),
        ("https://me:hunter2@x/v1", "holds a user or a password"),
        ("me:hunter2@x/v1", "expected the base URL"),
        ("https://x/v1?api-key=hunter2", "a query or a fragment"),
        ("https://x/v1#hunter2", "a query or a fragment"),
    ],
)
def test_other_urls_are_refused_and_secrets_in_them_not_shown(given: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        options(given)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("key", [SECRET, "a b", "", "1A"])
def test_a_key_in_place_of_its_variables_name_is_not_shown(key: str) -> None:
    with pytest.raises(ConfigError, match="expected the name of an environment variable") as raised:
        options("http://localhost", judge_key=key)
    assert not key or key not in str(raised.value)


def test_options_without_a_judge_are_refused_by_name() -> None:
    given: dict[str, Any] = {
        "judge_model": "m", "judge_key": "K", "judge_concurrency": 2, "judge_max_tokens": 9, "verdicts": "f", "judge_dry_run": True,
    }  # fmt: skip
    for name, value in given.items():
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')}: is used with --judge only"):
            JudgeOptions(**{name: value})
    with pytest.raises(ConfigError, match="expected --judge-model NAME"):
        JudgeOptions(judge="http://localhost")
