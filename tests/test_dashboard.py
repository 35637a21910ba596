"""The dashboard in Chromium: all sessions from one stream."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx
import pytest
from playwright.sync_api import Page, Request, expect
from ports import free_port
from processes import Chromium, run_server
from test_page import publish, server_at


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


def create(url: str, session_id: str, title: str) -> None:
    httpx.post(f"{url}/api/sessions", json={"session_id": session_id, "title": title}).raise_for_status()


def names(page: Page) -> list[str]:
    """The first line of each row."""
    return page.locator("#rows th a").all_text_contents()


def test_one_stream_and_no_polling(chromium):
    """Rows come, change and go with the sessions; the page makes a single request for all of it."""

    def scenario(page: Page) -> list[str]:
        requests: list[str] = []

        def note(request: Request) -> None:
            if "/static/" not in request.url:
                requests.append(request.url.removeprefix(url))

        page.on("request", note)
        page.goto(f"{url}/dashboard")
        expect(page.locator("#caption")).to_have_text("No sessions yet.")
        expect(page.locator("#connection")).to_have_text("connected")
        create(url, "a", "Import of the north")
        expect(page.locator("#rows tr")).to_have_count(1)
        publish(url, "a", progress=30, stage="sorting", message="3 of 10")
        row = page.locator("#rows tr")
        expect(row).to_contain_text("30%")
        for text in ("Import of the north", "a", "running", "sorting", "3 of 10"):
            expect(row).to_contain_text(text)
        publish(url, "a", status="failed", error="disk full")
        expect(row.locator(".badge")).to_have_attribute("data-tone", "danger")
        expect(row.locator("progress")).to_have_attribute("data-tone", "danger")
        expect(row).to_contain_text("3 of 10: disk full")
        expect(page.locator("[data-metric=sessions]")).to_have_text("1")
        httpx.delete(f"{url}/api/sessions/a").raise_for_status()
        expect(page.locator("#caption")).to_have_text("No sessions yet.")
        uptime = page.locator("[data-metric=uptime]").text_content()
        expect(page.locator("[data-metric=uptime]")).not_to_have_text(uptime or "")
        return requests

    with run_server() as url:
        requests, errors = chromium.visit(scenario)
    assert errors == []
    assert [path for path in requests if path.startswith("/api") or path == "/health"] == [
        "/api/streams/sessions"
    ]


def test_search_filter_and_sort(chromium):
    """By title, id, stage and message; by state; in each order."""

    def scenario(page: Page) -> None:
        page.goto(f"{url}/dashboard")
        expect(page.locator("#rows tr")).to_have_count(4)
        assert names(page) == ["without-title", "item 10", "Beta", "item 2"]
        page.get_by_label("Sort by").select_option("title")
        expect(page.locator("#rows th a").first).to_have_text("Beta")
        assert names(page) == ["Beta", "item 2", "item 10", "without-title"]
        page.get_by_label("Sort by").select_option("progress")
        expect(page.locator("#rows th a").first).to_have_text("item 10")
        page.get_by_label("Show").select_option("ended")
        expect(page.locator("#rows th a")).to_have_text(["item 10"])
        expect(page.locator("#caption")).to_have_text("1 of 4 sessions")
        page.get_by_label("Show").select_option("all")
        for search, found in [
            ("ITEM", ["item 10", "item 2"]),
            ("sorting", ["Beta"]),
            ("rows item", ["item 2"]),
            ("id-4", ["item 10"]),
            ("none of them", []),
        ]:
            page.get_by_label("Search").fill(search)
            expect(page.locator("#rows th a")).to_have_text(found)

    with run_server() as url:
        create(url, "id-1", "item 2")
        publish(url, "id-1", progress=40, message="4 rows")
        create(url, "id-2", "Beta")
        publish(url, "id-2", progress=10, stage="sorting")
        create(url, "id-4", "item 10")
        publish(url, "id-4", status="done")
        publish(url, "without-title", progress=5)
        _, errors = chromium.visit(scenario)
    assert errors == []


def test_a_thousand_sessions(chromium):
    """A page of the list at a time, in a page of a few screens; what is not in the snapshot is counted."""

    def scenario(page: Page) -> None:
        page.goto(f"{url}/dashboard")
        expect(page.locator("#caption")).to_have_text("The 1,000 latest of 1,005 sessions")
        for width, rows in ((1400, 25), (360, 10)):
            page.set_viewport_size({"width": width, "height": 800})
            expect(page.locator("#rows tr")).to_have_count(rows)
            assert page.evaluate("document.documentElement.scrollHeight") < 4000
            assert page.evaluate("document.documentElement.scrollWidth") == width
            assert names(page)[0] == "s1004"
            page.get_by_role("button", name="Next").click()
            expect(page.locator("#page")).to_have_text(f"Page 2 of {1000 // rows}")
            assert names(page)[0] == f"s{1004 - rows}"
            page.get_by_role("button", name="Previous").click()
            expect(page.locator("#page")).to_have_text(f"Page 1 of {1000 // rows}")
        page.get_by_label("Search").fill("s777")
        expect(page.locator("#rows th a")).to_have_text(["s777"])
        expect(page.locator("#pager")).to_be_hidden()

    with run_server() as url:
        with httpx.Client(base_url=url) as client:
            for number in range(1005):
                client.post(f"/api/sessions/s{number}/progress", json={"progress": number % 100})
        _, errors = chromium.visit(scenario)
    assert errors == []


def test_a_server_that_goes_and_comes_back(chromium):
    """The page says so, shows what it knew, and begins with a new snapshot; pausing ends the stream."""
    port = free_port()

    def scenario(page: Page) -> None:
        with server_at(port) as (url, server):
            publish(url, "old", progress=10)
            page.goto(f"{url}/dashboard")
            expect(page.locator("#rows th a")).to_have_text(["old"])
            server.wait(signal.SIGTERM)
        expect(page.locator("#offline")).to_be_visible()
        expect(page.locator("#connection")).to_have_text("reconnecting")
        expect(page.locator("[data-metric=uptime]")).to_have_text("\N{EN DASH}")
        expect(page.locator("#rows th a")).to_have_text(["old"])
        with server_at(port) as (url, _):
            publish(url, "new", progress=10)
            expect(page.locator("#offline")).to_be_hidden()
            expect(page.locator("#connection")).to_have_text("connected")
            expect(page.locator("#rows th a")).to_have_text(["new"])
            page.get_by_role("button", name="Pause").click()
            expect(page.locator("#connection")).to_have_text("paused")
            publish(url, "later", progress=10)
            page.get_by_role("button", name="Resume").click()
            expect(page.locator("#rows th a")).to_have_text(["later", "new"])

    chromium.visit(scenario)  # the browser logs each failed request as an error
