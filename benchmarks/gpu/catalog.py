"""The checks, in the order in which they run: what decides stands first. No torch."""

from dataclasses import dataclass

# Share of an H100's bfloat16 peak, useful FLOPs only, of stages one and two.
EXPECTED_SHARES = {"64M": (0.25, 0.25), "0.6B": (0.40, 0.35), "1.7B": (0.50, 0.45), "8B LoRA": (0.60, 0.50)}


@dataclass(frozen=True)
class Check:
    """A check.

    code: "module:function" of (Machine) -> figures, one after another. about: what it shows. seconds: its time limit; it is not
    begun with less than a third of it.
    """

    code: str
    about: str
    seconds: float


_HERE = "benchmarks.gpu."
CHECKS: dict[str, Check] = {
    "machine": Check(_HERE + "values:machine", "what is here, and a plain product's rate", 30),
    "layouts": Check(_HERE + "values:layouts", "each layout against padded float32, forward and backward", 120),
    "noise": Check(_HERE + "values:noise", "the same pairs in other batches, with and without gradients; step 0", 60),
    "determinism": Check(_HERE + "values:determinism", "the same steps twice, bit for bit", 60),
    "waits": Check(_HERE + "kernels:waits", "calls in a step that make the host wait", 60),
    "speed 0.6B": Check(_HERE + "speed:speed_600m", "both stages beside the padded live-reference trainer", 90),
    "speed 64M": Check(_HERE + "speed:speed_64m", "both stages beside the padded live-reference trainer", 60),
    "speed 1.7B": Check(_HERE + "speed:speed_1700m", "both stages beside the padded live-reference trainer", 90),
    "speed 8B LoRA": Check(_HERE + "speed:speed_8b", "both stages beside the padded live-reference trainer", 120),
    "fit": Check(_HERE + "memory:fit", "what `fit` counts beside the allocator's peak", 90),
    "head": Check(_HERE + "kernels:head", "the compiled head beside the eager one", 60),
    "graphs": Check(_HERE + "kernels:graphs", "graphs that seven lengths compile", 60),
    "attention": Check(_HERE + "kernels:attention", "each form of attention by head width, forward and backward", 100),
    "commands": Check(_HERE + "commands:commands", "the command line, end to end", 180),
    "compile": Check(_HERE + "speed:compiled", "train --compile beside eager", 150),
}
