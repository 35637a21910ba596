"""The reports of benchmark runs: figures, marks, and that the page needs and leaks nothing."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_samples import MACHINE, make_peers, make_transports
from playwright.sync_api import sync_playwright
from processes import FLAGS
from programs import require_program

from benchmarks import report
from benchmarks.report import write
from benchmarks.report.markdown import render_changes, render_markdown
from benchmarks.report.page import render_page
from benchmarks.report.plots import plot_scenario
from benchmarks.report.progress import Progress
from benchmarks.report.standings import compare, format_number, format_ratio, summarize
from benchmarks.results import Contender, Decision, Figure, Results, Round, Scenario

MORE = Figure(key="rate", label="deliveries per second", unit="deliveries/s", better="more")
LESS = Figure(key="delay", label="delay, p99", unit="ms", better="less")


def make_results(values: dict[str, list[float]], figure: Figure = MORE, **fields: object) -> Results:
    """Return a run with one scenario, whose rounds have these values; the subject is ``ours``."""
    rounds = [
        Round(contender=name, number=number, values={figure.key: value})
        for name, numbers in values.items()
        for number, value in enumerate(numbers, 1)
    ]
    scenario = Scenario(
        name="one", group="one", title="A scenario", question="How many?", figures=[figure], rounds=rounds
    )
    contenders = [Contender(name=name, title=name) for name in values]
    run = {"command": "peers", "title": "A run", "question": "How fast?", "started": "2026-11-22T03:10:00Z"}
    return Results(
        **(run | fields), subject="ours", machine=MACHINE, contenders=contenders, scenarios=[scenario]
    )


def get_comparison(results: Results):
    scenario = results.scenarios[0]
    return compare(results, scenario, scenario.figures[0])


def test_median_ratio_and_best():
    """A ratio is of the medians, to the subject; the best has the highest median, whoever it is."""
    comparison = get_comparison(make_results({"ours": [10, 30, 20], "theirs": [50, 60, 400]}))
    ours, theirs = comparison.standings
    assert (ours.median, theirs.median) == (20, 60)
    assert (ours.ratio, theirs.ratio) == (1, 3)
    assert theirs.is_best
    assert not ours.is_best
    assert not ours.is_level


def test_less_is_better():
    comparison = get_comparison(make_results({"ours": [10], "theirs": [50]}, LESS))
    assert [each.contender.name for each in comparison.ranked] == ["ours", "theirs"]


def test_neither_is_better():
    figure = Figure(key="rate", label="streams told to begin anew", unit="streams", better="neither")
    comparison = get_comparison(make_results({"ours": [10], "theirs": [50]}, figure))
    assert comparison.ranked == ()
    assert not any(each.is_best for each in comparison.standings)


@pytest.mark.parametrize(
    ("ours", "theirs", "level"),
    [([10, 12, 14], [13, 15, 17], True), ([10, 11, 12], [13, 15, 17], False), ([96], [100], True)],
    ids=["ranges overlap", "ranges apart", "within 5 %"],
)
def test_level_with_the_best(ours, theirs, level):
    """What may be chance is not called a lead."""
    results = make_results({"ours": ours, "theirs": theirs})
    assert get_comparison(results).standings[0].is_level == level
    assert bool(summarize(results).level) == level
    assert bool(summarize(results).behind) != level


def test_sum_of_two_figures():
    """A figure whose key is a sum has a value where all its parts have one."""
    figure = Figure(key="user+kernel", label="sum", unit="KB", better="less")
    results = make_results({"ours": [1, 2], "theirs": [3]}, figure)
    for turn in results.scenarios[0].rounds:
        turn.values = {"user": turn.values["user+kernel"], "kernel": 10.0}
    del results.scenarios[0].rounds[1].values["kernel"]
    assert [each.values for each in get_comparison(results).standings] == [(11,), (13,)]


def test_limit_is_never_the_best():
    results = make_results({"ours": [10], "loop": [50], "theirs": [5]})
    results.contenders[1].is_limit = True
    assert [each.contender.name for each in get_comparison(results).ranked] == ["ours", "theirs"]
    assert [each.contender.name for each in get_comparison(results).standings] == ["ours", "loop", "theirs"]


def test_variant_of_the_subject_is_not_ranked():
    """The subject with other settings is no competitor of it; a variant of another contender is."""
    results = make_results({"ours": [10], "ours-ws": [50], "theirs": [5], "theirs-file": [4]})
    results.contenders[1].variant_of = results.subject
    results.contenders[3].variant_of = "theirs"
    assert [each.contender.name for each in get_comparison(results).ranked] == [
        "ours",
        "theirs",
        "theirs-file",
    ]
    assert len(get_comparison(results).standings) == 4


def test_rounds_with_faults_do_not_count():
    results = make_results({"ours": [10, 20, 30], "theirs": [5, 6, 7]})
    results.scenarios[0].rounds[2].faults = ["event 3 is missing"]
    ours = get_comparison(results).standings[0]
    assert (ours.median, ours.values, ours.rounds, ours.invalid) == (15, (10, 20), 3, 1)
    assert "event 3 is missing" in render_page(results)
    assert "event 3 is missing" in render_markdown(results)
    assert "**15**‡" in render_markdown(results)


def test_a_busy_load_generator_is_marked():
    """More than 90 % of a core; in the tables, the plot and the summary."""
    results = make_results({"ours": [10, 20], "theirs": [5, 6]})
    assert "†" not in render_markdown(results)
    results.scenarios[0].rounds[0].load = 0.91
    assert "**15**†" in render_markdown(results)
    assert "load generator busy for more than 90 % in 1 of 2 rounds" in render_page(results)
    assert "Hollow dot" in plot_scenario(results, results.scenarios[0])[0].caption


def test_summary_of_the_sample():
    summary = summarize(make_peers())
    assert [each.scenario.name for each in summary.ahead] == [
        "fanout-100",
        "fanout-1000",
        "fanout-10000",
        "idle",
        "cpu",
    ]
    assert "many-8" in [each.scenario.name for each in summary.behind]
    assert sum(map(len, (summary.ahead, summary.level, summary.behind))) == 16


def test_a_shared_first_place_is_no_lead():
    """Of a scenario in which several are level, none is said to be clearly the best."""
    results = make_results({"ours": [10, 12], "theirs": [11, 13]})
    assert "no clear difference" in render_page(results)
    assert "clearly ahead" not in render_page(results)
    assert "1 of 1" not in render_page(results)
    clear = render_page(make_results({"ours": [10, 12], "theirs": [20, 21]}))
    assert "in 1 another is clearly ahead" in clear
    assert "1 of 1" in clear


def test_decisions_name_the_title_of_a_contender():
    assert "<strong>long-poll</strong>" in render_page(make_transports())
    assert "**long-poll**" in render_markdown(make_transports())


def test_contenders_that_were_not_there():
    """Who was in no scenario is named once; who was not in some, there, together with the same reason."""
    page = render_page(make_peers())
    assert page.count("not on PATH") == 1
    assert "Without Quart-Trio generators on Hypercorn: It answers" in page
    results = make_results({"ours": [1]})
    results.scenarios[0].skipped = {"b": "too slow", "c": "too slow", "d": "absent"}
    for text in (render_page(results), render_markdown(results)):
        assert "Without b, c: too slow" in text
        assert "Without d: absent" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1_161_924, "1,160,000"),
        (9_999, "9,999"),
        (1_234.5, "1,230"),
        (100.4, "100"),
        (15.96, "16.0"),
        (7.998, "8.00"),
        (0.4512, "0.451"),
        (0, "0"),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


def test_ratios():
    ratios = [format_ratio(ratio) for ratio in (0.0123, 0.45, 3, 12.4, 1234)]
    assert [ratio.rstrip("\N{MULTIPLICATION SIGN}") for ratio in ratios] == [
        "0.012",
        "0.45",
        "3.00",
        "12",
        "1,200",
    ]


def test_log_scale_only_where_contenders_differ_much():
    near = make_results({"ours": [10], "theirs": [190]})
    far = make_results({"ours": [10], "theirs": [210]})
    assert "Logarithmic" not in plot_scenario(near, near.scenarios[0])[0].caption
    assert "Logarithmic" in plot_scenario(far, far.scenarios[0])[0].caption


def test_plots_of_the_sample():
    """Quantiles share a plot, parts of a sum too; every valid round is a dot; the colours are the page's."""
    results = make_peers()
    plots = {each.name: plot_scenario(results, each) for each in results.scenarios}
    assert [len(plots[name]) for name in ("fanout-1", "paced-10-1000", "idle", "storm")] == [1, 1, 1, 1]
    assert plots["fanout-1000"][0].svg.count("<circle") == 8 * 5
    assert "p50 / p90 / p99 / max, ms" in plots["paced-10-1000"][0].svg
    assert "best" not in plots["paced-10-1000"][0].svg  # of which quantile?
    assert ">10.3 best<" in plots["idle"][0].svg  # the sum, not the first part
    for svg in (plot.svg for each in plots.values() for plot in each):
        assert not re.search(r"#[0-9a-f]{6}|url\(|href|id=", svg)
        assert len(svg) < 12_000


def test_json_round_trip(tmp_path):
    results = make_peers()
    write(results, tmp_path)
    assert Results.load(tmp_path / "results.json") == results
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "report.html", "report.md"}


def test_an_older_file_without_newer_fields(tmp_path):
    """A file of an earlier version, or with fields of a later one, can still be rendered."""
    path = tmp_path / "results.json"
    content = {
        "command": "peers",
        "title": "Old",
        "question": "?",
        "started": "2026-11-22",
        "machine": {"cpu": "x", "cores": 2, "memory": 4, "system": "Linux", "load": 0, "board": "new"},
        "contenders": [{"name": "a", "title": "A"}],
        "scenarios": [
            {
                "name": "s",
                "group": "s",
                "title": "S",
                "question": "?",
                "figures": [{"key": "v", "label": "value", "unit": "ms", "better": "less"}],
                "rounds": [{"contender": "a", "number": 0, "values": {"v": 7}}],
            }
        ],
    }
    path.write_text(json.dumps(content))
    write(Results.load(path), tmp_path)
    assert "<h1>Old</h1>" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    "values",
    [{}, {"ours": [5, 6]}, {"theirs": [5]}, {"ours": [0], "theirs": [0, 0]}, {"ours": [-1, 0, 900]}],
    ids=["nothing", "one contender", "without the subject", "zeros", "negative"],
)
@pytest.mark.parametrize("plot", ["bars", "quantiles", "stack", "none"])
def test_few_or_odd_values(values, plot, tmp_path):
    figure = Figure(key="v", label="value", unit="ms", better="less", plot=plot)
    results = make_results(values, figure)
    assert write(results, tmp_path)
    assert '<span class="best">' not in render_page(make_results({"ours": [5]}, figure))


def test_empty_results(tmp_path):
    results = make_results({})
    results.scenarios = []
    results.subject = ""
    assert write(results, tmp_path)


HOSTILE = "</script></style><img src=x onerror=alert(1)> $x_1$ | `a` [b](http://c) *d* \n# e \"f' {{ 7*7 }}"


def make_hostile() -> Results:
    results = make_results({"ours": [5], HOSTILE: [6]}, title=HOSTILE, question=HOSTILE, started=HOSTILE)
    scenario = results.scenarios[0]
    scenario.title = scenario.question = scenario.name = HOSTILE
    scenario.parameters = {HOSTILE: HOSTILE}
    scenario.skipped = {HOSTILE: HOSTILE}
    scenario.notes = results.failures = scenario.rounds[0].faults = [HOSTILE]
    scenario.figures[0] = Figure(key="rate", label=HOSTILE, unit=HOSTILE, better="more")
    scenario.rounds.append(Round(contender="unknown <b>", number=0, values={"rate": 3}))
    results.decisions = [Decision(work=HOSTILE, choice=HOSTILE, because=HOSTILE)]
    results.versions = {HOSTILE: HOSTILE}
    for each in results.contenders:
        each.version = each.note = each.settings = HOSTILE
        each.source = "javascript:alert(1)"
    return results


def test_text_in_a_plot_stays_as_it_is():
    """matplotlib would set what is between dollar signs as mathematics."""
    results = make_results({"ours": [5], "theirs": [6]})
    results.contenders[1].title = "$a_1$ & <b>"
    assert ">$a_1$ &amp; &lt;b&gt;<" in plot_scenario(results, results.scenarios[0])[0].svg


def test_text_is_escaped_in_markdown():
    markdown = render_markdown(make_hostile())
    assert "<" not in markdown.replace("&lt;", "")
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    cells = [len(re.findall(r"(?<!\\)\|", row)) for row in rows]
    assert set(cells) == {4, 5, 6}, rows  # of three tables, and of no row more
    assert not [line for line in markdown.splitlines() if line.startswith("# e")]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=require_program("chromium"), args=FLAGS)
        yield browser
        browser.close()


def open_page(browser, path: Path, width: int, scheme: str = "light"):
    """Open a page without JavaScript; return it, and the URLs that it has requested."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True)
    page = context.new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.as_uri())
    return page, requests


@pytest.mark.parametrize("make", [make_peers, make_transports, make_hostile])
def test_page_in_a_browser(browser, make, tmp_path):
    """It loads nothing else, never scrolls sideways, has unique ids, and its links lead somewhere."""
    write(make(), tmp_path)
    for width in (1400, 360):
        page, requests = open_page(browser, tmp_path / "report.html", width)
        assert requests == [(tmp_path / "report.html").as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") == width
        assert page.locator("script, img, link, iframe").count() == 0
        ids = page.eval_on_selector_all("[id]", "elements => elements.map(each => each.id)")
        assert len(ids) == len(set(ids))
        links = page.eval_on_selector_all("a", "elements => elements.map(each => each.getAttribute('href'))")
        assert {link[1:] for link in links if link.startswith("#")} <= set(ids)
        assert not [link for link in links if not link.startswith(("#", "https://"))]
        for attribute in ("aria-labelledby", "aria-details"):
            code = f"all => all.map(each => each.getAttribute('{attribute}'))"
            assert set(page.eval_on_selector_all(f"[{attribute}]", code)) <= set(ids)
        page.context.close()


def test_plots_follow_the_colour_scheme(browser, tmp_path):
    """Text, lines, bars and dots all have another colour in the dark."""
    write(make_peers(), tmp_path)
    colors = []
    for scheme in ("light", "dark"):
        page, _ = open_page(browser, tmp_path / "report.html", 1400, scheme)
        code = "all => all.map(each => [getComputedStyle(each).fill, getComputedStyle(each).stroke]).flat()"
        colors.append(set(page.eval_on_selector_all("figure svg *", code)) - {"none"})
        page.context.close()
    assert len(colors[0]) >= 6
    assert not colors[0] & colors[1]


def test_compare_two_runs():
    before = make_results({"ours": [10, 11, 12], "theirs": [5, 6]})
    after = make_results({"ours": [20, 22, 24], "theirs": [5, 7], "new": [1]})
    lines = render_changes(before, after).splitlines()
    assert lines[4:] == [
        "| A scenario: deliveries per second, deliveries/s | ours | 11 | 22 | **+100%** |",
        "| A scenario: deliveries per second, deliveries/s | theirs | 5.50 | 6 | +9% |",
    ]


def test_command(tmp_path, monkeypatch, capsys):
    """It makes the reports of a file again, and says what is wrong with one that is no result."""
    write(make_transports(), tmp_path)
    (tmp_path / "report.html").unlink()
    monkeypatch.setattr("sys.argv", ["report", str(tmp_path)])
    assert report.main() == 0
    assert (tmp_path / "report.html").exists()
    (tmp_path / "results.json").write_text('{"title": 1}')
    assert report.main() == 2
    assert "results.json" in capsys.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_outside_a_terminal():
    """A line for each finished step; no control characters."""
    file = io.StringIO()
    times = iter(range(0, 1000, 65))
    with Progress(2, file, clock=lambda: next(times)) as progress:
        progress.start("first")
        progress.finish("first: 12")
        progress.note("a fault")
        progress.finish("second: 13")
    assert file.getvalue().splitlines() == [
        "[1/2, 1 min 5 s] first: 12",
        "a fault",
        "[2/2, 2 min 10 s] second: 13",
    ]


def test_progress_in_a_terminal(monkeypatch):
    """One line that is drawn again, and never wraps; notes stay."""
    monkeypatch.setenv("COLUMNS", "60")
    file = Terminal()
    times = iter([0.0, 10.0, 10.0, 10.0, 10.0])
    with Progress(4, file, clock=lambda: next(times)) as progress:
        progress.start("a long description " * 5)
        progress.finish("12")
        progress.note("a fault")
    drawn = [line.removesuffix("\x1b[K") for line in file.getvalue().split("\r")]
    assert all(len(line) < 60 for line in drawn if "\n" not in line)
    assert drawn[2].startswith("[#####---------------] 1/4, about 30 s left  a long")
    assert "\x1b[Ka fault\n" in file.getvalue()
    assert file.getvalue().endswith("\n")
