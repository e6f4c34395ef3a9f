"""The head in chunks, against the whole logits in float64: values, gradients, the bytes it takes and moves, its compiled form."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.head import moved
from minicache.scoring import head
from minicache.scoring.head import Compiled, Head
from tests.scoring.test_memory import allocated

# of torch's compiler, about itself
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

VOCABULARY, WIDTH, K = 400, 16, 50
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scaled": {"scale": 0.25},
    "capped": {"cap": 3.0},
    "all": {"bias": True, "scale": 2.0, "cap": 5.0},
}


def head_of(kind: str = "plain", dtype: torch.dtype = torch.float32) -> Head:
    torch.manual_seed(0)
    options = {"bias": False, "scale": 1.0, "cap": None} | KINDS[kind]
    linear = nn.Linear(WIDTH, VOCABULARY, bias=options["bias"], dtype=dtype)
    return Head(linear, options["scale"], options["cap"])


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states (K, WIDTH), targets (K,) and the gradient of their logprobs (K,)."""
    torch.manual_seed(1)
    return 4 * torch.randn(K, WIDTH, dtype=dtype), torch.randint(0, VOCABULARY, (K,)), torch.linspace(-1, 2, K)


def plain(made: Head, hidden: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor) -> tuple[list[Any], list[Any]]:
    """Logprobs, entropy and log sum p^2, and the gradients of hidden, weight and bias: in float64, of all logits at once."""
    linear = nn.Linear(WIDTH, VOCABULARY, bias=made.linear.bias is not None, dtype=torch.float64)
    linear.load_state_dict(made.linear.state_dict())
    states = hidden.detach().double().requires_grad_()
    logits = made.scale * linear(states)
    logits = logits if made.cap is None else made.cap * torch.tanh(logits / made.cap)
    everything = logits.log_softmax(1)
    logps = everything.gather(1, targets[:, None])[:, 0]
    (logps * grad.double()).sum().backward()
    p = everything.exp()
    values = [logps, -(p * everything).sum(1), (p**2).sum(1).log()]
    return values, [states.grad, *(each.grad for each in linear.parameters())]


def computed(
    made: Head, hidden: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor
) -> tuple[list[Any], list[Any]]:
    states = hidden.clone().requires_grad_()
    values = made.logps(states, targets, distribution=True)
    values[0].backward(grad)
    return list(values), [states.grad, *(each.grad for each in made.linear.parameters())]


def assert_near(found: list[Any], expected: list[Any], share: float) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.double() - theirs).norm() <= share * theirs.norm()


@pytest.mark.parametrize("rows", [1, 7, 10**4])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_are_those_of_the_whole_logits(
    kind: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", rows * VOCABULARY)
    made, given = head_of(kind), inputs()
    (values, grads), (expected, expected_grads) = computed(made, *given), plain(made, *given)
    assert_near(values, expected, 1e-6)
    assert_near(grads, expected_grads, 2e-6)
    (alone,) = made.logps(given[0], given[1], distribution=False)
    assert torch.equal(alone, values[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_rounds_the_products_alone(kind: str, dtype: torch.dtype) -> None:
    """Logits are products of half precision; beyond this, nothing is rounded to it but the gradient that is multiplied again."""
    made, given = head_of(kind), inputs(dtype)
    (values, grads), (expected, expected_grads) = computed(made, *given), plain(made, *given)
    assert all(each.dtype == torch.float32 for each in values)
    assert_near(values[:1], expected[:1], 4 * torch.finfo(dtype).eps)
    assert_near(grads, expected_grads, 4 * torch.finfo(dtype).eps)
    assert [each.dtype for each in grads[:2]] == [dtype, torch.float32]


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    made = head_of("bias")
    getattr(made.linear, frozen).requires_grad_(False)
    (_, grads), given = computed(made, *inputs()), inputs()
    expected = plain(made, *given)[1]
    kept = [number for number, name in enumerate(("hidden", "weight", "bias")) if name != frozen]
    assert grads[{"weight": 1, "bias": 2}[frozen]] is None
    assert_near([grads[number] for number in kept], [expected[number] for number in kept], 2e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["plain", "capped"])
def test_it_takes_the_bytes_that_it_says(
    kind: str, dtype: torch.dtype, frozen: bool, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    made = replace(head_of(kind), linear=nn.Linear(256, 20_000, bias=False).requires_grad_(not frozen))
    monkeypatch.setitem(head.CHUNK_NUMBERS, "cpu", 100 * 20_000)
    states = torch.randn(250, 256, dtype=dtype, requires_grad=True)
    targets = torch.randint(0, 20_000, (250,))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled, torch.set_grad_enabled(training):
        logps = made.logps(states, targets, distribution=True)[0]
        if training:
            logps.sum().backward()
    assert 0.97 < made.bytes("cpu", dtype, training) / allocated(profiled) < 1.03


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_compiled_it_gives_the_same(kind: str) -> None:
    made = head_of(kind)
    hidden, targets, grad = inputs()
    rest = (made.linear.weight.detach(), None if made.linear.bias is None else made.linear.bias.detach())
    for distribution in (False, True):
        asked = (hidden, *rest, targets, made.scale, made.cap, distribution)
        compiled = Compiled(head._scores)
        for ours, theirs in zip(compiled(*asked), head._scores(*asked), strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-6, atol=2e-6)
        assert compiled.run is not compiled.function
    normalizer = head._scores(hidden, *rest, targets, made.scale, made.cap, False)[0]
    compiled, asked_for = Compiled(head._gradients), (hidden, *rest, targets, normalizer, grad, made.scale, made.cap)
    found, expected = compiled(*asked_for), head._gradients(*asked_for)
    assert compiled.run is not compiled.function
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-8)


def test_where_compilation_fails_it_runs_without() -> None:
    def double(value: torch.Tensor) -> torch.Tensor:
        return 2 * value

    def broken(value: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no compiler")

    compiled = Compiled(double)
    compiled.run = broken
    assert compiled(torch.ones(2)).tolist() == [2, 2] and compiled.run is double
    compiled.run = compiled.function = broken
    with pytest.raises(RuntimeError, match="no compiler"):
        compiled(torch.ones(2))


def test_full_memory_is_no_failure_of_the_compiler() -> None:
    def full(value: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    compiled = Compiled(torch.neg)
    compiled.run = full
    with pytest.raises(torch.OutOfMemoryError):
        compiled(torch.ones(2))
    assert compiled.run is full


def test_it_moves_at_most_half_of_what_it_moved() -> None:
    """`before` is what 0.1.0 moved in the same count."""
    found = moved(positions=12_000, vocabulary=151_936, width=1024)
    assert found["eager"] < 0.5 * found["before"] and found["compiled"] < 0.25 * found["before"]


def test_a_chunk_is_as_large_as_the_kind_of_device_bears() -> None:
    """Another accelerator's is CUDA's; mps computes no faster than fits the CPU's."""
    made = Head(nn.Linear(8, 1000), 1.0, None)
    rows = {kind: made.rows(kind) for kind in ("cpu", "mps", "cuda", "xpu")}
    assert rows["cpu"] == rows["mps"] < rows["cuda"] == rows["xpu"]
