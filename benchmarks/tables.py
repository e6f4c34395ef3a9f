"""A report as tables for the screen, and as rows for RESULTS.md."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.case import LIVE, OURS, TRL

COLUMNS = (
    *(
        "pairs/s",
        "tokens/s",
        "ours faster",
        "FLOPs over ours",
        "on a GPU",
        "peak GB",
        "2nd model GB",
        "logprobs differ",
    ),
)
Row = list[str]


def stage_rows(report: dict[str, Any], stage: str) -> Iterator[Row]:
    """For each contestant, its name and its values of COLUMNS."""
    weights = report["case"]["parameters"] * 4 / 1e9
    for name, one in report[stage].items():
        second = f"{weights:.2f}" if stage == "stage two" and name in (LIVE, TRL) else ""
        yield [
            name,
            f"{one['pairs_per_second']:.3g}",
            f"{one['tokens_per_second']:,.0f}",
            "" if name == OURS else f"{1 / one['our_time_over_its']:.2f} x",
            f"{one['flops_over_ours']:.2f}" if name != OURS and "flops_over_ours" in one else "",
            f"{one['flops_over_ours_on_a_gpu']:.2f}" if "flops_over_ours_on_a_gpu" in one else "",
            f"{one['peak_gb']:.2f}" if "peak_gb" in one else "",
            second,
            f"{one['largest_difference']:.1e}" if name != OURS and "largest_difference" in one else "",
        ]
    for name in report["absent"]:
        yield [name, "absent", *[""] * (len(COLUMNS) - 1)]


def absent_lines(report: dict[str, Any]) -> list[str]:
    return [f"{name} is absent: {why}" for name, why in report["absent"].items()]


def gate_rows(report: dict[str, Any]) -> Iterator[Row]:
    for gate in report["gates"]:
        found = "not measured" if gate["found"] is None else f"{gate['found']:.3g}"
        yield [gate["what"], gate["bar"], found, {True: "holds", False: "MISSED", None: ""}[gate["holds"]]]


def short_name(model: str) -> str:
    """`demo/SmolLM2-135M-Instruct.Q4_1.gguf` -> `SmolLM2-135M`"""
    return Path(model).stem.split("-Instruct")[0]


def case_line(report: dict[str, Any]) -> str:
    case = report["case"]
    return (
        f"{short_name(case['model'])}{' (random weights)' if case['random_weights'] else ''}, "
        f"{case['parameters'] / 1e6:.0f}M parameters, "
        f"vocabulary {case['vocabulary']:,}, {case['dtype']}; {case['pairs']} pairs of {case['data']}, "
        f"{case['tokens_of_both_sides']:,} tokens on both sides, {case['stored_tokens']:,} with each prefix once, "
        f"{case['padding']:.2f} times as many in padded micro-batches ({case['file_padding']:.2f} in the whole file); layout "
        f"{case['layout']}; micro-batches of {case['micro_pairs']} pairs, ours of {case['budget']:,} tokens"
    )


def machine_line(report: dict[str, Any]) -> str:
    machine = report["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = f"{machine['gpu']}; {machine['cpu']}" if machine["gpu"] else machine["cpu"]
    return f"{where}; load {machine['load']:.1f} before; Python {machine['python']}, {versions}; {machine['date']}"


def screen_tables(report: dict[str, Any]) -> list[Table | str]:
    parts: list[Table | str] = [case_line(report), machine_line(report)]
    for stage in ("stage one", "stage two"):
        table = Table(title=f"{short_name(report['case']['model'])}: {stage}", title_justify="left")
        for column in (stage, *COLUMNS):
            table.add_column(column, justify="left" if column == stage else "right")
        for row in stage_rows(report, stage):
            table.add_row(*row)
        parts.append(table)
    parts += absent_lines(report)
    table = Table("bar", "asked", "found", "", title="bars", title_justify="left")
    for row in gate_rows(report):
        table.add_row(*row, style="red" if row[-1] == "MISSED" else "")
    return [*parts, table]
