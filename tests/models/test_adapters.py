"""Adapters as people hold them: loaded as peft loads them, whole, or refused by name."""

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minicache.cache.reader import ReferenceCache
from minicache.data.tokenizers import ChatTokenizer
from minicache.errors import ConfigError, ModelError
from minicache.models import load_model, save_model, save_tokenizer
from minicache.models.adapter_targets import targets
from minicache.models.lora import add_lora
from minicache.options.lora import LoraOptions
from minicache.trackers import Silent
from tests.conftest import Cli, make_rows, precompute_into, tiny_llama, write_jsonl
from tests.helpers.adapters import logits_elsewhere, sft_adapter
from tests.zoo.check import Notes
from tests.zoo.families import families
from tests.zoo.weights import make, nothing_left_to_chance, perturb

pytest.importorskip("peft", reason="needs peft: pip install '.[lora]'")
IDS = torch.arange(5, 25)[None]


def logits(source: Path | str) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load_model(str(source)).model(input_ids=IDS).logits[0]
    return found


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-5 * max(1.0, float(expected.abs().max()))


def saved(model: Any, directory: Path, tokenizer: Path | None = None) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(directory)
    for file in tokenizer.iterdir() if tokenizer else ():
        shutil.copy(file, directory)
    return directory


@pytest.fixture(scope="module")
def tied_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A Llama whose head has the embeddings' weights."""
    model = tiny_llama()
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return saved(model, tmp_path_factory.mktemp("tied"), tokenizer_dir)


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {}),
    "dora": ("LoraConfig", {"use_dora": True, "target_modules": "all-linear"}),
    "dropout": ("LoraConfig", {"lora_dropout": 0.3}),
    "bias": ("LoraConfig", {"bias": "all"}),
    "no task": ("LoraConfig", {"task_type": None}),
    "embeddings": ("LoraConfig", {"target_modules": ["embed_tokens"]}),
    "head": ("LoraConfig", {"target_modules": ["lm_head"]}),
    "both ends tied": ("LoraConfig", {"target_modules": ["embed_tokens", "lm_head"]}),
    "whole head": ("LoraConfig", {"modules_to_save": ["lm_head"]}),
    "whole embeddings": ("LoraConfig", {"modules_to_save": ["embed_tokens"]}),
    "tokens": ("LoraConfig", {"trainable_token_indices": [6, 7]}),
    "pissa": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "olora": ("LoraConfig", {"init_lora_weights": "olora"}),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"], "target_modules": ["k_proj", "down_proj"]}),
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "lokr": ("LoKrConfig", {}),
    "vera": ("VeraConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "hra": ("HRAConfig", {}),
    "norms": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_is_what_peft_opens(
    kind: str, tied: bool, model_dir: Path, tied_dir: Path, tmp_path: Path
) -> None:
    name, settings = KINDS[kind]
    base = tied_dir if tied else model_dir
    adapter = sft_adapter(base, tmp_path / "sft", kind=name, **settings)
    expected = with_base(adapter, base) if kind == "no task" else logits_elsewhere(adapter, IDS)
    found = logits(adapter)
    same(found, expected)
    assert float((found - logits(base)).abs().max()) > 1e-3
    loaded = load_model(str(adapter))
    save_model(loaded.model, base, tmp_path / "merged")
    again = load_model(str(tmp_path / "merged"))
    same(logits(tmp_path / "merged"), expected)
    assert again.fingerprint == loaded.fingerprint


def with_base(adapter: Path, base: Path) -> torch.Tensor:
    import peft
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=IDS).logits[0]
    return found


NOT_MERGED: dict[str, tuple[str, dict[str, Any], str]] = {
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}, "of the kind PREFIX_TUNING, which adds to the input"),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}, "of the kind PROMPT_TUNING, which adds to the input"),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 3}, "of the kind P_TUNING"),
    "adaption": (
        "AdaptionPromptConfig",
        {"adapter_len": 2, "adapter_layers": 1, "target_modules": "self_attn"},
        "of the kind ADAPTION_PROMPT",
    ),
    "alora": ("LoraConfig", {"alora_invocation_tokens": [1, 2]}, "works on a part of the text only"),
}


@pytest.mark.parametrize("name", NOT_MERGED)
def test_kinds_that_cannot_be_merged(name: str, model_dir: Path, tmp_path: Path) -> None:
    kind, settings, message = NOT_MERGED[name]
    if "target_modules" not in settings and kind != "LoraConfig":
        settings = {**settings, "target_modules": ()}
    adapter = sft_adapter(model_dir, tmp_path / "sft", kind=kind, **settings)
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(adapter))
    assert "\n" not in str(error.value)


def change_weights(adapter: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(adapter / "adapter_model.safetensors")
    change(state)
    save_file(state, adapter / "adapter_model.safetensors")


def change_settings(adapter: Path, **settings: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a missing weight": (
        lambda adapter: change_weights(adapter, lambda state: state.__delitem__(FIRST)),
        "lacks the weights model.layers.0.self_attn.q_proj.lora_A.weight; peft would go on",
    ),
    "a weight left over": (
        lambda adapter: change_weights(
            adapter, lambda state: state.update({"base_model.model.x.lora_A.weight": torch.ones(1)})
        ),
        r"has weights that fit nothing in the model: x.lora_A.weight",
    ),
    "no prefix": (
        lambda adapter: change_weights(
            adapter, lambda state: [state.update({f"x.{key}": state.pop(key)}) for key in list(state)]
        ),
        "lacks the weights .* and 4 more",
    ),
    "another rank": (lambda adapter: change_settings(adapter, r=3), "size mismatch"),
    "a target without weights": (
        lambda adapter: change_settings(adapter, target_modules=["q_proj", "v_proj", "o_proj"]),
        "lacks the weights model.layers.0.self_attn.o_proj",
    ),
    "weights of no target": (
        lambda adapter: change_settings(adapter, target_modules=["q_proj"]),
        "fit nothing in the model: model.layers.0.self_attn.v_proj",
    ),
    "no target at all": (lambda adapter: change_settings(adapter, target_modules=["c_attn"]), "does not fit its base"),
    "whole layer without weights": (lambda adapter: change_settings(adapter, modules_to_save=["lm_head"]), "lm_head"),
    "no weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors in it",
    ),
    "damaged weights": (
        lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs"),
        "adapter_model.safetensors: a Git LFS pointer",
    ),
    "classifier": (
        lambda adapter: change_settings(adapter, task_type="SEQ_CLS"),
        "an adapter for SEQ_CLS; expected one",
    ),
    "unknown setting": (
        lambda adapter: change_settings(adapter, use_gizmo=True),
        "does not know use_gizmo; update peft",
    ),
    "unknown kind": (lambda adapter: change_settings(adapter, peft_type="GIZMO"), "peft cannot read it"),
    "settings that are no object": (
        lambda adapter: (adapter / "adapter_config.json").write_text("[1]"),
        r"adapter_config.json: expected a JSON object, got '\[1\]'",
    ),
    "settings too deep": (
        lambda adapter: (adapter / "adapter_config.json").write_text("[" * 100_000),
        "adapter_config.json: cannot be read: maximum recursion depth",
    ),
    "no base": (
        lambda adapter: change_settings(adapter, base_model_name_or_path=None),
        "expected the name of the base model",
    ),
    "a base that is not there": (
        lambda adapter: change_settings(adapter, base_model_name_or_path="/nowhere/model"),
        "the base model of this adapter, base_model_name_or_path in adapter_config.json: /nowhere/model",
    ),
    "itself as base": (lambda adapter: change_settings(adapter, base_model_name_or_path=str(adapter)), "comes back to"),
    "a revision": (
        lambda adapter: change_settings(adapter, base_model_name_or_path="org/model", revision="v2"),
        "revision v2",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_does_not_fit_is_refused_by_name(name: str, model_dir: Path, tmp_path: Path) -> None:
    break_it, message = FAULTS[name]
    adapter = sft_adapter(model_dir, tmp_path / "sft")
    break_it(adapter)
    with pytest.raises(ModelError, match=message) as error:
        load_model(str(adapter))
    assert "\n" not in str(error.value)


def test_settings_of_a_newer_peft_that_say_nothing_may_stay(model_dir: Path, tmp_path: Path) -> None:
    adapter = sft_adapter(model_dir, tmp_path / "sft")
    before = logits(adapter)
    change_settings(adapter, use_gizmo=False, gizmo_config=None)
    assert torch.equal(logits(adapter), before)


def test_a_base_of_another_width_is_told(model_dir: Path, tmp_path: Path) -> None:
    adapter = sft_adapter(model_dir, tmp_path / "sft")
    model = tiny_llama()
    model.config.hidden_size = 64
    other = saved(type(model)(model.config), tmp_path / "other")
    change_settings(adapter, base_model_name_or_path=str(other))
    with pytest.raises(ModelError, match=r"does not fit its base model: .*size mismatch"):
        load_model(str(adapter))


# --- embeddings of another size ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["embed_tokens"]}]
)
def test_resized_embeddings_are_followed(
    settings: dict[str, Any], tied: bool, model_dir: Path, tied_dir: Path, tmp_path: Path
) -> None:
    adapter = sft_adapter(
        tied_dir if tied else model_dir,
        tmp_path / "sft",
        before=lambda model: model.resize_token_embeddings(411),
        **settings,
    )
    state = load_file(adapter / "adapter_model.safetensors")
    assert any(len(value) == 411 for value in state.values())
    if settings.get("target_modules") and not tied:
        with pytest.raises(ModelError, match="embeddings for 411 tokens, the base has 400, and lm_head would not fit"):
            load_model(str(adapter))
        return
    loaded = load_model(str(adapter))
    assert loaded.vocabulary == 411
    model = resized_elsewhere(adapter, tied_dir if tied else model_dir)
    with torch.no_grad():
        same(loaded.model(input_ids=IDS).logits[0], model(input_ids=IDS).logits[0])
    save_model(loaded.model, tied_dir, tmp_path / "merged")
    assert load_model(str(tmp_path / "merged")).fingerprint == loaded.fingerprint


def resized_elsewhere(adapter: Path, base: Path) -> Any:
    import peft
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.resize_token_embeddings(411)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


# --- tokenizers ---


def test_the_base_s_tokenizer_is_used_where_the_adapter_has_none(model_dir: Path, tmp_path: Path, cli: Cli) -> None:
    data = write_jsonl(tmp_path / "pairs.jsonl", make_rows(6))
    adapter = sft_adapter(model_dir, tmp_path / "sft")
    cache = precompute_into(tmp_path / "cache", adapter, data)
    plain = precompute_into(tmp_path / "plain", model_dir, data)
    mine, base = (ReferenceCache(place).identity for place in (cache, plain))
    assert (mine.tokenizer, mine.template) == (base.tokenizer, base.template) and mine.weights != base.weights
    code, _, stderr = cli("export", "--policy", adapter, "--out", tmp_path / "merged")
    assert code == 0, stderr
    code, _, stderr = cli(
        "compare", "--policy", adapter, "--reference", model_dir, "--prompt", "why not", "--max-new-tokens", 2
    )
    assert code == 0, stderr


def test_the_adapter_s_own_template_goes_with_the_base_s_tokenizer(model_dir: Path, tmp_path: Path) -> None:
    adapter = sft_adapter(model_dir, tmp_path / "sft")
    (adapter / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    save_tokenizer(str(adapter), tmp_path / "tokenizer", None)
    assert ChatTokenizer.load(tmp_path / "tokenizer").template == "{{ messages[0]['content'] }}"


def test_an_adapter_in_the_hub_s_cache(model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "hub" / "models--org--sft" / "snapshots" / "abc"
    sft_adapter(model_dir, snapshot)
    refs = tmp_path / "hub" / "models--org--sft" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert torch.equal(logits("org/sft"), logits(snapshot))
    save_tokenizer("org/sft", tmp_path / "tokenizer", None)
    assert (tmp_path / "tokenizer" / "tokenizer.json").is_file()


# --- --lora-targets ---


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=400, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3))


def test_targets_as_peft_takes_them() -> None:
    model = tiny_llama()
    assert targets(model, "q_proj, self_attn.v_proj") == {"target_modules": ["q_proj", "self_attn.v_proj"]}
    assert targets(model, "model.layers.0.mlp.up_proj,lm_head")["target_modules"][1] == "lm_head"
    found = targets(gpt2(), "c_attn,mlp.c_fc")
    assert found == {"target_modules": ["c_attn", "mlp.c_fc"], "fan_in_fan_out": True}
    for name in ("proj", "mlp", "attn.q_proj", ".*q_proj", "input_layernorm"):
        with pytest.raises(ConfigError, match="no linear modules named"):
            targets(model, name)


@pytest.mark.parametrize("name", ["lm_head", "wte", "transformer.wte"])
def test_tied_ends_are_no_targets(name: str) -> None:
    with pytest.raises(
        ConfigError, match=r"has the same weights as .* would change one use of them alone; leave it out"
    ):
        targets(gpt2(), f"c_attn,{name}")


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        initializer_range=0.3,
    )
    return MixtralForCausalLM(config)


def test_experts_are_targets_by_peft_s_names() -> None:
    model = mixtral()
    assert targets(model, "w1,w3,q_proj") == {"target_modules": ["w1", "w3", "q_proj"]}
    found = targets(model, "q_proj,experts.down_proj")
    assert found == {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    with pytest.raises(ConfigError, match=r"named w4; expected .* some of .*down_proj.*w1"):
        targets(model, "w4")


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["w1", "w3", "q_proj"]},
        {"target_modules": [], "target_parameters": ["experts.down_proj"]},
    ],
)
def test_adapters_of_experts_merge(settings: dict[str, Any], tokenizer_dir: Path, tmp_path: Path) -> None:
    base = saved(mixtral(), tmp_path / "base", tokenizer_dir)
    adapter = sft_adapter(base, tmp_path / "sft", **settings)
    same(logits(adapter), logits_elsewhere(adapter, IDS))
    assert float((logits(adapter) - logits(base)).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("kind", "left_out", "noted"),
    [
        # transformers' renaming of old weights applies to these new names too when peft loads them
        ("laguna", "shared_experts", True),
        # one block's weights in several modules
        ("zamba", "shared_transf", False),
        # a linear layer in groups
        ("deepseek_v4", "o_a_proj", False),
    ],
)
def test_all_linear_leaves_out_what_an_adapter_would_break(
    kind: str, left_out: str, noted: bool, tmp_path: Path
) -> None:
    family, notes, options = next(each for each in families() if each.name == kind), Notes(), LoraOptions(lora_rank=2)
    with nothing_left_to_chance():
        model = make(family)
    perturb(model)
    base = saved(model.eval(), tmp_path / "base")
    adapted: Any = add_lora(load_model(str(base)).model, str(base), options, 0, notes)
    assert bool(notes.lines) == noted and all(left_out in line for line in notes.lines)
    adapters = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert adapters and not [name for name in adapters if left_out in name]
    with torch.no_grad():
        for name in adapters:
            adapted.get_parameter(name).normal_(0, 0.1)
        expected = adapted(input_ids=IDS, use_cache=False).logits[0]
    adapted.save_pretrained(tmp_path / "adapter")
    same(logits(tmp_path / "adapter"), expected)


def test_named_targets_that_cannot_be_read_back_are_refused() -> None:
    with nothing_left_to_chance():
        model = make(next(each for each in families() if each.name == "laguna"))
    options = LoraOptions(lora_rank=2, lora_targets="q_proj,shared_experts.up_proj")
    with pytest.raises(
        ConfigError, match=r"peft does not find the adapters of .*shared_experts.up_proj again in what it"
    ):
        add_lora(model, "base", options, 0, Silent())


FAR = r"adapter_config\.json: a rank of (20,000|257), where the adapter's matrices have 8 at most"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 20_000}, FAR),
        ({"rank_pattern": {"q_proj": 20_000}}, FAR),
        ({"r": 257}, FAR),
        ({"r": 256}, "the adapter does not fit its base model"),
    ],
)
def test_a_rank_far_from_that_of_the_matrices_is_refused_before_others_are_made(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    adapter = sft_adapter(model_dir, tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    if message == FAR:
        monkeypatch.setattr("minicache.models.lora.seen_in_float32", lambda _: pytest.fail("made"))
    with pytest.raises(ModelError, match=message):
        load_model(str(adapter))
