"""Checks of options beyond bounds: the shares of jobs, and the weights of caches."""

import re

from minicache.errors import ConfigError
from minicache.options.catalog import WEIGHTS
from minicache.options.declare import listed
from minicache.options.where import Where, different


def split_share(shard: str | None) -> tuple[int, int]:
    """K and N of "K/N": the number of a job, from 1, and the number of jobs; (1, 1) for None.

    Raises:
        ConfigError: `shard` has another form, or K is not from 1 to N.
    """
    parts = re.fullmatch("([0-9]{1,9})/([0-9]{1,9})", shard if shard is not None else "1/1")
    number, of = (int(parts[1]), int(parts[2])) if parts else (0, 0)
    if not 1 <= number <= of:
        raise ConfigError(f"--shard: expected K/N with K from 1 to N, such as 3/64, got {shard!r}")
    return number, of


def check_caches(caches: list[tuple[Where, float | None]]) -> None:
    """Check the reference caches of a run, each with its weight.

    Raises:
        ConfigError: a weight is not above 0, only some caches have one, or a cache is named twice.
    """
    weights = [weight for _, weight in caches]
    for where, weight in caches:
        path, _, rest = str(where).rpartition(":")
        if weight is None and path and re.fullmatch(r"-[0-9.e-]+|nan|inf", rest):
            raise ConfigError(f"--ref-cache {where}: expected a weight above 0, got {rest}")
    if len(caches) == 1 and weights[0] is not None:
        raise ConfigError(
            "--ref-cache: a weight is a share beside other caches; expected several, or one without a weight"
        )
    if None in weights and any(weights):
        raise ConfigError("--ref-cache: expected a weight for each cache (a/:0.7 b/:0.3) or for none, got some without")
    if 0 in weights:
        raise ConfigError("--ref-cache: a weight of 0 selects no pairs; expected one above 0, or leave the cache out")
    if not different(where for where, _ in caches):
        raise ConfigError("--ref-cache: one cache is named twice; expected different ones")


def check_weights(weights: str, optimizer: str, adapters: bool, dtype: str = "auto", parallel: str = "ddp") -> None:
    """Check what does not go with a precision of the weights that are trained.

    dtype: of the passes; "auto" is not known yet. parallel: "ddp" too where there are no shards.

    Raises:
        ConfigError: something does not.
    """
    if weights == "float32":
        return
    begin = f"--weights {weights}:"
    if adapters:
        raise ConfigError(
            f"{begin} is about training all weights; adapters are float32, and their base stays as it is stored: leave it out"
        )
    if optimizer not in WEIGHTS[weights]:
        raise ConfigError(
            f"--optimizer {optimizer}: does not round stochastically, and would lose updates to {weights} weights; with --weights "
            f"{weights} expected {listed(WEIGHTS[weights], 'or')}, whose state is in 8 bits there"
        )
    if dtype not in ("auto", weights):
        raise ConfigError(f"{begin} with passes in {dtype}; expected --dtype {weights}, or --weights float32")
    if parallel != "ddp":
        raise ConfigError(f"{begin} not with --parallel {parallel}; expected --parallel ddp, or --weights float32")
