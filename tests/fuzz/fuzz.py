"""Coverage-guided fuzzing (atheris) of what reads other people's files: `python -m tests.fuzz.fuzz [--seconds N] [NAME …]`.

Each target (targets.py) gets its share of the time, in a process of its own; it goes on from the inputs that it found before, in
build/fuzz. An input that is neither read nor refused by an error of ours is kept there as NAME-crash-…, one that takes longer than
LONGEST seconds as NAME-timeout-…; put those that were mended into tests/fuzz/kept/NAME, where the tests read them.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

HOME = Path(__file__).parents[2] / "build" / "fuzz"
LONGEST = 60


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="of targets; default: all")
    parser.add_argument("--seconds", type=int, default=120, help="in all")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    if options.alone:
        fuzz(options.names[0], options.seconds)
        return
    from tests.fuzz.targets import made

    with tempfile.TemporaryDirectory() as place:
        names = options.names or list(made(Path(place)))
    command = [
        sys.executable,
        "-m",
        "tests.fuzz.fuzz",
        "--alone",
        "--seconds",
        str(max(1, options.seconds // len(names))),
    ]
    failed = [name for name in names if subprocess.run([*command, name], check=False).returncode]
    if failed:
        sys.exit(f"faults: {', '.join(failed)}; their inputs are in {HOME}")


def fuzz(name: str, seconds: int) -> None:
    import atheris

    with atheris.instrument_imports(
        include=["minicache", "json", "yaml", "tomllib", "jinja2", "peft.config", "peft.tuners.lora.config"]
    ):
        from tests.fuzz.targets import made

    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as needed, tempfile.TemporaryDirectory(dir=memory) as place:
        target = made(Path(needed))[name]
        corpus = HOME / name
        corpus.mkdir(parents=True, exist_ok=True)
        for number, content in enumerate(target.inputs):
            (corpus / f"input-{number}").write_bytes(content)
        longest = max(2000, *(2 * len(content) for content in target.inputs))
        arguments = [f"-max_total_time={seconds}", f"-max_len={longest}", f"-timeout={LONGEST}", "-rss_limit_mb=4096"]
        arguments += [f"-artifact_prefix={HOME}/{name}-", "-print_final_stats=1", str(corpus)]
        atheris.Setup([sys.argv[0], *arguments], lambda content: target(content, Path(place)))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
