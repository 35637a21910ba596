"""Plots of a scenario as small SVG elements for a page, whose colours are the page's CSS variables.

A plot has a row for each contender, with its name and value above its bar, so that it can be read on a
telephone. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, replace

import matplotlib as mpl
import msgspec
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from ..results import Figure, Results, Scenario
from .standings import Comparison, Standing, compare, format_number, shown_figures

__all__ = ["Plot", "plot_scenario"]

WIDTH = 400.0  # all lengths are in CSS pixels at this width
ROW = 36.0
MARGIN = 6.0
AXIS = 22.0  # height of the tick labels
HEADER = 18.0
BAR = 10.0
LOG_FROM = 20.0  # a log scale shows contenders that differ by more than this factor
LETTERS = 50  # how many fit on a line

# matplotlib draws in these colours; in the SVG they become the page's variables.
TEXT, MUTED, GRID, SUBJECT, OTHER, SURFACE = (f"#0000f{digit}" for digit in range(1, 7))
_VARIABLES = {
    TEXT: "--text",
    MUTED: "--text-muted",
    GRID: "--border",
    SUBJECT: "--accent",
    OTHER: "--bar",
    SURFACE: "--surface",
}
_QUANTILE = re.compile(r"\b(?:p\d+(?:\.\d+)?|max|maximum|min|minimum|median|mean)\b|\b\d+(?:\.\d+)? %")
_OPACITIES = (1.0, 0.55, 0.3, 0.15)
_SHADES = ("strong colour", "pale", "paler", "palest")


@dataclass(frozen=True)
class Plot:
    """A plot: its title, the SVG element, and how to read it. ``figures`` are what it shows."""

    title: str
    svg: str
    caption: str
    figures: tuple[Figure, ...]


def plot_scenario(results: Results, scenario: Scenario) -> list[Plot]:
    """Return the plots of a scenario's figures; none of those without a value other than zero."""
    plots: list[Plot] = []
    together: dict[str, list[Comparison]] = {"quantiles": [], "stack": []}
    for figure in shown_figures(scenario):
        comparison = compare(results, scenario, figure)
        if figure.plot == "none" or not any(any(each.values) for each in comparison.standings):
            continue  # a plot of nothing but zeros says less than the table
        if figure.plot in together:
            together[figure.plot].append(comparison)
        else:
            plots.append(_plot_bars(comparison, results.subject))
    if together["quantiles"]:
        plots.insert(0, _plot_quantiles(together["quantiles"], results.subject))
    if together["stack"]:
        plots.insert(0, _plot_stack(together["stack"], results))
    return plots


def _plot_bars(comparison: Comparison, subject: str) -> Plot:
    figure = comparison.figure
    standings = [each for each in comparison.standings if each.values]
    numbers = [value for each in standings for value in each.values]
    axes = _Rows(len(standings), numbers)
    for row, standing in enumerate(standings):
        median = standing.median or 0.0
        axes.label(row, standing, format_number(median), subject)
        axes.bar(row, 0.0, median, standing, subject)
        axes.dots(row, comparison.scenario, standing, figure.key)
    better = {"more": "More is better.", "less": "Less is better.", "neither": ""}[figure.better]
    caption = f"Bar: median. Dot: one round. {better}{axes.explain()}"
    return Plot(f"{figure.label} ({figure.unit})", axes.render(), caption, (figure,))


def _plot_quantiles(comparisons: Sequence[Comparison], subject: str) -> Plot:
    """Plot the medians of several quantiles: one line for each contender, from the lowest to the highest."""
    figures = tuple(each.figure for each in comparisons)
    names = [_quantile_name(figure) for figure in figures]
    standings = [
        replace(each, is_best=False) for each in comparisons[0].standings if _values(comparisons, each)
    ]
    numbers = [value for each in standings for value in _values(comparisons, each)]
    header = f"{' / '.join(names)}, {figures[0].unit}"
    axes = _Rows(len(standings), numbers, header)
    for row, standing in enumerate(standings):
        values = _values(comparisons, standing)
        text = " / ".join(format_number(value) for value in values)
        axes.label(row, replace(standing, is_best=False), text, subject)  # it may be best in one of them only
        axes.points(row, values, standing, subject)
    caption = f"Points, from left to right: {', '.join(names)}, each the median of all rounds."
    better = " Less is better." if figures[0].better == "less" else ""
    title = f"{_without_quantile(figures[0])} ({figures[0].unit})"
    return Plot(title, axes.render(), caption + better + axes.explain(), figures)


def _plot_stack(comparisons: Sequence[Comparison], results: Results) -> Plot:
    """Plot the medians of the parts of a sum, one behind the other; the number is the median of sums."""
    figures = tuple(each.figure for each in comparisons)
    total = msgspec.structs.replace(figures[0], key="+".join(figure.key for figure in figures))
    standings = [each for each in compare(results, comparisons[0].scenario, total).standings if each.values]
    sums = [sum(_values(comparisons, each)) for each in standings]
    axes = _Rows(len(standings), [0.0, *sums], f"sum, {figures[0].unit}", log=False)
    for row, standing in enumerate(standings):
        axes.label(row, standing, format_number(standing.median or 0.0), results.subject)
        start = 0.0
        for value, opacity in zip(_values(comparisons, standing), _OPACITIES, strict=False):
            axes.bar(row, start, start + value, standing, results.subject, opacity)
            start += value
    parts = [f"{figure.label} ({shade})" for shade, figure in zip(_SHADES, figures, strict=False)]
    better = " Less is better." if figures[0].better == "less" else ""
    title = ", ".join(figure.label for figure in figures) + f" ({figures[0].unit})"
    caption = f"Medians, one behind the other: {', '.join(parts)}.{better}"
    return Plot(title, axes.render(), caption, figures)


def _values(comparisons: Sequence[Comparison], standing: Standing) -> list[float]:
    found = [comparison.of(standing.contender.name) for comparison in comparisons]
    return [each.median for each in found if each is not None and each.median is not None]


def _quantile_name(figure: Figure) -> str:
    match = _QUANTILE.search(figure.key) or _QUANTILE.search(figure.label)
    return match[0] if match else figure.label


def _without_quantile(figure: Figure) -> str:
    return _QUANTILE.sub("", figure.label).strip(" ,:") or "latency"


class _Rows:
    """The axes of a plot with a row for each contender."""

    def __init__(
        self, rows: int, numbers: Sequence[float], header: str = "", *, log: bool | None = None
    ) -> None:
        top = HEADER if header else 0.0
        self._length = rows * ROW
        height = top + self._length + AXIS
        self._canvas = Canvas(figsize=(WIDTH / 72, height / 72), dpi=72)
        box = (MARGIN / WIDTH, AXIS / height, 1 - 2 * MARGIN / WIDTH, self._length / height)
        self._axes = axes = self._canvas.add_axes(box)
        self._busy = False
        axes.set_ylim(self._length, 0)
        axes.patch.set_visible(False)
        self._canvas.patch.set_visible(False)
        self._is_log = _needs_log(numbers) if log is None else log
        self._scale(axes, numbers)
        axes.yaxis.set_major_locator(NullLocator())
        axes.tick_params(length=0, labelbottom=False)
        axes.grid(axis="x", color=GRID, linewidth=1)
        axes.set_axisbelow(True)
        for spine in axes.spines.values():
            spine.set_visible(False)
        self._label_ticks()
        if header:
            self._text(1.0, -7.0, header, "right", MUTED)

    def _scale(self, axes: Axes, numbers: Sequence[float]) -> None:
        highest = max(numbers) or 1.0
        if self._is_log:
            self._left = min(numbers) * 0.7
            axes.set_xscale("log")
            axes.set_xlim(self._left, highest * 1.15)
            steps = (1.0,) if highest / self._left > 300 else (1.0, 2.0, 5.0)
            axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=6))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            self._left = 0.0
            axes.set_xlim(min(0.0, *numbers), highest * 1.06)
            axes.xaxis.set_major_locator(MaxNLocator(4))

    def _label_ticks(self) -> None:
        """Label the scale; a label near its end stays within the plot."""
        axes = self._axes
        for value in axes.get_xticks():
            place = axes.transAxes.inverted().transform(axes.transData.transform((value, 0.0)))[0]
            if -0.001 <= place <= 1.001:
                side = "left" if place < 0.05 else "right" if place > 0.95 else "center"
                self._text(place, self._length + 13, _format_tick(value), side, MUTED)

    def _text(
        self, x: float, y: float, text: str, side: str, color: str = TEXT, weight: str = "normal"
    ) -> None:
        self._axes.text(
            x, y, " ".join(text.split()), transform=self._axes.get_yaxis_transform(), ha=side, va="center",
            fontsize=12, color=color, weight=weight, parse_math=False,
        )  # fmt: skip

    def label(self, row: int, standing: Standing, value: str, subject: str) -> None:
        """Write the contender's name and its value above its bar."""
        value = f"{value} best" if standing.is_best else value
        title = standing.contender.title
        room = LETTERS - len(value)
        if len(title) > room:
            title = title[: room - 1].rstrip() + "…"
        y = row * ROW + 10
        weight = "bold" if standing.contender.name == subject else "normal"
        self._text(0.0, y, title, "left", weight=weight)
        self._text(1.0, y, value, "right", weight="bold" if standing.is_best else "normal")

    def bar(
        self, row: int, start: float, end: float, standing: Standing, subject: str, opacity: float = 1.0
    ) -> None:
        """Draw a bar from ``start`` to ``end``; an empty one for a limit."""
        start = max(start, self._left)
        name = standing.contender.name
        color = SUBJECT if name == subject else OTHER
        self._axes.barh(
            row * ROW + 25, max(end - start, 0.0), BAR, start,
            facecolor="none" if standing.contender.is_limit else color,
            edgecolor=color if standing.contender.is_limit else "none",
            linestyle="--", alpha=opacity,
        )  # fmt: skip

    def dots(self, row: int, scenario: Scenario, standing: Standing, key: str) -> None:
        """Draw the value of each valid round; hollow if the load generator may have been the limit."""
        for busy in (False, True):
            turns = [turn for turn in scenario.rounds if turn.is_load_bound == busy and not turn.faults]
            found = [turn.get(key) for turn in turns if turn.contender == standing.contender.name]
            values = [value for value in found if value is not None]
            if values:
                self._busy |= busy
                self._axes.plot(
                    values,
                    [row * ROW + 25] * len(values),
                    "o",
                    color=TEXT,
                    markersize=5,
                    markerfacecolor=SURFACE if busy else TEXT,
                    markeredgecolor=TEXT if busy else SURFACE,
                    markeredgewidth=1,
                )

    def points(self, row: int, values: Sequence[float], standing: Standing, subject: str) -> None:
        """Draw a line through the values, and a mark on each."""
        color = SUBJECT if standing.contender.name == subject else OTHER
        y = row * ROW + 25
        self._axes.plot([values[0], values[-1]], [y, y], color=color, linewidth=3)
        self._axes.plot(
            values,
            [y] * len(values),
            "o",
            color=color,
            markersize=8,
            markeredgecolor=SURFACE,
            markeredgewidth=1,
        )

    def explain(self) -> str:
        """Return what has to be said of the scale and the dots."""
        text = (
            " Hollow dot: the load generator was busy for more than 90 % of the time." if self._busy else ""
        )
        return text + (" Logarithmic scale: equal distances are equal factors." if self._is_log else "")

    def render(self) -> str:
        """Return the SVG element."""
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with mpl.rc_context({"svg.fonttype": "none"}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # letters that matplotlib's font lacks; the page's font is used
            self._canvas.savefig(buffer, format="svg", metadata=metadata)
        return _shrink(buffer.getvalue())


def _needs_log(numbers: Sequence[float]) -> bool:
    return min(numbers) > 0 and max(numbers) / min(numbers) > LOG_FROM


def _format_tick(value: float) -> str:
    for factor, letter in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= factor:
            return f"{value / factor:g}{letter}"
    return f"{value:g}"


def _shrink(svg: str) -> str:
    """Return the element in the page's colours and font, without ids, groups and long numbers."""
    root = ElementTree.fromstring(re.sub(r'xmlns(:xlink)?="[^"]*"|xlink:', "", svg))
    radii = {marker.get("id"): abs(float(marker.get("d", "").split()[2])) for marker in root.iter("path")}
    small = ElementTree.Element("svg", {"viewBox": root.get("viewBox", "")})
    for element in root.iter():
        style = _translate(element.get("style", ""))
        if element.tag == "path" and "id" not in element.attrib:
            path = {"d": _round(" ".join(element.get("d", "").split())), "style": style}
            ElementTree.SubElement(small, "path", path)
        elif element.tag == "use":  # all marks are circles
            circle = {"cx": _round(element.get("x", "")), "cy": _round(element.get("y", "")), "style": style}
            ElementTree.SubElement(small, "circle", circle | {"r": f"{radii[element.get('href', '')[1:]]:g}"})
        elif element.tag == "text":
            place = {key: _round(element.get(key, "")) for key in ("x", "y")}
            ElementTree.SubElement(small, "text", place | {"style": style}).text = element.text
    return ElementTree.tostring(small, encoding="unicode")


def _translate(style: str) -> str:
    """Return a style with the page's colours, and without what is the default or belongs to the page."""
    declarations = [part.split(": ", 1) for part in style.split("; ") if part]
    kept = [
        f"{name}:{f'var({_VARIABLES[value]})' if value in _VARIABLES else value}"
        for name, value in declarations
        if name not in ("font-family", "stroke-linecap")
    ]
    return ";".join(kept)


def _round(numbers: str) -> str:
    return re.sub(r"-?\d+\.\d+", lambda match: f"{float(match[0]):.1f}".removesuffix(".0"), numbers)
