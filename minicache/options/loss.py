"""Options of the loss, beside its name and beta."""

from dataclasses import dataclass

from minicache.options.catalog import DIVERGENCES, names_of
from minicache.options.declare import check_options, option

LOSS = "Loss"
# The default of --beta by --logps. The sum over an answer of a hundred tokens is a hundred times its mean. Sources: Tülu 3,
# arXiv:2411.15124, for the mean; Rafailov et al. 2023, DPO, arXiv:2305.18290, for the sum.
BETAS = {"mean": 5.0, "sum": 0.1}


@dataclass(frozen=True)
class LossOptions:
    """Options that some losses read beside beta; options/catalog.py says which loss reads which.

    f_divergence, f_alpha: the function that replaces the log ratio in losses on the difference of the sides.
    ld_alpha: None is 1, equal weights of all tokens.
    """

    label_smoothing: float = option(0.0, "Assumed share of flipped labels.", panel=LOSS, least=0, below=0.5)
    f_divergence: str = option("reverse_kl", "f-divergence: {names}.", panel=LOSS, choices=names_of(DIVERGENCES))
    f_alpha: float = option(0.5, "Alpha of --f-divergence alpha.", panel=LOSS)
    discopop_tau: float = option(0.05, "Temperature of the discopop loss.", panel=LOSS, above=0)
    simpo_gamma: float = option(0.5, "Target margin of the simpo loss.", panel=LOSS)
    sft_weight: float = option(0.0, "Weight of an added SFT loss on the chosen answers (RPO).", panel=LOSS, least=0)
    wpo: bool = option(False, "Weight each pair by its likelihood under the policy (WPO).", panel=LOSS)
    ld_alpha: float | None = option(
        None,
        "Weight of tokens beyond the other answer's length (LD-DPO). Needs a cache made with --per-token.",
        panel=LOSS,
        what="a share",
        least=0,
        most=1,
    )

    def __post_init__(self) -> None:
        check_options(self)


PLAIN_LOSS = LossOptions()
