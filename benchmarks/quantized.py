"""Memory and time of a step of adapters on a plain base, one in 8 bits and one in 4: python -m benchmarks.quantized --model DIR.

Each in a process of its own, on the CPU in float32 unless --dtype names another precision.
"""

import argparse
import ctypes
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

KINDS = ("", "int8", "nf4-double")
STEPS = 3


def measure(source: str, kind: str, dtype: str, tokens: int) -> dict[str, float]:
    """Bytes of live tensors between steps; resident bytes then and at most in a step, beyond imports; seconds of a step."""
    import numpy as np
    import torch

    from minicache.models import load_model
    from minicache.models.lora import add_lora
    from minicache.models.precision import hold_for
    from minicache.options.train import LoraOptions
    from minicache.pairs import EncodedPair, PairTable
    from minicache.scoring.scorer import Scorer
    from minicache.trackers import Silent
    from minicache.training.optim import make_optimizer

    before = resident()
    loaded = load_model(source, False, kind)
    model = hold_for(add_lora(loaded.model, source, LoraOptions(lora_rank=16), 0, Silent()), torch.device("cpu"), dtype)
    scorer, optimizer = Scorer(model, dtype), make_optimizer(model, "adamw", 1e-5, 0.0)
    random = np.random.default_rng(0)
    lengths = (tokens // 4, tokens // 2, tokens // 2)
    ids = random.integers(1, loaded.vocabulary, sum(lengths)).astype("int32")
    mask = np.ones(len(ids), np.uint8)
    mask[: lengths[0]] = 0
    table = PairTable.from_pairs([EncodedPair(ids, mask, lengths, (0, 0))], "int32")
    del loaded
    seconds = []
    for step in range(STEPS + 1):
        if step == 1:
            resident()
            # the peak from here on, without that of loading
            Path("/proc/self/clear_refs").write_text("5")
        started = time.monotonic()
        ((_, batch),) = scorer.batches(table, np.arange(1), 10**6)
        means = scorer(batch).logp_mean
        (means[:, 1] - means[:, 0]).sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.monotonic() - started)
    del means, batch
    gc.collect()
    return {
        "tensors": live_bytes(),
        "resident": resident() - before,
        "peak": status("VmHWM") - before,
        "seconds": statistics.median(seconds[1:]),
    }


def live_bytes() -> int:
    """Bytes of the storages of all tensors that are alive."""
    import torch

    storages: dict[int, int] = {}
    for each in gc.get_objects():
        if isinstance(each, torch.Tensor) and each.device.type != "meta":
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
    return sum(storages.values())


def resident() -> int:
    """Resident bytes of this process, after what is free was given back to the system."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return status("VmRSS")


def status(name: str) -> int:
    """Bytes, by the system's count of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.kind is not None:
        sys.stdout.write(json.dumps(measure(given.model, given.kind, given.dtype, given.tokens)))
        return
    first: dict[str, Any] = {}
    print(f"{'base':12}{'tensors':>10}{'resident':>10}{'peak':>10}  seconds a step")
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.quantized", *sys.argv[1:], "--kind", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ})
        found = json.loads(done.stdout.splitlines()[-1])
        first = first or found
        sizes = "".join(f"{found[name] / 1e6:7.0f} MB" for name in ("tensors", "resident", "peak"))
        ratio = found["tensors"] / first["tensors"]
        print(f"{kind or 'plain':12}{sizes}  {found['seconds']:.2f}   tensors x {ratio:.2f}")


if __name__ == "__main__":
    main()
