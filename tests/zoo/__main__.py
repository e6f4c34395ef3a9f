"""`python -m tests.zoo`: checks every family and writes docs/models.md; results also as JSON lines in build/zoo/."""

import argparse
import json
import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
# Before torch is imported: two families at a time on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("--only", default="", help="model types or names of rows, separated by commas; writes no page")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "zoo", help="the folder of the results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "models.md", help="the page to write")
    parser.add_argument("--table", action="store_true", help="write the page from the results of the last run")
    options = parser.parse_args()

    from tests.zoo.run import check_all, chosen
    from tests.zoo.table import line, page, sums

    file = options.out / "results.jsonl"
    if options.table:
        results = [json.loads(each) for each in file.read_text().splitlines()]
        options.page.write_text(page(results), encoding="utf-8")
        return
    started, results = time.monotonic(), []
    options.out.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lines:
        for found in check_all(chosen(options.only), options.out):
            results.append(found)
            lines.write(json.dumps(found) + "\n")
            lines.flush()
            print(line(found), flush=True)
    results.sort(key=lambda found: str(found["name"]))
    file.write_text("".join(json.dumps(found) + "\n" for found in results))
    print(f"{sums(results)}; {time.monotonic() - started:.0f} s")
    if not options.only:
        options.page.write_text(page(results), encoding="utf-8")
        print(f"written: {options.page}")


if __name__ == "__main__":
    main()
