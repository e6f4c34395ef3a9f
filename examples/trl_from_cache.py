"""TRL's DPOTrainer trains from an exported reference cache: no reference model is loaded, no pass made over the data.

    minidpo precompute-ref --model MODEL --data pairs.jsonl --ref-cache cache/
    minidpo export --ref-cache cache/ --out pairs.parquet
    python examples/trl_from_cache.py --model MODEL --pairs pairs.parquet --out run/

TRL 1.16 tokenizes every data set anew, and with `precompute_ref_log_probs` scores it anew, whatever columns it has. Both steps
are a method each, and here they return the data set as it is: its columns already have the names that they would give them.
"""

import argparse
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer

COLUMNS = ["prompt_ids", "chosen_ids", "rejected_ids", "ref_chosen_logps", "ref_rejected_logps"]


class CachedDPOTrainer(DPOTrainer):
    """Takes token ids and the reference's sums from the data set. The pairs must be cut to length already: max_length=None."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        masked = [side for side in ("chosen", "rejected") if not counts_whole_answers(dataset, side)]
        if masked:
            raise ValueError(
                f"expected pairs in which just the answers count (--loss-on response), got others: {masked}"
            )
        return dataset.select_columns(COLUMNS)

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset


def counts_whole_answers(dataset: Dataset, side: str) -> bool:
    """TRL sums over all of an answer and nothing else; sums over other tokens would be compared with those."""
    return all(
        mask == [0] * len(prompt) + [1] * len(answer)
        for prompt, answer, mask in zip(
            dataset["prompt_ids"], dataset[f"{side}_ids"], dataset[f"{side}_loss_mask"], strict=True
        )
    )


def trainer_for(model: str, pairs: str, out: str, **options: Any) -> CachedDPOTrainer:
    """A trainer on a parquet file of `minidpo export`. options: of DPOConfig."""
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
    gpu = torch.cuda.is_available()  # TRL's default is bfloat16, which it refuses elsewhere
    trainer = trainer_for(arguments.model, arguments.pairs, arguments.out, report_to="none", bf16=gpu, use_cpu=not gpu)
    trainer.train()
    trainer.save_model()
