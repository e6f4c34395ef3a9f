"""Python processes that import nothing from the working directory, where a stranger's `torch.py` may lie.

`python -m` and `python -c` look for modules there first. Imports only what Python has loaded before it looks anywhere.
"""

import os
import sys

# The directory that holds this package. Without pathlib, which Python may not have loaded yet.
ROOT = os.path.realpath(f"{__file__}/../..")


def python_command() -> list[str]:
    """The beginning of a command that runs this Python, without the working directory among the places of modules."""
    # -I, which implies -P, also ignores the variables that this process ignores
    return [sys.executable, "-I" if sys.flags.isolated else "-P"]


def python_environment() -> dict[str, str]:
    """This process's variables, by which no Python below it looks for modules in the working directory."""
    given = {**os.environ, "PYTHONSAFEPATH": "1"}
    if _here() == ROOT:
        # run from a copy of the repository that is not installed: this package, and no stranger's, is in that directory
        given["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, given.get("PYTHONPATH"))))
    return given


def forget_working_directory() -> None:
    """Import nothing more from the working directory in this process, which `python -m` puts first, nor in those it starts.

    The directory stays where this package lies in it: a copy of the repository that is not installed.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    if sys.flags.safe_path or not sys.path:
        return
    if os.path.realpath(sys.path[0]) == _here() != ROOT:
        del sys.path[0]


def _here() -> str:
    """The working directory; "" if it was removed."""
    try:
        return os.path.realpath(os.curdir)
    except OSError:
        return ""
