"""Hand-made models and data: nothing is downloaded, everything is small enough for two slow cores."""

import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before torch is imported, and for the processes that tests start: several at once on two cores wait for each other's threads,
# and sums in one order are the same sums everywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from minicache.processes.world import World
    from tests.helpers.hub_repos import Hub

SHARED = Path(__file__).parents[2] / "shared"
Original = Callable[[str], Path]
Cli = Callable[..., tuple[int, str, str]]
Row = dict[str, Any]
Place = TypeVar("Place", Path, str)
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "then",
    "it",
    "rained",
    "你好",
    "世界",
    "今天",
    "天气",
    "很好",
    "why",
    "not",
]


@pytest.fixture(scope="session")
def original() -> Original:
    """Finds what MiniMind's own code made, and real data, beside the checkout: `original("data/dpo_en_chat.jsonl")`.

    An extra: whatever decides is in the checkout, see tests/references. A test that misses a file is skipped and names it.
    """

    def find(name: str) -> Path:
        if not (SHARED / name).exists():
            pytest.skip(f"needs {SHARED.name}/{name} beside the checkout")
        return SHARED / name

    return find


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of small random MiniMind checkpoints, one of each of `tests.references.checkpoints.NAMES`."""
    from tests.references.checkpoints import save_all

    return save_all(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def minimind_tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tokenizer directory of each MiniMind generation, with its special tokens and a template that does as its own."""
    from tests.references.conversations import CHAT_FORMATS, save_tokenizer

    place = tmp_path_factory.mktemp("minimind-tokenizers")
    return {generation: save_tokenizer(generation, WORDS, place / generation) for generation in CHAT_FORMATS}


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE of 400 ids with a ChatML template."""
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def save_tokenizer(directory: Path) -> Path:
    """Write the tokenizer of `tokenizer_dir`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "user assistant system\n"] * 20, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def tiny_llama(vocabulary: int = 400, seed: int = 0, width: int = 32) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that logprobs differ from uniform by far more than rounding
        bos_token_id=None,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """A Llama of two layers with its tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tiny_llama().save_pretrained(directory)
    for file in tokenizer_dir.iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    return directory


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Preference pairs in MiniMind's form: random words, every third with three turns of prompt."""
    import numpy as np

    random = np.random.default_rng(seed)

    def words(most: int) -> str:
        return " ".join(random.choice(WORDS, random.integers(2, most)))

    rows = []
    for index in range(count):
        prompt = [{"role": "user", "content": f"{words(10)} {index} {seed}"}]
        if index % 3 == 0:
            prompt += [{"role": "assistant", "content": words(6)}, {"role": "user", "content": words(6)}]
        sides = ({"role": "assistant", "content": words(most)} for most in (12, 25))
        chosen, rejected = ([*prompt, side] for side in sides)
        rows.append({"chosen": chosen, "rejected": rejected})
    return rows


def write_jsonl(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 pairs."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "pairs.jsonl", make_rows(40))


@pytest.fixture(scope="session")
def ref_cache(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, data_file: Path) -> Path:
    """The 40 pairs scored by the tiny model in blocks of 8. Read it; copy it before changing it."""
    return precompute_into(tmp_path_factory.mktemp("cache") / "ref", model_dir, data_file)


def precompute_into(path: Place, model: Path, *data: Path, **options: Any) -> Place:
    from minicache.options.stage_one import PrecomputeConfig
    from minicache.stages.precompute import precompute
    from minicache.trackers import Silent

    config = PrecomputeConfig(str(model), tuple(map(str, data)), path, **{"block_pairs": 8, **options})
    precompute(config, one_process(), Silent())
    return path


def one_process() -> "World":
    import torch

    from minicache.processes.world import World

    return World(0, 1, torch.device("cpu"))


@pytest.fixture
def repos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["Hub"]:
    """A Hub on loopback whose repositories this process reads and writes, and processes that it starts."""
    from huggingface_hub import constants

    from minicache.cache.places.hub import snapshot_at
    from tests.helpers.hub_repos import TOKEN, serving

    with serving() as hub:
        # the real library's protocol for objects; xet's own servers have no stand-in here
        for name, value in {
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_CACHE": str(tmp_path / "hf"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        variables = {
            "HF_ENDPOINT": hub.address,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hf-home"),
        }
        for name, text in {**variables, "HF_HUB_DISABLE_XET": "1"}.items():
            monkeypatch.setenv(name, text)
        snapshot_at.cache_clear()
        yield hub
        snapshot_at.cache_clear()


@pytest.fixture(scope="session")
def s3_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an S3 server on loopback that has the bucket `bucket`."""
    from tests.helpers.object_stores import s3_server

    with s3_server(tmp_path_factory.mktemp("s3") / "log") as port:
        yield port


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Where the object store is to be looked for from now on. Failures show soon."""
    from minicache.cache.places.bucket import bucket_at
    from tests.helpers import object_stores

    object_stores.set_credentials(monkeypatch)
    object_stores.set_times(monkeypatch)
    yield lambda port: object_stores.look_at(monkeypatch, port)
    bucket_at.cache_clear()


@pytest.fixture
def url(s3_port: int, endpoint: Callable[[int], None]) -> str:
    """A place on the S3 server where nothing is yet."""
    endpoint(s3_port)
    return f"s3://bucket/a folder/{os.urandom(8).hex()}"


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Cli:
    """Run the command line in this process: (exit code, stdout, stderr)."""
    from typer.testing import CliRunner

    from minicache.cli import app, expand_data

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, expand_data([str(argument) for argument in arguments]))
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    return run
