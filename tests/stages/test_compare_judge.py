"""compare with a judge: the command from models to page, files that never lose answers, and a page that counts agreement."""

import base64
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minicache.judge.rate import Judged, WinRate, win_rate
from minicache.judge.verdicts import Ruling
from minicache.options.others import CompareConfig
from minicache.options.train import TrainConfig
from minicache.pages.compare import Answers, page, page_data
from minicache.pages.run_answers import read_answers
from minicache.stages.compare import verdicts_file
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import Cli, one_process
from tests.helpers.judge_server import Fault, JudgeServer, judge_server
from tests.stages.test_compare import NAMES, NASTY, data_of, policy_dir

__all__ = ["policy_dir"]  # a fixture

PROMPTS = ("why not", "the cat sat on a mat", "今天天气很好")
SECRET = "sk-very-secret-0123456789"


@pytest.fixture
def judge() -> Iterator[JudgeServer]:
    with judge_server() as one:
        yield one


def command(policy: Path, reference: Path, judge: JudgeServer, *more: object) -> tuple[object, ...]:
    prompts = [each for text in PROMPTS for each in ("--prompt", text)]
    asked = ("compare", "--policy", policy, "--reference", reference, *prompts, "--max-new-tokens", 6)
    return *asked, "--judge", judge.base, "--judge-model", "judge", *more


def test_the_command_judges_and_writes(
    cli: Cli,
    policy_dir: Path,
    model_dir: Path,
    judge: JudgeServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("MY_KEY", SECRET)
    judge.needs_key = SECRET
    # the policy's answers are the ones that differ from those of the first order's A
    judge.reply = lambda text: "B" if len(judge.asked) % 2 else "A"
    files = ("--jsonl", tmp_path / "a.jsonl", "--html", tmp_path / "a.html", "--judge-key", "MY_KEY")
    code, stdout, stderr = cli(*command(policy_dir, model_dir, judge, *files, "--judge-concurrency", 1, "--verbose"))
    assert code == 0, stderr
    said = " ".join(stdout.split())
    assert "judge: the policy's win rate is 100.0% (95% interval 43.8% to 100.0%, Wilson; a tie is half a win)" in said
    assert "wins 3, ties 0, losses 0, unreadable 0" in said and "verdicts in" in said
    assert "judges in 6 requests" in " ".join(stderr.split())
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["judge"] for row in rows] == [{"model": "judge", "outcome": "win", "replies": ["B", "A"]}] * 3
    assert len(read_answers(tmp_path / "a.jsonl")) == 3
    assert len((tmp_path / "a.verdicts.jsonl").read_text(encoding="utf-8").splitlines()) == 6
    assert "judge" in data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    everything = stdout + stderr + caplog.text + "".join(file.read_text("utf-8") for file in tmp_path.iterdir())
    assert SECRET not in everything
    code, stdout, _ = cli(*command(policy_dir, model_dir, judge, *files, "--json"))
    found = json.loads(stdout)
    assert code == 0 and len(judge.asked) == 6, "nothing is asked twice"
    assert found["judge"]["rate"] == 1.0 and found["judge"]["prompts"][0] == {"outcome": "win", "replies": ["B", "A"]}
    assert [item["prompt"] for item in found["answers"]] == list(PROMPTS)
    assert found["judge"]["url"] == judge.base and SECRET not in stdout


def test_json_without_a_judge_is_the_list_it_was(
    cli: Cli, policy_dir: Path, model_dir: Path, judge: JudgeServer
) -> None:
    asked = command(policy_dir, model_dir, judge)
    code, stdout, _ = cli(*asked[: asked.index("--judge")], "--json")
    assert code == 0 and [item["prompt"] for item in json.loads(stdout)] == list(PROMPTS)
    assert set(json.loads(stdout)[0]) == {"prompt", "messages", "reference", "policy", "reference_cut", "policy_cut"}
    assert not judge.headers


def test_a_judge_that_fails_costs_no_answer(
    cli: Cli, policy_dir: Path, model_dir: Path, judge: JudgeServer, tmp_path: Path
) -> None:
    judge.faults = [Fault(403, b'{"error": {"message": "no credit"}}')]
    files = ("--jsonl", tmp_path / "a.jsonl", "--html", tmp_path / "a.html")
    code, _, stderr = cli(*command(policy_dir, model_dir, judge, *files, "--judge-concurrency", 1))
    assert code == 1 and "no credit" in stderr
    rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 3 and "judge" not in rows[0]
    assert "judge" not in data_of((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert not (tmp_path / "a.verdicts.jsonl").exists()


def test_what_is_wrong_with_the_judge_is_known_before_a_model_is_loaded(
    cli: Cli, judge: JudgeServer, tmp_path: Path
) -> None:
    nowhere = Path("no-such-model")
    judge.needs_key = "another"
    code, _, stderr = cli(*command(nowhere, nowhere, judge))
    assert code == 1 and "(401)" in stderr and "no-such-model" not in stderr
    (tmp_path / "other.jsonl").write_text("{}\n")
    code, _, stderr = cli(*command(nowhere, nowhere, judge, "--verdicts", tmp_path / "other.jsonl"))
    assert code == 1 and "expected a verdict that compare wrote" in " ".join(stderr.split())
    code, _, stderr = cli(*command(nowhere, nowhere, judge, "--verdicts", tmp_path))
    assert code == 1 and "is a directory" in " ".join(stderr.split())


def test_a_dry_run_answers_and_asks_nobody(
    cli: Cli, policy_dir: Path, model_dir: Path, judge: JudgeServer, tmp_path: Path
) -> None:
    more = ("--judge-dry-run", "--jsonl", tmp_path / "a.jsonl")
    code, stdout, stderr = cli(*command(policy_dir, model_dir, judge, *more))
    assert code == 0 and "To send: 6 requests, about" in " ".join(stderr.split()) and "win rate" not in stdout
    assert not judge.headers and [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]


def test_where_verdicts_are_kept(tmp_path: Path, ref_cache: Path) -> None:
    def place(policy: Path | str, **options: Any) -> Path | None:
        judge = {"judge": "http://x", "judge_model": "m"}
        return verdicts_file(CompareConfig(str(policy), prompt=("x",), **_with(judge, options)))

    train(TrainConfig(ref_cache, tmp_path / "run", max_steps=1, batch_size=1), one_process(), Silent())
    assert place(tmp_path / "run") == tmp_path / "run" / "verdicts.jsonl"
    assert place("org/name") == Path("verdicts.jsonl")
    assert place(tmp_path / "run", jsonl=Path("x/a.jsonl"), html=Path("y/b.html")) == Path("x/a.verdicts.jsonl")
    assert place(tmp_path / "run", html=Path("y/b.html")) == Path("y/b.verdicts.jsonl")
    assert place("p", html=Path("y/b.html"), verdicts=Path("v")) == Path("v")
    assert verdicts_file(CompareConfig("p", prompt=("x",), html=Path("y"))) is None


def _with(judge: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    from minicache.options.judge import JudgeOptions

    given = judge | {name: options.pop(name) for name in ("verdicts",) if name in options}
    return {**options, "judging": JudgeOptions(**given)}


# --- the page ---


def judged(outcomes: list[str], said: str = "A", model: str = "judge") -> WinRate:
    """A rate with these outcomes."""
    orders = {"win": "BA", "loss": "AB", "tie": "AA", "unreadable": "?A"}

    def both(outcome: str) -> list[Ruling]:
        return [
            Ruling("d", model, bool(place), letter if letter != "?" else None, said, False, 16)  # type: ignore[arg-type]
            for place, letter in enumerate(orders[outcome])
        ]

    rate = win_rate("http://x/v1", model, "v.jsonl", [both(outcome) if outcome else [] for outcome in outcomes])
    assert [each.outcome for each in rate.prompts] == [outcome or "tie" for outcome in outcomes]
    return rate


def test_the_page_hides_the_judge_until_it_is_revealed_and_keeps_votes_that_came_before() -> None:
    answers = [Answers(text, [], "r", "p", False, False) for text in PROMPTS]
    rate = judged(["win", "loss", ""], said="B, clearly", model="judge-9")
    html, plain = page(answers, NAMES, {}, 1, rate), page(answers, NAMES, {}, 1)
    assert "judge-9" not in html and "clearly" not in html and "win" not in data_of(html)["items"][0]
    assert data_of(html)["digest"] == data_of(plain)["digest"], "votes are stored under it"
    assert {name: data_of(html)[name] for name in data_of(plain)} == data_of(plain)
    sealed = json.loads(base64.b64decode(data_of(html)["judge"]))
    assert sealed["model"] == "judge-9" and sealed["prompts"][2] == {"outcome": "tie", "replies": []}
    assert sealed["prompts"][0] == {"outcome": "win", "replies": ["B, clearly"] * 2}


def test_nothing_a_judge_says_leaves_its_place_in_the_page() -> None:
    answers = [Answers("q", [], "r", "p", False, False)] * len(NASTY)
    prompts = [Judged("win", [text, text]) for text in NASTY]
    rate = judged(["win"] * len(NASTY), model=NASTY[2])
    html = page(answers, NAMES, {}, 0, WinRate(**{**vars(rate), "prompts": prompts}))
    assert html.lower().count("<script") == 2
    sealed = json.loads(base64.b64decode(data_of(html)["judge"]))
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", json.dumps(sealed, ensure_ascii=False).replace("\\n", ""))
    assert sealed["prompts"][0]["replies"][0] == NASTY[0], "it is text for the script, which writes it with textContent"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_pages_script_counts_agreement_as_the_definition_does() -> None:
    votes = ["win", "win", "tie", "loss", "win", None, "loss", "tie", "win"]
    said = ["win", "loss", "tie", "loss", "win", "win", "unreadable", "win", ""]
    answers = [Answers(f"q{i}", [], "r", "p", False, False) for i in range(len(votes))]
    data = page_data(answers, NAMES, {}, 1, judged(said))
    sides = json.loads(base64.b64decode(data["key"]))["sides"]
    other = {"a": "b", "b": "a"}
    cast = {
        str(i): "tie" if vote == "tie" else side if vote == "win" else other[side]
        for i, (vote, side) in enumerate(zip(votes, sides, strict=True))
        if vote
    }
    html = page(answers, NAMES, {}, 1, judged(said))
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    state = {"votes": cast, "at": 0, "revealed": True}
    code = f"{script}\nconst data = {json.dumps(data)};\n" + (
        f"console.log(JSON.stringify(ballot(data, unseal(data.key), {json.dumps(state)}, 'today')));"
        "console.log(JSON.stringify(agreement('ab', {}, { prompts: [{ outcome: 'win' }, { outcome: 'tie' }] })));"
        "console.log(JSON.stringify(agreement('a', { 0: 'a' }, { prompts: [{ outcome: 'win' }] })));"
    )
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, check=True, timeout=60)
    found, nothing, certain = map(json.loads, done.stdout.splitlines())
    pairs = [
        (vote, verdict or "tie") for vote, verdict in zip(votes, said, strict=True) if vote and verdict != "unreadable"
    ]
    same, both = sum(a == b for a, b in pairs), len(pairs)
    chance = sum(
        sum(a == kind for a, _ in pairs) * sum(b == kind for _, b in pairs) for kind in ("win", "tie", "loss")
    ) / both**2  # fmt: skip
    assert found["judge"]["agreement"] == {
        "both": both, "same": same, "share": pytest.approx(same / both),
        "kappa": pytest.approx((same / both - chance) / (1 - chance)),
    }  # fmt: skip
    rate = judged(said)
    assert {name: found["judge"][name] for name in ("wins", "ties", "losses", "unreadable", "judged")} == {
        name: getattr(rate, name) for name in ("wins", "ties", "losses", "unreadable", "judged")
    }
    assert found["judge"]["rate"] == pytest.approx(rate.rate)
    assert (found["judge"]["low"], found["judge"]["high"]) == pytest.approx((rate.low, rate.high), abs=1e-4)
    assert [line["judge"] for line in found["votes"]] == [outcome or "tie" for outcome in said]
    assert nothing == {"both": 0, "same": 0, "share": None, "kappa": None}
    assert certain == {"both": 1, "same": 1, "share": 1, "kappa": None}
