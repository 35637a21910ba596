"""The server's own pages in Chromium: one job watched over all transports and controlled from the page."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from ports import free_port
from processes import Chromium, Program, Proxy, run_server

NAMES = ("SSE", "WebSocket", "Long polling")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_server(demo_seconds=6, drain=1) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


WITH_LOG = ".subscription:not([data-transport=Polling])"
CARDS = f"""() => [...document.querySelectorAll('{WITH_LOG}')].map((card) => Object.fromEntries(
    [...card.querySelectorAll('[data-part]')].map((part) => [part.dataset.part, part.textContent])))"""


def read_cards(page: Page) -> list[dict[str, str]]:
    """Return the text of each part of the cards of the transports that have a log: all but polling."""
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
    expect(page.locator("#job-id")).to_have_text(session_id)
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
        wait_cards(page, "cards.every((card) => card.state === 'connected' && card.events === '0')")
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
        wait_cards(page, "cards.every((card) => card.state === 'finished')")
        expect(page.locator("#connection-summary")).to_have_text("all events received")
        expect(page.locator("#artifacts")).to_be_visible()
        page.wait_for_function("() => document.querySelector('.preview-image')?.naturalWidth > 0")
        cards = read_cards(page)
        assert [card["percent"] for card in cards] == ["100%"] * 3
        assert [card["missed"] for card in cards] == ["0"] * 3
        last = get_log(url, session_id)["next"]
        assert [card["cursor"] for card in cards] == [last] * 3
        assert [int(card["events"]) for card in cards] == [seq(last) - seq(first)] * 3

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
        wait_cards(page, "cards.every((card) => card.state === 'finished')")
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


def publish(url: str, session_id: str, **update: Any) -> None:
    httpx.post(f"{url}/api/sessions/{session_id}/progress", json=update).raise_for_status()


def emit(url: str, session_id: str, kind: str, data: Any) -> None:
    body = {"type": kind, "data": data}
    httpx.post(f"{url}/api/sessions/{session_id}/events", json=body).raise_for_status()


def watch(page: Page, url: str, session_id: str) -> None:
    """Open the page of a session, and wait until all three transports are connected."""
    page.goto(f"{url}/#{session_id}")
    wait_cards(page, "cards.every((card) => card.state === 'connected')")


TONES = f"""() => ({{
    badge: document.querySelector('#job-state').dataset.tone,
    bar: document.querySelector('#job-progress').dataset.tone,
    message: document.querySelector('#job-message').dataset.tone === 'danger',
    listed: document.querySelector('.sessions [aria-current] .badge')?.dataset.tone,
    bars: [...document.querySelectorAll('{WITH_LOG} progress')].map((bar) => bar.dataset.tone),
    connections: [...document.querySelectorAll('#connection-summary, {WITH_LOG} .connection-state')].map(
        (state) => state.dataset.tone),
}})"""


@pytest.mark.parametrize(
    ("state", "tone"),
    [
        ("succeeded", "success"),
        ("failed", "danger"),
        ("cancelled", "neutral"),
        ("lost", "danger"),
        ("deleted", "neutral"),
    ],
)
def test_one_truth_for_each_end(url, chromium, state, tone):
    """Badge, bars and words are of the record's state; no connection looks well or ill; no button is left."""

    def scenario(page: Page) -> None:
        session_id = f"end-{state}"
        publish(url, session_id, progress=30, stage="copying", message="Step 3")
        watch(page, url, session_id)
        publish(url, session_id, progress=40)
        expect(page.locator("#job-percent")).to_have_text("40%")
        if state == "deleted":
            httpx.delete(f"{url}/api/sessions/{session_id}").raise_for_status()
        else:
            publish(url, session_id, status=state, error="it broke" if state == "failed" else None)
            publish(url, f"{session_id}-2", status=state, message="it broke")
        expect(page.locator("#job-state")).to_have_text(state)
        wait_cards(page, "cards.every((card) => card.state === 'finished')")
        tones = page.evaluate(TONES)
        assert (tones["badge"], tones["bar"], tones["bars"]) == (tone, tone, [tone] * 3)
        assert tones["message"] == (tone == "danger")
        assert tones["listed"] in (tone, None if state == "deleted" else tone)
        assert tones["connections"] == ["neutral"] * 4
        for selector in ("#controls", "#again"):
            expect(page.locator(selector)).to_be_hidden()
        expect(page.locator("#job-stats")).not_to_contain_text("Time left")
        if state == "failed":
            expect(page.locator("#job-message")).to_have_text("Step 3: it broke")
            page.goto(f"{url}/#{session_id}-2")
            expect(page.locator("#job-message")).to_have_text("it broke")  # once
        if state == "deleted":
            expect(page.locator("#job-message")).to_have_text("This session was deleted.")

    _, errors = chromium.visit(scenario)
    assert [error for error in errors if "404" not in error] == []


def test_a_session_of_ones_own(url, chromium):
    """Its title, id, stages, status, data, artifacts and own events are shown, and no phase of another's."""

    def scenario(page: Page) -> None:
        body = {"session_id": "report-42", "title": "Quarterly report"}
        httpx.post(f"{url}/api/sessions", json=body).raise_for_status()
        publish(url, "report-42", stage="reading", status="processing", data={"files": 12})
        publish(url, "report-42", stage="render")
        emit(url, "report-42", "note", {"file": "march.csv"})
        watch(page, url, "report-42")
        assert page.locator("#job-title").text_content() == "Quarterly report"
        assert page.locator("#job-id").text_content() == "report-42"
        assert page.locator("#stages li span").all_text_contents() == ["reading", "render"]
        publish(url, "report-42", stage="printing", artifacts=[{"name": "a.pdf", "path": "/srv/a.pdf"}])
        expect(page.locator("#stages li span")).to_have_text(["reading", "render", "printing"])
        expect(page.locator("#stages li[aria-current]")).to_contain_text("printing")
        # The amount is not known.
        expect(page.locator("#job-percent")).to_have_text("\N{EN DASH}")
        assert page.locator("#job-progress").get_attribute("value") is None
        expect(page.locator("#job-stats")).to_contain_text("processing")
        expect(page.locator("#files")).to_contain_text("a.pdf")
        expect(page.locator("#event-rows")).to_contain_text('note{"file":"march.csv"}')
        expect(page.locator("#job-data-text")).to_contain_text('"files": 12')
        publish(url, "report-42", progress=0)
        expect(page.locator("#job-percent")).to_have_text("0%")

    _, errors = chromium.visit(scenario)
    assert errors == []


def test_own_events_are_no_records(url, chromium):
    """Each transport counts them, whatever their type; a number or state in their data changes nothing."""

    def scenario(page: Page) -> None:
        publish(url, "own", progress=20, message="Step 2")
        watch(page, url, "own")
        emit(url, "own", "tick", {"progress": 77, "state": "failed", "artifacts": 5})
        emit(url, "own", "another type", [1, 2])
        emit(url, "own", "error", "not the end")
        wait_cards(page, "cards.every((card) => card.events === '3')")
        assert {(card["percent"], card["missed"], card["state"]) for card in read_cards(page)} == {
            ("20%", "0", "connected")
        }
        expect(page.locator("#job-percent")).to_have_text("20%")
        expect(page.locator("#job-state")).to_have_text("running")
        expect(page.locator("#artifacts")).to_be_hidden()
        expect(page.locator(".event-type[data-own=true]")).to_have_text(["warning", "another type", "tick"])
        response = httpx.post(f"{url}/api/sessions/own/progress", json={"artifacts": 5})
        assert response.status_code == 422

    _, errors = chromium.visit(scenario)
    assert errors == []


def test_clocks_go_on(url, chromium):
    """The times of the page count the seconds also when nothing comes."""

    def scenario(page: Page) -> None:
        publish(url, "quiet", progress=20)
        watch(page, url, "quiet")
        first = page.locator("#job-stats").text_content()
        page.wait_for_function("old => document.querySelector('#job-stats').textContent !== old", arg=first)
        assert {card["events"] for card in read_cards(page)} == {"0"}

    _, errors = chromium.visit(scenario)
    assert errors == []


def test_estimates_count_down(url, chromium):
    """The time left falls with the record's age, and is unknown when it has passed or nobody is connected."""

    def scenario(page: Page) -> list[float | None]:
        page.goto(url)
        return page.evaluate(
            """async () => {
                const { describeSession, remainingTime } = await import('/static/state.js');
                const record = { state: 'running', status: 'running', progress: 50, eta: 10 };
                const running = describeSession({ record });
                const times = [0, 4, 11, 13].map((age) => remainingTime(record, running, age, true));
                const gone = describeSession({ record, existence: 'gone' });
                const away = remainingTime(record, running, 0, false);
                return [...times, remainingTime(record, gone, 0, true), away];
            }"""
        )

    times, errors = chromium.visit(scenario)
    assert errors == []
    assert times == [10, 6, 1, None, None, None]


def test_more_sessions_than_are_listed(chromium):
    """They are counted, with a link to the dashboard."""

    def scenario(page: Page) -> None:
        watch(page, url, "s3")
        expect(page.locator(".sessions li")).to_have_count(8)
        link = page.get_by_role("link", name="4 more sessions on the dashboard")
        assert link.get_attribute("href") == "/dashboard"

    with run_server() as url:
        for number in range(12):
            publish(url, f"s{number}", progress=number)
        _, errors = chromium.visit(scenario)
    assert errors == []


def test_an_empty_server_says_how_to_publish(chromium):
    """The page says what it is; its command, copied and run, makes the first session appear."""

    def scenario(page: Page) -> None:
        page.goto(url)
        expect(page.locator("#welcome")).to_be_visible()
        expect(page.locator("#watch")).to_be_hidden()
        expect(page.get_by_role("button", name="Start demo job")).to_be_visible()
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        command = page.evaluate("navigator.clipboard.readText()")
        assert url in command
        subprocess.run(command, shell=True, check=True, capture_output=True)
        expect(page.locator("#job-title")).to_have_text("my-session")
        expect(page.locator("#job-percent")).to_have_text("40%")
        expect(page.locator("#welcome")).to_be_hidden()

    with run_server() as url:
        _, errors = chromium.visit(scenario, permissions=["clipboard-read", "clipboard-write"])
    assert errors == []


def test_the_end_of_a_demonstration(chromium):
    """Its film, sound and captions are there, and the only button starts another."""

    def scenario(page: Page) -> None:
        page.goto(url)
        page.get_by_role("button", name="Start demo job").click()
        expect(page.locator("#job-state")).to_have_text("succeeded")
        page.wait_for_function("() => document.querySelector('.preview-image')?.naturalWidth > 0")
        page.wait_for_function("() => document.querySelector('audio')?.duration > 0")
        expect(page.locator(".captions li")).not_to_have_count(0)
        expect(page.locator("#stages li small")).to_have_text(["done"] * 5)
        expect(page.locator("#controls")).to_be_hidden()
        first = page.locator("#job-id").text_content()
        page.get_by_role("button", name="Start another").click()
        expect(page.locator("#job-id")).not_to_have_text(first)

    with run_server(demo_seconds=0.5) as url:
        _, errors = chromium.visit(scenario)
    assert errors == []


def test_where_websockets_do_not_pass(url, chromium):
    """That transport says so and stops trying; the session and the other two are not affected."""

    def scenario(page: Page) -> None:
        publish(url, "blocked", progress=20)
        page.goto(f"{proxy.url}/#blocked")
        wait_cards(page, "cards[1].state === 'blocked'")
        wait_cards(page, "cards[0].state === 'connected' && cards[2].state === 'connected'")
        expect(page.locator("#connection-summary")).to_have_text("3 of 4 connected")
        attempts = proxy.refused
        publish(url, "blocked", status="done")
        expect(page.locator("#job-state")).to_have_text("succeeded")
        wait_cards(page, "cards[0].state === 'finished' && cards[2].state === 'finished'")
        expect(page.locator("#connection-summary")).to_have_text("all events received")
        assert proxy.refused == attempts == 3
        press(page, "Reconnect WebSocket")
        wait_cards(page, "cards[1].state === 'finished' || cards[1].state === 'blocked'")

    with Proxy(url, refuse_upgrades=True) as proxy:
        _, errors = chromium.visit(scenario)
    assert all("WebSocket" in error for error in errors)


@contextmanager
def server_at(port: int) -> Iterator[tuple[str, Program]]:
    """A server that can be stopped, and started again at the same port."""
    with Program(
        sys.executable, "-m", "sseserve", "serve", "--port", str(port), SSESERVE_DRAIN="1"
    ) as program:
        yield program.wait_for_output(r"serving at (\S+)")[1], program


def test_a_restarted_server(chromium):
    """Gone while it is gone, watched again when it comes back, and every transport has all of the new log."""
    port = free_port()

    def scenario(page: Page) -> None:
        with server_at(port) as (url, server):
            publish(url, "work", progress=10)
            watch(page, url, "work")
            for percent in (20, 30, 40):
                publish(url, "work", progress=percent)
            wait_cards(page, "cards.every((card) => card.events === '3')")
            server.wait(signal.SIGTERM)
        expect(page.locator("#offline")).to_be_visible()
        expect(page.locator("#connection-summary")).to_have_text("offline")
        with server_at(port) as (url, _):
            expect(page.locator("#offline")).to_be_hidden()
            expect(page.locator("#job-state")).to_have_text("gone")
            expect(page.locator("#controls")).to_be_hidden()
            wait_cards(page, "cards.every((card) => card.state === 'finished')")
            for percent in (5, 6, 7):
                publish(url, "work", progress=percent)
            emit(url, "work", "note", 1)
            expect(page.locator("#job-state")).to_have_text("running")
            expect(page.locator("#job-percent")).to_have_text("7%")
            wait_cards(page, "cards.every((card) => card.state === 'connected' && card.events === '7')")
            publish(url, "work", status="done")
            wait_cards(page, "cards.every((card) => card.state === 'finished' && card.events === '8')")
            cards = read_cards(page)
            assert {(card["missed"], card["percent"]) for card in cards} == {("0", "100%")}
            assert {card["cursor"] for card in cards} == {get_log(url, "work")["next"]}

    chromium.visit(scenario)  # the browser logs each failed request as an error


def test_events_of_a_lost_log_are_counted_as_missed(chromium):
    """A transport that was away while the others saw the end of a log says how much of it it has missed."""
    port = free_port()

    def scenario(page: Page) -> None:
        with server_at(port) as (url, server):
            publish(url, "work", progress=10)
            watch(page, url, "work")
            press(page, "Disconnect WebSocket")
            for percent in (20, 30, 40):
                publish(url, "work", progress=percent)
            wait_cards(page, "cards[0].events === '3' && cards[2].events === '3'")
            server.wait(signal.SIGTERM)
        with server_at(port) as (url, _):
            publish(url, "work", progress=50)
            expect(page.locator("#job-percent")).to_have_text("50%")
            press(page, "Reconnect WebSocket")
            wait_cards(page, "cards.every((card) => card.state === 'connected')")
            wait_cards(page, "cards.map((card) => card.events).join() === '4,1,4'")
            assert [card["missed"] for card in read_cards(page)] == ["0", "3", "0"]

    chromium.visit(scenario)


def test_a_transport_that_found_no_session_comes_back(chromium):
    """After a restart one may ask before the session is there again, and another one after that."""
    port = free_port()

    def scenario(page: Page) -> None:
        with server_at(port) as (url, server):
            publish(url, "work", progress=10)
            watch(page, url, "work")
            wait_cards(page, "cards.every((card) => card.state === 'connected')")
            server.wait(signal.SIGTERM)
        page.route("**/api/sessions/work/status**", lambda route: route.fulfill(status=404, body="{}"))
        with server_at(port) as (url, _):
            publish(url, "work", progress=50)
            wait_cards(page, "cards[0].state === 'finished' && cards[2].state === 'connected'")
            page.unroute("**/api/sessions/work/status**")
            publish(url, "work", progress=60)
            wait_cards(page, "cards.every((card) => card.state === 'connected' && card.percent === '60%')")

    chromium.visit(scenario)


def test_parser_of_event_streams(url, chromium):
    """However a stream is split, its messages are the same: own ids, all types, comments and line ends."""
    stream = (
        "\ufeff: comment\r\nretry: 250\n\nid: a-1\nevent: own type\ndata: 1\ndata:  2\n\n"
        "data: x\r\revent: progress\ndata: {}\nid: a-2\n: beat\n\nid: a-3\n\nevent: nothing\n\ndata: cut"
    )

    def scenario(page: Page) -> list[Any]:
        page.goto(url)
        return page.evaluate(
            """async (stream) => {
                const { EventStreamParser } = await import('/static/sse-parser.js');
                const read = (parts) => {
                    const out = [];
                    const parser = new EventStreamParser({
                        onMessage: ({ id, event, data }) => out.push([id, event, data]),
                        onRetry: (ms) => out.push(ms),
                    });
                    parts.forEach((part) => parser.push(part));
                    return out;
                };
                const whole = read([stream]);
                for (let at = 0; at <= stream.length; at += 1) {
                    const parts = [stream.slice(0, at), stream.slice(at)];
                    if (JSON.stringify(read(parts)) !== JSON.stringify(whole)) return ['split at', at];
                }
                return JSON.stringify(read([...stream])) === JSON.stringify(whole) ? whole : ['characters'];
            }""",
            stream,
        )

    messages, errors = chromium.visit(scenario)
    assert errors == []
    assert messages == [
        250,
        ["a-1", "own type", "1\n 2"],
        [None, "message", "x"],
        ["a-2", "progress", "{}"],
        ["a-3", None, None],
    ]
