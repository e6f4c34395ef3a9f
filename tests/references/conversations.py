"""Tokenizers, chat templates and loss masks of each generation, as its DPO training uses them, without their tools.

A tokenizer is a byte-level BPE of at most 400 ids, trained here, its first ids the same special tokens as the original's. A
template renders the same conversations alike, but for the words of its own default system turn.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY = 400
EMPTY_THINK = "<think>\n\n</think>\n\n"
DEFAULT_SYSTEM = {"minimind2-2504": "你是测试里的助手。", "minimind2-2510": "You answer the tests", "minimind3": None}

# A question brings the header of its answer along, and nothing opens an answer otherwise.
TEMPLATE_2504 = (
    "{% set given = messages[0].role == 'system' %}"
    "{{ '<s>system\n' ~ (messages[0].content if given else 'DEFAULT') ~ '</s>\n' }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<s>user\n' ~ m.content ~ '</s>\n<s>assistant\n' }}{% endif %}"
    "{% if m.role == 'assistant' %}{{ m.content ~ '</s>\n' }}{% endif %}"
    "{% endfor %}"
).replace("DEFAULT", str(DEFAULT_SYSTEM["minimind2-2504"]))
TEMPLATE_2510 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nDEFAULT<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\n' ~ m.content ~ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
).replace("DEFAULT", str(DEFAULT_SYSTEM["minimind2-2510"]))
# Every answer has a think block: what was thought, or nothing. Results of tools are a user's turn.
TEMPLATE_3 = (
    "{% if tools %}"
    "{{ '<|im_start|>system\n' ~ (messages[0].content ~ '\n\n' if messages[0].role == 'system' else '') ~ 'The tools:' }}"
    "{% for tool in tools %}{{ '\n' ~ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{% if loop.first or loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' ~ m.content ~ '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% elif not (tools and loop.first and m.role == 'system') %}"
    "{{ '<|im_start|>' ~ m.role ~ '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set content = m.content if m.content is string else '' %}"
    "{% set parts = ['', content] if m.reasoning_content is string else content.split('</think>') %}"
    "{% set thoughts = parts[0].split('<think>')[-1] if parts | length > 1 else '' %}"
    "{% set thoughts = m.reasoning_content if m.reasoning_content is string else thoughts %}"
    "{{ '<think>\n' ~ thoughts.strip('\n') ~ '\n</think>\n\n' ~ parts[-1].lstrip('\n') }}"
    "{% for call in m.tool_calls or [] %}"
    "{% if parts[-1] or not loop.first %}{{ '\n' }}{% endif %}"
    "{% set call = call.function or call %}"
    '{{ \'<tool_call>\n{"name": "\' ~ call.name ~ \'", "arguments": \' }}'
    "{{ (call.arguments if call.arguments is string else call.arguments | tojson) ~ '}\n</tool_call>' }}"
    "{% endfor %}"
    "{% else %}{{ m.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' ~ ('<think>\n' if open_thinking else '<think>\n\n</think>\n\n') }}"
    "{% endif %}"
)


@dataclass(frozen=True)
class ChatFormat:
    """How a generation renders conversations, and which tokens of them its DPO training counts.

    special: its special tokens, the beginning of a turn second, its end third. words: further tokens that are not marked special.
    header, closing: what counts stands between them. skipped: tokens after each that still belong to it (a line break).
    """

    template: str
    special: tuple[str, str, str]
    header: str
    closing: str
    skipped: int
    words: tuple[str, ...] = ()


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_FORMATS = {
    "minimind2-2504": ChatFormat(TEMPLATE_2504, ("<unk>", "<s>", "</s>"), "<s>assistant", "</s>", 1),
    "minimind2-2510": ChatFormat(TEMPLATE_2510, CHATML, "<|im_start|>assistant", "<|im_end|>", 1),
    "minimind3": ChatFormat(
        TEMPLATE_3, CHATML, "<|im_start|>assistant\n", "<|im_end|>\n", 0, ("<tool_call>", "</tool_call>", "<think>", "</think>")
    ),
}  # fmt: skip


def save_tokenizer(generation: str, words: list[str], directory: Path) -> Path:
    """Train a tokenizer on `words` and write its files. Returns the directory."""
    chat_format = CHAT_FORMATS[generation]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[
            *chat_format.special,
            *(AddedToken(word, special=False, normalized=False) for word in chat_format.words),
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(words), "system user\n\nassistant\n", "the\n  cat"]  # of the last a token for "\n "
    tokenizer.train_from_iterator(texts * 20, trainer)
    directory.mkdir(parents=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    padding, start, end = chat_format.special
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": start, "eos_token": end}
    config |= {"pad_token": padding, "unk_token": padding, "chat_template": chat_format.template}
    (directory / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")
    return directory


def assistant_mask(ids: list[int], header: list[int], closing: list[int], skipped: int) -> list[int]:
    """1 for each id that DPODataset counts: from `skipped` ids after a header to `skipped` ids after its closing, or to the end.

    The ids become characters, so that a regular expression can find the spans.
    """
    text, start, end = ("".join(map(chr, part)) for part in (ids, header, closing))
    mask = [0] * len(ids)
    for found in re.finditer(f"{re.escape(start)}.*?(?:{re.escape(end)}|\\Z)", text, re.DOTALL):
        span = slice(found.start() + len(header) + skipped, found.end() + skipped)
        mask[span] = [1] * len(mask[span])
    return mask


def encode(
    tokenizer: Any, generation: str, messages: list[dict[str, Any]], max_length: int, think: str = "keep"
) -> tuple[list[int], list[int]]:
    """The ids and loss mask of one side of a pair, as DPODataset makes them but for padding.

    tokenizer: of transformers. think: "drop" removes every empty think block, as the third generation does at random. Calls and
    the tools in a system turn may be JSON text, as SFTDataset.create_chat_prompt reads them.
    """
    chat_format = CHAT_FORMATS[generation]
    tools, messages = None, [dict(message) for message in messages]
    for message in messages:
        if message["role"] == "system" and message.get("tools"):
            tools = _from_json(message["tools"])
        if message.get("tool_calls"):
            message["tool_calls"] = _from_json(message["tool_calls"])
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False, tools=tools)
    text = text.replace(EMPTY_THINK, "") if think == "drop" else text
    ids, header, closing = (tokenizer(part)["input_ids"] for part in (text, chat_format.header, chat_format.closing))
    ids = ids[:max_length]
    return ids, assistant_mask(ids, header, closing, chat_format.skipped)


def _from_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


def shifted(ids: list[int], mask: list[int]) -> tuple[list[int], list[int], list[int]]:
    """What the model reads, what each place is to predict, and whether that counts: a token is predicted from those before it."""
    return ids[:-1], ids[1:], mask[1:]
