"""Adapters as other people's programs make them: by peft alone, with factors that change something."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def sft_adapter(
    base: Path,
    out: Path,
    seed: int = 0,
    kind: str = "LoraConfig",
    before: Callable[[Any], None] | None = None,
    **settings: Any,
) -> Path:
    """An adapter directory of peft, with random factors; no tokenizer. before: changes the base, as a resize does."""
    import peft
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if before:
            before(model)
        given = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **settings}
        # kinds without targets
        given = {name: value for name, value in given.items() if value != ()}
        torch.manual_seed(seed)
        adapted: Any = peft.get_peft_model(model, getattr(peft, kind)(**given))
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        adapted.save_pretrained(out)
    return out


@torch.no_grad()
def logits_elsewhere(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    """(length, vocabulary) logits of what peft and transformers alone open."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.AutoPeftModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    found: torch.Tensor = model.eval()(input_ids=ids).logits[0]
    return found
