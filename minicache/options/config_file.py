"""Files of options: TOML, YAML or JSON, and the run.json of a run. No torch.

    lr = 5e-7
    ref-cache = ["a:0.7", "b:0.3"]
    [precompute-ref]
    max-length = 2048

A name at the top is an option of the command that reads the file; a table named like a command holds options of that one alone,
so that one file serves several. A name that the command does not have is refused.
"""

import json
import re
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicache.data.plain_yaml import read_yaml
from minicache.errors import ConfigError
from minicache.json_lines import to_json
from minicache.options.declare import flag, options_of
from minicache.options.train import TrainConfig
from minicache.text import one_line

MOST_BYTES = 1_000_000
# Of an integer.
MOST_BITS = 4096
SUFFIXES = (".toml", ".yaml", ".yml", ".json")
MANY_PARTS = re.compile(r"""(?<![\w"'-])(?:[\w"'-]+[ \t]*\.[ \t]*){64}""")
# Entries of run.json that only a run's record has.
OF_A_RUN = {"started_from", "handshake"}
# A file may be a stranger's: to run a model's own code is for the person at this machine to say.
NEVER = "trust_remote_code"
# What makes a run that one, and no other.
OF_ONE_RUN = {"out", "resume", NEVER}


def options_in(file: Path, command: str, commands: Mapping[str, object], known: Mapping[str, str]) -> dict[str, Any]:
    """The values of a file for a command, by parameter, as texts or lists of texts.

    command: its name. commands: all commands, by name. known: each name that an option of this command has -> its parameter.

    Raises:
        ConfigError: the file cannot be read, or holds a name or a value that no option has.
    """
    entries = _entries(file)
    if entries.keys() >= OF_A_RUN:
        # all options of `train`, of which another command has some, beside what the run found
        named = set(known.values()) & {item.name for item, _ in options_of(TrainConfig)} - OF_ONE_RUN
        given = {name: entries.get(name) for name in named}
        return {name: _text(file, name, value) for name, value in given.items() if value is not None and value != []}
    tables = {name: value for name, value in entries.items() if isinstance(value, dict) and name in commands}
    values: dict[str, Any] = {}
    for name, value in ({**entries, **tables.get(command, {})}).items():
        if name in tables or value is None:
            continue
        parameter = known.get(name.replace("_", "-"))
        if parameter is None:
            raise ConfigError(f"{file}: {name}: `minidpo {command}` has no such option; see minidpo {command} --help")
        if parameter == NEVER:
            raise ConfigError(f"{file}: {name}: is for the command line alone, because a file may be a stranger's")
        values[parameter] = _text(file, name, value)
    return values


def _entries(file: Path) -> dict[str, Any]:
    """What a file says. Raises ConfigError: it cannot be read, or is not one of the formats."""
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"--config {file}: expected a file that ends in {', '.join(SUFFIXES)}, or a run.json")
    try:
        if not file.is_file():
            raise ConfigError(f"--config {file}: no such file")
        if (size := file.stat().st_size) > MOST_BYTES:
            raise ConfigError(f"--config {file}: expected options, got {size:,} bytes; at most {MOST_BYTES:,} are read")
        text = file.read_text(encoding="utf-8-sig")
        found = _parsed(text, file.suffix.lower())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {file}: cannot be read: {one_line(error, 200)}") from error
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
        raise ConfigError(f"--config {file}: expected names and values, got {str(found)[:40]!r}")
    return found


def _parsed(text: str, suffix: str) -> Any:
    """Raises ValueError: not of the format."""
    if suffix == ".toml":
        # for each part of a name, tomllib keeps the whole of it up to there
        if MANY_PARTS.search(text):
            raise ValueError("expected names of a few parts, got one of more than 64")
        return tomllib.loads(text)
    if suffix == ".json":
        return json.loads(text, object_pairs_hook=_without_twins)
    return read_yaml(text)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} stands in it twice")
        found[name] = value
    return found


def _text(file: Path, name: str, value: Any) -> Any:
    """A value as the command line would have it: a text, or a list of texts. Raises ConfigError: it is neither."""
    if isinstance(value, list):
        texts = [_text(file, name, each) for each in value]
        if any(isinstance(each, list) for each in texts):
            raise ConfigError(f"{file}: {name}: expected a value or a list of values, got a list of lists")
        return texts
    if isinstance(value, dict):
        raise ConfigError(f"{file}: {name}: expected a value, got a table; tables are named like commands")
    # TOML's hexadecimal integers; Python writes none of more than 4,300 digits
    if isinstance(value, int) and value.bit_length() > MOST_BITS:
        raise ConfigError(f"{file}: {name}: expected a number, got one of {value.bit_length():,} bits")
    return str(value).lower() if isinstance(value, bool) else str(value)


def config_as_toml(kind: type, values: Mapping[str, Any]) -> str:
    """The options of a kind of config with their help, as a file that `options_in` reads.

    values: those of the options by name, and first of all those of options that the kind does not declare.
    """
    declared_here = options_of(kind)
    own = {item.name for item, _ in declared_here}
    lines = [_line(name, value) for name, value in values.items() if name not in own]
    for item, declared in declared_here:
        if item.name not in values:
            continue
        lines += ["", *textwrap.wrap(declared.text, 100, initial_indent="# ", subsequent_indent="# ")]
        if item.name != NEVER:
            lines.append(_line((declared.shown or flag(item.name)).removeprefix("--"), values[item.name]))
        else:
            lines.append("# on the command line alone")
    return "\n".join(lines).lstrip() + "\n"


def as_toml(values: Mapping[str, Any]) -> str:
    """Values by name, one a line."""
    return "".join(f"{_line(name.replace('_', '-'), value)}\n" for name, value in values.items())


def _line(name: str, value: Any) -> str:
    """TOML has no value for None."""
    return f"# {name} =" if value is None else f"{name} = {_toml(value)}"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml, value))}]"
    # a JSON text is a TOML text, but for DEL
    return to_json(str(value))
