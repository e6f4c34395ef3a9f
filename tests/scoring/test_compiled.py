"""--compile: the layers of a decoder share what is compiled, and give what they give uncompiled."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from minicache.cache.reader import ReferenceCache
from minicache.errors import ConfigError
from minicache.scoring import compiled
from minicache.scoring.compiled import compile_layers, require_compiler
from minicache.scoring.masks import Windows
from minicache.scoring.scorer import Scorer
from tests.conftest import precompute_into
from tests.helpers import varlen
from tests.scoring.test_families import tiny
from tests.scoring.test_scoring import lay_out, random_pairs

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's compiler, about itself


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Counts graphs. The C++ that Inductor would make of each takes a minute of a slow core to compile."""
    torch._dynamo.reset()
    counter, original = CompileCounterWithBackend("eager"), torch.nn.Module.compile

    def compile_(module: torch.nn.Module, **given: Any) -> None:
        original(module, backend=counter, **given)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    yield counter
    torch._dynamo.reset()


@pytest.mark.parametrize("kernel", ["varlen", pytest.param("spans", marks=pytest.mark.slow)])
def test_layers_share_their_graphs_whatever_their_number_and_the_lengths(
    kernel: str, counter: CompileCounterWithBackend
) -> None:
    varlen.register()
    graphs = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counter.frame_count = 0
        model = tiny("llama", {"num_hidden_layers": layers})
        scorer = Scorer(model, "bfloat16" if kernel == "varlen" else "float32")
        scorer.use_layout("packed", Windows(), kernel=kernel)
        batches = [lay_out(random_pairs(count, seed=count), "packed") for count in (1, 2, 5)]
        plain = [scorer(batch).logp_mean for batch in batches]
        compile_layers(scorer)
        for batch, due in zip(batches, plain, strict=True):
            found = scorer(batch).logp_mean
            found.sum().backward()
            assert torch.allclose(found, due, atol=1e-5 if kernel == "spans" else 2.5e-2)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] and 0 < graphs[0] <= (3 if kernel == "varlen" else 25)


def test_a_compiled_reference_gives_the_same_cache(
    model_dir: Path, data_file: Path, ref_cache: Path, tmp_path: Path, counter: CompileCounterWithBackend
) -> None:
    cache = precompute_into(tmp_path / "cache", model_dir, data_file, compile=True)
    assert counter.frame_count > 0
    plain, found = ReferenceCache(ref_cache), ReferenceCache(cache)
    assert found.identity == plain.identity
    assert np.allclose(found.load().reference.logp_mean, plain.load().reference.logp_mean, atol=1e-6)


def test_what_the_compiler_lacks_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compiled, "has_triton", lambda: False)
    require_compiler(torch.device("cpu"))
    with pytest.raises(ConfigError, match="--compile: expected Triton for cuda, found none; pip install triton"):
        require_compiler(torch.device("cuda"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ConfigError, match="--compile: expected a C"):
        require_compiler(torch.device("cpu"))
