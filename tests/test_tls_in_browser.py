"""A browser over https: HTTP/2, and so a hundred streams to one host, where HTTP/1.1 has six."""

from __future__ import annotations

import ssl
import sys
from pathlib import Path

import httpx
from certificates import Authority
from playwright.sync_api import Page
from processes import Chromium, Program

TABS = 20
STREAMS = 5  # of each tab

WATCH = """ids => {
    window.received = {};
    for (const id of ids) {
        const source = new EventSource(`/api/sessions/${id}/status/stream`);
        source.addEventListener("progress", event => {
            window.received[id] = JSON.parse(event.data).progress;
        });
    }
}"""
HAVE = f"percent => Object.values(received).filter(each => each === percent).length === {STREAMS}"


def test_twenty_tabs(tmp_path: Path):
    """All of their streams are open at once, on one connection, and get their events."""
    authority = Authority()
    context = ssl.create_default_context(cafile=authority.write(tmp_path))
    cert, key = authority.issue().write(tmp_path)
    serve = (sys.executable, "-m", "sseserve", "serve", "--port", "0", "--tls-cert", cert, "--tls-key", key)
    with Program(*serve) as server, httpx.Client(verify=context) as client, Chromium() as chromium:
        url = server.wait_for_output(r"serving at (https\S+)")[1]
        sessions = [[f"s-{tab}-{number}" for number in range(STREAMS)] for tab in range(TABS)]

        def publish(percent: int) -> None:
            for session in (session for tab in sessions for session in tab):
                path = f"/api/sessions/{session}/progress"
                assert client.post(url + path, json={"progress": percent}).is_success

        def open_tabs(page: Page) -> tuple[dict[str, int], str]:
            pages = [page, *(page.context.new_page() for _ in range(TABS - 1))]
            for tab, ids in zip(pages, sessions, strict=True):
                tab.goto(f"{url}/ready")
                tab.evaluate(WATCH, ids)
                tab.wait_for_function(HAVE, arg=10)
            health = client.get(f"{url}/health").json()
            publish(20)
            for tab in pages:
                tab.wait_for_function(HAVE, arg=20)
            entry = "performance.getEntriesByType('navigation')[0].nextHopProtocol"
            return health, page.evaluate(entry)

        publish(10)
        (health, protocol), _ = chromium.visit(open_tabs, ignore_https_errors=True)
        assert protocol == "h2"
        assert health["streams"] == TABS * STREAMS
        assert health["connections"] == 2  # the other one is this client's
