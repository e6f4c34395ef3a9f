"""Reference and policy answer the same prompts: side by side on the screen, as JSON lines, or as a page for blind votes."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from minicache.data.tokenizers import ChatTokenizer
from minicache.disk import check_writable, written_whole
from minicache.errors import ConfigError, ModelError
from minicache.intake.prompts import Prompt, read_prompts
from minicache.models import load_model
from minicache.options.others import CompareConfig
from minicache.pages.compare import Answers, page
from minicache.pairs import Ints
from minicache.processes.world import World
from minicache.trackers import Tracker
from minicache.training.run_directory import policy_source, run_behind


@dataclass(frozen=True)
class _Speaker:
    """A model that answers. ends: token ids that close an answer."""

    model: Any
    tokenizer: ChatTokenizer
    ends: list[int]


def compare(config: CompareConfig, world: World, tracker: Tracker) -> list[Answers]:
    """Both models' answers to every prompt; written to `config.jsonl` and `config.html` where named.

    Raises:
        MinicacheError: a model or the prompts cannot be read, the two do not fit, or the reference is not known.
    """
    for file in filter(None, (config.jsonl, config.html)):
        check_writable(file)
    policy = policy_source(config.policy)
    reference = config.reference or _reference_of(config.policy)
    tokenizer = ChatTokenizer.load(Path(policy))
    prompts = read_prompts(config, tokenizer)
    replies = []
    for source in (reference, policy):
        tracker.begin(f"loading {source}", None)
        loaded = load_model(source, config.trust_remote_code)
        _check_fits(source, loaded.model, prompts, config.max_new_tokens)
        speaker = _Speaker(loaded.model.to(world.device), tokenizer, _ends(loaded.model, tokenizer))
        tracker.begin(f"answering as {source}", len(prompts))
        replies.append(_answer_all(speaker, prompts, config, tracker))
        del loaded, speaker
    answers = [
        Answers(prompt.text, [asdict(turn) for turn in prompt.turns], before[0], after[0], before[1], after[1])
        for prompt, before, after in zip(prompts, *replies, strict=True)
    ]
    _note_cut(answers, config, tracker)
    _write(answers, config, {"reference": reference, "policy": config.policy})
    return answers


def _reference_of(run: str) -> str:
    """What the run started from."""
    behind = run_behind(run)
    if behind is None:
        raise ConfigError(f"{run} is no run directory that says what it started from; add --reference MODEL")
    return behind.started_from


def _check_fits(source: str, model: Any, prompts: list[Prompt], max_new_tokens: int) -> None:
    """A token the model does not know, or a position it does not have, would be a crash deep inside it."""
    known, largest = model.get_input_embeddings().num_embeddings, max(int(prompt.ids.max()) for prompt in prompts)
    if largest >= known:
        raise ModelError(
            f"{source}: knows {known} tokens, the policy's tokenizer gives token id {largest}; "
            "expected reference and policy to share a tokenizer"
        )
    room, longest = getattr(model.config, "max_position_embeddings", None), max(len(prompt.ids) for prompt in prompts)
    if room and longest + max_new_tokens > room:
        raise ConfigError(
            f"{source}: has room for {room} tokens, the longest prompt has {longest}, --max-new-tokens is "
            f"{max_new_tokens}; lower it or leave that prompt out"
        )


def _ends(model: Any, tokenizer: ChatTokenizer) -> list[int]:
    """The tokenizer's closing token, and what the model's own settings name beside it."""
    named = getattr(model.generation_config, "eos_token_id", None)
    ends = {*(named if isinstance(named, list) else [named])}
    ends.add(tokenizer.backend.token_to_id(tokenizer.special.get("eos_token", "")))
    return sorted(ends - {None})


def _answer_all(
    speaker: _Speaker, prompts: list[Prompt], config: CompareConfig, tracker: Tracker
) -> list[tuple[str, bool]]:
    """Of each prompt, in their order: the answer, and whether it was cut at --max-new-tokens."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index].ids))  # alike lengths: little padding
    replies: dict[int, tuple[str, bool]] = {}
    on_gpu = [speaker.model.device] if speaker.model.device.type == "cuda" else []
    with torch.random.fork_rng(on_gpu), torch.inference_mode():
        torch.manual_seed(config.seed)
        for start in range(0, len(order), config.batch_size):
            batch = order[start : start + config.batch_size]
            said = _answer([prompts[index].ids for index in batch], speaker, config)
            replies |= {index: _text(ids, speaker) for index, ids in zip(batch, said, strict=True)}
            tracker.advance(len(batch), sum(len(prompts[index].ids) for index in batch) + sum(map(len, said)))
    return [replies[index] for index in range(len(prompts))]


def _answer(prompts: list[Ints], speaker: _Speaker, config: CompareConfig) -> list[list[int]]:
    """The new token ids of each prompt of a batch, up to and with the one that closes the answer."""
    from transformers import GenerationConfig

    width, pad = max(map(len, prompts)), speaker.ends[0] if speaker.ends else 0
    inputs = torch.full((len(prompts), width), pad)  # (B, width) int64, padded on the left
    mask = torch.zeros_like(inputs)
    for row, ids in enumerate(prompts):
        inputs[row, width - len(ids) :] = torch.from_numpy(ids.astype("int64"))
        mask[row, width - len(ids) :] = 1
    sampling = {"temperature": config.temperature, "top_p": config.top_p, "top_k": 0} if config.temperature else {}
    # The model's own settings (Qwen's repetition penalty, say) are left out: both are to answer under the same ones.
    speaker.model.generation_config = GenerationConfig(
        max_new_tokens=config.max_new_tokens,
        do_sample=bool(sampling),
        eos_token_id=speaker.ends or None,
        pad_token_id=pad,
        **sampling,
    )
    device = speaker.model.device
    output = speaker.model.generate(inputs.to(device), attention_mask=mask.to(device))[:, width:].tolist()
    return [_until_end(ids, speaker.ends) for ids in output]


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(ids) if token in ends), None)
    return ids if end is None else ids[: end + 1]


def _text(ids: list[int], speaker: _Speaker) -> tuple[str, bool]:
    text, cut = speaker.tokenizer.backend.decode(ids, skip_special_tokens=True).strip(), ids[-1] not in speaker.ends
    return text.rstrip("\ufffd") if cut else text, cut  # the cut may go through a character of several tokens


def _note_cut(answers: list[Answers], config: CompareConfig, tracker: Tracker) -> None:
    cut = sum(item.reference_cut + item.policy_cut for item in answers)
    if cut:
        tracker.note(f"{cut} of {2 * len(answers)} answers were cut at --max-new-tokens {config.max_new_tokens}")


def _write(answers: list[Answers], config: CompareConfig, names: dict[str, str]) -> None:
    """The files asked for; `names` says who is the reference and who the policy."""
    asked = ("system", "max_new_tokens", "temperature", "top_p", "seed", "batch_size")
    settings = {name: getattr(config, name) for name in asked}
    if config.jsonl:
        lines = [{**asdict(item), "models": names, "settings": settings} for item in answers]
        with written_whole(config.jsonl) as draft:
            draft.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    if config.html:
        with written_whole(config.html) as draft:
            draft.write_text(page(answers, names, settings, config.seed), encoding="utf-8")
