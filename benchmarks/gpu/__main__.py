"""python -m benchmarks.gpu: see the package's docstring."""

import argparse
import sys
from datetime import UTC, datetime
from pathlib import Path

import benchmarks.gpu
from benchmarks.gpu.catalog import CHECKS
from benchmarks.gpu.page import found, page, report_of
from benchmarks.gpu.visit import FAILED, Outcome, visit
from minicache.disk import write_json, written_whole

RESULTS = Path(__file__).parents[1] / "results"
# Without a GPU the visit is a test of its own code: its figures are no results.
TINY_OUT = Path("build/gpu")
MINUTES, TINY_MINUTES = 10.0, 60.0


def main() -> None:
    asked = parse()
    tiny = asked.tiny or not has_gpu()
    out = asked.out or (TINY_OUT if tiny else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    facts = {
        "date": datetime.now(UTC).date().isoformat(),
        "command": " ".join(["python -m benchmarks.gpu", *sys.argv[1:]]),
        "tiny": tiny,
    }

    def done(outcomes: list[Outcome]) -> None:
        tell(outcomes[-1])
        report = report_of(outcomes, facts)
        write_json(out / "gpu.json", report)
        with written_whole(out / "gpu.md") as draft:
            draft.write_text(page(report), encoding="utf-8")

    checks = {name: check for name, check in CHECKS.items() if not asked.only or name in asked.only}
    outcomes = visit(checks, tiny, asked.minutes or (TINY_MINUTES if tiny else MINUTES), done)
    print(f"written: {out / 'gpu.json'}, {out / 'gpu.md'}")
    if out == RESULTS:
        from benchmarks.results import write_results

        print(f"written: {write_results()}")
    sys.exit(any(each.status == FAILED for each in outcomes))


def parse() -> argparse.Namespace:
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="gpu", description=benchmarks.gpu.__doc__, formatter_class=text)
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=f"of: {', '.join(CHECKS)}")
    parser.add_argument("--minutes", type=float, help="for all checks; default: 10")
    parser.add_argument("--out", type=Path, help="directory of gpu.json and gpu.md; default: benchmarks/results")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on the CPU; implied without a GPU")
    return parser.parse_args()


def has_gpu() -> bool:
    """Whether torch sees a CUDA device. Asking makes no context on it."""
    import torch

    return torch.cuda.is_available()


def tell(outcome: Outcome) -> None:
    """Print how a check ended, and each figure that is not as expected."""
    print(f"{outcome.status:12} {outcome.name} ({outcome.seconds:.0f} s) {outcome.message}", flush=True)
    for each in outcome.figures:
        if each.error or each.holds is False:
            value = each.error or f"{found(vars(each))}, expected {each.expected}"
            print(f"             {each.name}: {value}", flush=True)


if __name__ == "__main__":
    main()
