"""The key of a judge's server: read from the environment, sent to that server, and written nowhere."""

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from urllib.parse import urlsplit

from minicache.errors import ConfigError
from minicache.options.judge import USUAL_KEY, JudgeOptions, base_url

HIDDEN = "[key]"


@dataclass(frozen=True)
class Key:
    """A key and the variable it is from. value: "" for none; no text of the object shows it."""

    variable: str
    value: str = field(default="", repr=False)

    def hide(self, text: str) -> str:
        """The text without the key, which a server may repeat."""
        return text.replace(self.value, HIDDEN) if self.value else text

    @property
    def headers(self) -> dict[str, str]:
        """The header that carries it."""
        return {"Authorization": f"Bearer {self.value}"} if self.value else {}


def read_key(options: JudgeOptions) -> tuple[Key, str]:
    """The key for this judge, and a line for the user, "" for none.

    The usual variable may hold the key of another server: it is not sent in the clear to another machine, unless it is named.

    Raises:
        ConfigError: the variable that the user names is not set, or no header can hold its value.
    """
    variable = options.judge_key or USUAL_KEY
    value = os.environ.get(variable, "").strip()
    if not value:
        if options.judge_key:
            raise ConfigError(f"--judge-key: the environment variable {variable} is not set; put the key into it")
        return Key(variable), ""
    if not (value.isascii() and value.isprintable()) or " " in value:
        raise ConfigError(f"{variable}: expected a key of printable ASCII without spaces; check the variable")
    url = urlsplit(base_url(options.judge or ""))
    if url.scheme == "http" and not options.judge_key and not is_loopback(url.hostname or ""):
        return Key(variable), f"{variable} is not sent over http to another machine; --judge-key {variable} sends it"
    return Key(variable, value), ""


def is_loopback(host: str) -> bool:
    """Whether a host is this machine, by its name or number."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
