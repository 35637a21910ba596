"""The transports on the page at ``/``, compared: delays, and connections that are degraded, in Chromium."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect
from processes import Chromium, run_server
from test_page import emit, get_log, press, publish, seq, watch


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with run_server(drain=1) as url:
        yield url


@pytest.fixture(scope="module")
def chromium() -> Iterator[Chromium]:
    with Chromium() as chromium:
        yield chromium


def part(page: Page, transport: str, name: str) -> Any:
    """Return a part of a transport's card."""
    return page.locator(f"[data-transport='{transport}'] [data-part={name}]")


def count(page: Page, transport: str, name: str) -> int:
    return int(part(page, transport, name).text_content())


# The browser's clock is an hour ahead of the server's.
SKEW = """Object.defineProperty(performance, 'timeOrigin', { value: performance.timeOrigin + 3_600_000 })"""


def degrade(page: Page, transport: str, mode: str) -> None:
    page.get_by_label(f"Degrade {transport}", exact=True).select_option(mode)


def test_degraded_connections(url, chromium):
    """A cut transport with a cursor has every event once, a delayed one has all late, polling misses some."""

    def scenario(page: Page) -> None:
        page.add_init_script(SKEW)
        publish(url, "film", progress=1)
        watch(page, url, "film")
        expect(part(page, "Polling", "state")).to_have_text("connected")
        first = seq(get_log(url, "film")["next"])
        publish(url, "film", progress=2)
        for transport in ("SSE", "WebSocket", "Long polling", "Polling"):
            expect(part(page, transport, "events")).to_have_text("1")
            # The text alternative of the sparkline has the same figures as the list.
            expect(part(page, transport, "last")).to_contain_text("s")
            last, median, worst = (
                part(page, transport, name).text_content() for name in ("last", "median", "worst")
            )
            expect(part(page, transport, "sparkline")).to_have_attribute(
                "aria-label",
                f"Delay of the events of the last 30 seconds: last {last}, median {median}, worst {worst}",
            )
            number, unit = worst.split()
            assert unit == "ms" or float(number.replace(",", "")) < 60  # and not an hour
            assert part(page, transport, "dots").get_attribute("d").count("M") == 1
        for transport in ("SSE", "Polling"):
            degrade(page, transport, "cut")
            expect(part(page, transport, "state")).to_have_text("reconnecting")
            expect(part(page, transport, "note")).to_contain_text("The page has cut the connection")
        degrade(page, "Long polling", "delay")
        expect(part(page, "Long polling", "description")).to_contain_text("Simulated")
        was_late = count(page, "Long polling", "late")
        for percent in (3, 4, 5, 6):
            publish(url, "film", progress=percent)
        expect(part(page, "WebSocket", "events")).to_have_text("5")
        # Real: the server no longer has this stream, and its counter stands still.
        assert count(page, "SSE", "events") == 1
        expect(part(page, "Long polling", "events")).to_have_text("5")
        assert count(page, "Long polling", "late") == was_late + 4
        expect(part(page, "SSE", "note")).to_have_text("Resumed: caught up on 4 events, none lost.")
        expect(part(page, "Polling", "note")).to_have_text(
            "Reconnected: 3 events missed. Only the current state is read."
        )
        assert [count(page, "Polling", name) for name in ("events", "missed", "reconnects")] == [2, 3, 1]
        expect(page.locator("#announcements")).not_to_contain_text("Reconnected")
        expect(page.locator("#announcements")).not_to_contain_text("Resumed")
        assert [count(page, "SSE", name) for name in ("events", "missed", "reconnects")] == [5, 0, 1]
        for transport in ("SSE", "Long polling", "Polling"):
            degrade(page, transport, "none")
        # All transports that have a log are away: what polling sees of it is not taken for the log.
        for transport in ("SSE", "WebSocket", "Long polling"):
            press(page, f"Disconnect {transport}")
        emit(url, "film", "note", "unseen")
        publish(url, "film", progress=7)
        last = get_log(url, "film")["next"]
        expect(part(page, "Polling", "cursor")).to_have_text(last)
        expect(page.locator("#job-percent")).to_have_text("7%")
        assert count(page, "Polling", "events") + count(page, "Polling", "missed") == seq(last) - first
        for transport in ("SSE", "WebSocket", "Long polling"):
            press(page, f"Reconnect {transport}")
            expect(part(page, transport, "events")).to_have_text("7")
        expect(page.locator("#event-rows")).to_contain_text("unseen")
        httpx.delete(f"{url}/api/sessions/film").raise_for_status()
        expect(part(page, "Polling", "state")).to_have_text("finished")
        expect(page.locator("#job-state")).to_have_text("deleted")
        expect(page.get_by_label("Degrade Polling")).to_be_visible()

    _, errors = chromium.visit(scenario)
    assert [error for error in errors if "404" not in error] == []


# A connection of a stream that the test plays with `handlers`: `events` has what comes out of it, and when.
CONNECTION = """async (mode) => {
    const { Degradation } = await import('/static/degradation.js');
    window.events = [];
    const now = () => Math.round(performance.now());
    const start = now();
    const note = (name) => (...args) => window.events.push([now() - start, name, ...args]);
    const connect = (id, cursor, handlers) => {
        note('connect')();
        window.handlers = handlers;
        return note('close');
    };
    window.degradation = new Degradation();
    window.degradation.mode = mode;
    window.end = window.degradation.wrap({ isStream: true, connect })('id', null, {
        open: note('open'), received: note('received'), message: note('message'), closed: note('closed'),
    });
}"""


def test_degradation_on_a_virtual_clock(url, chromium):
    """Delay and loss keep the order, a connection that is cut says so once, and others are not touched."""

    def play(page: Page, mode: str, script: str, *, after: int = 0) -> list[Any]:
        """Open a connection in a mode, run a script ``after`` ms, then 10 s more."""
        page.evaluate(CONNECTION, mode)
        page.clock.run_for(after)
        page.evaluate(f"() => {{ {script} }}")
        page.clock.run_for(10_000)
        return page.evaluate("events")

    packet = "handlers.received(1); handlers.message('{}');".format

    def scenario(page: Page) -> None:
        page.clock.install(time=0)
        page.goto(f"{url}/dashboard")
        page.clock.pause_at(60_000)
        none = play(page, "none", "handlers.open();" + packet("a"))
        assert none == [[0, "connect"], [0, "open"], [0, "received", 1], [0, "message", "a"]]
        delay = play(
            page,
            "delay",
            "handlers.open();" + packet("a") + "degradation.mode = 'none';" + packet("b"),
            after=500,
        )
        assert [event[0::2] if event[1] == "message" else event[:2] for event in delay] == [
            [500, "connect"],
            [1000, "open"],
            [1000, "received"],
            [1000, "a"],
            [1000, "received"],
            [1000, "b"],
        ]
        # The first packet is lost once, the third twice: each message follows the packet that it came in.
        losses = "const values = [0, 1, 1, 0, 0, 1]; Math.random = () => values.shift();"
        packets = packet("a") + packet("b") + packet("c")
        loss = play(page, "none", "degradation.mode = 'loss';" + losses + packets)
        assert [event[::2] for event in loss if event[1] == "message"] == [[200, "a"], [200, "b"], [600, "c"]]
        # However often one is lost, it comes.
        lost = play(page, "none", "degradation.mode = 'loss'; Math.random = () => 0;" + packet("a"))
        assert lost[-1] == [3000, "message", "a"]
        cut = play(page, "cut", "handlers.open();")
        page.evaluate("() => handlers.closed('the connection was lost')")
        page.clock.run_for(1)
        assert [event[:2] for event in cut] == [
            [0, "connect"],
            [0, "open"],
            [5000, "close"],
            [5000, "closed"],
        ]
        assert page.evaluate("events.length") == len(cut)
        assert cut[-1][-1] == 3000
        # A connection that its user closes before is not cut.
        closed = play(page, "cut", "handlers.open(); setTimeout(end, 10)")
        assert [event[1] for event in closed] == ["connect", "open", "close"]
        # One that its user closes before it is opened is not opened.
        assert play(page, "delay", "end()") == []

    _, errors = chromium.visit(scenario)
    assert errors == []


def test_figures_of_delays(url, chromium):
    """Delays are those of a window, with events that were missed; what the page keeps of them is bounded."""

    def scenario(page: Page) -> dict[str, Any]:
        page.goto(f"{url}/dashboard")
        return page.evaluate(
            """async () => {
                const { Delays, figures } = await import('/static/delays.js');
                const { drawDelays } = await import('/static/sparkline.js');
                const { Subscription } = await import('/static/subscription.js');
                const { WatchedSession } = await import('/static/watched-session.js');
                const isotime = (at) => new Date(at).toISOString();
                const timed = (seq) => ({ state: 'running', updated_at: isotime(seq * 1000) });
                const record = (seq) => ({ id: `e-${seq}`, ...timed(seq) });
                const message = (seq) => ({ id: `e-${seq}`, event: 'progress', data: record(seq) });

                const session = new WatchedSession('id', () => {});
                session.onStatus({ ...record(1), created_at: '' });
                for (let seq = 2; seq < 2000; seq += 1) session.onMessage(message(seq));
                const known = session.timesBetween({ epoch: 'e', seq: 1 }, { epoch: 'e', seq: 2000 });

                let handlers;
                const connect = (id, cursor, given) => ((handlers = given), () => {});
                const polling = new Subscription({ name: 'Polling', connect, hasLog: false, session });
                polling.start('id', record(1990));
                handlers.open();
                handlers.message(message(1995));
                const seen = polling.delays.recent(1_995_000).map(({ at }) => at / 1000);
                polling.stop();

                session.onMessage({ id: null, event: 'deleted', data: null });
                session.onPolled({ ...record(2000), created_at: '' });

                const delays = new Delays();
                for (let at = 0; at < 4000; at += 1) delays.add(isotime(at));
                // The first two are in one column.
                const slow = [{ at: 0, delay: 10_000 }, { at: -20, delay: 1 }, { at: 15_000, delay: 0.5 }];
                const samples = [1, 20, 3].map((delay, index) => ({ at: 1000 * index, delay }));
                return {
                    known: known.length,
                    seen,
                    existence: session.existence,
                    kept: delays.recent(4000).length,
                    window: delays.recent(33_500).length,
                    figures: [figures(samples), figures([]), figures([{ at: 0, delay: 2 }])],
                    drawn: drawDelays(slow, 30_000),
                };
            }"""
        )

    values, errors = chromium.visit(scenario)
    assert errors == []
    assert values["known"] == 1000
    assert values["seen"] == [1991, 1992, 1993, 1994, 1995]
    assert values["existence"] == "deleted"
    assert (values["kept"], values["window"]) == (3000, 499)
    assert values["figures"] == [
        {"last": 3, "median": 3, "worst": 20},
        None,
        {"last": 2, "median": 2, "worst": 2},
    ]
    assert values["drawn"] == {"curve": "M0.0 0.0L150.0 80.0", "dots": "M0.0 0.0h0M150.0 80.0h0"}
