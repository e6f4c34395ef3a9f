"""A folder of data files, on a disk, in an object store or on the Hub: which of its files are asked for, and in which order.

In this order: what `datasets.save_to_disk` wrote; the README's `configs`; the names that the Hub goes by (splits_by_name).
"""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from minicache.data.files import SUFFIXES, suffix_of
from minicache.data.plain_yaml import read_yaml
from minicache.errors import DataError

# Shows a line to a person.
Note = Callable[[str], None]
Splits = dict[str, list[str]]

# Files about data.
ABOUT = {"config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
# The document of a table that `export` wrote as jsonl.
DOCUMENT = ".minicache.json"
# Most characters of a README or JSON file that says where data lies, and files that a message names.
MOST_ABOUT, LISTED = 2**22, 5

# https://huggingface.co/docs/hub/datasets-file-names-and-splits, in detail datasets/data_files.py of datasets 5.2.
KEYWORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
SHARD = re.compile(r"(?:data/)?(?P<split>[^/]+)-\d{5}-of-\d{5}[^/]*\.[^/]*")
IN_FOLDER = {
    split: re.compile(rf"(?:.*[-._ 0-9/])?(?:{words})(?:[-._ 0-9][^/]*)?/.*") for split, words in KEYWORDS.items()
}
IN_NAME = {split: re.compile(rf"(?:.*[-._ 0-9/])?(?:{words})[-._ 0-9][^/]*") for split, words in KEYWORDS.items()}


@dataclass(frozen=True)
class Folder:
    """A folder of files. name: as errors show it. names: of its files, with slashes. read: the text of a small file of it."""

    name: str
    names: list[str]
    read: Callable[[str], str]

    def select(self, config: str, split: str, note: Note) -> list[str]:
        """The files of a configuration and a split, "" where none is named, in their order. Files left aside are noted once.

        Raises:
            DataError: there are none, or there are several configurations or splits and none of them is named.
        """
        names = sorted(name for name in self.names if _is_visible(name))
        data = [name for name in names if is_data(name)]
        if not data:
            found = _listed(names) or "no file at all"
            raise DataError(f"{self.name}: expected files ending in {', '.join(SUFFIXES)}; it holds {found}")
        saved = self._saved(names)
        configs = {} if saved else self._configs()
        if saved and config:
            raise DataError(f"{self.name}: save_to_disk wrote it, without configurations; got :{config}")
        if configs:
            splits = self._of_config(configs[self._config(configs, config)], data, split)
        else:
            splits = saved or self._by_name(data, config, split)
        chosen = splits[self._choice("split", splits, split)]
        if not chosen:
            raise DataError(f"{self.name}: its README names files of this split, and none is there")
        used = {name for each in splits.values() for name in each}
        about = ABOUT if saved else {"README.md"} if configs else set()
        unused = [name for name in names if name not in used and PurePosixPath(name).name not in about]
        # The data of other configurations are left aside by choice.
        if unused := [name for name in unused if not (configs and is_data(name))]:
            note(f"{self.name}: not used: {_listed(unused)}")
        return chosen

    def _choice(self, what: str, there: Iterable[str], asked: str) -> str:
        """The name asked for, or the only one there is."""
        names = list(there)
        if asked in names or (not asked and len(names) == 1):
            return asked or names[0]
        sign = {"split": "@", "configuration": ":"}[what]
        found = f"has the {what}{'s' * (len(names) > 1)} {', '.join(names)}"
        if asked:
            raise DataError(f"{self.name}: {found}; got {sign}{asked}")
        raise DataError(f"{self.name}: {found}; add one of them, as in {self.name}{sign}{names[0]}")

    # --- what save_to_disk wrote ---

    def _saved(self, names: list[str]) -> Splits:
        if "dataset_dict.json" in names:
            splits = _json_at(self, "dataset_dict.json").get("splits")
            if not isinstance(splits, list) or not splits:
                raise DataError(
                    f"{self.name}/dataset_dict.json: expected the names of splits, got {str(splits)[:40]!r}"
                )
            return {str(split): self._arrow_files(f"{split}/") for split in splits}
        if "state.json" in names:
            return {str(_json_at(self, "state.json").get("_split") or "train"): self._arrow_files("")}
        return {}

    def _arrow_files(self, folder: str) -> list[str]:
        """The files that a state.json lists."""
        state = _json_at(self, f"{folder}state.json")
        if state.get("_indices_data_files"):
            raise DataError(f"{self.name}/{folder}: a selection of rows; call flatten_indices() and save_to_disk again")
        listed = state.get("_data_files")
        files = [f"{folder}{each.get('filename')}" for each in listed or () if isinstance(each, dict)]
        if not files or (missing := sorted({*files} - {*self.names})):
            raise DataError(
                f"{self.name}/{folder}state.json: lists {missing[0] if files else 'no files'}, which is not there"
            )
        return files

    # --- README and names ---

    def _by_name(self, data: list[str], folder: str, split: str) -> Splits:
        """The splits of the data below a folder, "" for all."""
        below = f"{folder.strip('/')}/" if folder else ""
        inside = [name.removeprefix(below) for name in data if name.startswith(below)]
        if not inside:
            raise DataError(f"{self.name}: has neither a configuration nor a folder {folder!r} with data")
        splits = splits_by_name(inside)
        of_none = sorted({*inside} - {name for names in splits.values() for name in names})
        if of_none and len(splits) == 1 and not split:
            (only,) = splits
            raise DataError(
                f"{self.name}: has the split {only}, and files of no split: {_listed(of_none)}; add @{only}, or name the files"
            )
        return {split: [below + name for name in names] for split, names in splits.items()}

    def _config(self, configs: dict[str, dict[str, Any]], asked: str) -> str:
        default = [name for name, each in configs.items() if each.get("default") is True or name == "default"]
        return self._choice("configuration", default[:1] if default and not asked else configs, asked)

    def _of_config(self, config: dict[str, Any], data: list[str], split: str) -> Splits:
        """The splits of a README's configuration. Its `data_files`: a pattern, a list of them, or a list of {split, path}."""
        below, patterns = str(config.get("data_dir") or "").strip("./"), config.get("data_files")
        if patterns is None:
            return self._by_name(data, below, split)
        splits: Splits = {}
        for item in patterns if isinstance(patterns, list) else [patterns]:
            name, paths = (item.get("split"), item.get("path")) if isinstance(item, dict) else ("train", item)
            files = splits.setdefault(str(name), [])
            for path in paths if isinstance(paths, list) else [paths]:
                fits = glob_pattern(f"{below}/{str(path).removeprefix('./')}".lstrip("/"))
                files += [each for each in data if fits.fullmatch(each) and each not in files]
        return splits

    def _configs(self) -> dict[str, dict[str, Any]]:
        """The README's configurations by name."""
        text = self.read("README.md")[:MOST_ABOUT] if "README.md" in self.names else ""
        front = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\n---[ \t]*(?:\r?\n|$)", text, re.DOTALL)
        if not front or "configs" not in front[1]:
            return {}
        try:
            content = read_yaml(front[1])
        except ValueError as error:
            raise DataError(
                f"{self.name}/README.md: its metadata are no YAML: {' '.join(str(error).split())}"
            ) from None
        configs = content.get("configs") if isinstance(content, dict) else None
        found: dict[str, Any] = {}
        for each in configs if isinstance(configs, list) else ():
            if isinstance(each, dict) and found.setdefault(name := str(each.get("config_name")), each) is not each:
                raise DataError(f"{self.name}/README.md: two configurations are called {name[:80]!r}; expected one")
        return found


def splits_by_name(names: list[str]) -> Splits:
    """The files of each split by the names that the Hub goes by; all are `train` where no name says a split.

    `data/NAME-00000-of-00001.parquet`; else folders called train, test, …; else files called so.
    """
    shards: Splits = {}
    for name in names:
        if found := SHARD.fullmatch(name):
            shards.setdefault(found["split"], []).append(name)
    if shards:
        return {
            split: shards[split] for split in sorted(shards, key=lambda each: ([*KEYWORDS, each].index(each), each))
        }
    for patterns in (IN_FOLDER, IN_NAME):
        splits: Splits = {}
        for name in names:
            if split := next((split for split, pattern in patterns.items() if pattern.fullmatch(name)), None):
                splits.setdefault(split, []).append(name)
        if splits:
            return {split: splits[split] for split in KEYWORDS if split in splits}
    return {"train": names}


def is_data(name: str) -> bool:
    """Whether a file holds rows, by its name."""
    return suffix_of(name) in SUFFIXES and PurePosixPath(name).name not in ABOUT and not name.endswith(DOCUMENT)


def glob_pattern(glob: str) -> re.Pattern[str]:
    """A glob as a regular expression: `*` and `?` stay within a folder, `**` goes through all below.

    Raises:
        DataError: its brackets hold a range from a later sign to an earlier one, or nothing.
    """
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^\]]+\])", glob)
    signs = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    try:
        return re.compile(
            "".join(signs.get(part) or (_class(part) if at % 2 else re.escape(part)) for at, part in enumerate(parts)),
            re.DOTALL,
        )
    except re.error as error:
        raise DataError(f"{glob}: is no pattern of files' names: {error}") from None


def _class(part: str) -> str:
    # the signs that a set in brackets may one day be combined with
    inner = re.sub(r"([\\\[&~|])", r"\\\1", part[1:-1])
    return f"[^{inner[1:]}]" if inner.startswith("!") else f"[{inner}]"


def _is_visible(name: str) -> bool:
    """Whether neither a file nor a folder above it is hidden or special, such as .git and __pycache__."""
    return not any(part.startswith((".", "__")) for part in name.split("/"))


def _json_at(folder: Folder, name: str) -> dict[str, Any]:
    try:
        found = json.loads(folder.read(name)[:MOST_ABOUT]) if name in folder.names else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{folder.name}/{name}: is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}


def _listed(names: list[str]) -> str:
    """The first of these names and the number of the others, in words."""
    more = f" and {len(names) - LISTED:,} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"
