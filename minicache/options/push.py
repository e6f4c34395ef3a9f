"""Options of `push`: a policy or a reference cache as a repository of the Hugging Face Hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from minicache.errors import ConfigError
from minicache.hub import ID
from minicache.options.declare import check_options, needed, option

# Kind of what is pushed -> the Hub's kind of repository.
KINDS = {"policy": "model", "cache": "dataset"}
# As the Hub's metadata names licences: apache-2.0, cc-by-4.0, llama3.1.
LICENCE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True)
class PushConfig:
    """Options of `push`. kind: None is found out. model: what `export` wrote, in place of the run's own model."""

    source: Path = needed("The directory of a run or of a reference cache.", argument=True, metavar="DIRECTORY")
    repo: str = needed("Its name on the Hub, org/name.", argument=True, metavar="ORG/NAME")
    kind: str | None = option(
        None, "What it is: {names}. (Default: found out; another kind is refused.)", choices=lambda: KINDS
    )
    model: Path | None = option(
        None, "Send the model that `export --policy RUN` wrote here, such as one with its adapter merged."
    )
    base_model: str | None = option(
        None,
        "The Hub's name of the model that was trained, or of the reference. (Default: as it was loaded, if from the Hub.)",
        metavar="ORG/NAME",
    )
    license: str | None = option(None, "The licence in the card. (Default: none is named.)", metavar="NAME")
    public: bool = option(False, "Everybody may read it. (Default: a new repository is private.)")
    replace_card: bool = option(False, "Replace the card there even if a person has changed it.")
    dry_run: bool = option(False, "Print the card and the files; send nothing, ask nothing of the network.")

    def __post_init__(self) -> None:
        check_options(self)
        for name, value in (("push", self.repo), ("--base-model", self.base_model)):
            if value is not None and not ID.fullmatch(value):
                raise ConfigError(f"{name}: expected the name of a repository of the Hub, org/name, got {value!r}")
        if self.license is not None and not LICENCE.fullmatch(self.license):
            raise ConfigError(f"--license: expected a name of the Hub's list, such as apache-2.0, got {self.license!r}")
