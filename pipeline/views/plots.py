"""SVG plots for the report and the pool page, which follow the reader's light or dark theme.

The same numbers give the same bytes: plots contain no date or random identifier and use no global state.
"""

import io
import textwrap
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from lsmix.data.errors import LsmixError, printable_words
from lsmix.pipeline.config.results import Interval
from lsmix.pipeline.views.error_rates import RunSummary

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
except ImportError as error:
    raise LsmixError(f"Plots need matplotlib ({error}). Run: pip install 'lsmix[report]'") from error

__all__ = [
    "Series",
    "curves",
    "difference_plot",
    "distance_plot",
    "error_rate_plot",
    "gain_plot",
    "histogram",
    "pair_matrix",
    "spread_plot",
]

# Role -> (colour on light, colour on dark). `_themed` replaces the light colours by CSS variables.
_COLOURS = {
    "ink": ("#1d2530", "#e6eaf0"),
    "soft": ("#5f6b7a", "#9aa6b5"),
    "line": ("#dde2e9", "#333d4a"),
    "c0": ("#2563c9", "#79a8ff"),
    "c1": ("#c9590c", "#f5a45d"),
    "c2": ("#0f8264", "#4fcaa5"),
    "c3": ("#7d4cc4", "#bd9df2"),
    "c4": ("#b92d52", "#f08aa3"),
    "c5": ("#697077", "#aeb6c0"),
}
_SERIES = [light for role, (light, _) in _COLOURS.items() if role.startswith("c")]
_WIDTH = 4.8  # inches of every plot: narrow enough that its text is readable on a phone
_LINE_LENGTH = 22  # characters per line of a label
_LEGEND_LETTERS = 56  # characters per line of a legend
_NUMBERED_CLASSES = 10  # with more classes, the squares of the class matrix are too small for numbers
_CLASS_LENGTH = 16  # characters of a class name next to the matrix
_LEVEL_LETTERS = 2  # class names up to this length are horizontal below the matrix; longer ones are vertical
_MANY_POINTS = 300  # lines with more points are noisy and drawn thin
_INK, _SOFT, _LINE = (_COLOURS[role][0] for role in ("ink", "soft", "line"))
_FONT_STACK = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_STYLE: dict[Any, Any] = {  # matplotlib types the keys as one long Literal
    "axes.axisbelow": True,
    "axes.edgecolor": _LINE,
    "axes.grid": True,
    "axes.labelcolor": _SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": _INK,
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.family": "DejaVu Sans",  # ships with matplotlib, so text has the same size everywhere
    "font.size": 10,
    "grid.color": _LINE,
    "grid.linewidth": 0.8,
    "legend.fontsize": 9.5,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.8,
    "svg.fonttype": "none",
    "svg.hashsalt": "lsmix",
    "text.color": _INK,
    "text.parse_math": False,  # a run may be named "$5"
    "xtick.color": _LINE,
    "xtick.labelcolor": _SOFT,
    "ytick.color": _LINE,
    "ytick.labelcolor": _SOFT,
}


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a plot."""

    label: str
    x: Sequence[float] | np.ndarray
    y: Sequence[float] | np.ndarray  # as long as x; non-finite values leave a gap
    spread: Sequence[float] | np.ndarray = ()  # half-length of each point's error bar; empty draws no error bars


def error_rate_plot(rows: Sequence[RunSummary]) -> bytes:
    """Draw a row for each run: a faint point for each seed, and the mean ± sample standard deviation, also as a number.

    Runs without a result keep an empty row. A dashed line marks the mean of the first baseline run. Open diamonds are
    the error rates that the paper reports.
    """
    papers = " (open diamonds: paper)" if any(run.paper_mean is not None for run in rows) else ""
    with _rows([run.label for run in rows], f"error rate in %, last epoch{papers}") as (figure, axes):
        for index, run in enumerate(rows):
            colour = _SERIES[5] if run.baseline else _SERIES[0]
            axes.plot(run.errors, [index] * len(run.errors), "o", color=colour, alpha=0.35, markersize=5, mew=0)
            if run.std is not None:
                axes.errorbar(run.mean, index, xerr=run.std, color=colour, elinewidth=2, capsize=0)
            axes.plot([run.mean], [index], "o", color=colour, markersize=8, mew=0)
            if run.paper_mean is not None:
                axes.plot([run.paper_mean], [index], "D", color=_SOFT, markersize=6, mfc="none", mew=1.2)
            _annotate_right(axes, index, run.text)
        reference = next((run.mean for run in rows if run.baseline and run.errors), None)
        if reference is not None:
            axes.axvline(reference, color=_SOFT, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        axes.margins(x=0.08)
        return _svg(figure)


def difference_plot(rows: Mapping[str, Interval], x_label: str) -> bytes:
    """Draw a row for each difference with its interval; a dashed line marks 0; intervals that contain 0 are grey."""
    with _rows(rows, x_label) as (figure, axes):
        for index, one in enumerate(rows.values()):
            colour = _SERIES[5] if one.low <= 0.0 <= one.high else _SERIES[2 if one.value < 0 else 1]
            axes.plot([one.low, one.high], [index, index], color=colour, linewidth=2)
            axes.plot([one.value], [index], "o", color=colour, markersize=8, mew=0)
            _annotate_right(axes, index, f"{one.value:+.2f}".replace("-", "−"))
        axes.axvline(0.0, color=_SOFT, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
        return _svg(figure)


def curves(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    x_ticks: Sequence[float] = (),
    y_log: bool = False,
) -> bytes:
    """Draw lines over a common x axis; a series with a single point is drawn as a marker.

    ``x_ticks`` makes the x axis logarithmic, with ticks at these values. ``y_log`` makes the y axis logarithmic, for
    values that span orders of magnitude, such as an error rate from the first epoch on; zeros then leave a gap.
    """
    names = [_shortened(one.label) for one in series]
    columns, height = _legend(names)
    with _figure(3.0 + height) as (figure, (axes,)):
        axes.grid(visible=False, axis="x")
        axes.set_title(_label(title))
        for index, (one, name) in enumerate(zip(series, names, strict=True)):
            axes.plot(
                np.asarray(one.x, dtype=float),
                np.asarray(one.y, dtype=float),
                label=name,
                linestyle="-" if index < len(_SERIES) else (0, (4, 2)),  # dashed once the colours repeat
                linewidth=1.1 if len(one.x) > _MANY_POINTS else 1.8,
                marker="o" if len(one.x) == 1 or len(one.spread) else None,
            )
            if len(one.spread):
                axes.errorbar(one.x, one.y, one.spread, fmt="none", color=axes.lines[-1].get_color(), elinewidth=1.2)
        _draw_legend(figure, names, columns)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.01)
        if x_ticks:
            axes.set_xscale("log")
            axes.set_xticks(list(x_ticks), [f"{tick:,g}" for tick in x_ticks])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.margins(x=0.05)
        elif all(float(value).is_integer() for one in series for value in one.x):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if y_log and any(np.max(one.y, initial=0) > 0 for one in series):
            axes.set_yscale("log", nonpositive="mask")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        return _svg(figure)


def histogram(lam: np.ndarray, share: np.ndarray) -> bytes:
    """Draw the distributions of the sampled λ and of the share of x₂, both as counts, int (bins,), over 0 to 1."""
    with _figure(2.6, panels=2) as (figure, panels):
        for axes, counts, title, colour in zip(
            panels, (lam, share), ("sampled λ", "share of x₂"), _SERIES, strict=False
        ):
            axes.grid(visible=False, axis="x")
            axes.bar(
                (np.arange(len(counts)) + 0.5) / len(counts), counts, 0.88 / len(counts), color=colour, linewidth=0
            )
            axes.set_title(title)
            axes.set_xlim(0.0, 1.0)
            axes.set_xticks([0.0, 0.5, 1.0], ["0", "0.5", "1"])
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        top = max(axes.get_ylim()[1] for axes in panels)
        for axes in panels:
            axes.set_ylim(0.0, top)
        panels[0].set_ylabel("images")
        return _svg(figure)


def pair_matrix(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw the number of images for each pair of classes, int (C, C): rows are classes of x₁, columns classes of x₂."""
    size, top = len(names), max(int(counts.max()), 1)
    with _figure(0.5 + _WIDTH * 0.85) as (figure, (axes,)):
        axes.grid(visible=False)
        axes.set_aspect("equal")
        for spine in axes.spines.values():
            spine.set_visible(False)
        for row, column in np.ndindex(size, size):
            count = int(counts[row, column])
            square = (column - 0.48, row - 0.48)
            axes.add_patch(Rectangle(square, 0.96, 0.96, color=_SERIES[0], alpha=0.04 + 0.5 * count / top, linewidth=0))
            if size <= _NUMBERED_CLASSES:
                axes.text(column, row, f"{count:,}", ha="center", va="center", fontsize=min(10, 75 / size))
        axes.set_xlim(-0.5, size - 0.5)
        axes.set_ylim(size - 0.5, -0.5)
        shown = [_label(name).replace("\n", " ")[:_CLASS_LENGTH] for name in names]
        axes.set_yticks(range(size), shown)
        axes.set_xticks(range(size), shown, rotation=90 if max(map(len, shown)) > _LEVEL_LETTERS else 0)
        axes.tick_params(length=0, labelcolor=_INK)
        axes.set_xlabel("class of x₂")
        axes.set_ylabel("class of x₁")
        return _svg(figure)


def spread_plot(samples: Mapping[str, np.ndarray], x_label: str) -> bytes:
    """Draw the spread of each sample as a row: 5% to 95% thin, the middle half thick, and the median, also as a number.

    The first sample is the reference: across all rows, its middle half is shaded and its median is a dashed line.
    Non-finite values are ignored; a sample without finite values keeps an empty row.
    """
    with _rows(samples, x_label) as (figure, axes):
        for index, values in enumerate(samples.values()):
            finite = values[np.isfinite(values)]
            if not finite.size:
                continue
            colour = _SERIES[0] if index else _SERIES[5]
            low, first, median, third, high = np.percentile(finite, (5, 25, 50, 75, 95))
            if not index:
                axes.axvspan(first, third, color=colour, alpha=0.12, linewidth=0, zorder=0)
                axes.axvline(median, color=_SOFT, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
            axes.plot([low, high], [index, index], color=colour, linewidth=1.4, solid_capstyle="butt")
            axes.plot([first, third], [index, index], color=colour, linewidth=8, solid_capstyle="butt")
            axes.plot([median], [index], "|", color=_INK, markersize=15, markeredgewidth=2)
            _annotate_right(axes, index, f"{median:.3f}")
        return _svg(figure)


def distance_plot(rows: Mapping[str, tuple[Interval, Interval]], x_label: str) -> bytes:
    """Draw two bars for each row with their intervals: the first distance to the left, the second to the right."""
    with _rows(rows, x_label) as (figure, axes):
        for index, both in enumerate(rows.values()):
            for sign, colour, one in zip((-1, 1), (_SERIES[2], _SERIES[1]), both, strict=True):
                axes.barh(index, sign * one.value, height=0.5, color=colour, alpha=0.75, linewidth=0)
                axes.plot([sign * one.low, sign * one.high], [index, index], color=_INK, linewidth=1.2)
            _annotate_right(axes, index, f"−{both[0].value:.3f}  +{both[1].value:.3f}")
        axes.axvline(0.0, color=_SOFT, linewidth=1)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
        return _svg(figure)


def gain_plot(points: Mapping[str, tuple[Interval, Interval]], x_label: str, y_label: str) -> bytes:
    """Draw a numbered point for each name at (x, y), with the intervals of both; the legend below lists the names."""
    names = [f"{number} {_shortened(name)}" for number, name in enumerate(points, start=1)]
    columns, height = _legend(names)
    with _figure(3.4 + height) as (figure, (axes,)):
        axes.axhline(0.0, color=_SOFT, linewidth=1, linestyle=(0, (3, 3)))
        for index, ((x, y), name) in enumerate(zip(points.values(), names, strict=True)):
            colour = _SERIES[index % len(_SERIES)]
            axes.plot([x.low, x.high], [y.value, y.value], color=colour, linewidth=1, alpha=0.6)
            axes.plot([x.value, x.value], [y.low, y.high], color=colour, linewidth=1, alpha=0.6)
            axes.plot([x.value], [y.value], "o", color=colour, markersize=7, mew=0, label=name)
            axes.annotate(str(index + 1), (x.value, y.value), (5, 5), textcoords="offset points", color=_INK)
        _draw_legend(figure, names, columns)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        return _svg(figure)


def _label(text: str) -> str:
    """Return a name as printable text on at most two short lines."""
    return "\n".join(textwrap.wrap(printable_words(text), _LINE_LENGTH, max_lines=2, placeholder="…"))


def _shortened(text: str) -> str:
    shown = printable_words(text)
    return shown if len(shown) <= 2 * _LINE_LENGTH else f"{shown[: 2 * _LINE_LENGTH - 1]}…"


@contextmanager
def _rows(labels: Collection[str], x_label: str) -> Iterator[tuple[Figure, Axes]]:
    """Return a figure and its axes with one labelled row at each of y = 0, 1, …, from top to bottom."""
    count = max(1, len(labels))
    with _figure(0.8 + 0.42 * count) as (figure, (axes,)):
        axes.grid(visible=False, axis="y")
        axes.spines["left"].set_visible(False)
        axes.set_yticks(range(len(labels)), [_label(label) for label in labels])
        axes.tick_params(axis="y", length=0, labelcolor=_INK)
        axes.set_ylim(count - 0.4, -0.6)
        axes.set_xlabel(x_label)
        yield figure, axes


def _annotate_right(axes: Axes, index: int, text: str) -> None:
    axes.annotate(
        text, (1.02, index), xycoords=("axes fraction", "data"), va="center", color=_INK, annotation_clip=False
    )


@contextmanager
def _figure(height: float, *, panels: int = 1) -> Iterator[tuple[Figure, list[Axes]]]:
    """Return a figure of ``height`` inches and its panels, in the style of lsmix."""
    with mpl.rc_context():
        mpl.rcdefaults()  # the output must not depend on the user's matplotlibrc
        mpl.rcParams.update(_STYLE)
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasAgg(figure)
        every = [figure.add_subplot(1, panels, index + 1) for index in range(panels)]
        for axes in every:
            axes.set_prop_cycle(color=_SERIES)
        yield figure, every


def _legend(names: Sequence[str]) -> tuple[int, float]:
    """Return the number of columns of a legend below a plot, and the legend's height in inches."""
    columns = max(1, min(3, _LEGEND_LETTERS // (max(map(len, names), default=0) + 6)))
    return columns, 0.19 * -(-len(names) // columns) if len(names) > 1 else 0.0


def _draw_legend(figure: Figure, names: Sequence[str], columns: int) -> None:
    if len(names) > 1 and any(axes.get_legend_handles_labels()[0] for axes in figure.axes):
        figure.legend(loc="outside lower left", ncols=columns, handlelength=1.4)


def _svg(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with warnings.catch_warnings():
        # The reader's font renders the text; the font used here only measures it, so missing glyphs do not matter.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _themed(buffer.getvalue().decode()).encode()


def _themed(svg: str) -> str:
    """Return the SVG with colours as CSS variables that follow the theme, and with the reader's system font."""
    for role, (light, _) in _COLOURS.items():
        svg = svg.replace(light, f"var(--{role}, {light})")
    svg = svg.replace("'DejaVu Sans'", _FONT_STACK)
    light_variables, dark_variables = (
        "".join(f"--{role}:{pair[theme]};" for role, pair in _COLOURS.items()) for theme in (0, 1)
    )
    style = f"<style>svg{{{light_variables}}}@media (prefers-color-scheme:dark){{svg{{{dark_variables}}}}}</style>"
    head, marker, rest = svg.partition("<defs>")
    return f"{head}{style}{marker}{rest}"
