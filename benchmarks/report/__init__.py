"""Reports of benchmark runs: a JSON file with all samples, a page, and Markdown.

python -m benchmarks report DIRECTORY                # make the page and the Markdown again
python -m benchmarks report DIRECTORY --compare OTHER
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec

from ..results import Results
from .markdown import render_changes, render_markdown
from .page import render_page

__all__ = ["main", "write"]


def write(results: Results, directory: Path) -> str:
    """Write ``results.json``, ``report.html`` and ``report.md`` into a directory, which is made if need be.

    Returns:
        The Markdown, to be printed at the end of a run.
    """
    results.save(directory / "results.json")
    (directory / "report.html").write_text(render_page(results))
    markdown = render_markdown(results)
    (directory / "report.md").write_text(markdown)
    return markdown


def main() -> int:
    """Make the reports of a run again from its JSON file; return 2 if that is not one, else 0."""
    parser = argparse.ArgumentParser(description="Make the reports of a run again from its JSON file.")
    parser.add_argument("results", type=Path, help="results.json of a run, or the directory that it is in")
    parser.add_argument("--output", type=Path, help="where to write (default: beside results.json)")
    parser.add_argument("--compare", type=Path, metavar="OLDER", help="only print what has changed since")
    options = parser.parse_args()
    try:
        results = _read(options.results)
        older = _read(options.compare) if options.compare else None
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    if older is not None:
        print(render_changes(older, results), end="")
        return 0
    beside = options.results if options.results.is_dir() else options.results.parent
    directory = options.output or beside
    write(results, directory)
    print(f"Written: {directory / 'report.html'}, {directory / 'report.md'}")
    return 0


def _read(path: Path) -> Results:
    file = path / "results.json" if path.is_dir() else path
    try:
        return Results.load(file)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file}: not the results of a benchmark run: {error}") from error
