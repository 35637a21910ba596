"""The server's own pages in Chromium: one job watched over three transports and controlled from the page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from processes import Chromium, run_server

NAMES = ("SSE", "WebSocket", "Long polling")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_server(demo_seconds=6, drain=1) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


CARDS = """() => [...document.querySelectorAll('.subscription')].map((card) => Object.fromEntries(
    [...card.querySelectorAll('[data-part]')].map((part) => [part.dataset.part, part.textContent])))"""


def read_cards(page: Page) -> list[dict[str, str]]:
    """Return the text of each part of the three subscription cards."""
    return page.evaluate(CARDS)


def wait_cards(page: Page, condition: str) -> None:
    """Wait until a JavaScript condition holds for ``cards``, the value of `read_cards`."""
    page.wait_for_function(f"() => {{ const cards = ({CARDS})(); return {condition}; }}")


def seq(cursor: str) -> int:
    return int(cursor.rpartition("-")[2])


def press(page: Page, name: str, *, key: str = "Enter") -> None:
    """Press a button with the keyboard."""
    button = page.get_by_role("button", name=name, exact=True)
    expect(button).to_be_enabled()
    button.focus()
    page.keyboard.press(key)


def start_job(page: Page, url: str) -> str:
    """Start a demo job from the page; return its session ID once all three transports receive events."""
    page.goto(url)
    old_hash = page.evaluate("location.hash")
    press(page, "Start demo job")
    page.wait_for_function("old => location.hash && location.hash !== old", arg=old_hash)
    session_id = page.evaluate("decodeURIComponent(location.hash.slice(1))")
    expect(page.locator("#job-title")).to_contain_text(session_id)
    wait_cards(page, "cards.every((card) => card.state === 'connected' && Number(card.events) > 1)")
    return session_id


def get_log(url: str, session_id: str) -> dict[str, Any]:
    return httpx.get(f"{url}/api/sessions/{session_id}/events").json()


def test_every_transport_resumes_to_the_same_cursor(url, chromium):
    """Each transport is disconnected during the job, resumes, and ends at the log's last cursor."""

    def scenario(page: Page) -> None:
        session_id = start_job(page, url)
        # While the job is paused, all three transports start at the same event.
        press(page, "Pause")
        expect(page.locator("#job-state")).to_have_text("paused")
        page.reload()
        wait_cards(page, "cards.every((card) => card.state === 'connected' && card.events === '1')")
        (first,) = {card["cursor"] for card in read_cards(page)}
        press(page, "Resume")
        wait_cards(page, "cards.every((card) => Number(card.events) > 4)")
        for name in NAMES:
            press(page, f"Disconnect {name}")
        wait_cards(page, "cards.every((card) => card.state === 'disconnected')")
        disconnected = read_cards(page)
        # The job continues while no client is connected.
        page.wait_for_function(
            "({ id, cursors }) => fetch(`/api/sessions/${id}/status`).then((response) => response.json())"
            ".then((status) => !cursors.some((cursor) => cursor === status.id))",
            arg={"id": session_id, "cursors": [card["cursor"] for card in disconnected]},
        )
        assert [card["events"] for card in read_cards(page)] == [card["events"] for card in disconnected]
        for name in NAMES:
            press(page, f"Reconnect {name}")
        wait_cards(page, "cards.every((card) => card.note.startsWith('Resumed: '))")
        wait_cards(page, "cards.every((card) => card.reconnects === '1')")
        wait_cards(page, "cards.every((card) => card.state === 'complete')")
        expect(page.locator("#connection-summary")).to_have_text("complete")
        expect(page.locator("#artifacts")).to_be_visible()
        page.wait_for_function("document.querySelector('.preview-image')?.naturalWidth > 0")
        cards = read_cards(page)
        assert [card["percent"] for card in cards] == ["100%"] * 3
        assert [card["skipped"] for card in cards] == ["0"] * 3
        last = get_log(url, session_id)["next"]
        assert [card["cursor"] for card in cards] == [last] * 3
        assert [int(card["events"]) for card in cards] == [seq(last) - seq(first) + 1] * 3

    _, errors = chromium.visit(scenario)
    assert errors == []


def test_keyboard_control(url, chromium):
    """Pause, resume and cancel with the keyboard reach the worker, and the page shows the new state."""

    def scenario(page: Page) -> list[str]:
        session_id = start_job(page, url)
        press(page, "Pause")
        expect(page.locator("#job-state")).to_have_text("paused")
        assert httpx.get(f"{url}/api/sessions/{session_id}/status").json()["state"] == "paused"
        press(page, "Resume", key="Space")
        expect(page.locator("#job-state")).to_have_text("running")
        press(page, "Cancel")
        expect(page.locator("#job-state")).to_have_text("cancelled")
        wait_cards(page, "cards.every((card) => card.state === 'complete')")
        assert {card["cursor"] for card in read_cards(page)} == {get_log(url, session_id)["next"]}
        expect(page.locator("#artifacts")).to_be_hidden()
        return [
            event["data"]["state"] for event in get_log(url, session_id)["events"] if "state" in event["data"]
        ]

    states, errors = chromium.visit(scenario)
    assert errors == []
    assert [*dict.fromkeys(states)] == ["queued", "running", "paused", "cancelled"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screen(url, chromium, scheme):
    """At 360 pixels nothing overflows, however long a publisher's message is; its markup is not rendered."""

    def scenario(page: Page) -> None:
        message = "<img src=x onerror=alert(1)> " + "x" * 300
        body = {"progress": 30, "stage": "custom stage", "message": message}
        session_id = f"narrow-{scheme}"
        httpx.post(f"{url}/api/sessions/{session_id}/progress", json=body).raise_for_status()
        page.goto(f"{url}/#{session_id}")
        expect(page.locator("#job-message")).to_have_text(message)
        wait_cards(page, "cards.every((card) => card.percent === '30%')")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.goto(f"{url}/dashboard")
        expect(page.get_by_text(session_id).first).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360

    size = {"width": 360, "height": 740}
    _, errors = chromium.visit(scenario, viewport=size, color_scheme=scheme, reduced_motion="reduce")
    assert errors == []


def test_unknown_session(url, chromium):
    """A link to a missing session shows an error, and so does a link that cannot be decoded."""

    def scenario(page: Page) -> None:
        page.goto(f"{url}/#nonesuch")
        expect(page.locator("#error")).to_contain_text("nonesuch")
        page.evaluate("location.hash = '%E0%A4%A'")
        expect(page.locator("#error")).to_contain_text("not correctly encoded")

    _, errors = chromium.visit(scenario)
    assert ["404" in error for error in errors] == [True]  # logged by the browser itself
