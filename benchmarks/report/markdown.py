"""A run as Markdown: who is best in what, and a table for each scenario."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator

from ..results import Results, Scenario
from .standings import Comparison, Standing, compare, format_number, format_ratio, headlines, shown_figures

__all__ = ["render_changes", "render_markdown"]


def render_markdown(results: Results) -> str:
    """Return the run as Markdown: a table of all scenarios, and one for each, with ranges and ratios."""
    lines = [f"# {_escape(results.title)}", "", _escape(results.question), ""]
    machine = results.machine
    lines += [
        _escape(f"{results.started[:10]}; {machine.cores} cores of {machine.cpu}; {machine.system}"),
        "",
    ]
    lines += [_escape(", ".join(f"{name} {version}" for name, version in results.versions.items())), ""]
    if results.quick:
        lines += ["**A quick check with short rounds, not a measurement.**", ""]
    if results.failures:
        lines += ["What went wrong:", "", *(f"- {_escape(failure)}" for failure in results.failures), ""]
    if results.decisions:
        titles = {each.name: each.title for each in results.contenders}
        rows = [
            [_escape(each.work), _bold(_escape(titles.get(each.choice, each.choice))), _escape(each.because)]
            for each in results.decisions
        ]
        lines += [*_table(["work", "choose", "because"], rows), ""]
    if comparisons := headlines(results):
        lines += [*_overview(results, comparisons), "", *_legend(results), ""]
    for scenario in results.scenarios:
        lines += [f"## {_escape(scenario.title)}", "", _escape(scenario.question), ""]
        lines += [*_describe(results, scenario), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def render_changes(before: Results, after: Results) -> str:
    """Return a table of the medians of two runs, for all figures that both have.

    A change is clear if the ranges of the rounds do not overlap.
    """
    rows = []
    older = {scenario.name: scenario for scenario in before.scenarios}
    for scenario in after.scenarios:
        for figure in shown_figures(scenario):
            for each in compare(after, scenario, figure).standings:
                name = each.contender.name
                values = older[scenario.name].of(name, figure.key) if scenario.name in older else []
                if not values or not each.values:
                    continue
                old, new = statistics.median(values), statistics.median(each.values)
                is_clear = min(values) > max(each.values) or max(values) < min(each.values)
                change = f"{new / old - 1:+.0%}" if old else ""
                what = _escape(f"{scenario.title}: {figure.label}, {figure.unit}")
                numbers = [format_number(old), format_number(new)]
                rows.append(
                    [what, _escape(each.contender.title), *numbers, _bold(change) if is_clear else change]
                )
    head = f"Medians of {before.started[:16]} and {after.started[:16]}. **Bold**: the ranges do not overlap."
    return "\n".join([head, "", *_table(["figure", "contender", "before", "after", "change"], rows), ""])


def _overview(results: Results, comparisons: list[Comparison]) -> Iterator[str]:
    """Yield a table with a row for each scenario, and a column for each contender."""
    present = {each.contender.name for comparison in comparisons for each in comparison.standings}
    names = [each.name for each in results.contenders if each.name in present]
    titles = {each.name: _escape(each.title) for each in results.contenders}
    rows = []
    for comparison in comparisons:
        figure = comparison.figure
        row = [_escape(comparison.scenario.title), _escape(f"{figure.label}, {figure.unit}")]
        rows.append(row + [_describe_median(comparison.of(name)) for name in names])
    return _table(["scenario", "figure", *(titles[name] for name in names)], rows)


def _describe(results: Results, scenario: Scenario) -> Iterator[str]:
    """Yield the table of a scenario, and what is to be known to read it."""
    rows = []
    for figure in shown_figures(scenario):
        for each in compare(results, scenario, figure).standings:
            label = _escape(f"{figure.label}, {figure.unit}")
            extremes = (min(each.values), max(each.values)) if each.values else ()
            ratio = format_ratio(each.ratio) if each.ratio is not None else ""
            rows.append(
                [
                    label,
                    _escape(each.contender.title),
                    _describe_median(each),
                    " to ".join(format_number(value) for value in extremes),
                    ratio,
                ]
            )
    if rows:
        yield from _table(["figure", "contender", "median", "range", "ratio"], rows)
        yield ""
    titles = {each.name: each.title for each in results.contenders}
    yield from (f"- {_escape(note)}" for note in scenario.notes)
    skipped: dict[str, list[str]] = {}
    for name, reason in scenario.skipped.items():
        skipped.setdefault(reason, []).append(titles.get(name, name))
    for reason, names in skipped.items():
        yield f"- Without {_escape(', '.join(names))}: {_escape(reason)}"
    for turn in scenario.rounds:
        if turn.faults:
            title = _escape(titles.get(turn.contender, turn.contender))
            yield f"- ‡ {title}, round {turn.number}: {_escape('; '.join(turn.faults))}"


def _legend(results: Results) -> Iterator[str]:
    """Yield what the marks in the tables mean, of those that there are."""
    rounds = [each for scenario in results.scenarios for each in scenario.rounds]
    yield "Medians. **Bold**: the best. ~: no clear difference to it (ranges overlap, or at most 5 % apart)."
    if results.subject:
        yield f"Ratios are to {_escape(results.subject)}."
    if any(each.is_load_bound for each in rounds):
        yield "†: the load generator was busy for more than 90 % in some rounds; the server may be faster."
    if any(each.faults for each in rounds):
        yield "‡: rounds with lost or doubled events are left out."


def _describe_median(standing: Standing | None) -> str:
    if standing is None:
        return ""
    marks = ("†" if standing.busy else "") + ("‡" if standing.invalid else "")
    if standing.median is None:
        return f"invalid{marks}" if standing.invalid else ""
    text = format_number(standing.median)
    text = _bold(text) if standing.is_best else f"~{text}" if standing.is_level else text
    return text + marks


def _table(head: list[str], rows: list[list[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield f"| {' | '.join(row)} |"


def _bold(text: str) -> str:
    return f"**{text}**"


def _escape(text: str) -> str:
    """Return text on one line that Markdown shows as it is."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~!])", r"\\\1", text)
