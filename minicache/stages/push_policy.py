"""What `push` sends of a run. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from minicache import __version__
from minicache.cache.manifest import Manifest
from minicache.cache.reader import ReferenceCache
from minicache.errors import ConfigError, MinicacheError, OutputError
from minicache.exchange.parcels import Parcel, model_files
from minicache.options.push import PushConfig
from minicache.options.where import HUB, local_path, split_weight
from minicache.pages.model_card import PICTURE, PolicyFacts, model_card
from minicache.pictures.runs import RunCurves, draw_runs
from minicache.reports.curves import METRICS, Curve, read_curves
from minicache.reports.held_out import learned
from minicache.reports.public import hub_id
from minicache.training.run_directory import RunRecord, holds_model, read_record

# As `models.adapter_places` names it.
MERGED_BASE = "base"


def parcel_of_policy(config: PushConfig, scratch: Path) -> Parcel:
    """The files of a finished run's policy, which are model, curves and metrics, and its card.

    scratch: where the curves are drawn.

    Raises:
        OutputError: the run is not finished. ConfigError: --model holds none, or the adapter's base is on this machine alone.
    """
    run = config.source
    record = _finished(run)
    folder = config.model or run / "model"
    if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise ConfigError(f"--model {folder}: holds no model; expected a directory that `export --policy {run}` wrote")
    adapter = (folder / "adapter_config.json").is_file()
    if adapter and (run / MERGED_BASE).is_dir():
        raise ConfigError(
            f"{run}: its adapter stands on the merged base in {run / MERGED_BASE}, which is on this machine alone; expected a "
            f"whole model: `minidpo export --policy {run} --out MERGED`, then --model MERGED"
        )
    base = config.base_model or hub_id(record.started_from)
    files, left_out = model_files(folder, base)
    notes = [f"not sent: {', '.join(left_out)}"] if left_out else []
    if adapter and base is None:
        notes.append(
            "nobody else finds the adapter's base by the last part of its path; --base-model org/name names it"
        )
    outcome = record.outcome
    if outcome and outcome.model_step == 0:
        notes.append("no step was better than the start: these weights are those of the base, and the card says so")
    logged = read_curves(run)
    picture = _picture(run, logged, record.flat, scratch / PICTURE, notes)
    known = record.flat
    about = PolicyFacts(
        known=known,
        logged=logged,
        caches=_manifests(record, config.dry_run, notes),
        base=base,
        adapter=adapter,
        has_picture=picture is not None,
        licence=config.license,
    )
    return Parcel(
        files={**files, METRICS: run / METRICS, **({PICTURE: picture} if picture else {})},
        card=model_card(config.repo, about),
        last="adapter_config.json" if adapter else "config.json",
        readable="the weights, the tokenizer, the curves and the options of the run",
        message=f"Policy after {outcome.model_step if outcome else 0:,} steps, by minidpo {__version__}",
        notes=notes,
        learned=learned(known),
    )


def _finished(run: Path) -> RunRecord:
    """The record of a run. Raises OutputError: the run is not finished, has failed, or its model is gone."""
    record = read_record(run)
    if record is None or record.failed or not record.outcome:
        why = f"failed: {record.failed}" if record and record.failed else "is not finished"
        raise OutputError(
            f"{run}: this run {why}; expected a finished one: wait for its end, or `minidpo train --resume --out {run}` if it "
            "has ended"
        )
    if not holds_model(run):
        raise OutputError(f"{run}: its model is gone; expected it in {run / 'model'}")
    return record


def _picture(run: Path, logged: dict[str, Curve], known: dict[str, Any], file: Path, notes: list[str]) -> bytes | None:
    """The curves; None if matplotlib is missing."""
    try:
        draw_runs([RunCurves(run.resolve().name, logged, known)], file)
    except MinicacheError as error:
        notes.append(f"the card has no curves: {error}")
        return None
    return file.read_bytes()


def _manifests(record: RunRecord, local_only: bool, notes: list[str]) -> list[Manifest]:
    """Those of the caches that the run was trained on, as far as they can be read; the card links to those of the Hub."""
    named = record.options["ref_cache"]
    found = []
    for where in named if isinstance(named, list | tuple) else [named]:
        place, _ = split_weight(where)
        if str(place).startswith(HUB) or (local_only and local_path(place) is None):
            continue
        with _noted(f"the card does not say which data {place} was made of", notes):
            found.append(ReferenceCache(place).blocks.manifest)
    return found


@contextmanager
def _noted(what: str, notes: list[str]) -> Iterator[None]:
    try:
        yield
    except MinicacheError as error:
        notes.append(f"{what}: {error}")
