"""`--config FILE` and `--print-config`: the same options as on the command line, from a file, in every command."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from minicache.cli import app
from minicache.options.recipes import RECIPES
from tests.conftest import Cli

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
# What each command needs, and one option more.
ASKED: dict[str, dict[str, Any]] = {
    "precompute-ref": {"model": "m", "data": ["a.jsonl", "b.jsonl"], "ref-cache": "c", "max-length": 77},
    "train": {"ref-cache": ["a:0.7", "b:0.3"], "out": "run", "lr": 3e-7, "tracker": ["wandb"]},
    "sweep": {
        "ref-cache": "c",
        "out": "s",
        "beta": [0.1, 0.3],
        "lr": 1e-6,
        "holdout": 0.1,
        "loss": "sigmoid:0.8,hinge:0.2",
    },
    "report": {"run": "run", "answers": "answers.jsonl"},
    "evaluate": {"policy": "run", "ref-cache": "c", "beta": 0.7},
    "compare": {"policy": "run", "prompt": ["one", "two, three"], "seed": 7},
    "export": {"policy": "run", "out": "model", "dtype": "bfloat16"},
    "import-cache": {"file": "a.jsonl", "model": "m", "ref-cache": "c", "logps": "sum"},
    "plot": {"runs": ["a", "b"], "smooth": 0.5},
    "merge": {"caches": ["a", "b"], "ref-cache": "c"},
    "inspect-cache": {"ref-cache": "c", "pair": 3},
    "diff": {"a": "one", "b": "two"},
    "fit": {"model": "m", "memory": ["24GB", "80GB"]},
    "recipes": {"recipe": "tulu-3"},
    "push": {"source": "run", "repo": "org/name", "license": "mit"},
}


def printed(cli: Cli, *arguments: object) -> dict[str, Any]:
    code, stdout, stderr = cli(*arguments, "--print-config")
    assert code == 0, stderr
    return tomllib.loads(stdout)


def write(file: Path, values: dict[str, Any]) -> Path:
    if file.suffix == ".toml":
        lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
        for table, inner in values.items():
            if isinstance(inner, dict):
                lines += [f"[{table}]", *(f"{name} = {json.dumps(value)}" for name, value in inner.items())]
        file.write_text("\n".join(lines), encoding="utf-8")
    else:
        file.write_text(json.dumps(values) if file.suffix == ".json" else yaml.safe_dump(values), encoding="utf-8")
    return file


@pytest.mark.parametrize("suffix", [".toml", ".yaml", ".yml", ".json"])
@pytest.mark.parametrize("name", ASKED)
def test_a_file_says_what_the_command_line_says(cli: Cli, tmp_path: Path, name: str, suffix: str) -> None:
    file = write(tmp_path / f"options{suffix}", ASKED[name])
    found = printed(cli, name, "--config", file)
    for option, value in ASKED[name].items():
        expected = [str(each) for each in value] if name == "sweep" and isinstance(value, list) else value
        assert found[option] == expected or found[option] == [str(expected)], option
    # what is printed is a file for --config, with the same result
    again = tmp_path / "again.toml"
    again.write_text(cli(name, "--config", file, "--print-config")[1], encoding="utf-8")
    assert printed(cli, name, "--config", again) == found


def test_every_command_but_env_is_asked_here() -> None:
    assert COMMANDS.keys() - ASKED.keys() == {"env"}


def test_the_command_line_wins_and_lists_are_not_joined(cli: Cli, tmp_path: Path) -> None:
    file = write(tmp_path / "options.toml", {**ASKED["train"], "nproc": 2, "recipe": "tulu-3"})
    found = printed(cli, "train", "--config", file, "--ref-cache", "own", "--lr", "1e-5")
    assert (found["ref-cache"], found["lr"], found["nproc"]) == ("own", 1e-5, 2)
    # of the recipe, which the file names
    assert (found["beta"], found["batch-size"]) == (5.0, 128)
    found = printed(cli, "train", "--config", file, "--recipe", "trl")
    assert (found["beta"], found["lr"]) == (0.1, 3e-7)


def test_one_file_serves_several_commands(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "both.toml"
    file.write_text(cli("recipes", "tulu-3")[1], encoding="utf-8")
    first = printed(cli, "precompute-ref", "--config", file, "--model", "m", "--data", "d", "--ref-cache", "c")
    second = printed(cli, "train", "--config", file, "--ref-cache", "c", "--out", "o")
    of_recipe = {name.replace("_", "-"): value for name, value in RECIPES["tulu-3"].options.items()}
    assert of_recipe.items() <= {**second, **first}.items()


def test_a_runs_own_record_makes_the_same_run_elsewhere(ref_cache: Path, tmp_path: Path, cli: Cli) -> None:
    arguments = ("--ref-cache", ref_cache, "--max-steps", 2, "--lr", 1e-3, "--recipe", "minimind-3", "--log-every", 1)
    assert cli("train", *arguments, "--out", tmp_path / "first")[0] == 0
    code, _, stderr = cli("train", "--config", tmp_path / "first" / "run.json", "--out", tmp_path / "second")
    assert code == 0, stderr
    curves = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 2
    # not the place of that run, nor leave to run code
    code, _, stderr = cli("train", "--config", tmp_path / "first" / "run.json")
    assert code == 2 and "--out" in stderr
    code, stdout, _ = cli("evaluate", "--config", tmp_path / "first" / "run.json", "--policy", "p", "--print-config")
    assert code == 0 and tomllib.loads(stdout)["ref-cache"] == str(ref_cache)


BROKEN = {
    "no such file": ("none.toml", None, "no such file"),
    "another kind of file": ("options.ini", "lr=1", "expected a file that ends in .toml, .yaml, .yml, .json"),
    "no TOML": ("a.toml", "lr = = 1", "cannot be read: Invalid value"),
    "no JSON": ("a.json", "{lr: 1}", "cannot be read: Expecting property name"),
    "no YAML": ("a.yaml", "lr: [1", "cannot be read: while parsing"),
    "no text": ("a.json", b"\xff\xfe\xff", "cannot be read: 'utf-8' codec"),
    "twice": ("a.json", '{"lr": 1, "lr": 2}', "lr stands in it twice"),
    "a list": ("a.json", "[1]", "expected names and values, got '[1]'"),
    "a number as a name": ("a.yaml", "1: 2", "expected names and values"),
    "deep": ("a.json", "[" * 100_000, "cannot be read: "),
    "large": ("a.toml", "#" * 1_000_001, "1,000,001 bytes; at most 1,000,000"),
    "an object of Python": ("a.yaml", "lr: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    "twice in YAML": ("a.yaml", "lr: 1\nlr: 2", "lr stands in it twice"),
    "twice by its value": ("a.yaml", "true: 1\nTrue: 2", "True stands in it twice"),
    "a tag that lies": ("a.yaml", "lr: !!bool x", "cannot be read: a value is not of the type that its tag names: 'x'"),
    "a tag of nothing": ("a.yaml", 'lr: !!int ""', "a value is not of the type that its tag names"),
    "no number": ("a.yaml", 'lr: !!float ""', "a value is not of the type that its tag names"),
    "no date": ("a.yaml", "lr: !!timestamp x", "a value is not of the type that its tag names"),
    "minutes": ("a.yaml", "lr: !!float 1" + ":1" * 400, "a value is not of the type that its tag names"),
    "a long number": ("a.toml", "lr = 0x" + "F" * 4000, "lr: expected a number, got one of 16,000 bits"),
    "long numbers": ("a.toml", "lr = [0x" + "F" * 4000 + "]", "lr: expected a number, got one of 16,000 bits"),
    "a long number in YAML": ("a.yaml", "0x" + "F" * 4000, "an integer of 4,002 characters; expected 1,000 or fewer"),
    "a long number in JSON": ("a.json", '{"lr": ' + "9" * 5000 + "}", "cannot be read: Exceeds the limit"),
    "an unknown name": ("a.toml", "learning_rate = 1", "learning_rate: `minidpo train` has no such option"),
    "of another command": ("a.toml", "max-length = 5", "max-length: `minidpo train` has no such option"),
    "an unknown table": ("a.toml", "[trian]\nlr = 1", "trian: `minidpo train` has no such option"),
    "a table": ("a.toml", "lr = {a = 1}", "lr: expected a value, got a table"),
    "a list of lists": ("a.toml", "data = [[1]]", "data: expected a value or a list of values"),
    "code": ("a.toml", "trust-remote-code = true", "is for the command line alone"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_no_file_of_options_gets_one_line(cli: Cli, tmp_path: Path, case: str) -> None:
    name, content, message = BROKEN[case]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, _, stderr = cli("train", "--config", tmp_path / name, "--ref-cache", "c", "--out", "o")
    assert code == 1 and message in " ".join(stderr.split()), stderr
    assert stderr.startswith("error: ") and "Traceback" not in stderr


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("batch-size = 4.5", "--batch-size"),
        ("batch-size = true", "--batch-size"),
        ('lr = "fast"', "--lr"),
        ("lr = [1, 2]", "--lr"),
        ("wpo = 3", "--wpo"),
    ],
)
def test_a_value_of_another_kind_is_refused_as_on_the_command_line(
    cli: Cli, tmp_path: Path, line: str, option: str
) -> None:
    (tmp_path / "a.toml").write_text(line)
    code, _, stderr = cli("train", "--config", tmp_path / "a.toml", "--ref-cache", "c", "--out", "o")
    assert code == 2 and option in stderr


def test_an_option_that_nothing_reads_is_refused_from_a_file_too(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('simpo-gamma = 0.7\nref-cache = "c"\nout = "o"')
    code, _, stderr = cli("train", "--config", tmp_path / "a.toml")
    assert code == 1 and "--simpo-gamma: --loss sigmoid does not read it" in stderr


def test_texts_of_every_kind_survive(cli: Cli, tmp_path: Path) -> None:
    odd = 'quote " back \\ slash, 中文 😀, del \x7f, tab \t, equals = #'
    code, stdout, stderr = cli("compare", "--policy", "p", "--prompt", odd, "--print-config")
    assert code == 0, stderr
    assert tomllib.loads(stdout)["prompt"] == [odd]


def test_recipes_are_listed_and_shown(cli: Cli) -> None:
    code, stdout, _ = cli("recipes")
    assert code == 0 and all(name in stdout for name in RECIPES)
    for name, entry in RECIPES.items():
        code, stdout, _ = cli("recipes", name)
        assert code == 0 and entry.source in stdout
        shown = tomllib.loads(stdout)
        expected = {option.replace("_", "-"): value for option, value in entry.options.items()}
        assert {**shown["precompute-ref"], **shown["train"]} == expected
    assert json.loads(cli("recipes", "--json")[1])["zephyr"]["options"]["beta"] == 0.01
    code, _, stderr = cli("recipes", "nobody")
    assert code == 1 and "--recipe: expected one of minimind-2504" in stderr
