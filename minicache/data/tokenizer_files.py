"""Which files belong to a tokenizer, and copying them: into another cache, and into a policy.

A directory of tokenizer files as a cache keeps it holds the tokenizer as transformers writes it, by which the cache's ids were
made and are identified, and in `source/` the files that the model came with, byte for byte. A policy gets the latter.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from minicache.data.tokenizers import CONFIG, NAMED, read_config, template_of
from minicache.disk import read_json
from minicache.errors import ModelError

SOURCE = "source"
TEMPLATE = "chat_template.jinja"
FOLDERS = (NAMED, "chat_templates")
PROCESSOR = "processor_config.json"
# The vocabularies of SentencePiece, tiktoken and Mistral, of tokenizers in Python, and those that transformers' settings name.
FILES = re.compile(
    r"tokenizer(\.[\d.]+)?\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|chat_template\.json"
    # of the processors of models of several modes, which hold their tokenizer
    rf"|(video_)?preprocessor_config\.json|{re.escape(PROCESSOR)}"
    r"|vocab\.(json|txt)|merges\.txt|tekken\.json|emoji\.json|bpe[._]codes|.+\.(jinja|model|spm|tiktoken)|.+\.model\.v\d+\w*"
)
# Only a load with trust_remote_code runs these.
FILES_OF_CODE = re.compile(r"token\w+\.py")


def is_tokenizer_file(name: str) -> bool:
    """Whether a file belongs to a tokenizer or a processor, by its name in a model's directory, which holds many others."""
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
    as transformers writes them, which name it, by the name that transformers 4 knows too.

    Files that were made of others (a tokenizer.json of a SentencePiece model) lie beside those. A directory without a copy of
    the source, as of caches of 0.1.0, is copied as it is.
    """
    source = directory / SOURCE
    if alone or not source.is_dir():
        _copy_files(directory, target)
        if alone:
            _name_class(target)
        return
    _copy_files(source, target)
    if not (target / "tokenizer.json").exists():
        _copy(directory / "tokenizer.json", target / "tokenizer.json")
    if (directory / TEMPLATE).exists():
        if not _has_template(source, (directory / TEMPLATE).read_text(encoding="utf-8")):
            _remove_templates(target)
        _copy(directory / TEMPLATE, target / TEMPLATE)
        # beside that file transformers reads no others than these, where the source may name them in its configuration
        shutil.rmtree(target / NAMED, ignore_errors=True)
        for name in tokenizer_files(directory):
            if name.startswith(NAMED):
                _copy(directory / name, target / name)


def write_template(directory: Path, text: str) -> None:
    """Write the chat template of a tokenizer. In place of another one it is the only one: transformers would take `tool_use`."""
    file = directory / TEMPLATE
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        shutil.rmtree(directory / NAMED, ignore_errors=True)
    file.write_text(text, encoding="utf-8", newline="\n")


def _name_class(directory: Path) -> None:
    """Replace the name of transformers 5 for a tokenizer without a class of its own; it knows the earlier one as well."""
    config = read_config(directory)
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        # transformers 4 expects an object under this name
        if isinstance(config.get("extra_special_tokens"), list):
            config["additional_special_tokens"] = config.pop("extra_special_tokens")
        _write(directory / CONFIG, config)


def _has_template(directory: Path, text: str) -> bool:
    try:
        return template_of(directory, read_config(directory))[0] == text
    # several, and none is the default
    except ModelError:
        return False


def _remove_templates(directory: Path) -> None:
    """Remove the templates that another one replaces, so that no program reads them in its stead."""
    for file in (directory / CONFIG, directory / PROCESSOR):
        config = read_json(file, ModelError)
        if config.pop("chat_template", None) is not None:
            _write(file, config)
    (directory / "chat_template.json").unlink(missing_ok=True)


def _write(file: Path, config: dict[str, Any]) -> None:
    file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8", newline="\n")


def _copy(file: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, target)
