"""Options that say how the weights of the reference, which adapters leave as they are, are held in memory."""

from dataclasses import dataclass

from minicache.errors import ConfigError
from minicache.options.declare import flag, option

PANEL = "Quantized base"
# Name of a quantization, as identities and run records hold it -> the field of the option that asks for it. A name stands for
# all settings: "nf4-double" for NF4 in blocks of 64 weights whose scales are quantized once more, "int8" for rows of LLM.int8.
QUANTIZATIONS = {"nf4-double": "base_4bit", "int8": "base_8bit"}


@dataclass(frozen=True)
class BaseOptions:
    """Options of a quantized base, the same in both stages: the policy begins as the reference."""

    base_4bit: bool = option(
        False,
        "Hold the base's linear layers in 4 bits (NF4, double quantization): QLoRA, with bitsandbytes.",
        panel=PANEL,
    )
    base_8bit: bool = option(False, "Hold them in 8 bits (the rows of LLM.int8).", panel=PANEL)

    def __post_init__(self) -> None:
        if self.base_4bit and self.base_8bit:
            raise ConfigError("--base-4bit, --base-8bit: expected one of them, got both")

    @property
    def quantization(self) -> str:
        """A name in QUANTIZATIONS; "" for weights as they are stored."""
        return next((name for name, field in QUANTIZATIONS.items() if getattr(self, field)), "")


AS_STORED = BaseOptions()


def flag_of(quantization: str) -> str:
    """The option that asks for a quantization: `--base-4bit`."""
    return flag(QUANTIZATIONS[quantization])
