"""The Hugging Face Hub, by its library huggingface_hub: its address, the names of repositories, its errors as one line.

Address and token come from where that library looks for them (HF_ENDPOINT; HF_TOKEN, or `hf auth login`).
"""

import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from minicache.errors import ConfigError, DataError, MinicacheError, OutputError, StoreError
from minicache.failures import of_the_machine
from minicache.loggers import hushed
from minicache.text import one_line

PART = r"[A-Za-z0-9][\w.-]*"
# The name of a repository.
ID = re.compile(rf"{PART}/{PART}")
LOGIN = "expected one in HF_TOKEN, or from `hf auth login`"


def endpoint() -> str:
    """The address of the Hub."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def page_of(kind: str, id: str) -> str:
    """The address of a repository's page. kind: "model" or "dataset"."""
    return f"{endpoint()}/{'datasets/' if kind == 'dataset' else ''}{id}"


@contextmanager
def in_one_line(what: str, kind: str, id: str) -> Iterator[None]:
    """Turn the library's errors, and those of the libraries below it, into one line.

    what: the beginning of the line. kind: of the repository, "model" or "dataset".
    """
    try:
        yield
    except MinicacheError:
        raise
    # Of HTTP libraries that change with the version.
    except Exception as error:
        raise _line(error, what, f"{'data set' if kind == 'dataset' else kind} {id}", id) from error


def _line(error: Exception, what: str, repository: str, id: str) -> MinicacheError:
    from huggingface_hub import errors

    hub = endpoint()
    # An upload's error is about the file; what went wrong is behind it.
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return DataError(
            f"{what}: the owners of the {repository} ask for consent first: accept their terms at {hub}, then `hf auth login`"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return DataError(
            f"{what}: {hub} has no {repository} that you may see; check the name; a private one needs a token (HF_TOKEN, or "
            "`hf auth login`)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return DataError(f"{what}: the {repository} has no such revision; expected a branch, a tag or a commit of it")
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return StoreError(
            f"{what}: the Hub cannot be asked, and the {repository} is not, or not whole, among what was downloaded; check the "
            "network, HF_HUB_OFFLINE and HF_ENDPOINT, then run the same command again"
        )
    if isinstance(error, errors.EntryNotFoundError):
        return DataError(f"{what}: the {repository} has no such file at this commit")
    if isinstance(error, errors.HFValidationError):
        return ConfigError(f"{what}: expected org/name as the Hub allows it: {one_line(error, 200)}")
    if isinstance(error, errors.HfHubHTTPError):
        return _refusal(error, what, id)
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return ConfigError(f"{what}: {hub} refuses the card's front matter; check --license: {one_line(error, 300)}")
    if isinstance(error, OSError) and error.errno:
        line = of_the_machine(error) or (f"{error.filename}: {error.strerror}" if error.filename else None)
        if line:
            return OutputError(f"{line}; HF_HOME names another place for what is downloaded")
    return StoreError(
        f"{what}: {hub} cannot be reached, or its answer not read; check the network and HF_ENDPOINT, then run the same command "
        f"again: {one_line(error, 300)}"
    )


def _refusal(error: "Exception", what: str, id: str) -> MinicacheError:
    """The line for an HTTP status."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = one_line(error, 300)
    if status == 401:
        return ConfigError(f"{what}: {endpoint()} does not know the token, or there is none; {LOGIN}")
    if status == 403:
        return ConfigError(
            f"{what}: the token may not do this; expected one with the right to write to {id.partition('/')[0]}/…, and a name "
            f"that is yours: {said}"
        )
    later = "; run the same command again later" if status is None or status == 429 or status >= 500 else ""
    return StoreError(f"{what}: {endpoint()} refuses ({status}){later}: {said}")


def listing(what: str, id: str, revision: str) -> tuple[str, list[str]]:
    """The commit of a data set's revision, "" for the default branch, and the names of its files. what: as of `in_one_line`."""
    from huggingface_hub import HfApi

    with in_one_line(what, "dataset", id):
        info = HfApi(endpoint()).dataset_info(id, revision=revision or None, timeout=60)
    if not info.sha:
        raise DataError(f"{what}: {endpoint()} names no commit of it")
    return info.sha, [each.rfilename for each in info.siblings or ()]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's remarks off the terminal, on which ours is shown, and its progress bars."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hidden = not are_progress_bars_disabled()
    if hidden:
        disable_progress_bars()
    try:
        with hushed("huggingface_hub"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if hidden:
            enable_progress_bars()
