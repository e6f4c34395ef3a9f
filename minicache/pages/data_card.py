"""The card of a reference cache, made from its manifest: as the data set of a `push`, or beside a table of `export`. No torch."""

from dataclasses import asdict

from minicache.cache.identity import Identity
from minicache.cache.manifest import Manifest, Source
from minicache.hub import page_of
from minicache.options.base import flag_of
from minicache.options.declare import flag
from minicache.pages.card import card, code, facts, link, plain, table
from minicache.reports.notes import notes_on
from minicache.reports.public import data_set_of, hub_id, public_log

SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
TAGS = ["preference", "dpo", "reference-logprobs", "minidpo"]
WHAT = (
    "Preference pairs, and what a frozen reference model thinks of them: for each pair the token ids of both answers, which of "
    "them count, and the reference's mean logprob of each answer. DPO and its relatives can be trained against it without the "
    "reference model in memory."
)
READABLE = (
    "Token ids are text: with the tokenizer that lies beside them, everybody who can read this data set can read all of its "
    "prompts and answers. Rows that were refused are counted here, and are not in it."
)


def data_card(
    manifest: Manifest, title: str, use: str, model: str | None = None, licence: str | None = None, viewer: bool = True
) -> str:
    """The text of the card. use: how it is read, Markdown. model: the Hub's name of the reference. viewer: whether it has rows."""
    log, identity = public_log(manifest.log, model), manifest.identity
    from_hub = sorted({found for source in log.sources if (found := data_set_of(source.name))})
    front = {
        "license": licence,
        "tags": TAGS,
        "source_datasets": from_hub,
        "size_categories": [next((name for most, name in SIZES if log.pairs < most), "n>10M")],
        "viewer": None if viewer else False,
    }
    found = hub_id(log.model)
    pairs = [
        ("pairs", f"{log.pairs:,}"),
        ("reference", link(found, page_of("model", found)) if found else plain(log.model)),
        ("weights", f"{code(identity.weights)}, {plain(identity.family)}"),
        ("identity", code(identity.digest)),
        ("made with", _options(identity)),
    ]
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in log.versions.items())
    made = f"Made {log.created} with {versions}."
    parts = [WHAT, facts(pairs), "## How to read it", use, "## Where the pairs are from", _sources(log.sources)]
    return card(front, title, [*parts, "## What can be read from it", READABLE, made])


def _options(identity: Identity) -> str:
    """The options of `precompute-ref` that change a value, as they are typed."""
    names = ("max_length", "truncate", "loss_on", "think", "special_text", "dtype", "date")
    given = [f"{flag(name)} {value}" for name in names if (value := getattr(identity, name))]
    given += [flag("per_token")] if identity.per_token else []
    given += [flag_of(identity.quantization)] if identity.quantization else []
    arguments = f"; template arguments {code(identity.template_args)}" if identity.template_args else ""
    return code(" ".join(given)) + arguments


def _sources(sources: list[Source]) -> str:
    rows = []
    for source in sources:
        refused = ", ".join(f"{count:,} {plain(reason)}" for reason, count in sorted(source.refused.items()))
        numbers = [f"{count:,}" for count in (source.rows, source.kept, source.duplicates, source.truncated)]
        rows.append([code(source.name), *numbers, refused or "0"])
    notes = [f"- {plain(source.name)}: {plain(line)}" for source in sources for line in notes_on(asdict(source))]
    head = ["file", "rows", "kept", "duplicate", "truncated", "refused"]
    return "\n".join([table(head, rows), *([""] if notes else []), *notes])
