"""Patterns of an adapter's settings, tried before peft uses them: a pattern can be written so that it takes years."""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from minicache.errors import ModelError

SECONDS = 10.0  # for all patterns and modules; those in use take milliseconds
# Python's matching cannot be ended from within its process. The forms are those in which peft matches a module's name.
TRIED = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for pattern in patterns:
    for form in (pattern, rf"(.*\\.)?({pattern})$", rf".*\\.{pattern}\\.(\\d+)\\."):
        try:
            compiled = re.compile(form)
        except (re.error, RecursionError, OverflowError):
            continue
        for name in names:
            compiled.fullmatch(name)
            compiled.match(name)
"""


def require_quick(config: Any, names: Iterable[str], directory: Path) -> None:
    """Require that the patterns of an adapter's settings are matched in no time with the modules of its base.

    Raises:
        ModelError: they take longer than SECONDS.
    """
    patterns = [each for each in _patterns(config) if set(each) & set("*+{")]
    if not patterns:
        return
    try:
        # whatever else they do, peft says
        subprocess.run(
            [sys.executable, "-I", "-c", TRIED],
            input=json.dumps([patterns, list(names)]).encode(),
            stderr=subprocess.DEVNULL,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"{directory}: a pattern in its settings takes more than {SECONDS:g} s to compare with the base's modules: "
            f"{max(patterns, key=len)[:60]!r}; expected names of modules, or a plain pattern"
        ) from error


def _patterns(config: Any) -> list[str]:
    found: list[str] = []
    for name in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = getattr(config, name, None)
        # of a list or a set of names, peft matches each name's end as it is
        if isinstance(value, str):
            found.append(value)
        elif isinstance(value, dict) or (name == "layers_pattern" and isinstance(value, list)):
            found += map(str, value)
    return found
