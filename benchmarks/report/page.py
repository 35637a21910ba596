"""A run as one HTML file, which loads nothing, needs no script, and follows the reader's colour scheme."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import jinja2
from markupsafe import Markup

from ..results import Figure, Results, Scenario
from .plots import Plot, plot_scenario
from .standings import (
    Comparison,
    Standing,
    compare,
    format_number,
    format_ratio,
    headlines,
    shown_figures,
    summarize,
)

__all__ = ["render_page"]

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Cell:
    """What a table says of one contender in one figure."""

    standing: Standing
    text: str
    range: str = ""
    ratio: str = ""


@dataclass(frozen=True)
class Section:
    """A scenario with its plots and its table: a row for each contender, a cell for each figure."""

    scenario: Scenario
    comparisons: tuple[Comparison, ...]
    plots: list[Plot]
    rows: list[list[Cell]]
    marks: list[str]
    faults: list[str]


def render_page(results: Results) -> str:
    """Return the HTML document."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": format_number, "ratio": format_ratio}
    titles = {each.name: each.title for each in results.contenders}
    anchors = {id(each): f"scenario-{number}" for number, each in enumerate(results.scenarios, 1)}
    return environment.get_template("report.html").render(
        results=results,
        subject=titles.get(results.subject, results.subject),
        summary=summarize(results),
        strengths=list(_find_strengths(results)),
        sections=[_describe(results, scenario) for scenario in results.scenarios],
        titles=titles,
        date=_format_date(results.started),
        duration=_format_duration(results.seconds),
        css=Markup((FOLDER / "report.css").read_text()),
        svg=Markup,
        direction=_direction,
        factor=_factor,
        anchor=lambda scenario: anchors[id(scenario)],
    )


def _find_strengths(results: Results) -> Iterator[tuple[str, list[Comparison], list[Comparison], int]]:
    """Yield each contender that is compared: in what it is the best, or level with the best, of how many."""
    comparisons = [each for each in headlines(results) if each.ranked]
    for contender in results.contenders:
        standings = [
            (each, standing)
            for each in comparisons
            for standing in each.ranked
            if standing.contender.name == contender.name
        ]
        if standings:
            best = [each for each, standing in standings if standing.is_best]
            level = [each for each, standing in standings if standing.is_level]
            yield contender.title, best, level, len(standings)


def _describe(results: Results, scenario: Scenario) -> Section:
    titles = {each.name: each.title for each in results.contenders}
    comparisons = tuple(compare(results, scenario, figure) for figure in shown_figures(scenario))
    rows = [
        [_describe_cell(standing, results) for standing in standings]
        for standings in zip(*(each.standings for each in comparisons), strict=True)
    ]
    return Section(
        scenario=scenario,
        comparisons=comparisons,
        plots=plot_scenario(results, scenario),
        rows=rows,
        marks=[
            text for standing in (comparisons[0].standings if comparisons else ()) for text in _mark(standing)
        ],
        faults=[
            f"{titles.get(each.contender, each.contender)}, round {each.number + 1}: {'; '.join(each.faults)}"
            for each in scenario.rounds
            if each.faults
        ],
    )


def _mark(standing: Standing) -> Iterator[str]:
    """Yield what the marks on a contender's figures mean."""
    title, rounds = standing.contender.title, standing.rounds
    if standing.busy:
        yield f"† {title}: load generator busy for more than 90 % in {standing.busy} of {rounds} rounds."
    if standing.invalid:
        yield f"‡ {title}: {standing.invalid} of {rounds} rounds were invalid."


def _describe_cell(standing: Standing, results: Results) -> Cell:
    if standing.median is None:
        return Cell(standing, "no valid round" if standing.invalid else "not measured")
    low, high = format_number(min(standing.values)), format_number(max(standing.values))
    ratio = standing.ratio
    show_ratio = ratio is not None and standing.contender.name != results.subject
    return Cell(
        standing,
        format_number(standing.median),
        f"{low} to {high}" if len(standing.values) > 1 else "",
        format_ratio(ratio) if show_ratio and ratio is not None else "",
    )


def _direction(figure: Figure) -> str:
    return {"more": "more is better", "less": "less is better", "neither": ""}[figure.better]


def _factor(better: Standing, worse: Standing) -> str:
    """Return by which factor two medians differ, as at least 1; nothing if one of them is zero."""
    low, high = sorted((better.median or 0.0, worse.median or 0.0))
    return format_ratio(high / low) if low > 0 else ""


def _format_date(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%-d %B %Y, %H:%M %Z}".strip(", ")
    except ValueError:
        return started


def _format_duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes} minutes" if minutes > 1 else f"{seconds:.0f} seconds"
