"""A model answers prompts, in batches, greedily or by sampling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import ConfigError, ModelError, fits
from minicache.pairs import Ints
from minicache.processes.devices import keeping_random_state


@dataclass(frozen=True)
class Sampling:
    """How answers are generated. temperature: 0 is greedy. batch_size: prompts answered at once."""

    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    batch_size: int


class Answer(NamedTuple):
    """The text of an answer. is_cut: it reached `max_new_tokens` before the model closed it."""

    text: str
    is_cut: bool


def answer_all(
    model: Any,
    tokenizer: ChatTokenizer,
    prompts: list[Ints],
    sampling: Sampling,
    advance: Callable[[int, int], None],
) -> list[Answer]:
    """The model's answers in the order of the prompts. The caller's random state stays as it is.

    prompts: (n,) ids each. advance: called after each batch with the number of prompts, and of tokens read and written.

    Raises:
        FullMemory: a batch does not fit in the device's memory.
    """
    ends = _end_ids(model, tokenizer)
    model.generation_config = _generation_config(ends, sampling)
    # prompts of similar length share a batch, which needs little padding
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers: dict[int, Answer] = {}
    with keeping_random_state(model.device), torch.inference_mode():
        torch.manual_seed(sampling.seed)
        for start in range(0, len(order), sampling.batch_size):
            batch = order[start : start + sampling.batch_size]
            generated = _generate(model, [prompts[index] for index in batch], ends)
            answers |= {index: _answer(ids, ends, tokenizer) for index, ids in zip(batch, generated, strict=True)}
            advance(len(batch), sum(len(prompts[index]) for index in batch) + sum(map(len, generated)))
    return [answers[index] for index in range(len(prompts))]


def require_fit(source: str, model: Any, prompts: list[Ints], max_new_tokens: int) -> None:
    """Refuse a token id or a position beyond the model's embeddings, either of which would crash inside the model.

    Raises:
        ModelError: a token id is too large.
        ConfigError: a prompt and its answer are too long.
    """
    known, largest = model.get_input_embeddings().num_embeddings, max(int(ids.max()) for ids in prompts)
    if largest >= known:
        raise ModelError(
            f"{source}: has {known} token embeddings, the policy's tokenizer gives token id {largest}; "
            "expected reference and policy to share a tokenizer"
        )
    room, longest = getattr(model.config, "max_position_embeddings", None), max(map(len, prompts))
    if room and longest + max_new_tokens > room:
        raise ConfigError(
            f"{source}: has room for {room} tokens, the longest prompt has {longest}, --max-new-tokens is "
            f"{max_new_tokens}; lower it or leave that prompt out"
        )


def _end_ids(model: Any, tokenizer: ChatTokenizer) -> list[int]:
    """Ids of the tokens that close an answer: the tokenizer's, and those that the model's generation config names."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(named if isinstance(named, list) else [named])}
    ends.add(tokenizer.backend.token_to_id(tokenizer.special.get("eos_token", "")))
    return sorted(ends - {None})


def _generation_config(ends: list[int], sampling: Sampling) -> Any:
    """The settings under which both models answer. Their own, such as Qwen's repetition penalty, are not used."""
    from transformers import GenerationConfig

    make: Any = GenerationConfig
    drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0} if sampling.temperature else {}
    return make(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=bool(drawn),
        eos_token_id=ends or None,
        pad_token_id=_padding(ends),
        **drawn,
    )


def _padding(ends: list[int]) -> int:
    return ends[0] if ends else 0


def _generate(model: Any, prompts: list[Ints], ends: list[int]) -> list[list[int]]:
    """The new token ids of each prompt of a batch, up to and including the one that closes the answer."""
    width = max(map(len, prompts))
    # (B, width) int64, padded on the left
    inputs = torch.full((len(prompts), width), _padding(ends))
    mask = torch.zeros_like(inputs)
    for row, ids in enumerate(prompts):
        inputs[row, width - len(ids) :] = torch.from_numpy(ids.astype("int64"))
        mask[row, width - len(ids) :] = 1
    asked = f"answering {len(prompts)} prompts of up to {width} tokens at once"
    with fits(asked, f"--batch-size {max(len(prompts) // 2, 1)}, or a lower --max-new-tokens"):
        output = model.generate(inputs.to(model.device), attention_mask=mask.to(model.device))[:, width:].tolist()
    return [_until_end(ids, ends) for ids in output]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if end is None else ids[: end + 1]


def _answer(ids: list[int], ends: list[int], tokenizer: ChatTokenizer) -> Answer:
    text, is_cut = tokenizer.decode(ids, special=False).strip(), ids[-1] not in ends
    # the cut may fall within a character of several tokens
    return Answer(text.rstrip("\ufffd") if is_cut else text, is_cut)
