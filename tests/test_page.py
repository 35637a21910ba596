"""The server's own page in Chromium: one job over three transports, as its users see and steer it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from outside import Chromium, server
from playwright.sync_api import Page, expect

NAMES = ("SSE", "WebSocket", "Long-poll")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with server(demo_seconds=6, drain=1) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


LANES = """() => [...document.querySelectorAll('.lane')].map((lane) => Object.fromEntries(
    [...lane.querySelectorAll('[data-part]')].map((part) => [part.dataset.part, part.textContent])))"""


def lanes(page: Page) -> list[dict[str, str]]:
    """What the three lanes show."""
    return page.evaluate(LANES)


def wait(page: Page, condition: str) -> None:
    """Wait for a condition over ``lanes``, the parts of each by their names."""
    page.wait_for_function(f"() => {{ const lanes = ({LANES})(); return {condition}; }}")


def seq(cursor: str) -> int:
    return int(cursor.rpartition("-")[2])


def press(page: Page, name: str, *, key: str = "Enter") -> None:
    """Press a button by the keyboard alone."""
    button = page.get_by_role("button", name=name, exact=True)
    expect(button).to_be_enabled()
    button.focus()
    page.keyboard.press(key)


def start(page: Page, url: str) -> str:
    """Start a job from the page; return its session once all lanes show it moving."""
    page.goto(url)
    before = page.evaluate("location.hash")
    press(page, "Start a job")
    page.wait_for_function("before => location.hash && location.hash !== before", arg=before)
    session_id = page.evaluate("decodeURIComponent(location.hash.slice(1))")
    expect(page.locator("#job-title")).to_contain_text(session_id)
    wait(page, "lanes.every((lane) => lane.state === 'connected' && Number(lane.events) > 1)")
    return session_id


def log(url: str, session_id: str) -> dict[str, Any]:
    return httpx.get(f"{url}/api/sessions/{session_id}/events").json()


def test_three_lanes_end_alike(url, chromium):
    """Each lane is let go in the middle of the job and misses nothing: all end with the log's last cursor."""

    def look(page: Page) -> None:
        session_id = start(page, url)
        # While it rests nothing comes between the lanes' beginnings.
        press(page, "Pause")
        expect(page.locator("#job-state")).to_have_text("paused")
        page.reload()
        wait(page, "lanes.every((lane) => lane.state === 'connected' && lane.events === '1')")
        (first,) = {lane["cursor"] for lane in lanes(page)}
        press(page, "Resume")
        wait(page, "lanes.every((lane) => Number(lane.events) > 4)")
        for name in NAMES:
            press(page, f"Disconnect {name}")
        wait(page, "lanes.every((lane) => lane.state === 'disconnected')")
        held = lanes(page)
        # The job goes on without anybody.
        page.wait_for_function(
            "({ id, cursors }) => fetch(`/api/sessions/${id}/status`).then((answer) => answer.json())"
            ".then((status) => !cursors.some((cursor) => cursor === status.id))",
            arg={"id": session_id, "cursors": [lane["cursor"] for lane in held]},
        )
        assert [lane["events"] for lane in lanes(page)] == [lane["events"] for lane in held]
        for name in NAMES:
            press(page, f"Reconnect {name}")
        wait(page, "lanes.every((lane) => lane.note.startsWith('Resumed: ') && lane.reconnects === '1')")
        wait(page, "lanes.every((lane) => lane.state === 'complete')")
        expect(page.locator("#connection")).to_have_text("complete")
        expect(page.locator("#results")).to_be_visible()
        page.wait_for_function("document.querySelector('.picture')?.naturalWidth > 0")
        ends = lanes(page)
        assert [lane["percent"] for lane in ends] == ["100%"] * 3
        assert [lane["skipped"] for lane in ends] == ["0"] * 3
        last = log(url, session_id)["next"]
        assert [lane["cursor"] for lane in ends] == [last] * 3
        assert [int(lane["events"]) for lane in ends] == [seq(last) - seq(first) + 1] * 3

    _, errors = chromium.visit(look)
    assert errors == []


def test_the_keyboard_steers_a_job(url, chromium):
    """Pause, resume and cancel by keys; the worker obeys, and the page says so."""

    def look(page: Page) -> list[str]:
        session_id = start(page, url)
        press(page, "Pause")
        expect(page.locator("#job-state")).to_have_text("paused")
        assert httpx.get(f"{url}/api/sessions/{session_id}/status").json()["state"] == "paused"
        press(page, "Resume", key="Space")
        expect(page.locator("#job-state")).to_have_text("running")
        press(page, "Cancel")
        expect(page.locator("#job-state")).to_have_text("cancelled")
        wait(page, "lanes.every((lane) => lane.state === 'complete')")
        assert {lane["cursor"] for lane in lanes(page)} == {log(url, session_id)["next"]}
        expect(page.locator("#results")).to_be_hidden()
        return [
            event["data"]["state"] for event in log(url, session_id)["events"] if "state" in event["data"]
        ]

    states, errors = chromium.visit(look)
    assert errors == []
    assert [*dict.fromkeys(states)] == ["queued", "running", "paused", "cancelled"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen(url, chromium, scheme):
    """At 360 pixels nothing is wider than the screen, however long a publisher's words; nor is markup run."""

    def look(page: Page) -> None:
        message = "<img src=x onerror=alert(1)> " + "x" * 300
        body = {"progress": 30, "stage": "weird stage", "message": message}
        session_id = f"narrow-{scheme}"
        httpx.post(f"{url}/api/sessions/{session_id}/progress", json=body).raise_for_status()
        page.goto(f"{url}/#{session_id}")
        expect(page.locator("#job-message")).to_have_text(message)
        wait(page, "lanes.every((lane) => lane.percent === '30%')")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.goto(f"{url}/dashboard")
        expect(page.get_by_text(session_id).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360

    size = {"width": 360, "height": 740}
    _, errors = chromium.visit(look, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    assert errors == []


def test_an_unknown_session(url, chromium):
    """A link to a session that is gone says so, and a link that cannot be read does too."""

    def look(page: Page) -> None:
        page.goto(f"{url}/#nonesuch")
        expect(page.locator("#trouble")).to_contain_text("nonesuch")
        page.evaluate("location.hash = '%E0%A4%A'")
        expect(page.locator("#trouble")).to_contain_text("cannot be read")

    _, errors = chromium.visit(look)
    assert ["404" in error for error in errors] == [True]  # the browser's own word
