"""The facts of a machine that a bug report needs: versions, devices, extras. No names, no credentials, no torch at import."""

import importlib.util
import os
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from minicache.text import one_line

DISTRIBUTION = "minidpo"
# Variables that change the behaviour of a run and contain no secret.
VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "LOCAL_WORLD_SIZE",
    "OMP_NUM_THREADS",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "TMPDIR",
    "TORCHELASTIC_RESTART_COUNT",
    "WORLD_SIZE",
)


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Everything that `minidpo env` shows; the names are those of `--json`.

    packages: version of each required package, None if it is missing. extras: the same for the packages of each extra.
    devices: a line for each GPU. problem: why torch cannot be used, or None.
    """

    minidpo: str
    python: str
    system: str
    processors: int
    packages: dict[str, str | None]
    extras: dict[str, dict[str, str | None]]
    devices: list[str]
    cuda: str | None
    problem: str | None
    variables: dict[str, str]


def look_around() -> Environment:
    """The facts of this machine and of this process's environment."""
    needed, extras = _requirements()
    devices, cuda, problem = _devices()
    return Environment(
        minidpo=_version(DISTRIBUTION) or "not installed",
        python=f"{platform.python_implementation()} {platform.python_version()}, {sys.maxsize.bit_length() + 1} bit",
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processors=os.cpu_count() or 1,
        packages={name: _version(name) for name in needed},
        extras={extra: {name: _version(name) for name in names} for extra, names in extras.items()},
        devices=devices,
        cuda=cuda,
        problem=problem,
        variables={name: os.environ[name] for name in VARIABLES if name in os.environ},
    )


def _requirements() -> tuple[list[str], dict[str, list[str]]]:
    """The names of the packages that the distribution requires, and of those that each of its extras requires."""
    needed: list[str] = []
    extras: dict[str, list[str]] = {}
    try:
        listed = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        # Run from a checkout that is not installed.
        return ["torch", "transformers", "zarr", "numpy"], {}
    for line in listed:
        requirement, _, marker = line.partition(";")
        name = re.split(r"[\s<>=!~\[]", requirement.strip(), maxsplit=1)[0]
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if name == DISTRIBUTION:
            continue
        if extra:
            extras.setdefault(extra[1], []).append(name)
        elif not marker or _version(name):
            needed.append(name)
    return needed, {extra: names for extra, names in extras.items() if extra not in ("dev", "docs", "bench")}


def _version(name: str) -> str | None:
    """The version of an installed package; None if it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> tuple[list[str], str | None, str | None]:
    """GPUs, the CUDA that torch was built for, and why torch cannot be used."""
    if importlib.util.find_spec("torch") is None:
        return [], None, "torch is not installed"
    try:
        import torch

        from minicache.processes.devices import accelerators, facts_of

        found = []
        for device in accelerators():
            name, memory, capability = facts_of(device)
            last = f"compute {capability}" if capability else device.type
            found.append(f"{name}, {memory / 2**30:,.1f} GiB, {last}")
        return found, torch.version.cuda, None
    # A broken driver or build may raise anything, and is what this report should show.
    except Exception as error:
        return [], None, one_line(error, 300)
