"""plot and inspect-cache --plot: what is read of a run, what is drawn, and what is said where nothing can be."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from minicache.cache.reader import ReferenceCache
from minicache.errors import ConfigError, DataError, OutputError
from minicache.options.others import PlotConfig
from minicache.pictures import frame
from minicache.pictures.runs import RunCurves, draw_runs, smoothed
from minicache.pictures.sweep import draw_sweep
from minicache.reports.contents import read_cache
from minicache.reports.curves import names_apart, read_curves
from minicache.reports.names import PANELS
from minicache.reports.sweep import RunResult, SweepReport
from minicache.stages.plot import plot
from tests.conftest import Cli

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


def make_run(directory: Path, steps: int = 6, evaluated: bool = False, **facts: object) -> Path:
    """A run directory with every metric that has a panel, and some that have none."""
    directory.mkdir(parents=True)
    lines = []
    for step in range(steps):
        line: dict[str, Any] = {name: math.sin(step) for panel in PANELS for name in panel.metrics}
        lines.append({"step": step, **line, "epoch": step / 3, "note": "text", "flag": True})
        if evaluated and step % 2 == 0:
            lines.append({"step": step, "eval/loss": 0.7 - step / 100, "eval/rewards/accuracy": 0.5})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "run.json").write_text(json.dumps({"logps": "mean", "loss": "sigmoid", **facts}))
    return directory


def texts(svg: Path) -> str:
    """The words of a picture: matplotlib writes each as a comment beside its outlines."""
    return svg.read_text(encoding="utf-8")


# --- reading ---


def test_a_later_line_of_a_step_wins_and_a_cut_last_line_is_passed_over(tmp_path: Path) -> None:
    lines = ['{"step": 0, "loss": 1}', '{"step": 4, "loss": 2, "kl": 5}', '{"step": 2, "loss": 3}', "",
             '{"step": 4, "loss": 4, "eval/loss": NaN}', '{"step": 6, "lo']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    curves = read_curves(tmp_path)
    assert curves["loss"] == ([0, 2, 4], [1.0, 3.0, 4.0]) and curves["kl"] == ([4], [5.0])
    assert math.isnan(curves["eval/loss"][1][0]) and set(curves) == {"loss", "kl", "eval/loss"}


def test_text_and_flags_are_no_metrics(tmp_path: Path) -> None:
    assert not {"note", "flag", "step"} & read_curves(make_run(tmp_path / "run")).keys()


@pytest.mark.parametrize("content", ["", "\n", '{"step": 0', '{"step": 0, "no": "number"}'])
def test_a_run_without_numbers_yet_says_so(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="no metrics yet"):
        read_curves(tmp_path)


@pytest.mark.parametrize("broken", ["garbage", "[1]", '{"loss": 1}', '{"step": null}', "3"])
def test_a_broken_line_in_the_midst_is_named(broken: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0, "loss": 1}}\n{broken}\n{{"step": 1, "loss": 1}}\n')
    with pytest.raises(DataError, match=r"metrics.jsonl, line 2: expected a JSON object with 'step'"):
        read_curves(tmp_path)


def test_a_place_that_is_no_run_is_told_what_it_is(tmp_path: Path) -> None:
    make_run(tmp_path / "sweep" / "b1")
    (tmp_path / "empty").mkdir()
    for place, said in (
        ("none", "no such run"),
        ("empty", "no metrics.jsonl in it"),
        ("sweep", "holds runs.*sweep/b1"),
    ):
        with pytest.raises(DataError, match=said):
            plot(PlotConfig((tmp_path / place,), tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert names_apart([Path("/a/b")]) == ["b"]
    assert names_apart([Path("/s/b1"), Path("/s/b2")]) == ["b1", "b2"]
    assert names_apart([Path("/s/b1/run"), Path("/s/b2/run")]) == ["b1/run", "b2/run"]
    assert names_apart([Path("/s/run"), Path("/s/run")]) == ["run", "run"]


def test_smoothing_is_a_weighted_mean_of_what_came_before() -> None:
    values = np.random.default_rng(0).normal(size=20)
    for weight in (0.0, 0.3, 0.9):
        weights = weight ** np.arange(20.0)
        expected = [values[: n + 1][::-1] @ weights[: n + 1] / weights[: n + 1].sum() for n in range(20)]
        assert smoothed(values.tolist(), weight) == pytest.approx(expected)
    assert smoothed([2.0] * 5, 0.9) == pytest.approx([2.0] * 5)
    assert smoothed([math.nan, 1.0, math.inf, 1.0], 0.5)[1:] == [1.0, 1.0, 1.0]


# --- drawing ---


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf", ".PNG"])
def test_the_picture_is_of_the_kind_its_name_says_and_the_same_each_time(suffix: str, tmp_path: Path) -> None:
    run, file = make_run(tmp_path / "run"), tmp_path / "new" / f"x{suffix}"
    assert plot(PlotConfig((run,), file)) == file
    first = file.read_bytes()
    assert first.startswith(MAGIC[suffix.lower()])
    plot(PlotConfig((run,), file))
    assert file.read_bytes() == first and list(file.parent.iterdir()) == [file]


def test_one_run_is_drawn_into_itself_and_several_into_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two")
    assert plot(PlotConfig((one,))) == one / "curves.png"
    assert plot(PlotConfig((one / "metrics.jsonl",))) == one / "curves.png"
    assert plot(PlotConfig((one, two))) == Path("curves.png") and (tmp_path / "curves.png").is_file()


def test_every_panel_is_there_and_says_its_unit(tmp_path: Path) -> None:
    runs = {kind: make_run(tmp_path / kind, logps=kind, evaluated=True) for kind in ("mean", "sum")}
    pictures = {kind: texts(plot(PlotConfig((run,), tmp_path / f"{kind}.svg"))) for kind, run in runs.items()}
    for panel in PANELS:
        assert panel.title in pictures["mean"].replace("&#39;", "'")
    assert "<!-- nats per answer -->" in pictures["sum"] and "<!-- nats per answer -->" not in pictures["mean"]
    both = texts(plot(PlotConfig(tuple(runs.values()), tmp_path / "both.svg")))
    assert "runs of mean and of sum" in both
    for word in ("mean", "sum", "chosen", "rejected", "validation"):
        assert f"<!-- {word} -->" in both


def test_only_what_was_logged_is_drawn(tmp_path: Path) -> None:
    draw = {"loss": ([0], [0.7]), "eval/kl": ([0, 5], [0.0, 1.0])}
    draw_runs([RunCurves("x", draw, {})], tmp_path / "x.svg")
    picture = texts(tmp_path / "x.svg")
    assert (
        "<!-- loss -->" in picture
        and "(KL of means)" in picture
        and "over tokens" not in picture
        and "reward margin" not in picture
    )
    with pytest.raises(DataError, match="none of the metrics"):
        draw_runs([RunCurves("x", {"epoch": ([0], [1.0])}, {})], tmp_path / "y.svg")


def test_names_that_a_plotting_library_would_take_for_commands(tmp_path: Path) -> None:
    names = ("_hidden", "cost$_{x$", "运行 一", "a" * 120, "%s {0}", "\x1b[31m")
    runs = tuple(make_run(tmp_path / name) for name in names)
    picture = texts(plot(PlotConfig(runs, tmp_path / "x.svg", smooth=0.5)))
    for name in ("_hidden", "cost$_{x$", "运行 一", "%s {0}"):
        assert name in picture
    assert "\x1b" not in picture


def test_numbers_that_are_none_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 9, "loss": NaN, "kl": Infinity, "lr": 1e30}\n{"step": 10, "loss": -1e30}\n')
    plot(PlotConfig((run,), smooth=0.9))
    assert (run / "curves.png").is_file()


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("x.jpg", "x", "x."):
        with pytest.raises(ConfigError, match=r"expected a name ending in .png, .svg, .pdf"):
            plot(PlotConfig((run,), tmp_path / name))
    (tmp_path / "dir.png").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        plot(PlotConfig((run,), tmp_path / "dir.png"))
    for smooth in (-0.1, 1.0, math.nan):
        with pytest.raises(ConfigError, match="--smooth"):
            PlotConfig((run,), smooth=smooth)


def test_the_command_works_without_torch_and_names_a_missing_extra(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")

    def minidpo(*missing: str) -> subprocess.CompletedProcess[str]:
        hidden = "".join(f"sys.modules[{name!r}] = None; " for name in missing)
        code = (
            f"import sys; {hidden}sys.argv = ['minidpo', 'plot', {str(run)!r}]; from minicache.cli import main; main()"
        )
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    done = minidpo("torch", "transformers")
    assert done.returncode == 0 and "curves.png" in done.stdout.replace("\n", ""), done.stderr
    done = minidpo("matplotlib")
    assert done.returncode == 1 and "pip install 'minidpo[plot]'" in done.stderr and "Traceback" not in done.stderr


# --- a cache ---


def test_margins_are_counted_on_their_own_side_of_zero(ref_cache: Path) -> None:
    histogram = read_cache(ref_cache).inspection.margin_histogram
    assert histogram is not None
    _, reference = ReferenceCache(ref_cache).load()
    margins = reference.logp_mean[:, 0] - reference.logp_mean[:, 1]
    assert sum(histogram.pairs) == len(margins) == 40
    edges = np.array(histogram.edges)
    above = sum(count for count, left in zip(histogram.pairs, edges, strict=False) if left >= 0)
    assert above == (margins >= 0).sum()
    assert edges[0] <= margins.min() and edges[-1] >= margins.max() and np.allclose(np.diff(edges), edges[1] - edges[0])


def test_a_caches_histograms_are_drawn(cli: Cli, ref_cache: Path, tmp_path: Path) -> None:
    code, stdout, _ = cli("inspect-cache", ref_cache, "--plot", tmp_path / "h.png")
    assert code == 0 and "h.png" in stdout.replace("\n", "")
    width, height = struct.unpack(">II", (tmp_path / "h.png").read_bytes()[16:24])
    assert width > 2 * height
    code, stdout, _ = cli("inspect-cache", ref_cache, "--json", "--plot", tmp_path / "h.svg")
    assert code == 0 and json.loads(stdout)["margin_histogram"]["pairs"] and "40 pairs" in texts(tmp_path / "h.svg")


def test_a_picture_that_cannot_be_is_refused(cli: Cli, ref_cache: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (("--plot", tmp_path / "h.gif"), "expected a name ending in"),
        (("--plot", tmp_path / "h.png", "--pair", 1), "without --pair and --verify"),
        (("--plot", tmp_path), "expected a name ending in"),
    ):
        code, _, stderr = cli("inspect-cache", ref_cache, *arguments)
        assert code == 1 and said in " ".join(stderr.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [{"sft_weight": 1.0}, {"wpo": True}, {"loss": "ipo"}])
def test_ln_2_is_drawn_only_for_losses_that_begin_there(option: dict[str, Any], tmp_path: Path) -> None:
    pictures = []
    for name, facts in (("plain", {}), ("other", option)):
        plot(PlotConfig((make_run(tmp_path / name / "run", **facts),), tmp_path / f"{name}.svg"))
        pictures.append((tmp_path / f"{name}.svg").read_text().count("stroke-dasharray"))
    assert pictures[0] == pictures[1] + 1


@pytest.mark.parametrize("installed", [True, False])
def test_chinese_in_a_name_warns_of_nothing_whether_a_font_has_it_or_not(installed: bool, tmp_path: Path) -> None:
    run = make_run(tmp_path / "策略模型")
    code = (
        "import sys; from pathlib import Path; import minicache.pictures.frame as frame;"
        f"frame.CHINESE = frame.CHINESE if {installed} else ();"
        "from minicache.options.others import PlotConfig; from minicache.stages.plot import plot;"
        "plot(PlotConfig((Path(sys.argv[1]),), Path(sys.argv[2])))"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(run), str(tmp_path / "x.png")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "x.png").is_file()


def test_the_first_installed_font_with_chinese_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    for names, expected in (
        (["DejaVu Sans", "SimHei", "WenQuanYi Zen Hei"], ["SimHei"]),
        (["Noto Sans CJK SC", "SimHei"], ["Noto Sans CJK SC"]),
        (["DejaVu Sans"], []),
    ):
        monkeypatch.setattr(font_manager, "get_font_names", lambda names=names: names)
        monkeypatch.setattr(font_manager, "findSystemFonts", list)
        frame.chinese_fonts.cache_clear()
        assert frame.chinese_fonts() == expected
    frame.chinese_fonts.cache_clear()


def font_with(characters: str, family: str, file: Path) -> str:
    """A font in which each of these characters is a square of another size."""
    from fontTools.fontBuilder import FontBuilder  # type: ignore[import-untyped]
    from fontTools.pens.ttGlyphPen import TTGlyphPen  # type: ignore[import-untyped]

    names = [".notdef", *(f"u{ord(each):04X}" for each in characters)]
    glyphs = {}
    for size, name in enumerate(names, 2):
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 100 * size), (100 * size, 100 * size), (100 * size, 0)):
            pen.lineTo(point)
        pen.closePath()
        glyphs[name] = pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(each): f"u{ord(each):04X}" for each in characters})
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable({"familyName": family, "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(file)
    return str(file)


def test_chinese_is_drawn_with_a_font_that_has_it_and_as_boxes_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two characters look alike only as the box of what is missing."""
    from matplotlib import font_manager

    def look(text: str) -> bytes:
        with frame.picture(tmp_path / "a.png", (1, 1)) as figure:
            figure.text(0.5, 0.5, text)
        return (tmp_path / "a.png").read_bytes()

    monkeypatch.setattr(font_manager.fontManager, "ttflist", list(font_manager.fontManager.ttflist))
    for family, is_drawn in (("SimHei", True), ("", False)):
        # the name decides, not what else is installed here
        monkeypatch.setattr(frame, "CHINESE", (family,))
        installed = [font_with("策略", family, tmp_path / "font.ttf")] if family else []
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda installed=installed: installed)
        frame.chinese_fonts.cache_clear()
        assert (look("策") != look("略")) is is_drawn and look("a") != look("b")
    frame.chinese_fonts.cache_clear()


@pytest.mark.parametrize("scale", [1.0, 1e-7, -0.00012, 12345.678])
def test_no_title_runs_into_numbers_or_beyond_its_axis(
    scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    class Kept(Figure):
        def savefig(self, *given: Any, **more: Any) -> None:
            seen.append(self)
            super().savefig(*given, **more)

    monkeypatch.setattr("matplotlib.figure.Figure", Kept)
    runs = [
        RunResult(name=str(at), options={"beta": beta, "lr": 1e-7 * beta}, state="done", problem=None, steps=1, model_step=1,
                  held_out={"kl": 1e-9 * (at + 1) ** 6, "rewards/accuracy": 0.5, "rewards/margin": scale * (at + 1)},
                  pairs_trained=1, seconds=1.0)
        for at, beta in enumerate((0.1, 0.5, 5.0))
    ]  # fmt: skip
    draw_sweep(SweepReport(tmp_path, ["beta", "lr"], runs, 1, 1, 1.0, 1.0, 1.0), tmp_path / "sweep.png")
    curves = {
        name: (list(range(4)), [scale * (1 + step / 3) for step in range(4)])
        for panel in PANELS
        for name in panel.metrics
    }
    draw_runs([RunCurves("run", curves, {"logps": "sum"})], tmp_path / "runs.png")
    for figure in seen:
        figure.draw_without_rendering()
        for axis in filter(lambda axis: axis.axison, figure.axes):
            (low, high), title, below = axis.get_ylim(), axis.yaxis.label, axis.xaxis.label.get_window_extent()
            # of those beyond the axis matplotlib keeps labels too, and draws none
            drawn = [
                each for each in axis.get_yticklabels() if each.get_visible() and low <= each.get_position()[1] <= high
            ]
            if title.get_text():
                assert all(title.get_window_extent().x1 <= each.get_window_extent().x0 for each in drawn)
            assert below.width <= 1.2 * axis.get_window_extent().width
