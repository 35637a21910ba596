"""The pages, and an EventSource, in Chromium while the engine is unavailable and when it is back."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator

import pytest
from playwright.sync_api import Page, expect
from processes import ROOT, Chromium, Program
from test_page import publish, wait_cards, watch

BANNER = "The server cannot store new events: Redis does not respond."


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


@pytest.fixture
def server() -> Iterator[tuple[str, Program]]:
    with Program(sys.executable, ROOT / "tests" / "faulty_server.py") as program:
        yield program.wait_for_output(r"serving at (\S+)")[1], program
        assert program.wait(signal.SIGTERM) == 0, program.output


def test_the_job_page_recovers(chromium, server):
    """It says what is wrong while it is, also if it is opened then, and shows all that comes afterwards."""
    url, program = server

    def scenario(page: Page) -> None:
        publish(url, "work", progress=10)
        watch(page, url, "work")
        program.signal(signal.SIGUSR1)
        expect(page.locator("#offline")).to_contain_text(BANNER)
        page.reload()
        expect(page.locator("#error")).to_contain_text("Redis does not respond")
        program.signal(signal.SIGUSR2)
        wait_cards(page, "cards.every((card) => card.state === 'connected')")
        expect(page.locator("#error")).to_be_hidden()
        program.signal(signal.SIGUSR1)
        expect(page.locator("#offline")).to_contain_text(BANNER)
        program.signal(signal.SIGUSR2)
        expect(page.locator("#offline")).to_be_hidden()
        publish(url, "work", progress=60)
        publish(url, "work", status="done")
        wait_cards(page, "cards.every((card) => card.state === 'finished' && card.events === '2')")
        expect(page.locator("#job-state")).to_have_text("succeeded")

    chromium.visit(scenario)  # the browser logs each 503 as an error


def test_the_dashboard_recovers(chromium, server):
    """Rows stay, the banner comes and goes; opened meanwhile, it fills as soon as it can."""
    url, program = server

    def scenario(page: Page) -> None:
        publish(url, "work", progress=10)
        page.goto(f"{url}/dashboard")
        expect(page.locator("#rows tr")).to_have_count(1)
        program.signal(signal.SIGUSR1)
        expect(page.locator("#offline")).to_contain_text(BANNER)
        expect(page.locator("#connection")).to_have_text("connected")
        expect(page.locator("#rows tr")).to_have_count(1)
        page.reload()
        expect(page.locator("#offline")).to_contain_text(BANNER)
        expect(page.locator("#caption")).to_have_text("Loading…")
        program.signal(signal.SIGUSR2)
        expect(page.locator("#offline")).to_be_hidden()
        expect(page.locator("#rows tr")).to_have_count(1)
        publish(url, "work", progress=60)
        expect(page.locator("#rows tr")).to_contain_text("60%")

    _, errors = chromium.visit(scenario)
    assert errors == []


EVENT_SOURCE = """(path) => {
    window.got = [];
    const source = new EventSource(path);
    const note = ({ type, data }) => window.got.push([type, JSON.parse(data).progress ?? null]);
    for (const name of ['message', 'progress', 'degraded', 'restored']) source.addEventListener(name, note);
}"""


def test_an_event_source_comes_back(chromium, server):
    """If it is opened while the engine is unavailable, too. One that knows no names gets the records only."""
    url, program = server

    def scenario(page: Page) -> None:
        publish(url, "work", progress=10)
        page.goto(f"{url}/dashboard")
        program.signal(signal.SIGUSR1)
        expect(page.locator("#offline")).to_contain_text(BANNER)
        page.evaluate(EVENT_SOURCE, "/api/sessions/work/status/stream")
        page.wait_for_function("() => window.got.length === 1")
        program.signal(signal.SIGUSR2)
        page.wait_for_function("() => window.got.length === 3")
        assert page.evaluate("window.got") == [["degraded", None], ["restored", None], ["progress", 10]]
        page.evaluate(
            """(path) => {
                window.records = [];
                const source = new EventSource(path);
                source.onmessage = ({ data }) => window.records.push(JSON.parse(data).progress);
            }""",
            "/api/v1/sessions/work/status/stream",
        )
        page.wait_for_function("() => window.records.length === 1")
        program.signal(signal.SIGUSR1)
        page.wait_for_function("() => window.got.length === 4")
        program.signal(signal.SIGUSR2)
        page.wait_for_function("() => window.got.length === 5")
        publish(url, "work", progress=20)
        page.wait_for_function("() => window.records.length === 2")
        assert page.evaluate("window.records") == [10, 20]

    chromium.visit(scenario)
