"""Train TRL's DPOTrainer from an exported reference cache, without a reference model or a pass over the data.

    minidpo precompute-ref --model MODEL --data pairs.jsonl --ref-cache cache/
    minidpo export --ref-cache cache/ --out pairs.parquet
    python examples/trl_from_cache.py --model MODEL --pairs pairs.parquet --out run/

TRL 1.16 always tokenizes a data set and, with `precompute_ref_log_probs`, scores it, even if it has the columns already. Each of
these steps is a method, which here returns the data set as it is: its columns have the names that the methods would give them.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]


class CachedDPOTrainer(DPOTrainer):
    """Uses the token ids and reference logprobs of the data set, whose pairs are truncated already: needs max_length=None."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        masked = [side for side in ("chosen", "rejected") if not counts_whole_answers(dataset, side)]
        if masked:
            raise ValueError(
                f"expected pairs in which exactly the answers count (--loss-on response), got others: {masked}"
            )
        return dataset.select_columns(COLUMNS)

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def counts_whole_answers(dataset: Dataset, side: str) -> bool:
    """Whether exactly the tokens of the answers count. TRL sums over these, so the reference sums must be over the same."""
    return all(
        mask == [0] * len(prompt) + [1] * len(answer)
        for prompt, answer, mask in zip(
            dataset["prompt_ids"], dataset[f"{side}_ids"], dataset[f"{side}_loss_mask"], strict=True
        )
    )


def trainer_for(model: str, pairs: str, out: str, **options: Any) -> CachedDPOTrainer:
    """A trainer on a parquet file from `minidpo export`. options: for DPOConfig."""
    return CachedDPOTrainer(
        model,
        args=DPOConfig(out, precompute_ref_log_probs=True, max_length=None, **options),
        train_dataset=load_dataset("parquet", data_files=pairs, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--pairs", "--out"):
        parser.add_argument(name, required=True)
    arguments = parser.parse_args()
    # TRL's default is bfloat16, which it refuses without a GPU
    gpu = torch.cuda.is_available()
    trainer = trainer_for(arguments.model, arguments.pairs, arguments.out, report_to="none", bf16=gpu, use_cpu=not gpu)
    trainer.train()
    trainer.save_model()
