"""A run as one HTML file, which loads nothing, needs no script, and follows the reader's colour scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..results import Contender, Figure, Results, Scenario
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
    skipped: dict[str, list[str]]
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
    measured = {turn.contender for scenario in results.scenarios for turn in scenario.rounds}
    absent = _find_absent(results)
    return environment.get_template("report.html").render(
        results=results,
        verdict=list(_summarize(results)),
        present=[each for each in results.contenders if each.name in measured],
        absent=absent,
        rounds=_count_rounds(results),
        matrix=_tabulate(results),
        subject=titles.get(results.subject, results.subject),
        summary=summarize(results),
        strengths=list(_find_strengths(results)),
        sections=[
            _describe(results, scenario, {each.name for each, _ in absent}) for scenario in results.scenarios
        ],
        titles=titles,
        date=_format_date(results.started),
        duration=_format_duration(results.seconds),
        css=Markup((FOLDER / "report.css").read_text()),
        svg=Markup,
        direction=_direction,
        factor=_factor,
        anchor=lambda scenario: anchors[id(scenario)],
    )


def _summarize(results: Results) -> Iterator[str]:
    """Yield in sentences how the subject did."""
    summary = summarize(results)
    titles = {each.name: each.title for each in results.contenders}
    subject = titles.get(results.subject, results.subject)
    parts = [
        (summary.ahead, f"{subject} is clearly ahead of all others"),
        (summary.behind, "another is clearly ahead"),
        (summary.level, "there is no clear difference"),
    ]
    counted = [f"in {len(comparisons)} {what}" for comparisons, what in parts if comparisons]
    if counted:
        count = sum(len(comparisons) for comparisons, _ in parts)
        yield f"Of {count} scenarios, {', '.join(counted)}."
    winners = Counter(each.ranked[0].contender.title for each in summary.behind)
    if winners:
        counts = ", ".join(f"{title} in {number}" for title, number in winners.most_common())
        yield f"Ahead of {subject}, with the best figure of all: {counts}."


def _find_absent(results: Results) -> list[tuple[Contender, str]]:
    """Return the contenders that were skipped in all scenarios, and why."""
    reasons = [scenario.skipped for scenario in results.scenarios]
    return [
        (each, reasons[0][each.name])
        for each in results.contenders
        if reasons and all(each.name in skipped for skipped in reasons)
    ]


def _count_rounds(results: Results) -> dict[str, int]:
    turns = [turn for scenario in results.scenarios for turn in scenario.rounds]
    return {
        "all": len(turns),
        "invalid": sum(bool(turn.faults) for turn in turns),
        "busy": sum(turn.is_load_bound for turn in turns),
    }


def _tabulate(results: Results) -> dict[str, Any]:
    """Return the contenders that were measured, and a row of standings for each scenario."""
    comparisons = headlines(results)
    contenders = [each for each in results.contenders if any(row.of(each.name) for row in comparisons)]
    rows = [(each, [each.of(contender.name) for contender in contenders]) for each in comparisons]
    return {"contenders": contenders, "rows": rows}


def _find_strengths(results: Results) -> Iterator[tuple[str, list[Comparison], list[Comparison], int]]:
    """Yield of each contender where it is best, where it is one of several, and in how many it was."""
    comparisons = [each for each in headlines(results) if each.ranked]
    for contender in results.contenders:
        mine = [(each, each.of(contender.name)) for each in comparisons]
        ranked = [(each, standing) for each, standing in mine if standing in each.ranked]
        ahead = [each for each, standing in ranked if standing in each.leaders]
        if ranked:
            best = [each for each in ahead if len(each.leaders) == 1]
            shared = [each for each in ahead if len(each.leaders) > 1]
            yield contender.title, best, shared, len(ranked)


def _describe(results: Results, scenario: Scenario, absent: set[str]) -> Section:
    titles = {each.name: each.title for each in results.contenders}
    comparisons = tuple(compare(results, scenario, figure) for figure in shown_figures(scenario))
    rows = [
        [_describe_cell(standing, results) for standing in standings]
        for standings in zip(*(each.standings for each in comparisons), strict=True)
    ]
    skipped: dict[str, list[str]] = {}  # the titles of contenders, by the reason why they are not in it
    for name, reason in scenario.skipped.items():
        if name not in absent:
            skipped.setdefault(reason, []).append(titles.get(name, name))
    return Section(
        scenario=scenario,
        comparisons=comparisons,
        plots=plot_scenario(results, scenario),
        rows=rows,
        skipped=skipped,
        marks=[
            text for standing in (comparisons[0].standings if comparisons else ()) for text in _mark(standing)
        ],
        faults=[
            f"{titles.get(each.contender, each.contender)}, round {each.number}: {'; '.join(each.faults)}"
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
