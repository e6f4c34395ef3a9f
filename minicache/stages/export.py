"""Export of a policy for other programs: a Hugging Face directory, or MiniMind's own file."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minicache.cache.reader import ReferenceCache
from minicache.disk import check_writable, scratch_folder
from minicache.errors import MinicacheError, OutputError
from minicache.models import load_model, save_model, save_pth, save_tokenizer
from minicache.models.load import load_unquantized
from minicache.models.quantized import is_quantized
from minicache.options.exchange import ExportConfig
from minicache.processes.world import World
from minicache.reports.held_out import learned
from minicache.scoring.moved import Moved, Scored
from minicache.scoring.scorer import DTYPES
from minicache.trackers import Tracker
from minicache.training.run_directory import reading, run_behind, run_of


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    out: the file or directory written. name: the value of --model that loads it; for a .pth it may add the number of heads.
    dtype: precision of the weights. parameters: number of the weights. moved: by how much logprobs differ from those of a policy on
    a quantized base, which is written without quantization; None for others, or where no cache of its run can be read. learned:
    whether the policy of a run is another than the model it started from.
    """

    out: Path
    name: str
    dtype: str
    parameters: int
    moved: Moved | None = None
    learned: bool = True


def export(config: ExportConfig, world: World, tracker: Tracker) -> ExportReport:
    """Write the policy to `config.out`, with adapters merged into their base, as it was before any quantization.

    Raises:
        ModelError: the policy cannot be read, or does not fit the form. OutputError: it cannot be written.
    """
    if config.out.exists():
        raise OutputError(f"{config.out}: exists already; name another --out or remove it")
    check_writable(config.out)
    with reading(config.policy) as source:
        return _export(config, source, world, tracker)


def _export(config: ExportConfig, source: str, world: World, tracker: Tracker) -> ExportReport:
    """As `export`. source: the directory of the policy's model."""
    tracker.begin(f"loading {source}", None)
    loaded = load_model(source, config.trust_remote_code)
    model = loaded.model
    loaded.note_left_out(tracker.note)
    shift = None
    if is_quantized(model):
        before = _scored(model, config.policy, world, tracker)
        # not both at once
        del model, loaded
        tracker.begin(f"loading {source} without quantization", None)
        model = load_unquantized(source, config.trust_remote_code).model
        shift = before.moved_by(model, world.device) if before else None
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tracker.begin(f"writing {config.out}", None)
    if config.out.suffix == ".pth":
        dtype = "float16" if config.dtype == "auto" else config.dtype
        name = save_pth(model, config.out, dtype, is_new=True)
    else:
        if config.dtype != "auto":
            model = model.to(DTYPES[config.dtype])
        dtype, name = str(next(model.parameters()).dtype).removeprefix("torch."), str(config.out)
        _save_directory(model, source, config)
    return ExportReport(
        out=config.out, name=name, dtype=dtype, parameters=parameters, moved=shift, learned=_learned(config.policy)
    )


def _learned(policy: str) -> bool:
    """As `learned`, of the policy of a finished run; True of all others."""
    try:
        record = run_of(policy)
    # the model beside a record that cannot be read is exported all the same
    except OutputError:
        return True
    return not (record and record.outcome) or learned(record.flat)


def _scored(model: nn.Module, policy: str, world: World, tracker: Tracker) -> Scored | None:
    """The scores of a few pairs of the cache that the policy was trained on; None if it cannot be read."""
    cache = _cache_of(policy, tracker)
    if cache is None:
        return None
    tracker.begin(f"scoring pairs of {cache.path}", None)
    return Scored.by(model, cache, world.device)


def _cache_of(policy: str, tracker: Tracker) -> ReferenceCache | None:
    """The cache that the run of the policy was trained on, if it can still be read; else the tracker notes why not."""
    run = run_behind(policy)
    if run is None:
        tracker.note(f"{policy}: no run says on which cache it was trained; how far logprobs move is not measured")
        return None
    try:
        cache = ReferenceCache(run.ref_cache)
        cache.check_complete()
        return cache
    except MinicacheError as error:
        tracker.note(f"how far logprobs move is not measured: {error}")
        return None


def _save_directory(model: nn.Module, source: str, config: ExportConfig) -> None:
    """Write a Hugging Face directory with the tokenizer named, or else that of the policy."""
    with scratch_folder("export") as scratch:
        # Not the scratch directory itself: save_model copies its permissions, which exclude all other users.
        files = scratch / "tokenizer"
        family: Any = model.config
        save_tokenizer(config.tokenizer or source, files, None, config.trust_remote_code, family.model_type)
        save_model(model, files, config.out)
