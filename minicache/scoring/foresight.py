"""Whether a model and its passes fit a device, from its config, before its weights are loaded."""

import logging
from dataclasses import dataclass
from pathlib import Path

from minicache.errors import FullMemory
from minicache.models.adapter_places import adapter_place, base_name
from minicache.models.load import FAMILIES, split_source
from minicache.models.outline import Outline, held_for, outline_of
from minicache.options.lora import NO_LORA, LoraOptions
from minicache.pairs import PairTable
from minicache.processes.world import World
from minicache.scoring.budget import counted, free_bytes
from minicache.scoring.masks import Windows
from minicache.scoring.memory import TO_SCORE, TO_TRAIN, How, Line, Pass, bytes_of, gigabytes, need_of, parts_of
from minicache.scoring.scorer import Scorer
from minicache.text import one_line

log = logging.getLogger(__name__)

# The count is within 10 % of what is allocated. What needs less than this many times the free memory is tried.
MARGIN = 1.15
NOTHING = Line(0.0, 0.0)
NO_PASS = Pass(NOTHING, NOTHING, NOTHING, slots=1)


@dataclass(frozen=True)
class Held:
    """How a stage holds a model.

    trained: stage two. optimizer: for it. weights: precision of those that are trained, without adapters. shards: devices that the
    model is cut over, or 1.
    """

    dtype: str
    lora: LoraOptions = NO_LORA
    quantization: str = ""
    trained: bool = False
    optimizer: str = "adamw"
    weights: str = "float32"
    shards: int = 1

    def scorer(self, outline: Outline, longest: int) -> Scorer:
        """The scorer of a model without weights, which is changed, in the layout that takes least. longest: tokens of a side."""
        model = held_for(outline, self.lora, self.quantization, self.dtype, self.trained, self.weights)
        scorer = Scorer(model, self.dtype, head_is_own=True)
        scorer.shards = self.shards
        try:
            windows = Windows.read(scorer.model.config.get_text_config(), longest)
            scorer.use_layout("padded" if windows.recurrent else "packed", windows)
        # layers of another kind
        except ValueError:
            scorer.use_layout("padded")
        return scorer


def require_room(
    source: str,
    trust_remote_code: bool,
    held: Held,
    world: World,
    table: PairTable | None = None,
    checkpointing: bool = False,
) -> None:
    """Refuse a model that clearly does not fit, before it is loaded. All ranks must call this.

    Where its size is not known without its weights (a .pth file) or cannot be counted, nothing is said here.

    held: how it is held. table: the pairs of a pass, the longest among them; without, or in a layout other than packed, what
    stays from step to step is counted alone.

    Raises:
        FullMemory: on all ranks; the line has the numbers.
    """

    def find() -> tuple[float, str] | None:
        try:
            return _foreseen(source, trust_remote_code, held, world, table, checkpointing)
        # the stage itself says what is wrong with a request; a family's own code may raise anything
        except Exception as error:
            log.debug("%s: its memory is not known before it is loaded: %s", source, one_line(error, 300))
            return None

    known = [each for each in world.gather(find()) if each]
    if known and max(known)[0] > MARGIN:
        raise FullMemory(max(known)[1])


def _foreseen(
    source: str, trust_remote_code: bool, held: Held, world: World, table: PairTable | None, checkpointing: bool
) -> tuple[float, str] | None:
    """The bytes needed as a multiple of those that are free, and the line about them; None if they are not known."""
    adapter = adapter_place(source)
    if Path(split_source(base_name(adapter) if adapter else source)[0]).suffix in FAMILIES:
        return None
    outline, device = outline_of(source, trust_remote_code), world.device
    stored = {each.dtype for each in outline.model.parameters()}
    scorer = held.scorer(outline, int(table.lengths[:, 0].max() + table.lengths[:, 1:].max()) if table else 0)
    free = free_bytes(device, world.local_size)
    passes = NO_PASS
    if table and scorer.layout_name == "packed":
        passes = counted(scorer, table, How(held.trained, checkpointing, device.type, held.shards > 1))
    need = need_of(scorer, passes, held.optimizer if held.trained else None)
    weights = need.weights
    if device.type == "cpu" and held.shards == 1:
        # those that stay as they are stored are pages of a file, which the system drops and reads again
        weights -= bytes_of(each for each in scorer.parameters() if not each.requires_grad and each.dtype in stored)
    parts = [f"{gigabytes(weights)} for its weights", *([parts_of(need)] if need.state else [])]
    one = passes.bytes(passes.slots)
    if one:
        parts.append(f"{gigabytes(one)} for a pass over the longest pair, {passes.slots:,} token slots")
    total = weights + need.state + one
    line = (
        f"{source}: expected it to fit in memory, of which {gigabytes(free)} are free on {world.name(world.rank)}; got "
        f"{gigabytes(total)}: {', '.join(parts)}. Nothing was loaded. Try {TO_TRAIN if held.trained else TO_SCORE}"
    )
    return total / max(free, 1.0), line
