"""The pictures of a report, on a transparent ground; nothing here knows of files or HTML.

They are drawn for a light page; a dark one inverts their lightness and keeps their hues.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from run.metrics import short

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

Line = tuple[Sequence[float], Sequence[float | None]]
"""(x, y); a y of None leaves a gap."""
Series = Mapping[str, Line]
"""Name of a line -> the line."""
DPI = 150
INK, FAINT, GRID, GROUND = "#22272e", "#6b7480", "#e3e6ea", "#ffffff"
LEGEND: dict[str, Any] = {"fontsize": 8.5, "frameon": False, "labelcolor": INK, "handlelength": 1.4}
COLOURS = ("#3f7fd0", "#e0803a", "#35a079", "#c9506a", "#8d6fd1", "#a3892e", "#3aa0b5", "#8a8f98")


IN_A_ROW = 8
"""Names in a row of a legend."""


@dataclass(frozen=True)
class Mark:
    """A place on the axis of tokens where a stage begins."""

    tokens: float
    label: str


@dataclass(frozen=True)
class Panel:
    """One set of axes: lines against tokens, or against what `x_label` says."""

    title: str
    series: Series
    y_label: str = ""
    x_label: str = "tokens"
    is_smoothed: bool = False
    is_dotted: bool = False
    """Draw each measured point as well as the line."""
    y_range: tuple[float | None, float | None] = (None, None)
    counts_y: bool = False
    """Write the y axis as 10K, 2M."""
    is_log_x: bool = False
    is_log_y: bool = False
    y_ticks: Sequence[tuple[float, str]] = ()
    """Where the y axis is marked, and with what; left out: numbers where they fit."""
    x_ticks: Sequence[tuple[float, str]] = ()
    """The same of the x axis."""
    bands: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    """Name of a line -> (low, high) at each of its points."""
    faint: Mapping[str, Sequence[Line]] = field(default_factory=dict)
    """Name of a line -> others that are drawn faintly in its colour: the runs that it is the mean of."""
    colours: Mapping[str, str] = field(default_factory=dict)
    """Name of a line -> its colour, where it is to be the same in several pictures."""


def panels(content: Sequence[Panel], marks: Sequence[Mark] = (), columns: int = 1) -> "Figure":
    """Panels in one row of so many columns, stage marks on those whose axis is tokens."""
    figure = _figure(3.3 if columns == 1 else 2.5)
    row = figure.subplots(1, columns, squeeze=False)[0]
    for axes in row[len(content) :]:
        axes.set_axis_off()
    is_shared = len(content) > 1 and len({tuple(panel.series) for panel in content}) == 1 < len(content[0].series)
    for axes, panel in zip(row, content, strict=False):
        _draw_panel(axes, panel, has_legend=not is_shared)
        if panel.x_label == "tokens":
            _draw_marks(axes, marks)
    if is_shared:
        _draw_shared_legend(figure, row[0])
    return figure


def expert_load(load_LE: Sequence[Sequence[float]], y_label: str, extent: tuple[float, float]) -> "Figure":
    """Shares of the load over the mean share: a column an expert, a row a layer or, `extent` in tokens, a time."""
    figure = _figure(_load_height(len(load_LE)))
    axes = figure.subplots()
    _draw_bar(figure, axes, _draw_load(axes, load_LE, y_label, extent))
    return figure


def expert_loads(parts: Sequence[tuple[str, Sequence[Sequence[float]]]]) -> "Figure":
    """The same at several moments, side by side: (title, load by layer) of each."""
    figure = _figure(_load_height(len(parts[0][1])) + 0.2)
    row = figure.subplots(1, len(parts), squeeze=False)[0]
    for axes, (title, load_LE) in zip(row, parts, strict=True):
        image = _draw_load(axes, load_LE, "layer" if axes is row[0] else "", (-0.5, len(load_LE) - 0.5))
        axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold", pad=8)
    _draw_bar(figure, row.tolist(), image)
    return figure


def _load_height(rows: int) -> float:
    return max(1.5, min(3.4, 0.9 + 0.34 * rows))


def _draw_load(
    axes: "Axes", load_LE: Sequence[Sequence[float]], y_label: str, extent: tuple[float, float]
) -> "AxesImage":
    from matplotlib.colors import LinearSegmentedColormap

    num_experts = len(load_LE[0])
    colours = LinearSegmentedColormap.from_list("load", ["#2f6fb5", GROUND, "#d9642f"])
    values = [[share * num_experts for share in row] for row in load_LE]
    box = (-0.5, num_experts - 0.5, extent[1], extent[0])
    image = axes.imshow(values, cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest", extent=box)
    _style(axes)
    axes.grid(visible=False)
    axes.set_xlabel("expert", color=FAINT, fontsize=9)
    axes.set_ylabel(y_label, color=FAINT, fontsize=9)
    if len(load_LE) <= 12 and extent == (-0.5, len(load_LE) - 0.5):
        axes.set_yticks(range(len(load_LE)))
    axes.set_xticks(range(0, num_experts, max(1, num_experts // 16)))
    return image


def _draw_bar(figure: "Figure", axes: "Axes | list[Axes]", image: "AxesImage") -> None:
    bar = figure.colorbar(image, ax=axes, pad=0.015, aspect=12)
    bar.set_ticks([0, 1, 2], labels=["0", "1 = even", "2×"])
    bar.ax.tick_params(colors=FAINT, labelsize=8.5, length=0)
    bar.outline.set_visible(False)


def on_white(figure: "Figure") -> bytes:
    """The figure's PNG on a white ground, for a page that is not ours."""
    figure.patch.set_alpha(1)
    figure.patch.set_facecolor(GROUND)
    return png(figure)


def png(figure: "Figure") -> bytes:
    """The figure's PNG; the same figure gives the same bytes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    return buffer.getvalue()


def encode(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def smooth(values: Sequence[float | None], share: float = 0.04) -> list[float]:
    """The mean over about `share` of the points, half before and half after each; gaps are left out."""
    half = max(1, round(share * len(values) / 2))
    smoothed = []
    for place in range(len(values)):
        # The window shrinks towards both ends, so that it stays centred and a steep start is not dragged along.
        reach = min(half, place, len(values) - 1 - place)
        window = [value for value in values[place - reach : place + reach + 1] if value is not None]
        smoothed.append(sum(window) / len(window) if window else math.nan)
    return smoothed


def _figure(height: float) -> "Figure":
    """As wide as the page, with margins in inches: an automatic layout would draw everything several times."""
    from matplotlib.figure import Figure

    width, left, right, top, bottom, gap = 9.6, 0.68, 0.12, 0.34, 0.48, 0.66
    figure = Figure(figsize=(width, height), dpi=DPI)
    columns_width = (width - left - right) / 3
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=gap / (columns_width - gap),
    )
    return figure


def _draw_panel(axes: "Axes", panel: Panel, *, has_legend: bool = True) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    number_format = FuncFormatter(lambda value, _: short(value))
    _style(axes)
    for number, (name, (x, y)) in enumerate(panel.series.items()):
        colour = panel.colours.get(name, COLOURS[number % len(COLOURS)])
        points: Any = [math.nan if value is None else value for value in y]
        for faint_x, faint_y in panel.faint.get(name, ()):
            gaps: Any = [math.nan if value is None else value for value in faint_y]
            axes.plot(faint_x, gaps, color=colour, alpha=0.28, linewidth=0.8)
        if panel.is_smoothed and len(points) > 20:
            axes.plot(x, points, color=colour, alpha=0.25, linewidth=0.8)
            points = smooth(points)
        if name in panel.bands:
            axes.fill_between(x, *panel.bands[name], color=colour, alpha=0.15, linewidth=0)
        # One point makes no line.
        marker = "o" if panel.is_dotted or len(points) == 1 else ""
        axes.plot(x, points, color=colour, linewidth=1.7, marker=marker, markersize=3.6, label=name, clip_on=True)
    axes.set_title(panel.title, loc="left", fontsize=10, color=INK, weight="bold", pad=8)
    axes.set_xlabel(panel.x_label, color=FAINT, fontsize=9)
    axes.set_ylabel(panel.y_label, color=FAINT, fontsize=9)
    if panel.is_log_x:
        axes.set_xscale("log", base=2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    if panel.is_log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
        axes.yaxis.set_major_formatter(number_format)
        axes.yaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(number_format)
    if panel.counts_y:
        axes.yaxis.set_major_formatter(number_format)
    if panel.x_ticks:
        axes.set_xticks([place for place, _ in panel.x_ticks], [text for _, text in panel.x_ticks])
        axes.xaxis.set_minor_locator(NullLocator())
    if panel.y_ticks:
        axes.set_yticks([place for place, _ in panel.y_ticks], [text for _, text in panel.y_ticks])
    axes.set_ylim(*_limits(panel))
    if len(panel.series) > 1 and has_legend:
        axes.legend(**LEGEND)


def _draw_shared_legend(figure: "Figure", axes: "Axes") -> None:
    """One for panels of the same lines, below them, where it covers none."""
    handles, names = axes.get_legend_handles_labels()
    in_a_row = min(len(names), IN_A_ROW)
    room, height = 0.08 + 0.2 * math.ceil(len(names) / in_a_row), figure.get_figheight()
    top, bottom = (1 - figure.subplotpars.top) * height, figure.subplotpars.bottom * height
    figure.set_figheight(height + room)
    figure.subplots_adjust(top=1 - top / (height + room), bottom=(bottom + room) / (height + room))
    figure.legend(handles, names, loc="lower center", ncols=in_a_row, **LEGEND)


def _limits(panel: Panel) -> tuple[float | None, float | None]:
    """The panel's own limits, or, for a noisy line, limits that its first few points do not stretch."""
    values = sorted(
        value for _, y in panel.series.values() for value in y if value is not None and math.isfinite(value)
    )
    if panel.y_range[0] == 0.0 and values and values[-1] == 0.0:
        return 0.0, 1.0
    if panel.y_range != (None, None) or not panel.is_smoothed or len(values) < 50:
        return panel.y_range
    low, high = values[0], values[int(0.97 * len(values))]
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - room, high + 2 * room


def _draw_marks(axes: "Axes", marks: Sequence[Mark]) -> None:
    for mark in marks:
        axes.axvline(mark.tokens, color=FAINT, linewidth=1.0, linestyle=(0, (3, 3)), zorder=1)
        axes.annotate(
            mark.label,
            xy=(mark.tokens, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            rotation=90,
            fontsize=8,
            color=FAINT,
            bbox={"facecolor": GROUND, "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
        )


def _style(axes: "Axes") -> None:
    axes.figure.patch.set_alpha(0)
    axes.patch.set_alpha(0)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=FAINT, labelsize=8.5, length=0)
