"""JSON lines: what one command writes the others read, whatever characters a text holds."""

import json
from pathlib import Path

import pytest

from minicache.errors import DataError
from minicache.json_lines import json_lines, to_json_lines
from minicache.options.others import CompareConfig, ReportConfig
from minicache.pages.compare import Answers
from minicache.pages.run_answers import read_answers
from minicache.reports.curves import read_curves
from minicache.stages import compare
from minicache.stages.report import write_run_page

# all that str.splitlines cuts at besides "\n"
LINE_ENDS = "\r\u2028\u2029\x85\x0b\x0c\x1c\x1d\x1e"


def test_lines_are_numbered_and_say_what_was_wrong() -> None:
    lines = list(json_lines(b'{"a": 1}\r\n\n  \n[2]\nbroken \xff\n' + b"[" * 100_000))
    assert [(line.number, line.value) for line in lines] == [(1, {"a": 1}), (4, [2]), (5, None), (6, None)]
    assert lines[0].text == '{"a": 1}' and lines[2].text == "broken \ufffd"
    assert [type(line.error) for line in lines] == [type(None), type(None), UnicodeDecodeError, RecursionError]
    assert list(json_lines(b"")) == []


def test_only_a_newline_ends_a_line() -> None:
    rows = [{"text": f"a{LINE_ENDS}\nb"}, {"text": LINE_ENDS}]
    assert [line.value for line in json_lines(to_json_lines(rows).encode())] == rows


def test_report_reads_every_answer_that_compare_writes(tmp_path: Path) -> None:
    said = [f"one{end}two" for end in LINE_ENDS] + [LINE_ENDS]
    answers = [
        Answers(prompt=text, messages=[], reference=text, policy=text[::-1], reference_cut=False, policy_cut=True)
        for text in said
    ]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 0, "loss": 0.7}\n')
    config = CompareConfig("policy", prompt=("x",), jsonl=run / "answers.jsonl")
    compare._write(answers, config, {"reference": "r", "policy": "p"})
    read = read_answers(run / "answers.jsonl")
    assert [(row.prompt, row.sides["reference"][0], row.sides["policy"][0]) for row in read] == [
        (text, text, text[::-1]) for text in said
    ]
    assert f"{len(said)}. one" not in write_run_page(ReportConfig(run)).read_text(encoding="utf-8")
    assert f"{len(said) - 1}. one" in (run / "report.html").read_text(encoding="utf-8")


def test_curves_end_at_a_torn_line_and_refuse_one_before_it(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for torn in ('{"step": 1, "lo', '{"step": 1e999}', "[1]", '{"loss": 1}'):
        file.write_text('{"step": 0, "loss": 0.5}\n' + torn)
        assert read_curves(tmp_path) == {"loss": ([0], [0.5])}
        file.write_text(torn + "\n" + json.dumps({"step": 0, "loss": 0.5}) + "\n\n")
        with pytest.raises(DataError, match=r"metrics\.jsonl, line 1: expected a JSON object with 'step'"):
            read_curves(tmp_path)
