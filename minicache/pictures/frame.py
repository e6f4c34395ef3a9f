"""The look that all pictures share: axes, colours, fonts, files."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicache.disk import written_whole
from minicache.errors import ConfigError
from minicache.failures import system_error
from minicache.loggers import hushed
from minicache.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


SUFFIXES = (".png", ".svg", ".pdf")
CHOSEN, REJECTED, NEUTRAL, HELD_OUT = "#1b7f79", "#d1603d", "#3b5b92", "#c98a00"
RUNS = ("#3b5b92", "#d1603d", "#1b7f79", "#8a5aa8", "#b8860b", "#5b8c3a", "#c2477f", "#5f6b7a")
# fonts with Chinese characters, of which any may be installed
CHINESE = (
    *(
        "Noto Sans CJK SC",
        "Noto Sans SC",
        "Noto Sans CJK JP",
        "Source Han Sans SC",
        "Source Han Sans CN",
        "Source Han Sans",
    ),
    *("PingFang SC", "Hiragino Sans GB", "Heiti SC", "STHeiti", "Microsoft YaHei", "SimHei", "SimSun", "DengXian"),
    *("WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback", "Arial Unicode MS"),
)
GRID, INK = "#e3e3e3", "#33373d"


def check_picture(file: Path) -> None:
    """Check that the file's name ends in a kind of picture and that matplotlib is installed. Raises ConfigError."""
    if file.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"{file}: expected a name ending in {', '.join(SUFFIXES)}, got {file.suffix or 'no ending'}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(f"{file}: drawing needs matplotlib: pip install 'minidpo[plot]'") from None


def frame(axis: "Axes", title: str, below: str, beside: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.set_title(title, loc="left", fontsize=11, color=INK)
    axis.set_xlabel(below, fontsize=9, color=INK)
    axis.set_ylabel(beside, fontsize=9, color=INK)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9, colors=INK)
    if below in ("step", "tokens"):
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))


@contextmanager
def picture(file: Path, inches: tuple[float, float]) -> Iterator["Figure"]:
    """A figure to draw on; written whole when the block ends, the same bytes for the same numbers."""
    check_picture(file)
    import warnings

    import matplotlib
    from matplotlib.figure import Figure

    kind = file.suffix.lower()[1:]
    options: Any = {
        "font.family": ["DejaVu Sans", *chinese_fonts()],
        "text.parse_math": False,
        "svg.hashsalt": "minicache",
    }
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    # it logs that a font has no bold face, and draws the plain one
    fonts = hushed("matplotlib.font_manager")
    with matplotlib.rc_context(), warnings.catch_warnings(), fonts, written_whole(file) as draft:
        # a matplotlibrc may lie in the working directory, a stranger's, and say that LaTeX sets the texts
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(options)
        # a box in a run's name is no reason to stop
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure = Figure(figsize=inches, layout="constrained", facecolor="white")
        yield figure
        try:
            figure.savefig(draft, format=kind, dpi=150, metadata=dates.get(kind))
        # of a PDF's compressor, which is closed after the disk has refused
        except zlib.error as error:
            raise system_error(error, draft.parent) from error


@cache
def chinese_fonts() -> list[str]:
    """The first installed of the fonts with Chinese characters; none where none is installed."""
    from matplotlib import font_manager

    def known() -> list[str]:
        names = set(font_manager.get_font_names())
        return [name for name in CHINESE if name in names][:1]

    if found := known():
        return found
    # matplotlib keeps a list of fonts, which lacks those installed since
    listed = {entry.fname for entry in font_manager.fontManager.ttflist}
    for file in set(font_manager.findSystemFonts()) - listed:
        # a font that it cannot draw, of coloured bitmaps for example
        with suppress(OSError, RuntimeError, ValueError):
            font_manager.fontManager.addfont(file)
    return known()


def label(text: str) -> str:
    """A name on one line, shortened. A space is put before an underscore: a legend leaves out labels that begin with one."""
    shown = visible(text).replace("\n", "␊")
    shown = shown if len(shown) <= 60 else f"…{shown[-59:]}"
    return f" {shown}" if shown.startswith("_") else shown
