"""The Chinese of the pages: every text that a reader sees has it, none is left over, and what a user wrote stays."""

import ast
import re
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from string import Formatter

import jinja2
import numpy as np
import pytest
from jinja2 import nodes

from minicache.options.others import ReportConfig
from minicache.pages.chinese import CHINESE, SCRIPT, chinese
from minicache.pages.markup import Table, report
from minicache.reports.figures import MOVED_TOO_FAR, NO_LOWER_LOSS
from minicache.reports.held_out import held_out, words_on_policy, words_on_run
from minicache.reports.names import METRICS, PANELS
from minicache.stages.inspect import read_cache, write_cache_page
from minicache.stages.report import write_run_page
from minicache.text import Phrase, phrase, read_back
from minicache.trackers import Silent
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.pages.test_report import ODD_ROWS
from tests.pictures.test_plot import make_run

PACKAGE = Path(str(files("minicache")))
SOURCES = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py") if file.name != "chinese.py"]
TEMPLATES = {
    file.name: jinja2.Environment().parse(file.read_text(encoding="utf-8"))
    for file in (PACKAGE / "pages").glob("*.html")
}
MARKUP = ("base", "macros", "report", "cache", "run")  # compare.html has no text but a line in both languages
WORD = re.compile(r"[A-Za-z]{2,}")


def literals() -> set[str]:
    """The texts that `phrase` is called with in the package."""
    calls = [node for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.Call)]
    texts = [call.args[0] for call in calls if isinstance(call.func, ast.Name) and call.func.id == "phrase"]
    texts = [each for text in texts for each in ([text.body, text.orelse] if isinstance(text, ast.IfExp) else [text])]
    return {text.value for text in texts if isinstance(text, ast.Constant) and isinstance(text.value, str)}


def template_literals() -> set[str]:
    """The texts that a template gives to a macro, to `phrase`, or shows as they are."""
    calls = [call for tree in TEMPLATES.values() for call in tree.find_all(nodes.Call)]
    names = {"phrase", "zh", "label", "say", "dim", "details", "words"}
    found = [arg for call in calls if getattr(call.node, "name", "") in names for arg in call.args[:1]]
    found += [arg for call in calls if getattr(call.node, "name", "") == "state" for arg in call.args[1:]]
    return {"".join(text.value for text in ([arg] if isinstance(arg, nodes.Const) else arg.find_all(nodes.Const)))
            for arg in found if isinstance(arg, nodes.Const | nodes.Concat)}  # fmt: skip


def test_every_text_of_the_code_and_of_the_templates_has_its_chinese() -> None:
    texts = literals() | template_literals()
    # a test that finds no text would pass as well
    assert len(texts) > 80
    assert {"Complete: training may use it.", "not logged"} <= texts
    missing = {text for text in texts if WORD.search(re.sub(r"\{.*?\}", "", text))} - CHINESE.keys()
    assert not missing, missing
    assert {metric.name for metric in METRICS.values()} <= CHINESE.keys()
    assert {panel.title[0].upper() + panel.title[1:] for panel in PANELS} <= CHINESE.keys()


def test_no_chinese_is_left_of_a_text_that_is_gone() -> None:
    known = {node.value for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    known |= {node.value for tree in TEMPLATES.values() for node in tree.find_all(nodes.Const)} | template_literals()
    known |= {text[0].upper() + text[1:] for text in {panel.title for panel in PANELS}}
    assert not CHINESE.keys() - known


def test_the_script_has_each_of_its_texts_in_chinese_and_no_other() -> None:
    script = (PACKAGE / "pages" / "report.js").read_text(encoding="utf-8")
    assert set(re.findall(r'\bwords\("(.*?)"', script)) == SCRIPT.keys()


@pytest.mark.parametrize("text", [*CHINESE, *SCRIPT])
def test_the_chinese_holds_the_same_values(text: str) -> None:
    fields = [
        sorted(part[1:3] for part in Formatter().parse(each) if part[1]) for each in (text, {**CHINESE, **SCRIPT}[text])
    ]
    assert fields[0] == fields[1]


@pytest.mark.parametrize("name", MARKUP)
def test_a_template_holds_no_text_beside_its_expressions(name: str) -> None:
    """What stands there could not be shown in another language."""
    data = "{}".join(node.data for node in TEMPLATES[f"{name}.html"].find_all(nodes.TemplateData))
    bare = re.sub(r"<(style|script)\b.*?</\1>|<[^>]*>", "", data, flags=re.DOTALL)
    bare = bare.replace("special tokens", "")  # marked beside it
    assert not WORD.search(re.sub(r"<[^<]*$|^[^>]*>", "", bare)), bare
    assert not re.search(r"(aria-label|title|alt)=\"\w", data)


class Unmarked(HTMLParser):
    """texts: those without Chinese that hold a word, outside scripts and styles. labels: likewise."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, bool]] = []
        self.texts: list[str] = []
        self.labels: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if label := found.get("aria-label"):
            self.labels += [] if "data-zh-label" in found else [label]
        if tag not in ("meta", "br", "hr"):
            self.open.append((tag, "data-zh" in found or found.get("lang") == "zh-CN"))

    def handle_endtag(self, tag: str) -> None:
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if not any(marked or tag in ("script", "style", "noscript") for tag, marked in self.open) and WORD.search(data):
            self.texts.append(data.strip())


def test_all_that_a_cache_page_says_has_its_chinese_but_for_the_users_own(model_dir: Path, tmp_path: Path) -> None:
    rows = [{**one, "score": 3} for one in ODD_ROWS]
    files = write_jsonl(tmp_path / "plain.jsonl", make_rows(20)), write_jsonl(tmp_path / "odd.jsonl", rows)
    for per_token in (False, True):
        cache = precompute_into(tmp_path / f"cache{per_token}", model_dir, *files, per_token=per_token)
        found = Unmarked(
            write_cache_page(read_cache(cache), tmp_path / "page.html", Silent()).read_text(encoding="utf-8")
        )
        assert found.labels == []
        own = re.compile(
            r"\S*(plain|odd)\.jsonl(:\d+)?|\S*/cache(True|False)|identical|.* are the same.*|MB", re.DOTALL
        )
        manifest = [text for text in found.texts if not own.fullmatch(text) and not text.endswith(" MB")]
        # what is left are values of the identity and of the manifest: names of fields, dtypes, digests
        assert all(" " not in text or text.startswith(("--loss-on", "{", str(model_dir))) for text in manifest), (
            manifest
        )


def test_all_that_a_runs_page_says_has_its_chinese_but_for_the_users_own(tmp_path: Path) -> None:
    outcome = {"progress": {"step": 40, "best_step": 4}, "model_step": 4, "stopped": NO_LOWER_LOSS.format(waited=3)}
    run = make_run(tmp_path / "run", steps=40, evaluated=True, started_from="sft", pairs=9, held_out=3, steps_=1, outcome=outcome,
                   handshake=0.01, beta=0.3, lr=1e-6, ref_cache="cache")  # fmt: skip
    write_jsonl(run / "answers.jsonl", [{"prompt": "a prompt", "reference": "loss", "policy": "the policy"}])
    html = write_run_page(ReportConfig(run)).read_text(encoding="utf-8")
    found = Unmarked(html)
    assert found.labels == []
    assert "连续 3 次验证" in html and "data-zh" in html
    own = {"a prompt", "loss", "the policy", "sft", "cache", str(run), "1. a prompt"}
    flags = [text for text in found.texts if text not in own]
    # options and their values
    assert all(" " not in text or text in ("ref cache", "started from", "held out") for text in flags), flags


def test_a_users_text_stays_even_if_it_reads_as_one_of_ours() -> None:
    parts = [("preference", "Summary", [Table("Files", ["file"], [["loss"], [phrase("loss")]])])]
    html = report("cache.html", "loss", "chosen", parts, {})
    assert html.count('data-zh="损失"') == 1 and "<title>loss</title>" in html


def test_a_value_may_be_chinese_or_hold_braces_or_markup() -> None:
    text = phrase(
        "Stopped after step {step}: {why}.", step=phrase("{step:,} of {steps:,}", step=1, steps=2), why="<{x}>"
    )
    assert text == "Stopped after step 1 of 2: <{x}>."
    assert chinese(text) == "在第 1/2 步之后停止：<{x}>。"
    assert chinese("no such text") is None and chinese(phrase("{count} of none", count=1)) is None
    html = report("run.html", text, "about", [])
    assert 'data-zh="在第 1/2 步之后停止：&lt;{x}&gt;。"' in html and "<{x}>" not in html.partition("<script")[0]


def test_a_reason_in_a_file_is_read_back() -> None:
    for template, values in ((NO_LOWER_LOSS, {"waited": "3"}), (MOVED_TOO_FAR, {"kl": "0.5", "most": "0.1"})):
        found = read_back(template.format(**values), (NO_LOWER_LOSS, MOVED_TOO_FAR))
        assert isinstance(found, Phrase) and found.values == values and chinese(found)
    assert read_back("another reason", (NO_LOWER_LOSS,)) == "another reason"


def test_every_word_on_what_a_run_came_to_has_its_chinese() -> None:
    random = np.random.default_rng(0)
    few = held_out(random.normal(size=9), np.ones(9, bool), np.ones(9, bool))
    bad = held_out(-np.ones(99), np.zeros(99, bool), np.ones(99, bool))
    said = [*words_on_policy({"kl": 1.0}, few, True), *words_on_policy({"kl": 1.0}, few, False)]
    said += words_on_policy({"kl": 1e-9}, bad, False)
    for lr, moved, step in ((1e-7, 1e-9, 5), (None, 1e-9, 0), (1e-6, 0.01, 0)):
        last = {"kl": moved, "rewards/accuracy": 0.9}
        progress = {"validation": last, "last": last}
        said += words_on_run({"lr": lr, "outcome": {"progress": progress, "model_step": step}})
    assert len(said) >= 8
    for line in said:
        found = chinese(line)
        assert found, line
        assert re.search("[\u4e00-\u9fff]", found), found
        assert not set(WORD.findall(re.sub(r"--\S+", "", found))) - {"token", "rejected", "minidpo", "compare"}, found
