"""Chat templates render as transformers renders them, today as on any other day; what cannot work is a clean error."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models

from minicache.data.records import Turn
from minicache.data.tokenizer_bounds import require_bounded, require_bounded_files
from minicache.data.tokenizers import PLAIN_TEMPLATE, ChatTokenizer
from minicache.errors import ConfigError, ModelError, RowRefused
from minicache.models.tokenizers import save_tokenizer
from tests.conftest import TEMPLATE
from tests.references.checkpoints import GENERATIONS

LLAMA3 = """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported") }}
    {%- endif %}
{%- endfor %}
"""
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == "user" %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- set reasoning = '' %}
    {%- if message.role == "assistant" and '</think>' in content %}
        {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == "assistant" and loop.index0 > ns.last %}
        {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
    {%- endif %}
    {{- content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
MARKED = """{% for m in messages %}
{% if m.role == 'assistant' %}
A: {% generation %}{{ m.content }}<|im_end|>{% endgeneration %}

{%- else %}
U: {{ m.content }}
{% endif %}
{% if loop.index > 20 %}{% break %}{% endif %}
{%- endfor %}
{% if add_generation_prompt %}A: {% endif %}"""
PROBE = (
    "{{ tools is defined }}{{ tools is none }}{{ documents is none }}{{ strange is defined }}{{ pad_token }}{{ unk_token }}"
    "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=True) }}{{ messages[0] | tojson(ensure_ascii=True) }}"
)
TEMPLATES = {"chatml": TEMPLATE, "llama3": LLAMA3, "mistral": MISTRAL, "qwen3": QWEN3, "marked": MARKED, "plain": ""}
TALK = (
    Turn("user", " why\n"),
    Turn("assistant", "<think>\nhm\n</think>\n\nthe cat 你好"),
    Turn("user", "and <b>😀</b> {{ 7 * 7 }}?"),
    Turn("assistant", "\n not  "),
)
TALKS = [TALK, TALK[:3], TALK[:1], (Turn("system", "Be brief. "), *TALK), TALK[:2]]


def with_template(tokenizer_dir: Path, place: Path, template: object, **config: object) -> ChatTokenizer:
    """The tokenizer of 400 ids with another template and other entries in its configuration."""
    place.mkdir(exist_ok=True)
    (place / "tokenizer.json").write_bytes((tokenizer_dir / "tokenizer.json").read_bytes())
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    settings |= {"chat_template": template, "bos_token": "<|endoftext|>", **config}
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    return ChatTokenizer.load(place)


def require_same_rendering(ours: ChatTokenizer, directory: Path, **options: Any) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(directory)
    theirs.chat_template = ours.template
    for turns in TALKS:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        for opened in (False, True):
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **options)
            assert ours.render(turns, opened) == expected
            assert ours.encode([expected])[0][0].tolist() == theirs(expected, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", [*TEMPLATES, "probe"])
def test_a_template_renders_as_in_transformers(tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    tokenizer = with_template(tokenizer_dir, tmp_path, {**TEMPLATES, "probe": PROBE}[name])
    require_same_rendering(tokenizer, tmp_path, **({"date_string": "26 Jul 2024"} if name == "llama3" else {}))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_miniminds_tokenizers_render_as_in_transformers(minimind_tokenizers: dict[str, Path], generation: str) -> None:
    directory = minimind_tokenizers[generation]
    require_same_rendering(ChatTokenizer.load(directory), directory)


def test_todays_date_never_gets_into_a_prompt(tokenizer_dir: Path, tmp_path: Path) -> None:
    text = with_template(tokenizer_dir, tmp_path, LLAMA3).render(TALK)
    assert "26 Jul 2024" in text and f"{datetime.now().astimezone():%d %b %Y}" not in text


def test_a_template_that_insists_on_todays_date_gets_a_fixed_one(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer_dir, tmp_path, "{{ strftime_now('%d %B %Y') }}")
    assert tokenizer.render(TALK) == "26 July 2024"
    assert replace(tokenizer, date="2026-11-25").render(TALK) == "25 November 2026"
    asking = with_template(tokenizer_dir, tmp_path, LLAMA3)
    assert "Today Date: 25 Nov 2026" in replace(asking, date="2026-11-25").render(TALK)


def test_without_a_template_there_is_the_plain_form(tokenizer_dir: Path, tmp_path: Path) -> None:
    tokenizer = with_template(tokenizer_dir, tmp_path, None)
    assert tokenizer.template == PLAIN_TEMPLATE
    turns = (Turn("user", "why"), Turn("assistant", "你好"))
    assert tokenizer.render(turns) == "<|endoftext|>User: why\n\nAssistant: 你好<|im_end|>\n\n"
    assert tokenizer.render(turns[:1], open_answer=True) == "<|endoftext|>User: why\n\nAssistant: "


def test_where_a_template_stands_does_not_matter(tokenizer_dir: Path, tmp_path: Path) -> None:
    """In the configuration, as one of several there, or in a file of its own, which goes before."""
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": TEMPLATE}]
    assert with_template(tokenizer_dir, tmp_path / "a", TEMPLATE).template == TEMPLATE
    assert with_template(tokenizer_dir, tmp_path / "b", several).template == TEMPLATE
    (tmp_path / "b" / "chat_template.jinja").write_text(QWEN3)
    assert ChatTokenizer.load(tmp_path / "b").template == QWEN3


@pytest.mark.parametrize("template", [3, {"a": 1}, [{"name": "rag", "template": "x"}], ["x"], [{"name": "default"}]])
def test_a_template_is_never_guessed(tokenizer_dir: Path, tmp_path: Path, template: object) -> None:
    with pytest.raises(ModelError, match="--chat-template"):
        with_template(tokenizer_dir, tmp_path, template)


def test_named_templates_in_files_are_not_passed_over(tokenizer_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    assert with_template(tokenizer_dir, tmp_path, TEMPLATE).template == TEMPLATE
    with pytest.raises(ModelError, match="one named 'default'"):
        with_template(tokenizer_dir, tmp_path, None)


@pytest.mark.parametrize(
    "template", ["{% for %}", "{{ 'a }}", "{{ x | nofilter }}", "{% generation %}", "{% nonsense %}"]
)
def test_a_template_that_is_none_is_an_error_of_the_options(tokenizer_dir: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(ConfigError, match="cannot be compiled"):
        with_template(tokenizer_dir, tmp_path, template).render(TALK)


BREAKING = [
    "{{ messages[99].content.strip() }}",
    "{{ 1 / 0 }}",
    "{{ messages + 3 }}",
    "{{ messages[0].missing + 'x' }}",
    "{{ messages[1].content.encode('ascii') }}",
    "{{ raise_exception('first\nsecond') }}",
    "{{ messages.append(1) }}",
    "{{ messages.__class__.__mro__ }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ {}['x'].y }}",
]


@pytest.mark.parametrize("template", BREAKING)
def test_a_template_that_breaks_costs_the_row_alone(tokenizer_dir: Path, tmp_path: Path, template: str) -> None:
    with pytest.raises(RowRefused) as refused:
        with_template(tokenizer_dir, tmp_path, template).render(TALK)
    assert refused.value.reason == "template"
    assert "\n" not in str(refused.value) and 30 < len(str(refused.value)) < 400


@pytest.mark.parametrize("content", [None, b"", b"{", b"[]", b'{"model": 3}', b"\xff", b"null"])
def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        ChatTokenizer.load(tmp_path)


BOUNDS = {
    "an id": ({"vocab": {"a": 2**31}}, "the token 'a' has the id 2,147,483,648; expected ids below 16,777,216"),
    "a prefix": ({"continuing_subword_prefix": "x"}, "does not go on with the prefix 'x'; expected all to do so"),
}


@pytest.mark.parametrize("case", BOUNDS)
@pytest.mark.parametrize("load", [ChatTokenizer.load, lambda place: save_tokenizer(str(place), place / "out", False)])
def test_what_the_library_would_end_the_process_over_is_refused_before(
    tokenizer_dir: Path, tmp_path: Path, case: str, load: Callable[[Path], object]
) -> None:
    """Tables as long as the largest id; a merge that is cut within a character."""
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    changes, said = BOUNDS[case]
    content["model"] |= changes
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=rf"tokenizer\.json: .*{said}"):
        load(tmp_path)


def replacing(content: str, **pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(key: str, steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "Sequence", key: steps}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GROWING = {
    "normalizer": sequence("normalizers", [replacing("aa", String="a")] * 9),
    "nested": {"normalizer": sequence("normalizers", [sequence("normalizers", [replacing("aaaa", String="aa")] * 9)])},
    "without a type": {"normalizer": {"normalizers": [{"pattern": {"String": "a"}, "content": "aa"}] * 9}},
    "pattern": {"normalizer": sequence("normalizers", [replacing("a", Regex="(?=a)")] * 9)},
    "nothing": {"normalizer": replacing("a" * 256, String="")},
    "bytes": {"normalizer": {"type": "ByteLevel"}, "pre_tokenizer": sequence("pretokenizers", [BYTES] * 8)},
    "decoder": sequence("decoders", [replacing("aa", String="a")] * 9),
    "suffix": {"decoder": sequence("decoders", [{"type": "BPEDecoder", "suffix": ""}] * 9)},
}
SANE = {
    "normalizer": sequence("normalizers", [{"type": "Prepend", "prepend": "▁"}, *[replacing("▁", String=" ")] * 40]),
    "shrinking": {
        "normalizer": sequence("normalizers", [*[replacing("", Regex="x+")] * 40, replacing("▁", Regex=" {2,}")])
    },
    "growing": {"normalizer": sequence("normalizers", [replacing("aa", String="a")] * 8)},
    "precompiled": {"normalizer": sequence("normalizers", [{"type": "Precompiled"}, replacing("...", String="…")])},
    "decoder": sequence("decoders", [replacing(" ", String="▁"), {"type": "ByteFallback"}, {"type": "Fuse"}]),
}


def as_content(name: str, change: dict[str, Any]) -> dict[str, Any]:
    return {name: change} if name in ("normalizer", "decoder") else change


@pytest.mark.parametrize("name", GROWING)
def test_steps_that_make_a_text_too_long_are_refused(tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text()) | as_content(name, GROWING[name])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"tokenizer\.json: its .* may make a text more than 256 times as long"):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize("name", SANE)
def test_steps_that_do_not_are_taken(name: str) -> None:
    require_bounded(Path("tokenizer.json"), as_content(name, SANE[name]))


def test_pieces_of_no_length_are_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["pre_tokenizer"] = sequence("pretokenizers", [{"type": "FixedLength", "length": 0}])
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cuts texts into pieces of 0 characters"):
        ChatTokenizer.load(tmp_path)


def test_steps_may_lie_deep() -> None:
    deep: dict[str, Any] = GROWING["normalizer"]
    for _ in range(5000):
        deep = sequence("normalizers", [deep])
    with pytest.raises(ModelError, match="as long"):
        require_bounded(Path("tokenizer.json"), {"normalizer": deep})


ADDED = {"content": "<x>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
BESIDE = {
    "of a later version": ("tokenizer.5.json", b'{"model": {"vocab": {"a": 16777216}}}'),
    "of any name": ("b/a.tokenizer.5.json", b'{"model": {"vocab": {"a": 16777216}}}'),
    "settings": ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"16777216": ADDED}}).encode()),
    "added tokens": ("added_tokens.json", b'{"a": 16777216}'),
    "ranks": ("tokenizer.model", b"YQ== 0\nYg== 16777216\n"),
    "ranks that end with returns": ("qwen.tiktoken", b"\r\rYQ== 0\rYg== 16_777_216"),
}


@pytest.mark.parametrize("case", BESIDE)
def test_files_beside_the_tokenizer_are_bounded_too(tokenizer_dir: Path, tmp_path: Path, case: str) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    name, content = BESIDE[case]
    settings = {"fast_tokenizer_files": ["tokenizer.json", "b/a.tokenizer.5.json", 3]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}: .*has the id 16,777,216; expected ids below"):
        save_tokenizer(str(tmp_path), tmp_path / "out", False)


def test_a_pipe_that_the_settings_name_is_not_waited_for(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path / "model")
    os.mkfifo(tmp_path / "pipe")
    for name in ("../pipe", "/dev/zero"):
        (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": [name]}))
        require_bounded_files(tmp_path / "model")


@pytest.mark.parametrize("name", ["extra_ids", "offset", "num_madeup_words"])
def test_tokens_that_transformers_makes_up_are_bounded(tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({name: 2**20}))
    require_bounded_files(tmp_path)
    file.write_text(json.dumps({name: 2**20 + 1}))
    with pytest.raises(ModelError, match=rf"tokenizer_config\.json: {name} is 1,048,577; expected 1,048,576 or fewer"):
        save_tokenizer(str(tmp_path), tmp_path / "out", False)


def test_so_are_those_of_mistral(tmp_path: Path) -> None:
    within: list[Any] = [[], {"config": []}, {"config": {"default_num_special_tokens": 1000}}]
    for content in within:
        (tmp_path / "tekken.json").write_text(json.dumps(content))
        require_bounded_files(tmp_path)
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {"default_num_special_tokens": 10**10}}))
    with pytest.raises(ModelError, match=r"tekken\.json: default_num_special_tokens is 10,000,000,000"):
        require_bounded_files(tmp_path)


@pytest.mark.parametrize("content", [b"\n\x0e\n\x05<unk>\nx 99999999\n", b"YQ== 0\nYg== 16777215\n\nx y z\nx y\n", b""])
def test_a_vocabulary_within_bounds_and_a_binary_one_are_left_to_the_library(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    (tmp_path / "a.model").mkdir()
    require_bounded_files(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_json_too_deep_for_python_is_one_line(tokenizer_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_text("[" * 100_000)
    with pytest.raises(ModelError, match=rf"{name}: cannot be read as .*recursion") as caught:
        ChatTokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_decoder_that_panics_is_one_line(tokenizer_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tokenizer_dir, tmp_path, dirs_exist_ok=True)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["decoder"] = {"type": "Strip", "content": "a", "start": 1, "stop": 1}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = ChatTokenizer.load(tmp_path)
    ids = tokenizer.encode(["a"])[0][0]
    for decode in (
        tokenizer.decode,
        lambda ids: tokenizer.decode_after(ids, 0),
        lambda ids: tokenizer.decode(ids, False),
    ):
        with pytest.raises(ModelError, match="the tokenizer cannot decode token ids: slice index") as caught:
            decode(ids)
        assert "\n" not in str(caught.value)


def test_so_are_the_ids_of_a_vocabulary_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text('{"a": 4294967295}')
    with pytest.raises(ModelError, match=r"vocab\.json: the token 'a' has the id 4,294,967,295"):
        save_tokenizer(str(tmp_path), tmp_path / "out", False)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", [b"{\xff", None])
def test_a_file_that_cannot_be_read_is_named(
    tokenizer_dir: Path, tmp_path: Path, name: str, content: bytes | None
) -> None:
    with_template(tokenizer_dir, tmp_path, TEMPLATE)
    (tmp_path / name).unlink(missing_ok=True)
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        ChatTokenizer.load(tmp_path)


@pytest.mark.parametrize("content", ["[]", "3", "{"])
def test_a_configuration_that_is_no_object_is_refused(tokenizer_dir: Path, tmp_path: Path, content: str) -> None:
    with_template(tokenizer_dir, tmp_path, TEMPLATE)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer_config\.json"):
        ChatTokenizer.load(tmp_path)


def test_special_tokens_may_be_text_or_objects(tokenizer_dir: Path, tmp_path: Path) -> None:
    eos = {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False}
    tokenizer = with_template(
        tokenizer_dir, tmp_path, "{{ bos_token }}{{ eos_token }}{{ unk_token }}", eos_token=eos, unk_token=None
    )
    assert tokenizer.render(TALK) == "<|endoftext|><|im_end|>"


def test_ids_and_text_are_the_same_thing(tokenizer_dir: Path) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_dir)
    texts = [
        "",
        " ",
        "\n\n the  cat",
        "你好世界",
        "👩‍👩‍👧 é e\u0301 \u2028\x00 \ufeff",
        "<|im_start|>user\nx<|im_end|>",
        "a" * 5000,
    ]
    for text, (ids, offsets) in zip(texts, tokenizer.encode(texts), strict=True):
        assert tokenizer.decode(ids) == text and offsets.shape == (len(ids), 2)
        covered = {at for begin, end in offsets.tolist() for at in range(begin, end)}
        assert covered == set(range(len(text)))


def test_settings_of_the_tokenizer_file_neither_cut_nor_pad_nor_add(tokenizer_dir: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = ChatTokenizer.load(tokenizer_dir)
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.enable_truncation(7)
    backend.enable_padding(length=100)
    backend.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    backend.save(str(tmp_path / "tokenizer.json"))
    other = ChatTokenizer.load(tmp_path)
    texts = ["the cat sat on a mat and then it rained", "why"]
    for ours, theirs in zip(plain.encode(texts), other.encode(texts), strict=True):
        assert ours[0].tolist() == theirs[0].tolist() and ours[1].tolist() == theirs[1].tolist()
    assert other.digest == plain.digest


def test_the_digest_knows_what_changes_ids(tokenizer_dir: Path, tmp_path: Path) -> None:
    backend = Tokenizer.from_file(str(tokenizer_dir / "tokenizer.json"))
    backend.add_tokens(["rained sat"])
    backend.save(str(tmp_path / "tokenizer.json"))
    assert ChatTokenizer.load(tmp_path).digest != ChatTokenizer.load(tokenizer_dir).digest


def test_text_that_a_tokenizer_has_no_token_for_is_a_clean_error(tmp_path: Path) -> None:
    Tokenizer(models.WordLevel({"a": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RowRefused, match="cannot encode"):
        ChatTokenizer.load(tmp_path).encode(["b"])


def test_text_after_other_ids_is_what_they_add(tokenizer_dir: Path) -> None:
    tokenizer = ChatTokenizer.load(tokenizer_dir)
    words = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    words.decoder = decoders.Metaspace()
    ids = np.array([0, 1], np.int32)
    spaced = replace(tokenizer, backend=words)
    assert (spaced.decode(ids[1:]), spaced.decode_after(ids, 1), spaced.decode_after(ids, 0)) == ("b", " b", "a b")
    # One character of several tokens: the first of them is none.
    halves = tokenizer.encode(["猫"])[0][0]
    assert len(halves) > 1 and tokenizer.decode_after(halves, 1) == tokenizer.decode(halves[1:]) != ""
