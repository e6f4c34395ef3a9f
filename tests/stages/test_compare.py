"""compare: answers that depend on nothing but the settings, prompts from everywhere, a page that is safe and counts right."""

import base64
import json
import math
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from minicache.cache.reader import ReferenceCache
from minicache.data.files import read_rows
from minicache.data.formats import to_pair, to_prompt
from minicache.data.records import Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import CacheMismatch, ConfigError, DataError, MinicacheError, ModelError, OutputError, RowRefused
from minicache.intake.prompts import prompt_ids, read_prompts
from minicache.models import answering, load_model
from minicache.options.others import CompareConfig
from minicache.options.train import TrainConfig
from minicache.pages.compare import Answers, page, page_data, policy_sides
from minicache.pages.markup import embedded
from minicache.stages.compare import compare, tokenizer_of
from minicache.stages.train import train
from minicache.trackers import Silent
from minicache.training.run_directory import policy_source
from tests.conftest import WORDS, Cli, one_process, precompute_into, tiny_llama, write_jsonl

PROMPTS = ("why not", "the cat sat on a mat and then it rained", "今天天气很好", "a")


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """Other weights than the reference's, the same tokenizer."""
    directory = shutil.copytree(model_dir, tmp_path_factory.mktemp("policy") / "model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_llama(seed=1).save_pretrained(directory)
    return directory


def ask(policy: Path, reference: Path, **options: Any) -> list[Answers]:
    settings = {"prompt": PROMPTS, "max_new_tokens": 12, **options}
    return compare(CompareConfig(str(policy), str(reference), **settings), one_process(), Silent()).answers


# --- answering ---


def test_a_batch_answers_as_a_plain_greedy_loop_does(policy_dir: Path, model_dir: Path) -> None:
    answers = {size: ask(policy_dir, model_dir, batch_size=size) for size in (1, 3, 8)}
    assert answers[1] == answers[3] == answers[8]
    tokenizer = ChatTokenizer.load(policy_dir)
    end = tokenizer.backend.token_to_id("<|im_end|>")
    for source, name in ((model_dir, "reference"), (policy_dir, "policy")):
        model = load_model(str(source)).model
        for text, answer in zip(PROMPTS, answers[1], strict=True):
            ((ids, _),) = tokenizer.encode([tokenizer.render((Turn("user", text),), open_answer=True)])
            said: list[int] = []
            sequence = torch.from_numpy(ids).long()[None]  # (1, n)
            while len(said) < 12 and end not in said:
                said.append(int(model(sequence).logits[0, -1].argmax()))
                sequence = torch.cat([sequence, torch.tensor([said[-1:]])], 1)
            text = tokenizer.backend.decode(said, skip_special_tokens=True).strip()
            assert getattr(answer, name) == (text if end in said else text.rstrip("\ufffd"))
            assert getattr(answer, f"{name}_cut") == (end not in said)


def test_prompts_of_similar_length_share_a_batch_and_each_batch_is_told(
    policy_dir: Path, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    widths: list[tuple[int, ...]] = []
    plain = answering._generate

    def generate(model: Any, prompts: list[Any], ends: list[int]) -> list[list[int]]:
        widths.append(tuple(map(len, prompts)))
        return plain(model, prompts, ends)

    class Heard(Silent):
        told: ClassVar[list[int | str]] = []

        def begin(self, phase: str, pairs: int | None) -> None:
            self.told.append(phase.split()[0])

        def advance(self, pairs: int, tokens: int) -> None:
            self.told.append(pairs)

    monkeypatch.setattr(answering, "_generate", generate)
    config = CompareConfig(str(policy_dir), str(model_dir), prompt=PROMPTS, max_new_tokens=2, batch_size=3)
    compare(config, one_process(), Heard())
    assert [len(batch) for batch in widths] == [3, 1] * 2
    lengths = [length for batch in widths[:2] for length in batch]
    assert lengths == sorted(lengths) and len(set(lengths)) > 1
    assert Heard.told == ["loading", "answering", 3, 1] * 2


def test_sampling_follows_the_seed_and_leaves_the_generator_alone(policy_dir: Path, model_dir: Path) -> None:
    before = torch.get_rng_state()
    hot = {seed: ask(policy_dir, model_dir, temperature=1.0, top_p=0.9, seed=seed) for seed in (1, 2)}
    assert torch.equal(before, torch.get_rng_state())
    assert hot[1] == ask(policy_dir, model_dir, temperature=1.0, top_p=0.9, seed=1)
    assert hot[1] != hot[2]
    assert ask(policy_dir, model_dir, seed=1) == ask(policy_dir, model_dir, seed=2)  # greedy has nothing to draw


def test_settings_that_come_with_a_model_do_not_count_except_where_it_ends(
    policy_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    plain = ask(policy_dir, model_dir)
    tuned = shutil.copytree(policy_dir, tmp_path / "tuned")
    generation = {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "top_k": 4, "max_length": 3}
    (tuned / "generation_config.json").write_text(json.dumps(generation))
    assert ask(tuned, model_dir) == plain
    tokenizer = ChatTokenizer.load(policy_dir)
    policy: Any = load_model(str(policy_dir)).model
    said = policy.generate(
        torch.from_numpy(read_prompts(CompareConfig("", prompt=("a",)), tokenizer)[0].ids).long()[None],
        max_new_tokens=3, do_sample=False, pad_token_id=0,
    )[0, -1]  # fmt: skip
    (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, int(said)]}))
    assert not ask(tuned, model_dir, prompt=("a",))[0].policy_cut


def test_the_policy_against_itself_says_the_same(model_dir: Path) -> None:
    assert all(item.policy == item.reference for item in ask(model_dir, model_dir))


def test_a_reference_that_does_not_fit_is_refused_before_it_answers(
    policy_dir: Path, tmp_path: Path, tokenizer_dir: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_llama(vocabulary=60).save_pretrained(tmp_path / "small")
    with pytest.raises(ModelError, match=r"has 60 token embeddings.*share a tokenizer"):
        ask(policy_dir, tmp_path / "small")
    with pytest.raises(ConfigError, match="has room for 2048 tokens"):
        ask(policy_dir, policy_dir, max_new_tokens=2048)


def test_a_batch_that_does_not_fit_in_memory_is_one_line(policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_much(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("transformers.generation.GenerationMixin.generate", too_much)
    with pytest.raises(
        ModelError, match=r"answering 4 prompts of up to \d+ tokens at once does not fit .* try --batch-size 2"
    ):
        ask(policy_dir, policy_dir)


# --- prompts ---


def prompts_of(file: Path, tokenizer_dir: Path, **options: Any) -> list[tuple[Turn, ...]]:
    config = CompareConfig("", prompts=file, **options)
    return [prompt.turns for prompt in read_prompts(config, ChatTokenizer.load(tokenizer_dir))]


def test_prompts_are_read_from_lines_and_from_rows_of_every_kind(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffwhy not\r\n\n  今天\n".encode())
    assert prompts_of(tmp_path / "p.txt", tokenizer_dir) == [(Turn("user", "why not"),), (Turn("user", "今天"),)]
    user, answer = {"role": "user", "content": "why"}, {"role": "assistant", "content": "not"}
    rows = [
        {"prompt": "why"},
        "why",
        {"messages": [user]},
        {"messages": [user, answer]},
        {"conversations": [{"from": "human", "value": "why"}, {"from": "gpt", "value": "not"}]},
        {"prompt": "why", "chosen": "a", "rejected": "b"},
        {"chosen": [user, answer], "rejected": [user, {**answer, "content": "no"}]},
    ]
    file = write_jsonl(tmp_path / "p.jsonl", rows)
    assert prompts_of(file, tokenizer_dir) == [(Turn("user", "why"),)] * len(rows)
    (tmp_path / "p.json").write_text(json.dumps(rows))
    assert prompts_of(tmp_path / "p.json", tokenizer_dir) == [(Turn("user", "why"),)] * len(rows)


def test_several_turns_stay_and_a_system_turn_is_added_where_there_is_none(tokenizer_dir: Path, tmp_path: Path) -> None:
    turns = [{"role": role, "content": role} for role in ("user", "assistant", "user")]
    rows = [{"messages": turns}, {"messages": [{"role": "system", "content": "own"}, *turns]}]
    first, second = prompts_of(write_jsonl(tmp_path / "p.jsonl", rows), tokenizer_dir, system="be brief")
    assert [turn.content for turn in first] == ["be brief", "user", "assistant", "user"]
    assert [turn.content for turn in second] == ["own", "user", "assistant", "user"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"prompt": "a"}\n{"prompt": ""}\n', "line 2: 'prompt' asks nothing"),
        ('{"text": "a"}\n', "line 1: expected 'prompt', 'messages' or 'conversations'; the row has 'text'"),
        ('{"prompt": "a"}\n{"pro\n', "line 2: not JSON"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}\n', "line 1: 'messages' asks nothing"),
        ('{"messages": [{"role": "king", "content": "a"}]}\n', "line 1: role 'king'"),
        ("[1]", "line 1: expected an object or text, got a number"),
        ("", "the file is empty"),
    ],
)
def test_a_row_that_asks_nothing_is_named_with_its_line(
    text: str, said: str, tokenizer_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        prompts_of(tmp_path / "p.jsonl", tokenizer_dir)


def test_no_text_file_no_text_and_no_prompt_in_it(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n \n")
    for name, said in (("none.txt", "no such file"), ("bytes.txt", "cannot be read"), ("empty.txt", "found none")):
        with pytest.raises(DataError, match=said):
            prompts_of(tmp_path / name, tokenizer_dir)


@pytest.mark.parametrize("loss_on", ["response", "assistant"])
def test_a_caches_prompts_are_those_of_its_pairs(
    loss_on: str, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    path = precompute_into(tmp_path / "cache", model_dir, data_file, loss_on=loss_on)
    cache, tokenizer = ReferenceCache(path), ChatTokenizer.load(model_dir)
    rows = dict(read_rows(str(data_file)))
    for index in range(cache.log.pairs):
        pair, _ = cache.blocks.pair(index)
        turns = to_pair(rows[pair.source[1]], "", 0).prompt
        ((ids, _),) = tokenizer.encode([tokenizer.render(turns, open_answer=True)])
        assert np.array_equal(prompt_ids(pair), ids)
    (first, *_, last) = read_prompts(CompareConfig("", ref_cache=path, pairs=5), tokenizer)
    assert np.array_equal(first.ids, prompt_ids(cache.blocks.pair(0)[0]))
    assert np.array_equal(last.ids, prompt_ids(cache.blocks.pair(39)[0]))
    assert len(read_prompts(CompareConfig("", ref_cache=path, pairs=500), tokenizer)) == 40


def test_a_cache_of_another_tokenizer_is_refused(ref_cache: Path, model_dir: Path, tmp_path: Path) -> None:
    other = shutil.copytree(model_dir, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(CacheMismatch, match="another tokenizer"):
        read_prompts(CompareConfig("", ref_cache=ref_cache), ChatTokenizer.load(other))


def test_a_row_as_a_prompt_says_what_was_wrong() -> None:
    with pytest.raises(RowRefused, match="got null"):
        to_prompt(None)


# --- files ---


def test_json_lines_hold_everything_and_take_the_place_of_what_was_there(
    policy_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "答案.jsonl"
    answers = ask(policy_dir, model_dir, jsonl=file)
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line["prompt"] for line in lines] == list(PROMPTS)
    assert [(line["reference"], line["policy"]) for line in lines] == [(a.reference, a.policy) for a in answers]
    assert lines[0]["models"] == {"reference": str(model_dir), "policy": str(policy_dir)}
    assert lines[0]["settings"]["max_new_tokens"] == 12 and lines[0]["messages"][0]["role"] == "user"
    ask(policy_dir, model_dir, jsonl=file, prompt=("a",))
    assert len(file.read_text(encoding="utf-8").splitlines()) == 1
    assert list(file.parent.iterdir()) == [file]


def test_an_output_that_cannot_be_is_known_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place, said in ((tmp_path, "is a directory"), (tmp_path / "file" / "x.html", "cannot be written")):
        with pytest.raises(OutputError, match=said):
            ask(Path("no-such-model"), Path("no-such-model"), html=place)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "--temperature"),
        ({"temperature": math.nan}, "--temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "--top-p"),
        ({"top_p": 0.5}, "--temperature above 0"),
        ({"pairs": 3}, "--ref-cache"),
        ({"system": "x", "ref_cache": Path("c")}, "tokens already"),
        ({"batch_size": 0}, "--batch-size"),
        ({"prompt": (" ",)}, "--prompt: expected some text"),
        ({"jsonl": Path("a"), "html": Path("a")}, "different files"),
        ({"prompts": Path("a"), "jsonl": Path("./a")}, "different files"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(MinicacheError, match=said):
        CompareConfig("p", **{"prompt": ("x",), **options})


# --- the page ---

NASTY = [
    "</script><script>alert(1)</script>",
    "<!-- <script> ]]> <img src=x onerror=alert(2)> {{DATA}} & $& \\1",
    "\x1b[31mred\x1b]0;title\x07 \u202eturned\u2028line\x00",
    "שלום مرحبا 今天天气很好 👍🏽",
    "word " * 20000,
    "",
    "one\r\n\ttwo\n",
]
NAMES = {"reference": "org/</script>", "policy": "runs/试验"}


def nasty(count: int = len(NASTY)) -> list[Answers]:
    return [Answers(NASTY[i], [], NASTY[-i - 1], NASTY[(i + 2) % len(NASTY)], i % 2 == 0, False) for i in range(count)]


def data_of(html: str) -> dict[str, Any]:
    """The JSON as a browser finds it: from the element's beginning to the first thing that ends a script."""
    _, _, rest = html.partition('<script type="application/json" id="data">')
    data: dict[str, Any] = json.loads(re.split("</script", rest, maxsplit=1, flags=re.IGNORECASE)[0])
    return data


def test_nothing_a_model_says_leaves_its_place_in_the_page() -> None:
    html = page(nasty(), NAMES, {"system": NASTY[0]}, 0)
    plain = page([Answers("a", [], "b", "c", False, False)], NAMES, {}, 0)
    assert html.lower().count("<script") == plain.lower().count("<script") == 2
    data = data_of(html)
    assert data == page_data(nasty(), NAMES, {"system": NASTY[0]}, 0)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e]", html)
    assert data["items"][0]["prompt"] == [{"role": "", "content": NASTY[0]}] and data["items"][0]["a_cut"] in (1, 0)
    assert json.loads(embedded(NASTY)) == NASTY


def test_the_page_asks_no_network_and_names_no_model_in_the_open() -> None:
    html = page([Answers("q", [], "x", "y", False, False)], {"reference": "the-sft", "policy": "the-run"}, {}, 0)
    assert not re.search(r"https?:|//[a-z]|\ssrc=|\shref=|@import|url\(|fetch\(|XMLHttp|innerHTML\s*=", html)
    assert "default-src 'none'" in html
    assert "the-sft" not in html and "the-run" not in html


def test_who_is_a_is_balanced_and_follows_the_seed() -> None:
    for count in (1, 2, 7, 40):
        assert abs(policy_sides(count, 3).count("a") - count / 2) <= 0.5
    assert policy_sides(40, 1) == policy_sides(40, 1) != policy_sides(40, 2)
    assert {policy_sides(1, seed) for seed in range(20)} == {"a", "b"}


def test_each_answer_stands_on_the_side_the_key_says() -> None:
    answers = [Answers(str(i), [], f"reference {i}", f"policy {i}", False, False) for i in range(9)]
    data = page_data(answers, NAMES, {}, 5)
    key = json.loads(base64.b64decode(data["key"]))
    assert {name: key[name] for name in NAMES} == NAMES
    for i, (item, side) in enumerate(zip(data["items"], key["sides"], strict=True)):
        assert item[side] == f"policy {i}" and item["a" if side == "b" else "b"] == f"reference {i}"
    assert data["digest"] == page_data(answers, NAMES, {}, 5)["digest"]
    assert data["digest"] != page_data(answers, NAMES, {}, 6)["digest"]


def wilson(wins: int, total: int) -> tuple[float, float]:
    """By its definition: the shares p at which (wins/total - p)² = z² p (1 - p) / total, found as roots."""
    z2, share = 1.959964**2 / total, wins / total
    return tuple(sorted(np.roots([1 + z2, -2 * share - z2, share**2]).real))


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_pages_script_counts_as_the_definition_does() -> None:
    answers = [Answers(f"{word} 今天", [], "r", "p", False, False) for word in WORDS]
    html = page(answers, NAMES, {"seed": 1}, 1)
    data = data_of(html)
    sides = json.loads(base64.b64decode(data["key"]))["sides"]
    choices = ["a", "b", "tie", "a", None, "b"] * 3
    votes = {str(i): choice for i, choice in enumerate(choices[: len(sides)]) if choice}
    script = html.rpartition("<script>")[2].partition("</script>")[0]
    state = {"votes": votes, "at": 3, "revealed": True}
    code = f"{script}\nconst data = {json.dumps(data)};\n" + (
        f"console.log(JSON.stringify(ballot(data, unseal(data.key), {json.dumps(state)}, 'today')));"
        "console.log(JSON.stringify([tally('ab', {}), Object.keys(WORDS.en).sort(), Object.keys(WORDS.zh).sort()]));"
    )
    done = subprocess.run(["node", "-"], input=code, capture_output=True, text=True, check=True, timeout=60)
    found, (nothing, english, chinese) = map(json.loads, done.stdout.splitlines())
    wins = sum(votes[str(i)] == side for i, side in enumerate(sides) if str(i) in votes)
    ties = sum(vote == "tie" for vote in votes.values())
    losses = len(votes) - wins - ties
    summary = found["summary"]
    assert (summary["wins"], summary["ties"], summary["losses"], summary["voted"]) == (wins, ties, losses, len(votes))
    assert (summary["low"], summary["high"]) == pytest.approx(wilson(wins, wins + losses))
    assert found["models"] == NAMES and found["digest"] == data["digest"]
    for line, side in zip(found["votes"], sides, strict=True):
        assert line[side] == "policy" and line["prompt"] == data["items"][line["number"]]["prompt"]
        vote = votes.get(str(line["number"]))
        assert line["winner"] == ("tie" if vote == "tie" else vote and ("policy" if vote == side else "reference"))
    assert nothing["win_rate"] is None and nothing["low"] is None
    assert english == chinese


# --- the command ---


def test_the_command_shows_and_writes(
    cli: Cli, policy_dir: Path, model_dir: Path, ref_cache: Path, tmp_path: Path
) -> None:
    places = ("--jsonl", tmp_path / "a.jsonl", "--html", tmp_path / "a.html")
    asked = ("compare", "--policy", policy_dir, "--reference", model_dir, "--max-new-tokens", 3)
    code, stdout, stderr = cli(*asked, "--prompt", "why not", "--ref-cache", ref_cache, "--pairs", 2, *places)
    assert code == 0 and "1/3  why not" in stdout and "a.html" in stdout.replace("\n", "")
    assert "cut at --max-new-tokens 3" in " ".join(stderr.split())
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert len(data_of((tmp_path / "a.html").read_text(encoding="utf-8"))["items"]) == 3
    code, stdout, _ = cli(*asked, "--prompt", "why not", "--json", "--html", tmp_path / "b.html")
    assert code == 0 and json.loads(stdout)[0]["prompt"] == "why not" and (tmp_path / "b.html").is_file()


def test_prompts_get_what_the_template_of_the_run_was_given(
    tokenizer_dir: Path, model_dir: Path, tmp_path: Path
) -> None:
    """A run on a cache with a date and template arguments: compare prompts the same way, unless it is given others."""
    model = shutil.copytree(model_dir, tmp_path / "model")
    template = "{{ strftime_now('%Y') }} {{ mood }} {% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "why", "chosen": "not", "rejected": "on"}] * 2)
    given: dict[str, Any] = {
        "chat_template": tmp_path / "t.jinja",
        "template_arg": ("mood=glad",),
        "date": "2031-01-01",
    }
    cache = precompute_into(tmp_path / "cache", model, data, **given)
    train(TrainConfig(cache, tmp_path / "run", max_steps=1, batch_size=1), one_process(), Silent())
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "2031 glad why"),
        ({"template_arg": ("mood=sad",), "date": "2040-01-01"}, "2040 sad why"),
    ]
    for options, expected in cases:
        config = CompareConfig(str(tmp_path / "run"), prompt=("why",), **options)
        tokenizer = tokenizer_of(config, policy_source(config.policy))
        (prompt,) = read_prompts(config, tokenizer)
        assert tokenizer.decode(prompt.ids) == f"{expected}<|im_end|>"
    with pytest.raises(ConfigError, match="--template-arg tone: the chat template does not read it"):
        compare(
            CompareConfig(str(tmp_path / "run"), prompt=("why",), template_arg=("tone=x",)), one_process(), Silent()
        )
