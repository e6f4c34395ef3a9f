"""The Chinese page of messages quotes what the program says, and leaves out none that a MiniMind checkpoint or run causes."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from minicache.pages.chinese import WORDS

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minicache"
PAGE = ROOT / "docs" / "messages.zh.md"
HOLE = "…"
# Files of which each error and each note is on the page, and the fewest there are.
WHOLE = {
    "models/file_kinds.py": 18,
    "models/pth_file.py": 14,
    "models/minimind.py": 7,
    "models/minimind_save.py": 3,
    "models/generations.py": 1,
    "scoring/handshake.py": 1,
    "scoring/dtype.py": 2,
    "intake/scores.py": 1,
    "training/log_lines.py": 1,
    "training/lock.py": 1,
}
RAISED = re.compile(r"\w*Error|Cache\w+|RunDiverged|RunBusy|RowRefused|note")


def template(node: ast.AST) -> str:
    """The words of a text in the source, with a hole for each value."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"\{\w+[^}]*\}", HOLE, node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return HOLE


@cache
def said(file: Path) -> list[str]:
    """All texts in a file of the package."""
    nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return [template(node) for node in nodes if isinstance(node, ast.Constant | ast.JoinedStr | ast.BinOp)]


def plain(text: str) -> str:
    """One hole for several in a row; marks of code left out, which a quotation on the page cannot hold."""
    return re.sub(f"{HOLE}(?:[,: ]*{HOLE})*", HOLE, text.replace("`", ""))


def quoted() -> list[str]:
    rows = re.findall(r"^\| `(.+?)` \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) > 100
    return rows


def parts(text: str) -> list[str]:
    """The fixed words between the holes."""
    return [part for part in plain(text).split(HOLE) if re.search(r"\w", part)]


def is_of(quotation: str, text: str) -> bool:
    """Whether the fixed words of the quotation are in the text, in their order."""
    at = 0
    for part in parts(quotation):
        found = plain(text).find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


@pytest.mark.parametrize("quotation", quoted())
def test_each_quotation_is_what_the_program_says(quotation: str) -> None:
    assert parts(quotation), "nothing fixed to look for"
    assert any(is_of(quotation, text) for file in PACKAGE.rglob("*.py") for text in said(file)), quotation


@pytest.mark.parametrize("name", WHOLE)
def test_each_message_of_a_file_is_on_the_page(name: str) -> None:
    nodes = list(ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8"))))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    # what a function makes for others to raise
    made = [
        node.value
        for node in nodes
        if isinstance(node, ast.Return) and isinstance(node.value, ast.JoinedStr | ast.Constant)
    ]
    raised = [call.args[0] for call in calls if call.args and RAISED.fullmatch(ast.unparse(call.func).split(".")[-1])]
    texts = [text for text in map(template, raised) if len("".join(parts(text)).split()) > 2]
    texts += [text for text in map(template, made) if len("".join(parts(text)).split()) > 5]
    assert len(texts) >= WHOLE[name], texts
    for text in texts:
        assert any(is_of(quotation, text) for quotation in quoted()), text


def test_each_of_the_words_on_what_a_run_came_to_is_on_the_page() -> None:
    sentences = [text for text in map(template, map(ast.Constant, WORDS)) if len("".join(parts(text)).split()) > 8]
    assert len(sentences) >= 8
    for text in sentences:
        assert any(is_of(quotation, text) for quotation in quoted()), text


def test_a_changed_word_is_found_out() -> None:
    text = "…: cut off or damaged; copy or download the file again (…)"
    assert is_of("…: cut off or damaged; copy …", text)
    assert not is_of("…: cut off or broken; copy …", text) and not is_of("… again … cut off", text)


def test_no_error_is_its_own_cause() -> None:
    """`raise x or error from error` makes one where x is None: whoever follows its causes comes to no end."""
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Name):
                raised = node.exc.values if isinstance(node.exc, ast.BoolOp) else [node.exc]
                names = [each.id for each in raised if isinstance(each, ast.Name)]
                assert node.cause.id not in names, f"{file}:{node.lineno}"
