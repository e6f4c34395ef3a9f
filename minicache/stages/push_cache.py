"""What `push` sends of a reference cache. No torch."""

from minicache import __version__
from minicache.cache.places.place import ROOT
from minicache.cache.reader import ReferenceCache
from minicache.exchange.parcels import Parcel, cache_files
from minicache.options.push import PushConfig
from minicache.options.where import HUB
from minicache.pages.data_card import data_card
from minicache.reports.public import hub_id
from minicache.trackers import Tracker


def parcel_of_cache(config: PushConfig, tracker: Tracker) -> Parcel:
    """The files of a cache, all of which were read and checked, and its card.

    Raises:
        CacheError: it is not complete, or damaged.
    """
    cache = ReferenceCache(config.source)
    cache.check_complete()
    tracker.begin(f"checking {config.source}", None)
    for _, problem in cache.verify():
        raise problem
    # which refuses links in the tokenizer's directory
    assert cache.tokenizer_dir
    model = config.base_model or hub_id(cache.log.model)
    place = f"{HUB}datasets/{config.repo}"
    use = f"```sh\nminidpo inspect-cache {place}\nminidpo train --ref-cache {place} --out run/ --holdout 0.05\n```"
    if not model:
        use += "\n\nThe reference is not named as the Hub does: `train --model DIR` says where its weights lie."
    return Parcel(
        files=cache_files(cache, config.source, model),
        card=data_card(cache.blocks.manifest, config.repo.rpartition("/")[2], use, model, config.license, viewer=False),
        last=ROOT,
        readable=f"the text of all {cache.log.pairs:,} pairs (as token ids), and the tokenizer",
        message=f"Reference cache of {cache.log.pairs:,} pairs, by minidpo {__version__}",
    )
