"""The token ids of rows of strings, as TRL 1.16.0 makes them, in plain Python on a transformers tokenizer.

After `DPOTrainer._prepare_dataset` (trl/trainer/dpo_trainer.py: `add_eos`, `tokenize_fn`) with `_tokenize` and
`common_prefix_length` of trl/data_utils.py. tests/data/test_trl_plain.py compares it with TRL itself where that is installed.
"""

from typing import Any


def trl_ids(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int], list[int], bool]:
    """The ids of the prompt, of chosen's and of rejected's completion, and whether those of the prompt alone begin both sides."""
    end = tokenizer.eos_token
    answers = [row[side] if row[side].endswith(end) else row[side] + end for side in ("chosen", "rejected")]
    # With the special tokens that the tokenizer adds by itself, and with those that the text spells.
    alone, chosen, rejected = (
        tokenizer(text=text)["input_ids"] for text in (row["prompt"], *(row["prompt"] + answer for answer in answers))
    )
    shared = 0
    while shared < len(alone) and alone[: shared + 1] == chosen[: shared + 1] == rejected[: shared + 1]:
        shared += 1
    return alone[:shared], chosen[shared:], rejected[shared:], shared == len(alone)
