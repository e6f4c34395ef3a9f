"""How TRL 1.16 tokenizes rows of strings: trl/trainer/dpo_trainer.py, DPOTrainer._prepare_dataset, `add_eos` and `tokenize_fn`."""

from typing import Any


def plain_text_ids(tokenizer: Any, row: dict[str, str]) -> dict[str, list[int]]:
    """`prompt_ids`, `chosen_ids`, `rejected_ids` of a row, by a tokenizer of transformers."""
    answers = {
        side: row[side] if row[side].endswith(tokenizer.eos_token) else row[side] + tokenizer.eos_token
        for side in ("chosen", "rejected")
    }
    prompt = tokenizer(text=row["prompt"])["input_ids"]
    whole = {side: tokenizer(text=row["prompt"] + answer)["input_ids"] for side, answer in answers.items()}
    shared = min(_common(prompt, ids) for ids in whole.values())
    return {"prompt_ids": prompt[:shared], **{f"{side}_ids": ids[shared:] for side, ids in whole.items()}}


def _common(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
