"""A process that has everything imported and forks one command after another: `python -m tests.torture.forker`.

Each line of its input is JSON: arguments, output (a file) and environment of a command; the answer is its exit code. A program
started anew would import torch for seconds. Started with LD_PRELOAD, its commands have the library in them.
"""

import json
import os
import sys
from pathlib import Path


def main() -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    from tests.stages.test_crash import run_here

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os.environ.update(request["environment"])
            run_here(request["arguments"], Path(request["output"]))
            return
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
