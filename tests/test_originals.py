"""Extras: what MiniMind's own code computed, and real rows, where they lie beside the checkout (see `original` in conftest).

They show that tests/references are what they are named after; the rest of the tests need the references alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicache.data.encode import Encoder
from minicache.data.files import read_rows
from minicache.data.formats import to_pair
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import RowRefused
from minicache.models import balance, load_model
from tests.conftest import Original
from tests.data.test_encode import THINK
from tests.data.test_formats import require_two_forms_alike
from tests.data.test_minimind_rows import require_miniminds_masks
from tests.data.test_special_text import require_usual_encoding
from tests.data.test_tokenizers import TALKS, require_same_rendering
from tests.references.checkpoints import EXPERTS, GENERATIONS, NAMES, reference_of
from tests.references.conversations import DEFAULT_SYSTEM, encode

PLACE = "fixtures/minimind/"
DATA = ["data/dpo_en_chat.jsonl", "data/dpo_zh_chat.jsonl"]


def original_tokenizer(original: Original, generation: str) -> Path:
    """The directory of a generation's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        directory = original(f"{PLACE}{generation}-tokenizer/{name}").parent
    return directory


@pytest.mark.parametrize("name", NAMES)
def test_reference_and_package_compute_what_the_original_does(original: Original, name: str) -> None:
    file, expected = original(f"{PLACE}{name}.pth"), np.load(original(f"{PLACE}{name}.npz"))
    reference, state, model = (
        reference_of(name),
        torch.load(file, weights_only=True),
        load_model(str(file)).model.eval(),
    )
    shapes = reference.shapes(EXPERTS if name.endswith("moe") else 0, vocabulary=512)
    assert {key: tuple(value.shape) for key, value in state.items()} == shapes
    ids = torch.from_numpy(expected["input_ids"])
    computed = reference.compute(state, ids)
    logits = model(ids).logits.detach().numpy()
    assert np.abs(computed.logits.numpy() - expected["logits"]).max() < 1e-5
    assert np.abs(logits - expected["logits"]).max() < 1e-5
    if not computed.scores:
        return
    weight = 5e-4 if name.startswith("minimind3") else 0.1  # the model's default when the file was made
    by_reference = reference.balance_loss(computed.scores, reference.DEFAULTS.experts_per_token, weight)
    with balance.recording(model, weight) as routing:
        model(ids)
    if balance.balances_steps(model):
        load = routing.load(torch.arange(ids.numel()))
        by_package = load.loss(load)
    else:
        by_package = routing.loss(torch.arange(ids.numel()), torch.arange(len(ids)).repeat_interleave(ids.shape[1]), 2)
    for found in (by_reference, by_package):
        assert found.mean().item() == pytest.approx(expected["aux_loss"].item(), rel=1e-5)


@pytest.mark.parametrize(("generation", "think"), THINK)
def test_reference_and_package_count_the_tokens_that_the_original_counts(
    original: Original, generation: str, think: str
) -> None:
    from transformers import AutoTokenizer

    fixture = json.loads(original(f"{PLACE}{generation}-encoding.json").read_text(encoding="utf-8"))
    directory, length = original_tokenizer(original, generation), fixture["max_length"]
    encoder = Encoder(ChatTokenizer.load(directory), length, loss_on="assistant", think=think)
    theirs, compared = AutoTokenizer.from_pretrained(directory), 0
    encodings = fixture["encodings"][think if generation == "minimind3" else "as-is"]
    for row, sides in zip(fixture["rows"], encodings, strict=True):
        expected = [(sides[name]["input_ids"], sides[name]["loss_mask"]) for name in ("chosen", "rejected")]
        assert [encode(theirs, generation, row[name], length, think) for name in ("chosen", "rejected")] == expected
        if not all(any(mask) for _, mask in expected):
            with pytest.raises(RowRefused, match="no answer left"):  # MiniMind divides by zero counted tokens here
                encoder.encode(to_pair(row, "f", 1))
            continue
        encoded = encoder.encode(to_pair(row, "f", 1)).pair
        for side in (0, 1):
            assert tuple(column.tolist() for column in encoded.side(side)) == expected[side]
            compared += 1
    assert compared >= 8


@pytest.mark.parametrize("think", ["keep", "drop"])
def test_rows_with_thoughts_and_calls_get_the_originals_ids_and_masks(original: Original, think: str) -> None:
    assert require_miniminds_masks(original_tokenizer(original, "minimind3"), think) > 150


@pytest.mark.parametrize("generation", GENERATIONS)
def test_templates_write_what_the_original_writes(
    original: Original, minimind_tokenizers: dict[str, Path], generation: str
) -> None:
    """The original's in the package as in transformers, and that of the references as it, but for the default system turn."""
    directory = original_tokenizer(original, generation)
    theirs, ours = ChatTokenizer.load(directory), ChatTokenizer.load(minimind_tokenizers[generation])
    require_same_rendering(theirs, directory)
    start, end = (theirs.special[name] for name in ("bos_token", "eos_token"))
    assert (start, end) == tuple(ours.special[name] for name in ("bos_token", "eos_token"))
    for turns in TALKS:
        for opened in (False, True):
            found, expected = (tokenizer.render(turns, opened) for tokenizer in (ours, theirs))
            if DEFAULT_SYSTEM[generation] and turns[0].role != "system":
                found = found.removeprefix(f"{start}system\n{DEFAULT_SYSTEM[generation]}{end}\n")
                system, _, expected = expected.partition(f"{end}\n")
                assert system.startswith(f"{start}system\n")
            assert found == expected


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("file", DATA)
def test_real_rows_are_encoded_as_ever(original: Original, generation: str, file: str) -> None:
    tokenizer = ChatTokenizer.load(original_tokenizer(original, generation))
    rows: list[Any] = [row for line, row in read_rows(str(original(file))) if line % 6 == 0]
    require_usual_encoding(tokenizer, rows)


def test_two_forms_of_real_rows_agree(original: Original, tokenizer_dir: Path) -> None:
    assert (
        require_two_forms_alike(tokenizer_dir, original(DATA[0]), original("data/dpo_en_sharegpt.json"), every=3) > 70
    )
