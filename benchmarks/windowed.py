"""Stage one of families whose attention has windows: pairs a CPU second in the layout that `auto` takes beside padded rows.

    python -m benchmarks.windowed --tokenizer DIR [--data pairs.jsonl] [--pairs 32] [--rounds 3] [--only gemma2,gpt_oss]

A few layers with random weights, at a width where matrix products dominate; windows as published. Both layouts score the same
pairs in batches of similar length; a third way scores padded rows in the order of the file, as trainers with a live reference do.
Rounds alternate between the three. Results are written to benchmarks/results/windowed.json.
"""

import argparse
import operator
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.case import read_pairs
from benchmarks.measure import command_line, machine
from benchmarks.results import publish
from minicache.models.load import save_tokenizer
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.layout import settle_layout
from minicache.scoring.scorer import Scorer
from minicache.scoring.tables import score_table
from minicache.trackers import Silent

SIZE = {
    "vocab_size": 6400, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 96, "max_position_embeddings": 8192, "initializer_range": 0.06,
    "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
# family -> its settings, with a window as a published model has it
FAMILIES: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 4096},
    "mixtral": {"sliding_window": 4096, **EXPERTS},
    "phi3": {"sliding_window": 2047},
    "starcoder2": {"sliding_window": 4096},
    "gemma2": {"sliding_window": 4096, "attn_logit_softcapping": 50.0, "query_pre_attn_scalar": 96, **MIXED},
    "gemma3_text": {"sliding_window": 512, "query_pre_attn_scalar": 96, **MIXED},
    "gemma3n_text": {
        "sliding_window": 512, "num_hidden_layers": 4, "layer_types": MIXED["layer_types"] * 2, "intermediate_size": [2048] * 4,
        "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 6400, "num_kv_shared_layers": 2, "laurel_rank": 16,
        "altup_num_inputs": 2, "altup_active_idx": 0, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gemma4_text": {
        "sliding_window": 512, "hidden_size_per_layer_input": 64, "vocab_size_per_layer_input": 6400, "global_head_dim": 96,
        "num_global_key_value_heads": 4, "num_kv_shared_layers": 0, **MIXED,
    },
    "cohere2": {"sliding_window": 4096, **MIXED},
    "olmo3": {"sliding_window": 4096, **MIXED},
    "exaone4": {"sliding_window": 4096, **MIXED},
    "ministral": {"sliding_window": 4096, **MIXED},
    "gpt_oss": {"sliding_window": 128, **EXPERTS, **MIXED},
    "llama": {},
}  # fmt: skip
CPU = torch.device("cpu")
COLUMNS = [
    "family", "window", "layout", "pairs / CPU second", "over padded, by length", "token slots", "over padded, in order",
    "token slots", "values differ",
]  # fmt: skip
# Pairs of a batch in the order of the file.
IN_ORDER = 8


def model_of(family: str) -> Any:
    """A model with random weights, in eval mode."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**SIZE, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def in_order(scorer: Scorer, table: PairTable) -> Iterator[tuple[Any, Any, Any]]:
    """As `score_table`, the pairs in their order."""
    for start in range(0, len(table), IN_ORDER):
        indices = np.arange(start, min(start + IN_ORDER, len(table)))
        batch = scorer.layout.make(table, indices)
        with torch.no_grad():
            yield indices, batch, scorer(batch)


def measure(family: str, table: PairTable, rounds: int) -> dict[str, Any]:
    """Pairs a second in our layout, its ratios to padded rows, those of token slots, the largest difference of a mean logprob."""
    scorer = Scorer(model_of(family), "float32")
    seconds: dict[str, list[float]] = {"padded": [], "auto": [], "in order": []}
    slots, means = dict.fromkeys(seconds, 0), {}
    for asked in [name for _ in range(rounds) for name in seconds]:
        settle_layout(scorer, table, "padded" if asked == "in order" else asked, World(0, 1, CPU), Silent())
        if asked == "auto":
            chosen = scorer.layout_name
        started, found = time.process_time(), np.zeros((len(table), 2))
        slots[asked] = 0
        everything = score_table(scorer, table, np.arange(len(table)), None, CPU)
        for indices, batch, scores in in_order(scorer, table) if asked == "in order" else everything:
            slots[asked] += batch.input_ids.numel()
            found[indices] = scores.logp_mean.numpy()
        seconds[asked].append(time.process_time() - started)
        means[asked] = found
    return {
        "layout": chosen,
        "own": len(table) / median(seconds["auto"]),
        "differ": float(max(np.abs(each - means["auto"]).max() for each in means.values())),
        **{
            way: (median(map(operator.truediv, seconds[way], seconds["auto"])), slots[way] / slots["auto"])
            for way in ("padded", "in order")
        },
    }


def main() -> None:
    """Print a row a family, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--data", default="../shared/data/dpo_en_chat.jsonl")
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    directory = Path(mkdtemp(prefix="minidpo-bench-"))
    save_tokenizer(options.tokenizer, directory, None)
    whole = read_pairs(options, directory)
    count = min(options.pairs, len(whole))
    table = PairTable.from_pairs(whole.take(np.arange(count) * len(whole) // count), "int32")
    # the ids may be any for speed, but must exist
    table = replace(table, tokens=table.tokens % SIZE["vocab_size"])
    where, rows = machine(), []
    for family in [name for name in options.only.split(",") if name] or FAMILIES:
        found = measure(family, table, options.rounds)
        window = str(FAMILIES[family].get("sliding_window", "none"))
        ratios = [f"{each:.2f}" for way in ("padded", "in order") for each in found[way]]
        rows.append([family, window, found["layout"], f"{found['own']:.2f}", *ratios, f"{found['differ']:.1e}"])
        print(*rows[-1], sep=" | ", flush=True)
    report = {
        "what": f"Two or four layers of width {SIZE['hidden_size']} with random weights, float32; {count} pairs of "
        f"{options.data}, the longest side {table.side_lengths.max()} tokens. Stage one in the layout that `auto` takes, over "
        f"padded rows in batches of similar length, and over padded rows in the order of the file, {IN_ORDER} pairs a batch; "
        f"medians of {options.rounds} rounds, in seconds of CPU time. Beside each ratio stands that of the token slots. The last "
        "column is the largest difference of a mean logprob between the layouts, nats per token.",
        "machine": where,
        "command": command_line("windowed"),
        "table": [COLUMNS, rows],
    }
    publish("windowed", report, Console())


if __name__ == "__main__":
    main()
