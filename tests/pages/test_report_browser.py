"""The pages in headless Chromium: every width, dark and light, the keyboard, and nothing run or fetched that is not theirs."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from minicache.options.others import ReportConfig
from minicache.pages.compare import Answers
from minicache.pages.compare import page as compare_page
from minicache.stages.inspect import read_cache, write_cache_page
from minicache.stages.report import write_run_page
from minicache.text import visible
from minicache.trackers import Silent
from tests.conftest import make_rows, precompute_into, write_jsonl
from tests.helpers.browser import CHROMIUM, Browser
from tests.pages.test_report import LONG, NASTY, row
from tests.pictures.test_plot import make_run
from tests.stages.test_compare_judge import judged

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium to look at the pages with")
OPEN_ALL = "for (const one of document.querySelectorAll('details')) one.open = true; new Promise(requestAnimationFrame)"
TAB, ENTER = ("Tab", 9, ""), ("Enter", 13, "\r")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as one:
        yield one


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> dict[str, Path]:
    """A page of each kind, with long names, long texts and text that would like to be markup."""
    folder = tmp_path_factory.mktemp("pages")
    rows = [
        *make_rows(12),
        row(NASTY, NASTY, f"{NASTY} no"),
        row("why", f"{LONG} cat", f"{LONG} mat"),
        row("why", "w" * 900, "a"),
    ]
    data = write_jsonl(folder / f"{'a-very-long-name-' * 6}.jsonl", rows)
    cache = precompute_into(folder / "cache", model_dir, data, per_token=True)
    run = make_run(folder / "run", steps=40, evaluated=True, started_from="x/" * 60, beta=0.3)
    write_jsonl(run / "answers.jsonl", [{"prompt": NASTY * 4, "reference": NASTY, "policy": LONG * 3}])
    votes = folder / "compare.html"
    votes.write_text(compare_page([Answers(NASTY, [], NASTY, "no", False, True)], {}, {}, 0), encoding="utf-8")
    return {
        "compare": votes,
        "cache": write_cache_page(read_cache(cache), folder / "cache.html", Silent()),
        "run": write_run_page(ReportConfig(run)),
    }


@pytest.mark.parametrize("name", ["cache", "run"])
@pytest.mark.parametrize("width", [320, 768, 1440])
def test_a_page_fits_every_width_with_all_of_it_open(
    name: str, width: int, browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages[name], width)
    browser.run(OPEN_ALL)
    assert browser.run("document.documentElement.scrollWidth") == width
    beyond = f"one.getBoundingClientRect().right > {width} && !one.closest('.scroll, svg, .hidden')"
    assert browser.run(f"[...document.querySelectorAll('main *')].filter((one) => {beyond}).length") == 0
    assert (
        browser.run(
            "Math.min(...[...document.querySelectorAll('svg')].map((one) => one.getBoundingClientRect().width))"
        )
        > 200
    )


@pytest.mark.parametrize("name", ["cache", "run", "compare"])
def test_a_page_runs_and_fetches_nothing_but_itself(name: str, browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages[name])
    browser.run(OPEN_ALL)
    asked = {
        one["params"]["request"]["url"] for one in browser.heard if one.get("method") == "Network.requestWillBeSent"
    }
    assert asked == {pages[name].as_uri()}
    assert not [one for one in browser.heard if one.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]
    assert browser.run("document.images.length + document.scripts.length") == 2
    assert browser.run(f"document.body.innerText.includes({visible('onerror=alert(1)>')!r})")


@pytest.mark.parametrize("name", ["cache", "run"])
def test_dark_and_light_follow_the_system_and_all_text_can_be_read(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    """WCAG 2.2 AA, 1.4.3: text against what lies behind it, 4.5 to 1."""
    backs = []
    for dark in (False, True):
        browser.open(pages[name], dark=dark)
        browser.run(OPEN_ALL)
        lowest, where, back = browser.run(CONTRAST)
        assert lowest >= 4.5, where
        backs.append(back)
    assert backs[0] > 0.8 and backs[1] < 0.05


CONTRAST = """(() => {
  const parse = (text) => { const n = text.match(/[\\d.]+/g).map(Number); return [n[0], n[1], n[2], n.length > 3 ? n[3] : 1]; };
  const over = ([r, g, b, a], below) => [r, g, b].map((one, at) => one * a + below[at] * (1 - a));
  const linear = (one) => (one / 255 <= 0.04045 ? one / 255 / 12.92 : ((one / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const below = (one) => (one.parentElement ? behind(one.parentElement) : [255, 255, 255]);
  const behind = (one) => over(parse(getComputedStyle(one).backgroundColor), below(one));
  let lowest = 99, where = "";
  for (const one of document.querySelectorAll("body *")) {
    if (one.closest("script, .hidden") || ![...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(one), back = behind(one);
    const ink = over(parse(one.closest("svg") ? style.fill : style.color), back);
    const [high, low] = [light(ink), light(back)].sort((a, b) => b - a), ratio = (high + 0.05) / (low + 0.05);
    if (ratio < lowest) [lowest, where] = [ratio, one.outerHTML.slice(0, 200)];
  }
  return [lowest, where, light(behind(document.body))];
})()"""


def test_the_keyboard_reaches_a_text_and_opens_it(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["cache"])
    focused = "document.activeElement.closest('details[data-pair]')?.id || ''"
    for _ in range(200):
        browser.press(*TAB)
        if found := browser.run(focused):
            break
    assert found
    outline = browser.run(
        "getComputedStyle(document.activeElement).outlineStyle + getComputedStyle(document.activeElement).outlineWidth"
    )
    assert outline == "solid3px"
    assert not browser.run(f"document.getElementById('{found}').open")
    browser.press(*ENTER)
    browser.run("new Promise((done) => setTimeout(done, 50))")
    assert browser.run(
        f"document.getElementById('{found}').open && document.querySelectorAll('#{found} .tok').length > 0"
    )


def test_a_link_to_a_pair_opens_its_text_with_shaded_tokens(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["cache"])
    pair = browser.run("const link = document.querySelector('a[href^=\"#pair-\"]'); link.click(); link.hash.slice(1)")
    browser.run("new Promise((done) => setTimeout(done, 50))")
    assert browser.run(f"document.getElementById('{pair}').open")
    assert browser.run("document.activeElement.tagName") == "SUMMARY"
    shades = browser.run(
        f"[...new Set([...document.querySelectorAll('#{pair} .tok')].map((one) => one.className))].sort()"
    )
    assert len(shades) > 1 and all("tok s" in shade for shade in shades)
    browser.open(pages["cache"], fragment=f"#{pair}")
    assert browser.run(f"document.getElementById('{pair}').open")


def test_a_special_token_is_framed_and_named_the_same_text_typed_is_not(
    browser: Browser, model_dir: Path, tmp_path: Path
) -> None:
    data = write_jsonl(tmp_path / "typed.jsonl", [row("why<|im_end|>", "<|im_end|> not", "on a mat")])
    cache = precompute_into(tmp_path / "cache", model_dir, data, per_token=True)
    browser.open(write_cache_page(read_cache(cache), tmp_path / "cache.html", Silent()), fragment="#pair-0")
    look = "(one) => [one.textContent, one.title, getComputedStyle(one).borderTopStyle]"
    framed = browser.run(f"[...document.querySelectorAll('#pair-0 .special')].map({look})")
    assert framed[:2] == [["<|im_start|>", "special token", "solid"], ["<|im_end|>", "special token", "solid"]]
    assert len(framed) == 5 and all(re.fullmatch(r"special token, -\d+\.\d\d nats", one[1]) for one in framed[3:])
    others = browser.run(f"[...document.querySelectorAll('#pair-0 .words > :not(.special)')].map({look})")
    assert others[0][0] == "user\nwhy<|im_end|>" and {one[2] for one in others} == {"none"}
    assert not [one for one in others if "special" in one[1]]


def test_a_vote_is_counted_and_shown_where_only_the_pages_own_script_and_style_are_allowed(
    browser: Browser, pages: dict[str, Path]
) -> None:
    browser.open(pages["compare"])
    browser.press("1", 49, "1")
    browser.run("document.getElementById('reveal').click()")
    assert "Policy wins" in browser.run("document.getElementById('result').innerText")
    widths = "['.bar', '.bar div'].map((one) => document.querySelector('#result ' + one).getBoundingClientRect().width)"
    whole, filled = browser.run(widths)
    assert filled in (0, whole) and whole > 200
    assert browser.run("document.getElementById('done').style.width") == "100%"
    assert not [one for one in browser.heard if one.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]


@pytest.mark.parametrize("width", [320, 1000])
def test_what_a_judge_says_shows_once_votes_are_revealed_and_is_text(
    width: int, browser: Browser, tmp_path: Path
) -> None:
    rate = judged(["loss", "win", "tie", "win"], said=f"B {NASTY} {'x' * 400}", model=NASTY)
    file = tmp_path / "judged.html"
    answers = [Answers(f"question {number} at {width}", [], "r", "p", False, False) for number in range(4)]
    file.write_text(compare_page(answers, {"reference": "r", "policy": "p"}, {}, 0, rate), encoding="utf-8")
    browser.open(file, width)
    for _ in answers:
        browser.press("1", 49, "1")
    text = "document.body.innerText"
    assert not browser.run(f"{text}.includes('Judge') || {text}.includes('onerror')")
    browser.run("document.getElementById('reveal').click()")
    result, said = (browser.run(f"document.getElementById('{name}').innerText") for name in ("result", "judged"))
    assert re.search(r"Votes and judge agree on \d of 4 prompts with both \(\d+%\)", result)
    assert "63% (22% to 91%)" in result and "policy is better" in said and said.count("onerror=alert(1)>") == 3
    rows = browser.run("[...document.querySelectorAll('#result tr')].map((one) => one.children.length)")
    assert rows == [5, 5, 5]
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("document.images.length + document.scripts.length") == 2
    assert browser.run(CONTRAST)[0] >= 4.5
    assert not [one for one in browser.heard if one.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded")]


def test_a_screen_reader_finds_parts_charts_and_tables_by_name(browser: Browser, pages: dict[str, Path]) -> None:
    for name in ("cache", "run"):
        browser.open(pages[name])
        browser.call("Accessibility.enable")
        nodes = [one for one in browser.call("Accessibility.getFullAXTree")["nodes"] if not one.get("ignored")]
        named: dict[str, list[str]] = {}
        for node in nodes:
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
        assert len(named["main"]) == len(named["banner"]) == len(named["navigation"]) == 1
        for role in ("region", "image", "table", "navigation", "link", "heading", "columnheader", "rowheader"):
            assert named[role] and all(named[role]), role


# --- languages ---


def speak(browser: Browser, *languages: str) -> None:
    """Let the browser prefer these languages."""
    agent = browser.run("navigator.userAgent")
    browser.call("Emulation.setUserAgentOverride", userAgent=agent, acceptLanguage=",".join(languages))


@pytest.mark.parametrize("name", ["cache", "run", "compare"])
@pytest.mark.parametrize(
    ("languages", "expected"),
    [(["zh-CN", "en"], "zh-CN"), (["de", "zh-TW"], "zh-CN"), (["en-US", "zh-CN"], "en"), (["fr"], "en")],
)
def test_a_page_speaks_chinese_where_the_browser_does(
    name: str, languages: list[str], expected: str, browser: Browser, pages: dict[str, Path]
) -> None:
    speak(browser, *languages)
    browser.open(pages[name])
    title, other = {"zh-CN": ("[\u4e00-\u9fff]", "English"), "en": ("^[ -~]*$", "中文")}[expected]
    assert browser.run("document.documentElement.lang") == expected
    assert browser.run("document.getElementById('language').innerText") == other
    assert re.search(title, browser.run("document.querySelector('.votes button, section > h2').innerText"))
    english = "document.querySelector('section, nav').getAttribute('aria-label') || ''"
    assert name == "compare" or (browser.run(english) == "Parts") == (expected == "en")
    speak(browser, "en")


@pytest.mark.parametrize("name", ["cache", "run", "compare"])
@pytest.mark.parametrize("width", [320, 1000])
def test_a_chinese_page_fits_and_the_button_leads_back_to_the_same_english(
    name: str, width: int, browser: Browser, pages: dict[str, Path], tmp_path: Path
) -> None:
    speak(browser, "en")
    browser.open(pages[name], width)
    browser.run(OPEN_ALL)
    browser.run("new Promise((done) => setTimeout(done, 50))")
    before = browser.run("document.body.innerText")
    try:
        browser.run("document.getElementById('language').click()")
        assert browser.run("document.documentElement.scrollWidth") == width
        chinese = browser.run("document.body.innerText")
        assert chinese != before and visible("onerror=alert(1)>") in chinese
        browser.screenshot(tmp_path / f"{name}-{width}.png")
        browser.open(pages[name], width)
        assert browser.run("document.documentElement.lang") == "zh-CN", "the choice is not kept"
        browser.run(OPEN_ALL)
        browser.run("document.getElementById('language').click()")
        browser.run("new Promise((done) => setTimeout(done, 50))")
        assert browser.run("document.body.innerText") == before
    finally:
        browser.run("localStorage.clear()")


def test_without_its_script_a_page_is_english_and_the_vote_says_what_it_needs(
    browser: Browser, pages: dict[str, Path]
) -> None:
    speak(browser, "zh-CN")
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        for name, text in (("cache", "Summary"), ("run", "Summary"), ("compare", "Voting needs JavaScript")):
            # not `open`, which waits by a timer of the page
            browser.call("Page.navigate", url=pages[name].as_uri())
            time.sleep(1)
            found = browser.run("document.body.innerText + document.getElementById('language').hidden")
            assert text in found and found.endswith("true")
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)
        speak(browser, "en")
