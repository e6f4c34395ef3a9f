"""A tokenizer's files are kept as they are, the identity stays that of 0.1.0, and what is written gives the source's ids."""

import base64
import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer

from minicache.cache.reader import ReferenceCache
from minicache.data.encode import Encoder
from minicache.data.formats import to_pairs
from minicache.data.tokenizer_files import copy_to_policy, copy_tokenizer, tokenizer_files
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import ModelError, OutputError, RowRefused
from minicache.intake.tokenizer_files import pack, template_digest, unpack
from minicache.models import save_tokenizer, tokenizers
from minicache.options.train import TrainConfig
from minicache.stages.train import train
from minicache.trackers import Silent
from tests.conftest import TEMPLATE, Cli, one_process, precompute_into

OTHER = "{% for message in messages %}[{{ message.role }}]{{ message.content }}{{ eos_token }}{% endfor %}"
# What a tokenizer of an earlier transformers may have beside it: read by other programs, or by none.
BESIDE = {
    "special_tokens_map.json": '{\n "eos_token":   "<|im_end|>"\n}',
    "added_tokens.json": '{"<|im_end|>":2}',
    "tokenizer.model": "\x00\x01 a vocabulary",
    "chat_template.json": '{"chat_template": "of a processor"}',
    "vocab.json": "{}",
}
NOT_ITS = {"config.json": "{}", "checkpoint-5/tokenizer.json": "{}", "README.md": "x", "model.pth": "x", "a.py": "x"}


@pytest.fixture
def source(tokenizer_dir: Path, tmp_path: Path) -> Path:
    """A tokenizer written as earlier versions of the tokenizers library did (a merge is one string), beside other files."""
    place = tmp_path / "tokenizer of old"
    shutil.copytree(tokenizer_dir, place)
    content = json.loads((place / "tokenizer.json").read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    (place / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False))
    config = json.loads((place / "tokenizer_config.json").read_text())
    config |= {"legacy": True, "add_bos_token": False, "sp_model_kwargs": {}}
    (place / "tokenizer_config.json").write_text(json.dumps(config, indent=7))
    for name, text in {**BESIDE, **NOT_ITS}.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    return place


KEPT = {"tokenizer.json", "tokenizer_config.json", *BESIDE}


def contents(directory: Path) -> dict[str, bytes]:
    return {
        file.relative_to(directory).as_posix(): file.read_bytes() for file in directory.rglob("*") if file.is_file()
    }


def as_0_1_0_wrote_it(source: Path, directory: Path) -> ChatTokenizer:
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return ChatTokenizer.load(directory)


def ids_of(directory: Path, text: str = "the cat <|im_end|> 你好\n") -> list[int]:
    from transformers import AutoTokenizer

    ids: list[int] = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    return ids


def test_a_policy_has_the_files_of_its_tokenizer_byte_for_byte(
    source: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, tokenizer=str(source))
    report = train(TrainConfig(cache, tmp_path / "run", max_steps=1), one_process(), Silent())
    saved, given = contents(report.model_dir), contents(source)
    assert {name: saved[name] for name in KEPT} == {name: given[name] for name in KEPT}
    assert saved.keys() - KEPT == {"config.json", "generation_config.json", "model.safetensors", "chat_template.jinja"}
    assert saved["chat_template.jinja"].decode() == TEMPLATE
    assert json.loads(saved["config.json"])["dtype"] == "float32"
    assert ids_of(report.model_dir) == ids_of(source)


def test_named_templates_in_files_are_kept(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "chat_template.jinja").write_text(config.pop("chat_template"))
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "rag.jinja").write_text(OTHER)
    save_tokenizer(str(source), tmp_path / "saved", None)
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    policy, given = contents(tmp_path / "policy"), contents(source)
    for name in (*KEPT, "chat_template.jinja", "additional_chat_templates/rag.jinja"):
        assert policy[name] == given[name], name


def named_in_configuration(source: Path) -> None:
    """As Hermes 2 Pro and Command R have them."""
    config = json.loads((source / "tokenizer_config.json").read_text())
    named = {"default": config["chat_template"], "tool_use": OTHER, "rag": "{{ documents }}"}
    config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    (source / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("alone", [False, True])
def test_templates_named_in_the_configuration_are_those_of_the_policy(
    source: Path, tmp_path: Path, alone: bool
) -> None:
    from transformers import AutoTokenizer

    named_in_configuration(source)
    save_tokenizer(str(source), tmp_path / "saved", None)
    copy_to_policy(tmp_path / "saved", tmp_path / "policy", alone)
    given, policy = (AutoTokenizer.from_pretrained(place) for place in (source, tmp_path / "policy"))
    assert policy.chat_template == given.chat_template and set(given.chat_template) == {"default", "tool_use", "rag"}


@pytest.mark.parametrize("alone", [False, True])
def test_another_template_replaces_named_ones_too(source: Path, tmp_path: Path, alone: bool) -> None:
    from transformers import AutoTokenizer

    named_in_configuration(source)
    save_tokenizer(str(source), tmp_path / "saved", OTHER)
    copy_to_policy(tmp_path / "saved", tmp_path / "policy", alone)
    assert AutoTokenizer.from_pretrained(tmp_path / "policy").chat_template == OTHER


def test_a_refused_row_names_the_other_templates(source: Path, tmp_path: Path) -> None:
    named_in_configuration(source)
    save_tokenizer(str(source), tmp_path / "saved", None)
    tokenizer = ChatTokenizer.load(tmp_path / "saved")
    assert tokenizer.template == TEMPLATE
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    turns = {name: [{"role": role, "content": "x"}] for name, role in (("prompt", "user"), ("chosen", "assistant"))}
    (pair,) = to_pairs({**turns, "rejected": [{"role": "assistant", "content": "y"}], "tools": tools}, "f", 1)
    with pytest.raises(
        RowRefused, match=r"FILE; the tokenizer's own are named default, rag, tool_use\), or --ignore-fields"
    ):
        Encoder(tokenizer, 64).encode(pair)


PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def test_files_of_a_processor_are_kept(source: Path, model_dir: Path, data_file: Path, tmp_path: Path) -> None:
    """AutoProcessor and vLLM need them for a model of several modes."""
    for name in PROCESSORS:
        (source / name).write_text(json.dumps({"chat_template": "of old", "name": name}))
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, tokenizer=str(source))
    report = train(TrainConfig(cache, tmp_path / "run", max_steps=1), one_process(), Silent())
    for name in PROCESSORS:
        assert (report.model_dir / name).read_bytes() == (source / name).read_bytes()
    save_tokenizer(str(source), tmp_path / "saved", OTHER)
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    assert json.loads((tmp_path / "policy" / PROCESSORS[1]).read_text()) == {"name": PROCESSORS[1]}


def test_an_exported_policy_has_them_too(source: Path, model_dir: Path, tmp_path: Path, cli: Cli) -> None:
    code, _, err = cli("export", "--policy", model_dir, "--tokenizer", source, "--out", tmp_path / "out")
    assert code == 0, err
    saved, given = contents(tmp_path / "out"), contents(source)
    assert {name: saved[name] for name in KEPT} == {name: given[name] for name in KEPT}


def test_the_identity_is_that_of_0_1_0(source: Path, tmp_path: Path) -> None:
    """The digest is of the form in which transformers writes the tokenizer, not of how its file happens to be written."""
    save_tokenizer(str(source), tmp_path / "saved", None)
    saved, before = ChatTokenizer.load(tmp_path / "saved"), as_0_1_0_wrote_it(source, tmp_path / "before")
    assert (saved.digest, template_digest(saved)) == (before.digest, template_digest(before))
    assert ChatTokenizer.load(source).digest != before.digest
    assert {name: text for name, text in contents(tmp_path / "saved").items() if "source" not in name} == contents(
        tmp_path / "before"
    )


@pytest.mark.parametrize("generation", ["minimind2-2504", "minimind2-2510", "minimind3"])
def test_so_is_that_of_miniminds_own(original: Callable[[str], Path], tmp_path: Path, generation: str) -> None:
    source = original(f"fixtures/minimind/{generation}-tokenizer")
    save_tokenizer(str(source), tmp_path / "saved", None, model_type="qwen3")
    saved, before = ChatTokenizer.load(tmp_path / "saved"), as_0_1_0_wrote_it(source, tmp_path / "before")
    assert (saved.digest, template_digest(saved)) == (before.digest, template_digest(before))
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    policy = contents(tmp_path / "policy")
    assert all(policy[name] == text for name, text in contents(source).items())


def test_a_cache_of_0_1_0_goes_on_and_its_policy_gets_what_it_holds(
    source: Path, model_dir: Path, data_file: Path, tmp_path: Path
) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, tokenizer=str(source))
    shutil.rmtree(cache / "tokenizer" / "source")
    precompute_into(cache, model_dir, data_file, tokenizer=str(source))
    report = train(TrainConfig(cache, tmp_path / "run", max_steps=1), one_process(), Silent())
    held = contents(cache / "tokenizer")
    assert {name: text for name, text in contents(report.model_dir).items() if name in held} == held


def test_copies_of_a_cache_keep_them(source: Path, tmp_path: Path) -> None:
    """A merged one, and one that went through a table."""
    save_tokenizer(str(source), tmp_path / "saved", None)
    copy_tokenizer(tmp_path / "saved", tmp_path / "merged")
    unpack(pack(tmp_path / "saved"), tmp_path / "unpacked", "here")
    assert contents(tmp_path / "merged") == contents(tmp_path / "unpacked") == contents(tmp_path / "saved")


def test_files_of_others_are_no_tokenizers(source: Path) -> None:
    assert set(tokenizer_files(source)) == KEPT


def test_another_template_replaces_all_that_a_program_could_read_in_its_stead(source: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    save_tokenizer(str(source), tmp_path / "saved", OTHER)
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    policy = contents(tmp_path / "policy")
    assert policy["chat_template.jinja"].decode() == OTHER and "chat_template.json" not in policy
    config = json.loads(policy["tokenizer_config.json"])
    assert "chat_template" not in config
    assert config | {"chat_template": TEMPLATE} == json.loads((source / "tokenizer_config.json").read_text())
    shown = AutoTokenizer.from_pretrained(tmp_path / "policy").apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False
    )
    assert shown == "[user]x<|im_end|>"


def test_several_templates_without_a_default_are_replaced(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "rag", "template": "x"}, {"name": "tool_use", "template": "y"}]
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    save_tokenizer(str(source), tmp_path / "saved", OTHER)
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    assert ChatTokenizer.load(tmp_path / "policy").template == OTHER


# --- what is written is compared with the source ---


def reads_otherwise(monkeypatch: pytest.MonkeyPatch, when: Callable[[Path], bool]) -> None:
    """A policy's tokenizer that makes other ids of the Thai text, if `when` is true of the directory that it is copied from."""

    def copy(directory: Path, target: Path) -> None:
        copy_to_policy(directory, target)
        if when(directory):
            backend = Tokenizer.from_file(str(target / "tokenizer.json"))
            backend.add_tokens(["สุนัข"])
            backend.save(str(target / "tokenizer.json"))

    monkeypatch.setattr(tokenizers, "copy_to_policy", copy)


def test_files_that_give_other_ids_beside_the_policy_give_way_to_transformers_form(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads_otherwise(monkeypatch, lambda directory: (directory / "source").exists())
    save_tokenizer(str(source), tmp_path / "saved", None)
    assert not (tmp_path / "saved" / "source").exists() and ids_of(tmp_path / "saved") == ids_of(source)


def test_a_difference_in_either_form_is_refused_with_the_text(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads_otherwise(monkeypatch, lambda _: True)
    with pytest.raises(
        ModelError,
        match=r"not be the same beside the policy: 'สุนัข.* becomes, from its token \d+ on, \[\d+,.*the source gives",
    ):
        save_tokenizer(str(source), tmp_path / "saved", None)


def test_special_tokens_are_compared_too(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(directory: Path, target: Path) -> None:
        copy_to_policy(directory, target)
        config = json.loads((target / "tokenizer_config.json").read_text())
        (target / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<|im_start|>"}))
        (target / "special_tokens_map.json").unlink(missing_ok=True)

    monkeypatch.setattr(tokenizers, "copy_to_policy", copy)
    with pytest.raises(ModelError, match="its special tokens are"):
        save_tokenizer(str(source), tmp_path / "saved", None)


def test_a_tokenizer_that_does_more_than_its_file_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a class in Python may; the data is encoded by tokenizer.json alone."""
    from transformers import PreTrainedTokenizerFast

    call: Any = PreTrainedTokenizerFast.__call__
    monkeypatch.setattr(
        PreTrainedTokenizerFast, "__call__", lambda self, text, **more: call(self, text.lower(), **more)
    )
    with pytest.raises(ModelError, match=r"does not do what the tokenizer does in transformers.*The quick"):
        save_tokenizer(str(source), tmp_path / "saved", None)


# --- tokenizers without tokenizer.json ---


def write_vocabulary(directory: Path, content: bytes, **config: object) -> Path:
    directory.mkdir()
    (directory / "tokenizer.model").write_bytes(content)
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE, **config}))
    (directory / "config.json").write_text('{"model_type": "llama"}')
    return directory


def tiktoken_vocabulary() -> bytes:
    pieces = [bytes([byte]) for byte in range(256)] + [b"th", b"the", " 你".encode(), b"  "]
    return b"".join(base64.b64encode(piece) + f" {rank}\n".encode() for rank, piece in enumerate(pieces))


@pytest.mark.parametrize("library", ["sentencepiece", "tiktoken"])
def test_a_vocabulary_that_needs_a_library_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    content = tiktoken_vocabulary() if library == "tiktoken" else b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"
    source = write_vocabulary(tmp_path / "model", content, tokenizer_class="LlamaTokenizer")
    for name in ("sentencepiece", "sentencepiece.sentencepiece_model_pb2", "tiktoken", "tiktoken.load"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ModelError, match=r"vocabulary needs more packages: pip install 'minidpo\[tokenizers\]'"
    ) as caught:
        save_tokenizer(str(source), tmp_path / "saved", None)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [True, False])
def test_a_sentencepiece_vocabulary_is_converted_and_kept(tmp_path: Path, legacy: bool) -> None:
    sentencepiece = pytest.importorskip("sentencepiece", exc_type=ImportError)
    text = tmp_path / "text.txt"
    text.write_text("\n".join(["the cat sat on the mat", "你好 世界", "a  b"] * 30), encoding="utf-8")
    options = {"vocab_size": 300, "model_type": "bpe", "byte_fallback": True, "minloglevel": 9}
    sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(tmp_path / "spm"), **options)
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": legacy, "bos_token": "<s>", "eos_token": "</s>"}
    source = write_vocabulary(tmp_path / "model", (tmp_path / "spm.model").read_bytes(), **settings)
    save_tokenizer(str(source), tmp_path / "saved", None, model_type="llama")
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    policy = contents(tmp_path / "policy")
    assert policy["tokenizer.model"] == (tmp_path / "spm.model").read_bytes() and "tokenizer.json" in policy
    assert json.loads(policy["tokenizer_config.json"])["legacy"] is legacy
    assert ids_of(tmp_path / "policy", "<s>the cat  你好</s> x") == ids_of(source, "<s>the cat  你好</s> x")


@pytest.mark.filterwarnings("ignore")
def test_a_tiktoken_vocabulary_is_converted_and_kept(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|end|>",
        "extra_special_tokens": ["<|end|>"],
    }
    source = write_vocabulary(tmp_path / "model", tiktoken_vocabulary(), **settings)
    save_tokenizer(str(source), tmp_path / "saved", None, model_type="llama")
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    assert (tmp_path / "policy" / "tokenizer.model").read_bytes() == tiktoken_vocabulary()
    assert ids_of(tmp_path / "policy", "the  你<|end|>") == ids_of(source, "the  你<|end|>")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [None, "caches"])
def test_no_copy_of_a_tiktoken_vocabulary_is_kept_or_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str | None
) -> None:
    """Neither in the folder for temporary files nor in the user's own: the same path may hold another vocabulary by now."""
    pytest.importorskip("tiktoken")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.delenv("DATA_GYM_CACHE_DIR", raising=False)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    if own:
        monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / own))
    source = write_vocabulary(tmp_path / "model", tiktoken_vocabulary(), tokenizer_class="PreTrainedTokenizerFast")
    save_tokenizer(str(source), tmp_path / "before", None, model_type="llama")
    later = (
        tiktoken_vocabulary().replace(b" 258\n", b" 260\n").replace(b" 257\n", b" 258\n").replace(b" 260\n", b" 257\n")
    )
    (source / "tokenizer.model").write_bytes(later)
    save_tokenizer(str(source), tmp_path / "after", None, model_type="llama")
    assert ids_of(tmp_path / "before", "the 你") == [257, 258] and ids_of(tmp_path / "after", "the 你") == [258, 257]
    assert not list(temporary.glob("data-gym-cache/*")) and not (tmp_path / "caches").exists()
    assert os.environ.get("TIKTOKEN_CACHE_DIR") == (own and str(tmp_path / own))


# --- patterns that panic ---


def test_a_text_over_which_both_panic_is_no_difference(source: Path, tmp_path: Path) -> None:
    write_panicking(source)
    save_tokenizer(str(source), tmp_path / "saved", None)
    text = "a" * 70 + "!" * 20 + "1234567890" * 3
    assert text in tokenizers.TEXTS and tokenizers._ids_of_file(tmp_path / "saved")(text, False) is None


def test_a_text_over_which_one_panics_is_a_difference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(directory: Path, target: Path) -> None:
        copy_to_policy(directory, target)
        write_panicking(target)

    monkeypatch.setattr(tokenizers, "copy_to_policy", copy)
    with pytest.raises(ModelError, match=r"'aaaaa.* becomes, from its token 1 on, no ids, where the source gives"):
        save_tokenizer(str(source), tmp_path / "saved", None)


def write_panicking(directory: Path) -> None:
    """Let the tokenizer of a directory try more ways to split a run of "a" than its library does before it panics."""
    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    pattern = Split(Regex("(a|aa)+$"), "isolated")
    backend.pre_tokenizer = Sequence([pattern, ByteLevel(add_prefix_space=False, use_regex=True)])
    backend.save(str(directory / "tokenizer.json"))


def test_a_panic_while_a_tokenizer_is_converted_is_one_line(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def panic(*_: object) -> None:
        Tokenizer.from_file(str(tmp_path / "panicking" / "tokenizer.json")).encode("a" * 70 + "!")

    shutil.copytree(source, tmp_path / "panicking")
    write_panicking(tmp_path / "panicking")
    monkeypatch.setattr(import_module("transformers.convert_slow_tokenizer"), "convert_slow_tokenizer", panic)
    with pytest.raises(ModelError, match="has no fast"):
        tokenizers._convert(None, tmp_path, "a")
    with pytest.raises(OutputError, match="cannot be written: Onig"), tokenizers._writing(tmp_path):
        panic()


# --- from the hub ---


def test_of_a_hub_id_the_tokenizers_files_are_fetched_and_no_others(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[object, object]] = []

    def snapshot(name: str, allow_patterns: object, local_files_only: bool) -> str:
        asked.append((allow_patterns, local_files_only))
        return str(source)

    names = ["tokenizer.json", "tokenizer.model", "model.safetensors", "original/tokenizer.model", "config.json"]
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name: names)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert tokenizers._files_at("org/name") == source
    assert asked == [(["tokenizer.json", "tokenizer.model"], False)]

    def offline(*_: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", offline)
    assert tokenizers._files_at("org/name") == source and asked[1] == (None, True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(ModelError, match="org/name: its tokenizer's files cannot be downloaded"):
        tokenizers._files_at("org/name")


def test_what_the_hub_said_is_told_and_a_fault_of_ours_is_no_silence(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise PermissionError("401: this repository is gated")

    def not_there(*_: object, **__: object) -> None:
        raise FileNotFoundError("no snapshot in the cache")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", refused)
    monkeypatch.setattr("huggingface_hub.snapshot_download", not_there)
    with pytest.raises(ModelError, match="cannot be downloaded: 401: this repository is gated") as told:
        tokenizers._files_at("org/name")
    assert isinstance(told.value.__cause__, PermissionError)
    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda self, name: [3])
    with pytest.raises(AttributeError):
        tokenizers._files_at("org/name")


def test_a_tekken_json_is_read_by_the_tokenizers_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if mistral-common were installed: transformers then takes it for a Mistral model whose files have a tekken.json."""
    from transformers.models.auto import tokenization_auto as auto

    class Common:
        @classmethod
        def from_pretrained(cls, *_: object, **__: object) -> None:
            raise AssertionError("mistral-common's")

    Common.__name__ = "MistralCommonBackend"
    by_name = auto.tokenizer_class_from_name
    monkeypatch.setattr(
        auto, "tokenizer_class_from_name", lambda name: Common if name == Common.__name__ else by_name(name)
    )
    monkeypatch.setitem(auto.TOKENIZER_MAPPING_NAMES, "mistral", Common.__name__)
    monkeypatch.setitem(auto.TOKENIZER_MAPPING._extra_content, import_module("transformers").MistralConfig, Common)
    monkeypatch.setattr(
        "transformers.integrations.mistral.tokenizer.resolve_mistral_format", lambda *_, **__: (True, "x")
    )
    (source / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    assert tokenizers._opened(str(source), trust_remote_code=False).is_fast


# --- no chat template ---


def test_a_model_without_a_template_is_told_once_what_is_used(
    model_dir: Path, data_file: Path, tmp_path: Path, cli: Cli
) -> None:
    plain = tmp_path / "model"
    shutil.copytree(model_dir, plain)
    config = json.loads((plain / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (plain / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "other.jinja").write_text(OTHER)
    command = ("precompute-ref", "--model", plain, "--data", data_file, "--ref-cache")
    code, _, err = cli(*command, tmp_path / "cache")
    text = " ".join(err.split())
    assert code == 0 and text.count("the tokenizer has no chat template; turns are written plainly, as 'User: …'") == 1
    code, _, err = cli(*command, tmp_path / "other", "--chat-template", tmp_path / "other.jinja")
    assert code == 0 and "no chat template" not in err
    code, _, err = cli("precompute-ref", "--model", model_dir, "--data", data_file, "--ref-cache", tmp_path / "with")
    assert code == 0 and "no chat template" not in err
    assert ReferenceCache(tmp_path / "cache").tokenizer_dir.is_dir()


def test_a_family_whose_class_changes_what_the_file_says(tmp_path: Path) -> None:
    """Qwen2's class, which transformers chooses by config.json, splits digits that this file keeps together."""
    from transformers import PreTrainedTokenizerFast

    base, tokenizer = tmp_path / "base", Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet())
    tokenizer.train_from_iterator(["List 13 things of 2024 and 13 more of 2024"] * 4, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    ).save_pretrained(base)
    (base / "chat_template.jinja").write_text(TEMPLATE)
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    text = "List 13 things and 1,000,000 more in 2024."
    expected = ids_of(base, text)
    assert Tokenizer.from_file(str(base / "tokenizer.json")).encode(text, add_special_tokens=False).ids != expected
    save_tokenizer(str(base), tmp_path / "saved", None, model_type="qwen2")
    copy_to_policy(tmp_path / "saved", tmp_path / "policy")
    copy_to_policy(tmp_path / "saved", tmp_path / "adapter", alone=True)
    for place in ("policy", "adapter"):
        # as `compare` reads it, and as transformers does without a config.json
        assert ChatTokenizer.load(tmp_path / place).encode([text])[0][0].tolist() == expected, place
        assert ids_of(tmp_path / place, text) == expected, place


def test_an_adapter_s_tokenizer_needs_no_config(source: Path, tmp_path: Path) -> None:
    save_tokenizer(str(source), tmp_path / "saved", None)
    copy_to_policy(tmp_path / "saved", tmp_path / "adapter", alone=True)
    assert not (tmp_path / "adapter" / "source").exists()
    config = json.loads((tmp_path / "adapter" / "tokenizer_config.json").read_text())
    # transformers 4 knows no TokenizersBackend
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert ids_of(tmp_path / "adapter") == ids_of(source)
