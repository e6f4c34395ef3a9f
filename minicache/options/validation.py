"""Options of validation during training."""

from dataclasses import dataclass

from minicache.errors import ConfigError
from minicache.options.declare import check_options, option
from minicache.options.where import Where

VALIDATION = "Validation"


@dataclass(frozen=True)
class ValidationOptions:
    """Options of validation on pairs that are not trained on.

    holdout: pairs are held out by their digests, so that a pair is on the same side in every run.
    """

    holdout: float = option(
        0.0,
        "Share of the pairs that is held out for validation; the model that is best on it is saved.",
        panel=VALIDATION,
        what="a share of the pairs",
        least=0,
        below=1,
    )
    eval_cache: Where | None = option(
        None,
        "Validate on this reference cache of the same model instead.",
        panel=VALIDATION,
        metavar="PATH",
        movable=True,
    )
    eval_every: int | None = option(
        None, "Steps between validations. (Default: ten validations in a run.)", panel=VALIDATION, least=1
    )
    patience: int | None = option(
        None, "Stop after this many validations without a lower loss.", panel=VALIDATION, least=1
    )
    min_gain: float = option(0.0, "By how much the loss must be lower, for --patience.", panel=VALIDATION, least=0)

    def __post_init__(self) -> None:
        check_options(self)
        if self.holdout and self.eval_cache:
            raise ConfigError("--holdout, --eval-cache: expected one of them, got both")
        if not self.wanted and (self.patience or self.eval_every):
            raise ConfigError(
                "--patience and --eval-every need pairs to validate on: add --holdout 0.05 or --eval-cache"
            )
        if self.min_gain and not self.patience:
            raise ConfigError("--min-gain: is used with --patience only; expected both, got --min-gain alone")

    @property
    def wanted(self) -> bool:
        """Whether there are pairs to validate on."""
        return bool(self.holdout or self.eval_cache)


NO_VALIDATION = ValidationOptions()
