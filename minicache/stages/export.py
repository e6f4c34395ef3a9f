"""Export of a policy for other programs: a Hugging Face directory, or MiniMind's own file."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from minicache.disk import check_writable
from minicache.errors import OutputError
from minicache.models import load_model, save_model, save_pth, save_tokenizer
from minicache.options.exchange import ExportConfig
from minicache.processes.world import World
from minicache.scoring.scorer import DTYPES
from minicache.trackers import Tracker
from minicache.training.run_directory import policy_source


@dataclass(frozen=True)
class ExportReport:
    """The result of an export.

    out: the file or directory written. name: the value of --model that loads it; for a .pth it may add the number of heads.
    dtype: precision of the weights. parameters: number of the weights.
    """

    out: Path
    name: str
    dtype: str
    parameters: int


def export(config: ExportConfig, world: World, tracker: Tracker) -> ExportReport:
    """Write the policy to `config.out`, with adapters merged into their base.

    Raises:
        ModelError: the policy cannot be read, or does not fit the form. OutputError: it cannot be written.
    """
    if config.out.exists():
        raise OutputError(f"{config.out}: exists already; name another --out or remove it")
    check_writable(config.out)
    source = policy_source(config.policy)
    tracker.begin(f"loading {source}", None)
    loaded = load_model(source, config.trust_remote_code)
    model = loaded.model
    if loaded.left_out:
        tracker.note(loaded.left_out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tracker.begin(f"writing {config.out}", None)
    if config.out.suffix == ".pth":
        dtype = "float16" if config.dtype == "auto" else config.dtype
        name = save_pth(model, config.out, dtype)
    else:
        if config.dtype != "auto":
            model = model.to(DTYPES[config.dtype])
        dtype, name = str(next(model.parameters()).dtype).removeprefix("torch."), str(config.out)
        _save_directory(model, source, config)
    return ExportReport(out=config.out, name=name, dtype=dtype, parameters=parameters)


def _save_directory(model: nn.Module, source: str, config: ExportConfig) -> None:
    """Write a Hugging Face directory with the tokenizer named, or else that of the policy."""
    with TemporaryDirectory(prefix="minidpo-") as scratch:
        # Not the scratch directory itself: save_model copies its permissions, which exclude all other users.
        files = Path(scratch) / "tokenizer"
        family: Any = model.config
        save_tokenizer(config.tokenizer or source, files, None, config.trust_remote_code, family.model_type)
        save_model(model, files, config.out)
