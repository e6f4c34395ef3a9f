"""Options of `train` about adapters."""

from dataclasses import dataclass

from minicache.errors import ConfigError
from minicache.options.declare import check_options, flag, option, options_of

LORA = "LoRA"


@dataclass(frozen=True)
class LoraOptions:
    """Options of low-rank adapters, which are trained instead of all weights.

    lora_dropout is here to be refused: both stages run without dropout.
    """

    lora_rank: int = option(
        0, "Train adapters of this rank instead of all weights; 0: all weights.", panel=LORA, least=0
    )
    lora_alpha: float | None = option(None, "Scale of the adapters. (Default: twice the rank.)", panel=LORA, above=0)
    lora_targets: str = option("all-linear", "all-linear, or names of modules: q_proj,v_proj.", panel=LORA)
    lora_rslora: bool = option(False, "Divide alpha by the root of the rank (rsLoRA), not by the rank.", panel=LORA)
    lora_dora: bool = option(
        False, "Train the length of each weight vector apart from its direction (DoRA).", panel=LORA
    )
    lora_dropout: float = option(
        0.0, "Only 0: with dropout, the policy would not begin as the reference.", panel=LORA, least=0, below=1
    )
    continue_adapter: bool = option(
        False, "Train the reference's own adapter further, instead of a new one on top of it.", panel=LORA
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.lora_dropout:
            raise ConfigError(
                f"--lora-dropout: expected 0, got {self.lora_dropout:g}; with dropout, policy and reference would differ at "
                "step 0, so both stages run without"
            )
        if self.lora_rank and self.continue_adapter:
            raise ConfigError(
                "--lora-rank, --continue-adapter: expected a new adapter or the reference's own, got both"
            )
        for item, _ in options_of(LoraOptions):
            alone = item.name != "continue_adapter" and not self.lora_rank
            if alone and getattr(self, item.name) != item.default:
                name = flag(item.name)
                raise ConfigError(f"{name}: is used with --lora-rank only; expected both, got {name} alone")

    @property
    def wanted(self) -> bool:
        """Whether adapters are trained, and the other weights are not."""
        return bool(self.lora_rank) or self.continue_adapter


NO_LORA = LoraOptions()
