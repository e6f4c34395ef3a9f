"""Peaks by the cards' names, and the share of them that a run reaches."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minicache.models.described import without_weights
from minicache.pairs import EncodedPair, PairTable
from minicache.processes.devices import Facts
from minicache.training import log_lines, speed
from minicache.training.progress import Progress
from minicache.training.speed import peak_flops, peak_of, step_flops
from tests.zoo.families import Family, families, nature, tiny_config

# Names as the driver gives them, TFLOP/s; None: not known, or another card than the one whose name begins so.
CARDS = {
    "NVIDIA B200": 2250,
    "NVIDIA H200": 989,
    "NVIDIA H200 NVL": 835.5,
    "NVIDIA GH200 480GB": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835.5,
    "NVIDIA H800": 989,
    "NVIDIA H800 PCIe": 756,
    "NVIDIA H20": 148,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A800-SXM4-80GB": 312,
    "NVIDIA A800 80GB PCIe": 312,
    "NVIDIA A40": 149.7,
    "NVIDIA A30": 165,
    "NVIDIA A10": 125,
    "NVIDIA A10G": None,
    "NVIDIA L40S": 362,
    "NVIDIA L40": 181,
    "NVIDIA L4": 121,
    "NVIDIA GeForce RTX 5090": 209.5,
    "NVIDIA GeForce RTX 5090 D": None,
    "NVIDIA GeForce RTX 5090 Laptop GPU": None,
    "NVIDIA GeForce RTX 5080": 112.6,
    "NVIDIA GeForce RTX 5070 Ti": 87.9,
    "NVIDIA GeForce RTX 5070": 61.7,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 4090 D": 147.1,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "NVIDIA GeForce RTX 4080 SUPER": 104.4,
    "NVIDIA GeForce RTX 4080": 97.5,
    "NVIDIA GeForce RTX 4070 Ti SUPER": 88.2,
    "NVIDIA GeForce RTX 4070 Ti": 80.2,
    "NVIDIA GeForce RTX 4070 SUPER": 71,
    "NVIDIA GeForce RTX 4070": 58.3,
    "NVIDIA GeForce RTX 3090 Ti": 80,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb": None,
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb": None,
    "NVIDIA RTX 4000 Ada Generation": None,
    "Tesla T4": None,
    "AMD Instinct MI300X": None,
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_has_its_own_peak(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teraflops = CARDS[name]
    expected = teraflops and teraflops * 1e12
    assert peak_of(name) == expected
    monkeypatch.setattr(speed, "facts_of", lambda device: Facts(name, 0))
    assert peak_flops(torch.device("cuda", 0), "bfloat16") == expected
    assert peak_flops(torch.device("cuda", 0), "float32") is None
    assert peak_flops(torch.device("cpu"), "bfloat16") is None


@pytest.mark.parametrize("size", [1, 4])
def test_utilisation_is_of_all_devices(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are counted over the whole batch, whoever computed them."""
    monkeypatch.setattr(log_lines, "peak_flops", lambda device, dtype: 2e12)
    config = SimpleNamespace(
        dtype="bfloat16",
        batch_size=4,
        log_every=1,
        lr=1e-3,
        schedule="constant",
        warmup=0.0,
        min_lr=0.0,
        beta_end=None,
        max_kl=None,
        on_max_kl="warn",
    )
    world = SimpleNamespace(size=size, device=torch.device("cpu"), sum=lambda values: values * size)
    objective = SimpleNamespace(beta=0.1)
    run = SimpleNamespace(config=config, objective=objective, world=world, steps=10, training=range(8))
    progress = Progress(step=1, seconds=1000.0, tokens=5000, flops=4e15)
    training = SimpleNamespace(
        progress=progress,
        means=SimpleNamespace(reduce=lambda world: {"loss": 0.5, "kl": 0.0}),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
    )
    logged: list[dict[str, float]] = []
    tracker = SimpleNamespace(log=lambda step, metrics: logged.append(metrics))
    log_lines.log_step(run, training, torch.tensor(1.0), tracker)  # type: ignore[arg-type]
    assert logged[0]["mfu"] == pytest.approx(4e15 / 1000 / (2e12 * size), rel=1e-3)
    assert progress.flops == 0


@pytest.mark.filterwarnings("ignore")
def test_the_flops_of_a_step_are_counted_for_every_family() -> None:
    """Mamba and RWKV have no heads, Gemma 3 from 4B on has them in a config within its config, Gemma 4 has some of each width."""
    ids, mask = np.arange(5, 25), np.r_[np.zeros(3, int), np.ones(17, int)]
    table = PairTable.from_pairs([EncodedPair.join(ids, mask, np.r_[ids[:3], ids[3:] + 50], mask)], "uint16")
    counted = {}
    for family in families():
        if family.name != family.kind or nature(family) not in ("decoder", "multimodal"):
            continue
        try:
            model = without_weights(tiny_config(family))
        # a class that needs a package, or one that is refused as no language model
        except (ImportError, KeyError, ValueError, AttributeError, RuntimeError):
            continue
        if model.get_output_embeddings() is not None:  # type: ignore[operator]
            counted[family.kind] = step_flops(model, table, np.array([0]))
    assert len(counted) > 100 and all(flops > 0 for flops in counted.values())
    assert {"gemma3", "gemma4_text", "mamba", "rwkv", "gpt2", "qwen3_next"} <= counted.keys()


def test_a_frozen_tower_costs_nothing() -> None:
    family = Family("gemma3", "gemma3")
    whole, text = (without_weights(config) for config in (tiny_config(family), tiny_config(family).text_config))
    ids, mask = np.arange(5, 25), np.ones(20, int)
    table = PairTable.from_pairs([EncodedPair.join(ids, mask, ids + 50, mask)], "uint16")
    assert step_flops(whole, table, np.array([0])) == step_flops(text, table, np.array([0]))
