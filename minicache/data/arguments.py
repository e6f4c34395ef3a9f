"""What a chat template gets beside the messages, as it stands on a command line: a date, and values by name."""

import json
from datetime import datetime
from typing import Any

from minicache.errors import ConfigError

# The date of templates that ask for today's: the same rows give the same pairs on every day. It is the one that Llama 3's
# templates fall back to.
FIXED_DATE = "2024-07-26"
# What a template gets beside the messages, as lists.
LISTS = ("tools", "documents")
# Names that are no arguments of a template: what it always gets, and arguments of `apply_chat_template` itself.
NO_ARGUMENTS = (
    "messages",
    *LISTS,
    "add_generation_prompt",
    "tokenize",
    "continue_final_message",
    "chat_template",
)


def parse_arguments(entries: tuple[str, ...]) -> str:
    """The values of NAME=VALUE entries as the JSON text of an object, "" for none. A value is JSON, or else text.

    Raises:
        ConfigError: an entry has another form, or a name occurs twice or is no argument of a template.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not name.isidentifier() or name in found or name in NO_ARGUMENTS:
            raise ConfigError(
                f"--template-arg {entry}: expected NAME=VALUE, each name once, such as enable_thinking=false"
            )
        found[name] = decoded(value)
    return json.dumps(found, sort_keys=True, ensure_ascii=False) if found else ""


def require_date(date: str) -> None:
    """Raises ConfigError: this is neither "" nor a date."""
    try:
        if date and datetime.fromisoformat(date).date().isoformat() == date:
            return
    except ValueError:
        pass
    if date:
        raise ConfigError(f"--date {date}: expected a date like {FIXED_DATE}")


def decoded(text: str) -> Any:
    """The value of a JSON text; any other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
