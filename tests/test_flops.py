"""The operations that benchmarks count, against their definition."""

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.flops import Product, counted, useful_flops
from minicache.pairs import PairTable
from minicache.scoring.scorer import Scorer
from tests.conftest import tiny_llama
from tests.scoring.test_scoring import random_pairs


def test_products_and_attention_are_counted() -> None:
    left, right, total = torch.rand(3, 5), torch.rand(5, 7), torch.rand(3, 7)
    assert counted(lambda: left @ right) == counted(lambda: total.addmm_(left, right)) == 2 * 3 * 5 * 7
    assert counted(lambda: torch.addmm(total, left, right, out=total)) == 2 * 3 * 5 * 7
    # one product forward, two backward
    left.requires_grad_()
    weight = right.clone().requires_grad_()
    assert counted(lambda: (left @ weight).sum().backward()) == 3 * 2 * 3 * 5 * 7
    query, key = torch.rand(2, 4, 6, 8, requires_grad=True), torch.rand(2, 4, 9, 8)
    one = 2 * 2 * 4 * 6 * 9 * 8
    assert counted(lambda: scaled_dot_product_attention(query, key, key)) == 2 * one
    assert counted(lambda: scaled_dot_product_attention(query, key, key).sum().backward()) == 7 * one


@pytest.mark.parametrize("training", [False, True])
def test_a_pass_computes_what_the_pairs_need(training: bool) -> None:
    """And what the masks of attention hide, and in backward the head's logits once more."""
    model, table = tiny_llama().requires_grad_(training), PairTable.from_pairs(random_pairs(6), "int32")
    scorer = Scorer(model, "float32", "packed")
    batch, everything = scorer.batch(table, np.arange(6)), np.arange(6)

    def run() -> None:
        with torch.set_grad_enabled(training):
            scores = scorer(batch)
        if training:
            scores.logp_mean.sum().backward()

    need = useful_flops(model, table, everything, training)
    assert need < counted(run) < 1.4 * need


def test_a_share_is_of_the_products_rate_in_the_same_round() -> None:
    product = Product(torch.device("cpu"), "float32")
    flops = 3 * 2 * 2048**3
    assert product.share(flops / 2, [1.0, 2.0, 8.0], [1.0, 2.0, 2.0]) == 0.5
