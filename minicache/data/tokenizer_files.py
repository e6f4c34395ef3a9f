"""Which files belong to a tokenizer, and copying them: into another cache, and into a policy.

A directory of tokenizer files as a cache keeps it holds the tokenizer as transformers writes it, by which the cache's ids were
made and are identified, and in `source/` the files that the model came with, byte for byte. A policy gets the latter.
"""

import json
import re
import shutil
from pathlib import Path

from minicache.data.tokenizers import read_config, template_of
from minicache.errors import ModelError

SOURCE = "source"
TEMPLATE = "chat_template.jinja"
FOLDERS = ("additional_chat_templates", "chat_templates")
# The vocabularies of SentencePiece, tiktoken and Mistral, of tokenizers in Python, and those that transformers' settings name.
FILES = re.compile(
    r"tokenizer(\.[\d.]+)?\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.json"
    r"|vocab\.(json|txt)|merges\.txt|tekken\.json|emoji\.json|bpe[._]codes|.+\.(jinja|model|spm|tiktoken)|.+\.model\.v\d+\w*"
)
# Only a load with trust_remote_code runs these.
FILES_OF_CODE = re.compile(r"token\w+\.py")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer, by its name in the directory; a model's directory holds many others."""
    folder, _, file = name.rpartition("/")
    if folder:
        return folder in FOLDERS and file.endswith(".jinja")
    return bool(FILES.fullmatch(file) or FILES_OF_CODE.fullmatch(file))


def tokenizer_files(directory: Path) -> list[str]:
    """The names of the files in a directory that belong to a tokenizer."""
    files = (file for folder in ("", *FOLDERS) for file in sorted((directory / folder).glob("*")) if file.is_file())
    return [name for file in files if is_tokenizer_file(name := file.relative_to(directory).as_posix())]


def copy_tokenizer(directory: Path, target: Path) -> None:
    """Copy the files of a tokenizer and no others: a cache from elsewhere may have a config.json or weights among them."""
    for place in ("", SOURCE):
        _copy_files(directory / place, target / place)


def _copy_files(directory: Path, target: Path) -> None:
    for name in tokenizer_files(directory):
        _copy(directory / name, target / name)


def copy_to_policy(directory: Path, target: Path, alone: bool = False) -> None:
    """Copy the files that the tokenizer came with, and its chat template, as a policy's.

    alone: for an adapter's directory, which has no config.json by which transformers could choose the tokenizer's class: the files
    as transformers writes them, which name it.

    Files that were made of others (a tokenizer.json of a SentencePiece model) lie beside those. A directory without a copy of
    the source, as of caches of 0.1.0, is copied as it is.
    """
    source = directory / SOURCE
    if alone or not source.is_dir():
        _copy_files(directory, target)
        return
    _copy_files(source, target)
    if not (target / "tokenizer.json").exists():
        _copy(directory / "tokenizer.json", target / "tokenizer.json")
    if (directory / TEMPLATE).exists():
        if not _has_template(source, (directory / TEMPLATE).read_text(encoding="utf-8")):
            _remove_templates(target)
        _copy(directory / TEMPLATE, target / TEMPLATE)


def _has_template(directory: Path, text: str) -> bool:
    try:
        return template_of(directory, read_config(directory))[0] == text
    # several, and none is the default
    except ModelError:
        return False


def _remove_templates(directory: Path) -> None:
    """Remove the templates that another one replaces, so that no program reads them in its stead."""
    config = read_config(directory)
    if config.pop("chat_template", None) is not None:
        text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
        (directory / "tokenizer_config.json").write_text(text, encoding="utf-8", newline="\n")
    (directory / "chat_template.json").unlink(missing_ok=True)


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
