"""What options may be: bounds, names, and options that a run would not read."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from minicache.errors import ConfigError
from minicache.options import exchange, others, stage_one, sweep, train
from minicache.options.catalog import DIVERGENCES, LOSSES, SCHEDULES
from minicache.options.declare import KEY, flag, options_of
from minicache.options.dictionaries import fill
from minicache.options.objective import parse_loss, starts_at_ln_2
from minicache.options.sweep import SWEPT, sweep_config
from minicache.options.train import TrainConfig
from minicache.options.unused import FLAGS, RULES, require_read

CONFIGS = [
    each
    for module in (exchange, others, stage_one, train)
    for each in vars(module).values()
    if isinstance(each, type) and dataclasses.is_dataclass(each) and each.__module__ == module.__name__
]
OPTIONS = [(config, item) for config in CONFIGS for item in dataclasses.fields(config) if KEY in item.metadata]


def as_parameters(options: list[tuple[type, dataclasses.Field[Any]]]) -> list[Any]:
    """(config, item, declared) of each option, named after its field."""
    return [
        pytest.param(config, item, item.metadata[KEY], id=f"{config.__name__}.{item.name}") for config, item in options
    ]


DECLARED = as_parameters(OPTIONS)
NUMBERS = as_parameters(
    [each for each in OPTIONS if {int, float} & {each[1].type, *getattr(each[1].type, "__args__", ())}]
)


def config_of(**options: Any) -> TrainConfig:
    return fill(TrainConfig, {"ref_cache": "cache", "out": "run", **options})


@pytest.mark.parametrize(("config", "item", "declared"), DECLARED)
def test_every_option_has_a_help_text_and_a_default_that_it_allows(config: Any, item: Any, declared: Any) -> None:
    assert declared.text.strip() and "{" not in declared.text
    if item.default is not dataclasses.MISSING:
        declared.check(flag(item.name), item.default)


@pytest.mark.parametrize(("config", "item", "declared"), NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_may_be_infinite_or_none_at_all(config: Any, item: Any, declared: Any, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{flag(item.name)}: expected .*, got (nan|inf|-inf)$"):
        declared.check(flag(item.name), value)


@pytest.mark.parametrize(("config", "item", "declared"), NUMBERS)
def test_a_number_just_beyond_its_bounds_is_refused_and_one_on_them_is_not(
    config: Any, item: Any, declared: Any
) -> None:
    inside = [bound for bound in (declared.least, declared.most) if bound is not None]
    outside = [bound for bound in (declared.above, declared.below) if bound is not None]
    outside += [] if declared.least is None else [math.nextafter(declared.least, -math.inf)]
    outside += [] if declared.most is None else [math.nextafter(declared.most, math.inf)]
    for value in inside:
        declared.check(flag(item.name), value)
    for value in outside:
        with pytest.raises(ConfigError, match=f"^{flag(item.name)}: expected"):
            declared.check(flag(item.name), value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.0}, "--beta: expected a number above 0, got 0.0"),
        ({"holdout": 1.0}, "--holdout: expected a share of the pairs from 0 to below 1, got 1.0"),
        ({"ld_alpha": 2.0}, "--ld-alpha: expected a share from 0 to 1, got 2.0"),
        ({"label_smoothing": 0.5}, "--label-smoothing: expected 0 to below 0.5, got 0.5"),
        ({"seed": 10**400}, f"--seed: expected 0 to {2**63 - 1}, got 1{'0' * 39}"),
        ({"f_alpha": math.nan}, "--f-alpha: expected a finite number, got nan"),
        ({"sft_weight": math.inf}, "--sft-weight: expected 0 or more, got inf"),
        ({"schedule": "steps"}, f"--schedule: expected one of {', '.join(SCHEDULES)}, got 'steps'"),
        ({"tracker": ("wandb", "csv")}, "--tracker: expected one of wandb, swanlab, tensorboard, trackio, got 'csv'"),
    ],
)
def test_a_refusal_says_what_was_expected_and_what_came(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config_of(**options)
    assert str(caught.value) == message


# --- options that nothing reads ---

UNREAD: dict[str, tuple[dict[str, Any], str]] = {
    "label_smoothing": ({"loss": "ipo", "label_smoothing": 0.3}, "--loss ipo does not read it"),
    "f_divergence": ({"loss": "bco_pair", "f_divergence": "js"}, "--loss bco_pair does not read it"),
    "f_alpha": ({"f_divergence": "js", "f_alpha": 0.3}, "--f-divergence js does not read it"),
    "discopop_tau": ({"discopop_tau": 0.1}, "--loss sigmoid does not read it"),
    "simpo_gamma": ({"simpo_gamma": 0.1}, "expected simpo"),
    "min_lr": (
        {"schedule": "constant", "min_lr": 0.1},
        "--schedule constant does not read it; expected cosine, linear",
    ),
    "decay_norms": ({"decay_norms": True}, "is about --weight-decay; expected both"),
    "format": ({"format": "hh"}, "expected both, got it alone"),
    "columns": ({"columns": "prompt=question"}, "expected both, got it alone"),
    "ignore_fields": ({"ignore_fields": "images"}, "expected both, got it alone"),
    "row_pairs": ({"row_pairs": "all"}, "expected both, got it alone"),
    "save_dtype": ({"lora_rank": 4, "save_dtype": "bfloat16"}, "without --lora-rank"),
    "model": ({"model": "m", "init_from": "n"}, "--init-from"),
}


def test_each_rule_has_its_example() -> None:
    assert UNREAD.keys() == RULES.keys()


@pytest.mark.parametrize("name", UNREAD)
def test_an_option_that_the_run_would_not_read_is_refused_by_name(name: str) -> None:
    options, message = UNREAD[name]
    with pytest.raises(ConfigError, match=f"^{FLAGS[name]}: ") as caught:
        require_read(config_of(**options), options)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", UNREAD)
def test_where_it_comes_from_a_run_of_before_it_is_passed_over(name: str) -> None:
    options, _ = UNREAD[name]
    require_read(config_of(**options), options.keys() - {name})


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.3},
        {"loss": "ipo,robust:0.5", "label_smoothing": 0.3},
        {"f_divergence": "alpha", "f_alpha": 0.3},
        {"loss": "ipo", "label_smoothing": 0.0},
        {"min_lr": 0.1},
        {"lora_rank": 2, "lora_alpha": 4.0, "lora_targets": "q_proj"},
        {"data": ("a",), "format": "hh"},
        {"save_dtype": "bfloat16"},
        {"model": "m"},
    ],
)
def test_what_is_read_is_taken(options: dict[str, Any]) -> None:
    require_read(config_of(**options), options)


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_loss_is_said_to_read_is_what_it_reads(loss: str) -> None:
    """Each option of LossOptions changes the values of just those losses that name it."""
    torch = pytest.importorskip("torch")
    from minicache.training.losses import Logps, loss_named

    generator = torch.Generator().manual_seed(1)
    policy, reference = (-torch.rand(6, 2, generator=generator) for _ in range(2))
    logps = Logps(policy, reference, torch.full((6, 2), 5.0), True)
    plain = {"label_smoothing": 0.1}  # exo_pair takes its logarithm
    others: dict[str, Any] = {
        "label_smoothing": 0.2, "f_divergence": "js", "f_alpha": 0.2, "discopop_tau": 0.3, "simpo_gamma": 0.9,
    }  # fmt: skip
    for name, value in others.items():
        base = {**plain, **({"f_divergence": "alpha"} if name == "f_alpha" else {})}
        mine, other = (
            loss_named(loss)(logps, 0.3, train.LossOptions(**options)) for options in (base, {**base, name: value})
        )
        assert (not torch.equal(mine, other)) == (name in LOSSES[loss].reads), name
    assert {name for name in others if name in DIVERGENCES["alpha"].reads} == {"f_alpha"}


@pytest.mark.parametrize("loss", LOSSES)
def test_the_losses_said_to_begin_at_ln_2_are_those_that_do(loss: str) -> None:
    torch = pytest.importorskip("torch")
    from minicache.training.losses import Logps, loss_named

    same = -torch.rand(6, 2, generator=torch.Generator().manual_seed(1))
    losses = loss_named(loss)(
        Logps(same, same, torch.full((6, 2), 5.0), True), 0.3, train.LossOptions(label_smoothing=0.1)
    )
    assert LOSSES[loss].from_ln_2 == torch.allclose(losses, torch.full((6,), math.log(2)), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"loss": "sigmoid"}, True),
        ({"loss": "robust", "label_smoothing": 0.2}, True),
        ({"loss": "sigmoid:0.75,aot:0.25"}, True),
        ({"loss": "sigmoid,aot"}, False),
        ({"loss": "sigmoid:0.5"}, False),
        ({"loss": "sigmoid:0.5,hinge:0.5"}, False),
        ({"loss": "sigmoid", "sft_weight": 0.1}, False),
        ({"loss": "sigmoid", "wpo": True}, False),
        ({"loss": "sigmoid", "init_from": "other"}, False),
        ({"loss": "of a later version"}, False),
        ({}, False),
    ],
)
def test_which_runs_begin_at_ln_2(settings: dict[str, Any], expected: bool) -> None:
    assert starts_at_ln_2(settings) == expected


@pytest.mark.parametrize("text", ["dpo", "sigmoid:x", "sigmoid:0", "sigmoid:inf", "sigmoid:nan", "sigmoid,sigmoid", ""])
def test_a_loss_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^--loss: "):
        parse_loss(text)


# --- sweeps ---


def test_a_sweep_over_an_option_that_one_of_its_runs_does_not_read_is_refused() -> None:
    given = {"ref_cache": "c", "out": "s", "holdout": 0.1, "loss": ["sigmoid,ipo"], "label_smoothing": ["0,0.1"]}
    with pytest.raises(ConfigError, match="--label-smoothing: --loss ipo does not read it"):
        sweep_config(given, {})
    assert len(sweep_config({**given, "label_smoothing": ["0.1"]}, {}).runs) == 2  # one of them reads it
    with pytest.raises(ConfigError, match="--label-smoothing"):
        sweep_config({**given, "loss": ["ipo,hinge"], "label_smoothing": ["0.1"]}, {})


def test_a_sweep_that_was_begun_with_such_options_goes_on(tmp_path: Path) -> None:
    given = {"ref_cache": "c", "out": tmp_path, "holdout": 0.1, "loss": ["sigmoid,ipo"], "label_smoothing": ["0,0.1"]}
    assert len(sweep_config(given, {}).runs) == 4


def test_swept_options_are_trains_own() -> None:
    assert SWEPT.keys() <= {item.name for item, _ in options_of(TrainConfig)}
    assert sweep.SWEPT["beta"] is float and sweep.SWEPT["batch_size"] is int and sweep.SWEPT["loss"] is str


def test_an_absent_key_is_the_default_of_its_option() -> None:
    assert fill(TrainConfig, {"ref_cache": "c", "out": Path("o")}) == TrainConfig("c", Path("o"))
