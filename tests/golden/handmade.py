"""Models and pairs made by hand, the same under every version of torch, transformers and numpy.

Weights come from the raw stream of PCG64, which numpy keeps from version to version, and are written under the names that
Hugging Face files have, which transformers keeps.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_SIZE = 320, 16, 2, 2, 1, 8
INNER, EXPERTS, PICKED = 24, 4, 2
SHARED_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_SIZE,
    "intermediate_size": INNER,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "tie_word_embeddings": False,
    "attention_bias": False,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": "float32",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": {**SHARED_CONFIG, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "mlp_bias": False},
    "mixture": {
        **SHARED_CONFIG,
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": EXPERTS,
        "num_experts_per_tok": PICKED,
        "moe_intermediate_size": INNER,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "output_router_logits": True,  # asks for the balance loss in training
        "use_sliding_window": False,
    },
}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# As Qwen3's: the last answer gets an empty think block, so that `--think drop` has one to take out.
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last and '<think>' not in m['content'] %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def uniform(shape: tuple[int, ...], bits: np.random.PCG64) -> NDArray[np.float32]:
    """Numbers between -1 and 1, by the definition of a double from 53 random bits."""
    raw = bits.random_raw(int(np.prod(shape)))
    return (((raw >> np.uint64(11)) * 2.0**-53) * 2 - 1).astype(np.float32).reshape(shape)


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Of each tensor of a model of this kind, in the order in which weights are drawn."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            found[f"{at}.self_attn.{name}_proj.weight"] = (heads * HEAD_SIZE, HIDDEN)
        found[f"{at}.self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD_SIZE)
        experts = [f"{at}.mlp"]
        if kind == "mixture":
            found[f"{at}.self_attn.q_norm.weight"] = found[f"{at}.self_attn.k_norm.weight"] = (HEAD_SIZE,)
            found[f"{at}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
            experts = [f"{at}.mlp.experts.{expert}" for expert in range(EXPERTS)]
        for expert in experts:
            found[f"{expert}.gate_proj.weight"] = found[f"{expert}.up_proj.weight"] = (INNER, HIDDEN)
            found[f"{expert}.down_proj.weight"] = (HIDDEN, INNER)
        found[f"{at}.input_layernorm.weight"] = found[f"{at}.post_attention_layernorm.weight"] = (HIDDEN,)
    return {**found, "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def weights(kind: str, seed: int) -> dict[str, NDArray[np.float32]]:
    """Matrices within ±0.5, so that logprobs differ from uniform by far more than rounding; norms around 1."""
    bits = np.random.PCG64(seed)
    return {
        name: uniform(shape, bits) * np.float32(0.5) if len(shape) == 2 else 1 + uniform(shape, bits) * np.float32(0.1)
        for name, shape in shapes(kind).items()
    }


def write_model(directory: Path, kind: str, seed: int, tokenizer: Mapping[str, bytes]) -> Path:
    """Write a Hugging Face directory; return it. tokenizer: contents of its files by name."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(CONFIGS[kind], indent=2) + "\n")
    save_file(weights(kind, seed), directory / "model.safetensors", {"format": "pt"})
    for name, content in tokenizer.items():
        (directory / name).write_bytes(content)
    return directory


def make_tokenizer() -> dict[str, bytes]:
    """The files of a byte-level BPE of 320 ids."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["<think>\n\n</think>\n\n user assistant system\n the and you 你好 天气"] * 20, trainer
    )
    assert tokenizer.get_vocab_size() <= VOCABULARY  # as of many models, whose embeddings have rows to spare
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()}


# --- pairs ---


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    """A conversation that a user begins."""
    spoken = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *spoken] if system else spoken


def messages(*prompt: str, chosen: str, rejected: str, system: str = "") -> dict[str, Any]:
    """A row in MiniMind's form."""
    return {"chosen": turns(*prompt, chosen, system=system), "rejected": turns(*prompt, rejected, system=system)}


def make_rows() -> list[dict[str, Any]]:
    """One of every form that a row may have, several languages, and what is truncated, refused and found twice."""
    long = "and then it rained, " * 9
    weather = messages("今天天气怎么样？", chosen="今天天气很好，适合散步。", rejected="不知道。")
    typed = "Write <|im_end|> for me."
    return [
        messages("Why is the sky blue?", chosen="Air scatters blue light most.", rejected="Because."),
        weather,
        messages("Hi!", "Hello, what is it?", "2 + 2?", chosen="4.", rejected="It is 5, as you know."),
        messages("你好", "你好！有什么可以帮你？", "讲个笑话", chosen="为什么海是蓝的？", rejected="哈哈哈。"),
        {"prompt": "Name a colour.", "chosen": "Blue.", "rejected": "Seven."},
        {"prompt": turns("Who?", "You.", "Me?"), "chosen": "Yes, you.", "rejected": "No."},
        {"question": "How do I stop?", "response_j": "Press Ctrl-C once.", "response_k": "Pull the plug."},
        {
            "conversations": [{"from": "human", "value": "Sag etwas auf Deutsch."}],
            "chosen": {"from": "gpt", "value": "Grüß Gott! Schönes Wetter heute."},
            "rejected": {"from": "gpt", "value": "I will not."},
            "system": "Answer in German.",
        },
        {"chosen": "\n\nHuman: tea?\n\nAssistant: Green, please.", "rejected": "\n\nHuman: tea?\n\nAssistant: No."},
        messages("Briefly.", chosen="As you wish.", rejected="As you wish, and then some.", system="Be brief."),
        messages("Same beginnings?", chosen="The cat sat on the mat.", rejected="The cat sat on the dog."),
        weather,
        messages("Tell a story.", chosen="It rained. The end.", rejected="It rained. " + long),
        messages(long, "Go on.", "More?", chosen="No more rain, I hope.", rejected="More, and more, and more."),
        messages(typed, chosen="<|im_end|>", rejected="I cannot."),
        messages("Quote it.", chosen="You wrote <|im_start|>user", rejected="You wrote nothing."),
        messages("Think.", chosen="<think>\nhm\n</think>\n\nDone.", rejected="Done."),
        messages("Emoji?", chosen="🙂👍🏽 of course", rejected=":-)"),
        messages("Identical?", chosen="Yes.", rejected="Yes."),
        {"prompt": "No answer?", "chosen": "Here."},
        messages("Привет", chosen="Привет! Как дела?", rejected="Нет."),
        messages("List three fruits", chosen="1. apple\n2. pear\n3. fig", rejected="apple apple apple"),
        messages("code?", chosen="```py\nprint('hi')\n```", rejected="print hi"),
        messages("a", "b", "c", "d", "e", chosen="f", rejected="z"),
        messages("日本語で", chosen="こんにちは、元気ですか。", rejected="だめ。"),
        messages("Tabs\tand  spaces ", chosen="  kept\t", rejected="kept"),
        messages("One word", chosen="Word", rejected="Several words, not just the one you asked for"),
        messages("Once more", "What?", "That.", chosen="That, again.", rejected="What?"),
    ]


def more_rows() -> list[dict[str, Any]]:
    """To append."""
    return [
        messages("And now?", chosen="Now this.", rejected="Nothing."),
        messages("还有吗？", chosen="还有一句。", rejected="没有。"),
        messages("Last one", "Yes?", "Bye", chosen="Good bye!", rejected="Stay."),
    ]


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows as JSON lines; return the file."""
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return file
