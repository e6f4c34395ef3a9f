"""Options of `fit`."""

import re
from dataclasses import dataclass

from minicache.errors import ConfigError
from minicache.options import texts
from minicache.options.base import AS_STORED, BaseOptions
from minicache.options.catalog import OPTIMIZERS, WEIGHTS, names_of
from minicache.options.checks import check_weights
from minicache.options.choices import DTYPES, MOST_LENGTH, PARALLEL
from minicache.options.declare import check_options, needed, option
from minicache.options.lora import NO_LORA, LoraOptions

UNITS = {"": 1e9, "GB": 1e9, "GIB": 2**30, "MB": 1e6, "MIB": 2**20}


@dataclass(frozen=True)
class FitConfig:
    """Options of `fit`: the model, what is to be done with it, and on what.

    lora, base: what is asked for alone; nothing: all weights, adapters, and adapters on 4 bits. memory: () is this machine's GPU.
    """

    model: str = needed("The SFT model, as for precompute-ref. Only its config is read.")
    max_length: int = option(1024, "As for precompute-ref: the longest side.", least=2, most=MOST_LENGTH)
    memory: tuple[str, ...] = option(
        (),
        "Memory of a device, such as 24GB; may be given several times. (Default: this machine's GPU, else 24, 40 and 80 GB.)",
        metavar="SIZE",
    )
    nproc: int = option(1, "Number of devices.", least=1)
    parallel: str = option("ddp", texts.PARALLEL, choices=lambda: PARALLEL)
    dtype: str = option("auto", "Precision of the passes: auto (bfloat16), {names}.", choices=lambda: DTYPES)
    optimizer: str = option("adamw", "As for train: {names}.", choices=names_of(OPTIMIZERS))
    weights: str = option("float32", texts.WEIGHTS, choices=lambda: tuple(WEIGHTS))
    lora: LoraOptions = NO_LORA
    base: BaseOptions = AS_STORED
    trust_remote_code: bool = option(False, texts.TRUST)

    def __post_init__(self) -> None:
        check_options(self)
        self.sizes()
        check_weights(
            self.weights, self.optimizer, self.lora.wanted, self.dtype, self.parallel if self.sharded else "ddp"
        )
        if self.lora.continue_adapter:
            raise ConfigError("--continue-adapter: fit counts new adapters; expected --lora-rank, the rank of that one")
        if self.base.quantization and self.sharded:
            raise ConfigError(
                f"--parallel {self.parallel}: quantized weights cannot be sharded; expected --parallel ddp"
            )

    @property
    def sharded(self) -> bool:
        """Whether --parallel and the number of devices make shards of the model."""
        return self.nproc > 1 and self.parallel != "ddp"

    def sizes(self) -> dict[str, float]:
        """The bytes of each memory, by its name as written.

        Raises:
            ConfigError: it is no size.
        """
        return {text: bytes_in(text) for text in self.memory}


def bytes_in(text: str) -> float:
    """The bytes of a size: "24GB" is 24e9, "24GiB" 24 x 2^30, "24" as "24GB".

    Raises:
        ConfigError: it is no size.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = found[2].upper() if found else "?"
    if not found or unit not in UNITS or not float(found[1]):
        raise ConfigError(f"--memory: expected a size such as 24GB or 80GiB, got {text!r}")
    return float(found[1]) * UNITS[unit]
