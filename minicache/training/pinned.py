"""The caches of a run that lie on the Hub, at the commit that they have when the run begins. No torch."""

from collections.abc import Mapping
from dataclasses import replace

from minicache.cache.places.hub import pinned
from minicache.options.train import TrainConfig
from minicache.options.where import Where, split_weight


def pins(config: TrainConfig) -> dict[str, str]:
    """The URL with its commit of each cache that lies on the Hub, by the URL asked for.

    Raises:
        DataError, StoreError: there is no such data set, or the Hub cannot be asked.
    """
    places = [place for place, _ in config.caches]
    if config.validation.eval_cache:
        places.append(config.validation.eval_cache)
    fixed = {str(place): str(pinned(place)) for place in places}
    return {place: commit for place, commit in fixed.items() if place != commit}


def with_pins(config: TrainConfig, commits: Mapping[str, str]) -> TrainConfig:
    """The config in which these places are replaced; weights stay. run.json then says which commit was trained on."""
    if not commits:
        return config

    def fixed(where: Where) -> Where:
        place, _ = split_weight(where)
        text = str(place)
        return commits[text] + str(where)[len(text) :] if text in commits else where

    several = config.ref_cache
    held_out = config.validation.eval_cache
    return replace(
        config,
        ref_cache=tuple(map(fixed, several)) if isinstance(several, tuple | list) else fixed(several),
        validation=replace(config.validation, eval_cache=fixed(held_out) if held_out else None),
    )
