"""Reference and policy answer the same prompts side by side, greedily."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minicache.config import CompareConfig
from minicache.data.records import Turn
from minicache.data.tokenizers import ChatTokenizer
from minicache.distributed import World
from minicache.errors import ConfigError, DataError
from minicache.models import load_model
from minicache.runs import policy_source, run_facts
from minicache.trackers import Tracker


@dataclass(frozen=True)
class Answers:
    """What both say to one prompt."""

    prompt: str
    reference: str
    policy: str


def compare(config: CompareConfig, world: World, tracker: Tracker) -> list[Answers]:
    """Raises MinicacheError: a model or the prompts cannot be read, or the reference is not known."""
    prompts = [*config.prompt, *_read_prompts(config.prompts)]
    policy = policy_source(config.policy)
    reference = config.reference or _reference_of(config.policy)
    tokenizer = ChatTokenizer.load(Path(policy))
    answers = []
    for source in (reference, policy):
        tracker.begin(f"loading {source}", None)
        model = load_model(source, config.trust_remote_code).model.to(world.device)
        tracker.begin(f"answering as {source}", len(prompts))
        answers.append([_answer(model, tokenizer, prompt, config.max_new_tokens, tracker) for prompt in prompts])
        del model
    return [Answers(*item) for item in zip(prompts, *answers, strict=True)]


def _read_prompts(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--prompts {file}: cannot be read: {error}") from error
    if not lines:
        raise DataError(f"--prompts {file}: expected one prompt a line, found none")
    return lines


def _reference_of(run: str) -> str:
    """What the run started from."""
    source = run_facts(run).get("started_from")
    if source is None:
        raise ConfigError(f"{run} is no run directory that says what it started from; add --reference MODEL")
    return source


def _answer(model: Any, tokenizer: ChatTokenizer, prompt: str, max_new_tokens: int, tracker: Tracker) -> str:
    text = tokenizer.render((Turn("user", prompt),), open_answer=True)
    ((ids, _),) = tokenizer.encode([text])
    inputs = torch.from_numpy(ids).long()[None].to(model.device)
    end = tokenizer.backend.token_to_id(tokenizer.special.get("eos_token", ""))
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end if end is not None else 0,
        )
    tracker.advance(1, output.shape[1])
    return tokenizer.backend.decode(output[0, len(ids) :].tolist(), skip_special_tokens=True).strip()
