"""The recipe of docs/trl.md for rows of strings gives the ids of TRL's DPOTrainer, whatever the tokenizer adds in front."""

import json
import random
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from minicache.cache.reader import ReferenceCache
from minicache.data.encode import Encoder
from minicache.data.formats import to_pair
from minicache.data.tokenizers import ChatTokenizer
from tests.conftest import WORDS, Cli, write_jsonl
from tests.references.trl_plain import trl_ids

DOCS = (Path(__file__).parents[2] / "docs" / "trl.md").read_text(encoding="utf-8").partition("## Plain text")[2]
(TEMPLATE,) = re.findall(r"```jinja\n(.*?)```", DOCS, re.DOTALL)
COMMAND = re.findall(r"```sh\n(.*?)```", DOCS, re.DOTALL)[0]
# Kind of a tokenizer -> what the recipe puts in front of the template.
FRONTS = {"plain": "", "bos": "{{ bos_token }}", "bos-space": "{{ bos_token + ' ' }}"}
BOS, EOS = "<|endoftext|>", "<|im_end|>"
MADE = 7  # rows that are not random
Texts = dict[str, str]


def text_row(prompt: str, chosen: str, rejected: str) -> Texts:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def rows() -> list[Texts]:
    """Rows of strings, MADE by hand (rendered before, with end tokens, cut within a word, a transcript) and 200 at random."""
    made = [
        text_row("<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n", "a", "b"),
        text_row("Question: why not?\nAnswer:", " the cat sat", " on a mat\n"),
        text_row("why", f" it rained{EOS}", f"not{EOS}{EOS}"),
        text_row(f"{BOS}why ", f"{EOS}the", "你好"),
        text_row(" the c", "at sat", "世界"),
        text_row("why\n\n", "\nthen", "then"),
        text_row("\n\nHuman: why\n\nAssistant:", " the cat", " not"),
    ]
    draw = random.Random(0)

    def text() -> str:
        return "".join(draw.choices([*WORDS, " ", "\n", ". ", "😀", BOS, EOS, "<|im_end"], k=draw.randint(2, 9)))

    return [*made, *(text_row(f"so {text()}", f"{text()}a", f"{text()}b") for _ in range(200))]


@pytest.fixture(scope="module")
def tokenizers(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One without a BOS, one that adds it, one that also puts a space before the first word, unless a token stands there."""
    place = tmp_path_factory.mktemp("tokenizers")
    spaced = Tokenizer(models.BPE(byte_fallback=True))
    spaced.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaced.decoder = decoders.Metaspace(prepend_scheme="first")
    special = [BOS, "<|im_start|>", EOS]
    alphabet = sorted(set("".join([*WORDS, "Question: Answer?.\n<|_>😀▁Human"])))
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    spaced.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    backends = {kind: Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json")) for kind in ("plain", "bos")}
    for kind, backend in {**backends, "bos-space": spaced}.items():
        if kind != "plain":
            backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
        (place / kind).mkdir()
        backend.save(str(place / kind / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": EOS}
        (place / kind / "tokenizer_config.json").write_text(json.dumps(config))
    return {kind: place / kind for kind in FRONTS}


def transformers_own(directory: Path, kind: str) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id) == (kind != "plain")
    return tokenizer


@pytest.mark.parametrize("kind", FRONTS)
def test_the_recipe_gives_trl_s_ids(tokenizers: dict[str, Path], kind: str) -> None:
    theirs = transformers_own(tokenizers[kind], kind)
    ours = replace(ChatTokenizer.load(tokenizers[kind]), template=FRONTS[kind] + TEMPLATE)
    encoder = Encoder(ours, 4096, special_text="allow")
    alike = 0
    for number, row in enumerate(rows()):
        # The docs name what such a tokenizer does otherwise.
        if kind == "bos-space" and row["prompt"].startswith((" ", "<|")):
            continue
        prompt, *answers, whole = trl_ids(theirs, row)
        pair = encoder.encode(to_pair(row, "rows.jsonl", number + 1, format="prompt")).pair
        for side, answer in enumerate(answers):
            ids, mask = pair.side(side)
            assert ids.tolist() == prompt + answer, row
            # Where tokens merge across the boundary, TRL may count tokens of the prompt.
            assert not whole or mask.tolist() == [0] * len(prompt) + [1] * len(answer), row
        alike += whole
    assert alike > 100


def test_the_command_of_the_recipe_makes_a_cache_of_trl_s_ids(
    tokenizers: dict[str, Path], model_dir: Path, tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "MODEL"
    model.mkdir()
    for file in [*model_dir.iterdir(), *tokenizers["bos"].iterdir()]:
        (model / file.name).write_bytes(file.read_bytes())
    write_jsonl(tmp_path / "pairs.jsonl", rows()[:MADE])
    Path("plain.jinja").write_text(FRONTS["bos"] + TEMPLATE)
    name, *arguments = shlex.split(COMMAND.replace("\\\n", " "))
    code, _, stderr = cli(*arguments, "--dtype", "float32")
    assert (name, code) == ("minidpo", 0), stderr
    theirs = transformers_own(model, "bos")
    for scored, row in zip(ReferenceCache(tmp_path / "cache"), rows()[:MADE], strict=True):
        prompt, *answers, _ = trl_ids(theirs, row)
        assert [scored.pair.side(side)[0].tolist() for side in (0, 1)] == [prompt + answer for answer in answers]


@pytest.mark.parametrize("kind", FRONTS)
def test_the_reference_is_what_trl_itself_computes(
    tokenizers: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    trl = pytest.importorskip("trl", reason="needs TRL: pip install '.[bench]'")
    from datasets import Dataset

    tokenizer = transformers_own(tokenizers[kind], kind)
    trainer = SimpleNamespace(_tokenizer=tokenizer)
    options = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    data = Dataset.from_list(rows())
    made = trl.DPOTrainer._prepare_dataset(trainer, data, tokenizer, options, "train")
    for theirs, row in zip(made, rows(), strict=True):
        assert [theirs[f"{part}_ids"] for part in ("prompt", "chosen", "rejected")] == [*trl_ids(tokenizer, row)[:3]]
