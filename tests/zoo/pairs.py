"""Preference pairs for the zoo: turns, shared beginnings, answers from one token to more than a narrow window."""

from pathlib import Path
from typing import Any

from tests.conftest import make_rows, write_jsonl

# Longer sides are cut, so that of some answers a single token remains.
MAX_LENGTH = 72
PAIRS = 20


def write_pairs(file: Path) -> Path:
    """Write the pairs as JSON lines; returns the file."""
    rows = make_rows(PAIRS - 8, seed=5)
    for index in range(4):
        rows.append(_cut(MAX_LENGTH - 10 + index))
    for row in make_rows(4, seed=6):
        for side in ("chosen", "rejected"):
            row[side][-1]["content"] = "the cat sat on a mat " + row[side][-1]["content"]
        rows.append(row)
    return write_jsonl(file, rows)


def _cut(words: int) -> dict[str, Any]:
    """A pair whose prompt leaves few tokens for the answers, of which the first differs."""
    prompt = {"role": "user", "content": " ".join(["the"] * words)}
    answers = ("cat sat on a mat", "it rained and then not")
    chosen, rejected = ([prompt, {"role": "assistant", "content": answer}] for answer in answers)
    return {"chosen": chosen, "rejected": rejected}
