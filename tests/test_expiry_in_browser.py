"""What a page sees when its token expires: a notice, the end, and that it must not come back."""

from __future__ import annotations

import time

import httpx
import pytest
from processes import Chromium, run_server
from tokens import SECRET, bearer, make_token

SCRIPT = """
url => new Promise(resolve => {
  const source = new EventSource(url), seen = [];
  source.addEventListener("progress", event => seen.push("progress"));
  source.addEventListener("expiring", event => seen.push(event.data));
  source.onerror = () => {
    seen.push(source.readyState === EventSource.CLOSED ? "closed" : "error");
    if (source.readyState === EventSource.CLOSED) resolve(seen);
  };
})
"""
SOCKET_SCRIPT = """
url => new Promise(resolve => {
  const socket = new WebSocket(url), seen = [];
  socket.onmessage = event => seen.push(JSON.parse(event.data).event);
  socket.onclose = event => resolve([...seen, event.code]);
})
"""


@pytest.fixture(scope="module")
def chromium():
    with Chromium() as browser:
        yield browser


@pytest.mark.parametrize("transport", ["EventSource", "WebSocket"])
def test_a_token_expires(chromium, transport):
    """EventSource: expiring, the end, 401, and no other attempt; WebSocket: the close code 3000."""
    with run_server(jwt_key=SECRET, retry_ms=50) as url:
        admin = bearer(make_token(role="admin"))
        httpx.post(f"{url}/api/sessions", json={"session_id": "s", "owner": "ann"}, headers=admin)
        token = make_token(role="patient", exp=int(time.time()) + 2)
        body = {"sessions": ["s"]}
        ticket = httpx.post(f"{url}/api/tickets", json=body, headers=bearer(token)).json()["ticket"]

        def scenario(page):
            page.goto(f"{url}/health")
            path = "stream" if transport == "EventSource" else "ws"
            address = f"{url}/api/sessions/s/status/{path}?ticket={ticket}"
            if transport == "WebSocket":
                return page.evaluate(SOCKET_SCRIPT, address.replace("http", "ws", 1))
            return page.evaluate(SCRIPT, address)

        seen, _ = chromium.visit(scenario)
    if transport == "WebSocket":
        assert sorted(map(str, seen)) == ["3000", "expiring", "progress"]
    else:
        assert [item for item in seen if "expires_in" in item]
        assert seen[-2:] == ["error", "closed"]
        assert len(seen) == 4
