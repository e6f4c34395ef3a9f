"""Options of `compare` about a judge: a model behind a server that says which answer is better."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from minicache.errors import ConfigError
from minicache.options.declare import check_options, flag, option, options_of

JUDGE = "Judge"
# The variable that holds the key of most clients of such servers.
USUAL_KEY = "OPENAI_API_KEY"
REQUESTS_AT_ONCE = 4
# A letter and what a model writes around it. A judge that thinks aloud needs more.
MOST_TOKENS = 16
EXAMPLE = "http://localhost:8000/v1"


@dataclass(frozen=True)
class JudgeOptions:
    """Options of the judge. judge_key: the name of a variable of the environment; the key itself is no option."""

    judge: str | None = option(
        None,
        "Ask a model which answer is better: the base URL of any OpenAI-compatible server (vLLM, Ollama, llama.cpp, an API).",
        metavar="URL",
        panel=JUDGE,
    )
    judge_model: str | None = option(None, "The judge's name on that server.", metavar="NAME", panel=JUDGE)
    judge_key: str | None = option(
        None,
        f"The environment variable that holds the server's key. (Default: {USUAL_KEY}, if it is set.)",
        metavar="VARIABLE",
        panel=JUDGE,
    )
    judge_concurrency: int | None = option(
        None, f"Requests at once. (Default: {REQUESTS_AT_ONCE}.)", panel=JUDGE, least=1, most=256
    )
    judge_max_tokens: int | None = option(
        None,
        f"Most tokens of a verdict; a judge that thinks aloud needs 2000 or so. (Default: {MOST_TOKENS}.)",
        panel=JUDGE,
        least=1,
    )
    verdicts: Path | None = option(
        None,
        "Keep verdicts in this file, and ask only for those it lacks. (Default: NAME.verdicts.jsonl beside --jsonl or --html, "
        "else verdicts.jsonl in the run, else here.)",
        metavar="FILE",
        panel=JUDGE,
    )
    judge_dry_run: bool = option(False, "Say how much the judge would be asked, and ask nothing.", panel=JUDGE)

    def __post_init__(self) -> None:
        check_options(self)
        for item, _ in options_of(JudgeOptions):
            if not self.judge and getattr(self, item.name) != item.default:
                name = flag(item.name)
                raise ConfigError(f"{name}: is used with --judge only; expected both, got {name} alone")
        if not self.judge:
            return
        base_url(self.judge)
        if not (self.judge_model or "").strip():
            raise ConfigError("--judge: expected --judge-model NAME with it, the judge's name on that server")
        if self.judge_key is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.judge_key):
            # what was given may be the key itself
            raise ConfigError("--judge-key: expected the name of an environment variable that holds the key")

    @property
    def concurrency(self) -> int:
        """Requests at once."""
        return self.judge_concurrency or REQUESTS_AT_ONCE

    @property
    def max_tokens(self) -> int:
        """Most tokens of a verdict."""
        return self.judge_max_tokens or MOST_TOKENS


NO_JUDGE = JudgeOptions()


def base_url(text: str) -> str:
    """The URL below which a server has `/chat/completions`: as given, with `/v1` where only a host is.

    Raises:
        ConfigError: it is none, or holds what belongs into the environment. The message repeats no part that may be secret.
    """
    parts = _split(text)
    if "@" in parts.netloc:
        raise ConfigError(
            "--judge: the URL holds a user or a password; expected it without, and the key in an environment variable "
            f"({USUAL_KEY}, or another by --judge-key)"
        )
    if parts.query or parts.fragment:
        raise ConfigError(f"--judge: expected a base URL such as {EXAMPLE}, got one with a query or a fragment")
    path = parts.path.rstrip("/") or "/v1"
    return f"{parts.scheme}://{parts.netloc}{path.removesuffix('/chat/completions')}"


def _split(text: str) -> SplitResult:
    try:
        parts = urlsplit(text.strip())
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits or re.search(r"[\s\x00-\x1f\x7f]", text.strip()):
        shown = "" if "@" in text else f", got {text[:60]!r}"
        raise ConfigError(f"--judge: expected the base URL of a server, http:// or https://, such as {EXAMPLE}{shown}")
    return parts
