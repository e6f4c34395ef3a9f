"""A policy in the form that somebody else reads: a Hugging Face directory, or MiniMind's own file."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

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
    """out: what was written; name: how to call it as a --model (a .pth with other heads than its generation's says them)."""

    out: Path
    name: str
    dtype: str
    parameters: int


def export(config: ExportConfig, world: World, tracker: Tracker) -> ExportReport:
    """Adapters are merged into their base.

    Raises:
        ModelError: the policy cannot be read, or is none that fits the form. OutputError: it cannot be written.
    """
    if config.out.exists():
        raise OutputError(f"{config.out}: exists already; name another --out or remove it")
    check_writable(config.out)
    source = policy_source(config.policy)
    tracker.begin(f"loading {source}", None)
    model = load_model(source, config.trust_remote_code).model
    parameters = sum(parameter.numel() for parameter in model.parameters())
    tracker.begin(f"writing {config.out}", None)
    if config.out.suffix == ".pth":
        dtype = "float16" if config.dtype == "auto" else config.dtype
        return ExportReport(config.out, save_pth(model, config.out, dtype), dtype, parameters)
    if config.dtype != "auto":
        model = model.to(DTYPES[config.dtype])
    with TemporaryDirectory(prefix="minidpo-") as scratch:
        files = (
            Path(scratch) / "tokenizer"
        )  # a new directory: nobody else may open the scratch one, and save_model copies that
        save_tokenizer(config.tokenizer or source, files, None, config.trust_remote_code)
        save_model(model, files, config.out)
    return ExportReport(
        config.out, str(config.out), str(next(model.parameters()).dtype).removeprefix("torch."), parameters
    )
