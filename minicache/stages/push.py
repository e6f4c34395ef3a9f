"""A policy or a reference cache as a repository of the Hugging Face Hub, with a card. No torch."""

import re
from dataclasses import dataclass, replace

from minicache.cache.places.place import ROOT
from minicache.disk import scratch_folder
from minicache.errors import ConfigError
from minicache.exchange.hub import Found, Repository
from minicache.exchange.parcels import Parcel, machine_paths, replaced_by_cache, replaced_by_model
from minicache.hub import page_of
from minicache.options.push import KINDS, PushConfig
from minicache.pages.card import FILE, is_unchanged
from minicache.stages.push_cache import parcel_of_cache
from minicache.stages.push_policy import parcel_of_policy
from minicache.trackers import Tracker
from minicache.training.run_directory import RECORD


@dataclass(frozen=True)
class PushReport:
    """The result of a push.

    url: the page of the repository. commit: its newest; None after --dry-run. files, bytes: sent, or there already. names: of the
    files. private: whether it is; None if the network was not asked. card: the text of the card, as it was made. kept_card: whether
    a card that a person had changed stays. learned: whether a policy is another than the model it started from.
    """

    repo: str
    kind: str
    url: str
    commit: str | None
    files: int
    bytes: int
    names: list[str]
    private: bool | None
    card: str
    kept_card: bool = False
    learned: bool = True


def push(config: PushConfig, tracker: Tracker) -> PushReport:
    """Send a finished run's policy, or a complete cache, with its card; nothing is sent before all of it was checked.

    Raises:
        ConfigError: it is of another kind, there is no token, or it may not write there. CacheError: the cache is not complete, or
        damaged. OutputError: the run is not finished. StoreError: the Hub cannot be reached, or refuses.
    """
    kind = _kind(config)
    repository = Repository(KINDS[kind], config.repo)
    before = None
    if not config.dry_run:
        # first: a cache takes a while to check
        tracker.begin(f"asking {page_of(repository.kind, repository.id)}", None)
        before = repository.look()
        _settle_readers(config, before)
    with scratch_folder("push") as scratch:
        parcel = parcel_of_cache(config, tracker) if kind == "cache" else parcel_of_policy(config, scratch)
        for note in parcel.notes:
            tracker.note(note)
        for name in machine_paths(parcel.files, config.source):
            tracker.note(f"{name}: names a directory of this machine; it is sent as it is")
        report = _report(config, repository, parcel)
        return report if config.dry_run else _send(config, repository, before, parcel, report, tracker)


def _send(
    config: PushConfig,
    repository: Repository,
    before: Found | None,
    parcel: Parcel,
    report: PushReport,
    tracker: Tracker,
) -> PushReport:
    """Write the files; returns the report with the commit. before: what is there."""
    private = _settle_readers(config, before)
    kept = bool(before and before.card is not None and not (is_unchanged(before.card) or config.replace_card))
    files = dict(parcel.files) if kept else {**parcel.files, FILE: parcel.card.encode()}
    tracker.note(
        f"{report.url}: {'stays' if before else 'is made'} {'private' if private else 'public'}; "
        f"{'you and those who may see it' if private else 'everybody'} can read {parcel.readable}"
    )
    if kept:
        tracker.note(f"its {FILE} was changed by a person and stays; --replace-card replaces it")
    if before is None:
        repository.make(private)
    old = before.files if before else frozenset()
    is_cache = repository.kind == "dataset"
    gone = (replaced_by_cache if is_cache else replaced_by_model)(old, files)
    commit = repository.send(
        files,
        last=parcel.last,
        gone=gone,
        has=old,
        message=parcel.message,
        begin=lambda phase: tracker.begin(phase, None),
    )
    return replace(report, commit=commit, private=private, kept_card=kept)


def _settle_readers(config: PushConfig, before: Found | None) -> bool:
    """Whether the repository is private. Raises ConfigError: it is there, and not as asked for."""
    if before is None:
        return not config.public
    if not before.private and not config.public:
        raise ConfigError(
            f"{config.repo}: is there already and public; expected --public, which says that everybody may read what is sent, or "
            "another name"
        )
    if before.private and config.public:
        raise ConfigError(
            f"{config.repo}: is there already and private, which --public does not change; leave it out, and change it in the "
            "repository's settings"
        )
    return before.private


def _report(config: PushConfig, repository: Repository, parcel: Parcel) -> PushReport:
    sizes = [
        len(content) if isinstance(content, bytes) else content.stat().st_size for content in parcel.files.values()
    ]
    return PushReport(
        repo=config.repo,
        kind=repository.kind,
        url=page_of(repository.kind, repository.id),
        commit=None,
        files=len(sizes) + 1,
        bytes=sum(sizes) + len(parcel.card.encode()),
        names=sorted([FILE, *parcel.files]),
        private=None,
        card=parcel.card,
        learned=parcel.learned,
    )


# --- what it is ---


def _kind(config: PushConfig) -> str:
    """A name in KINDS. Raises ConfigError: it is neither, or another than --kind says."""
    source = config.source
    # pathlib makes one slash of two
    if re.match("[a-z0-9]{2,}:/", str(source)):
        raise ConfigError(f"{source}: expected a directory; copy what lies at a URL first")
    if not source.is_dir():
        raise ConfigError(f"{source}: no such directory; expected that of a run or of a reference cache")
    found = "cache" if (source / ROOT).is_file() else "policy" if (source / RECORD).is_file() else None
    if found is None:
        above = source.name == "model" and (source.parent / RECORD).is_file()
        advice = f"name the run, {source.parent}" if above else "expected what `train` or `precompute-ref` made"
        raise ConfigError(f"{source}: neither a run (no {RECORD} in it) nor a reference cache (no {ROOT}); {advice}")
    if config.kind not in (None, found):
        raise ConfigError(f"--kind {config.kind}: {source} is a {found}; leave it out, or name another directory")
    if config.model and found == "cache":
        raise ConfigError("--model: is for a policy; a cache has none; leave it out")
    return found
