"""The example's pull subscriber, between a fake of the Pub/Sub REST API and a server."""

from __future__ import annotations

import base64
import json
import runpy
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from processes import ROOT, Program, run_server, wait_until
from tokens import SECRET, make_token

SUBSCRIBER = ROOT / "examples" / "podcast" / "subscriber.py"
TOPIC = "projects/p/topics/status-updates"
SUBSCRIPTION = "projects/p/subscriptions/sse-service-subscription"
UPDATE = {
    "jobId": "j",
    "status": "processing",
    "progress": 40,
    "stage": "retrieving-content",
    "message": "3 of 7 sources",
    "timestamp": "2026-01-01T00:00:00Z",
    "data": {"sources": ["techcrunch"]},
    "attempt": 2,
}


class FakePubsub(ThreadingHTTPServer):
    """One topic and its subscription, as the REST reference documents their methods."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.changed = threading.Condition()
        self.created: dict[str, Any] = {}
        self.waiting: list[dict[str, Any]] = []
        self.pulled: dict[str, dict[str, Any]] = {}
        self.acknowledged: list[str] = []
        self.released: list[str] = []
        self.tokens = 0
        self._ids = 0

    def publish(self, data: bytes) -> None:
        with self.changed:
            self._ids += 1
            message = {"data": base64.b64encode(data).decode(), "messageId": f"m-{self._ids}"}
            self.waiting.append(message | {"publishTime": "2026-01-01T00:00:00Z"})
            self.changed.notify_all()

    def call(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
        name, _, verb = path.removeprefix("/v1/").partition(":")
        with self.changed:
            match method, verb:
                case "PUT", "":
                    self.created[name] = body
                case "POST", "pull":
                    assert self.created[name] == {"topic": TOPIC}
                    self.changed.wait_for(lambda: self.waiting, 0.2)
                    self.pulled |= {f"ack {m['messageId']}": m for m in self.waiting}
                    received = [{"ackId": f"ack {m['messageId']}", "message": m} for m in self.waiting]
                    self.waiting = []
                    return {"receivedMessages": received} if received else {}
                case "POST", "acknowledge":
                    self.acknowledged += [self.pulled.pop(ack)["messageId"] for ack in body["ackIds"]]
                case "POST", "modifyAckDeadline":
                    assert body["ackDeadlineSeconds"] == 0
                    messages = [self.pulled.pop(ack) for ack in body["ackIds"]]
                    self.released += [message["messageId"] for message in messages]
                    self.waiting += messages
                case _:
                    raise AssertionError(f"{method} {path}")
        return {}


class _Handler(BaseHTTPRequestHandler):
    server: FakePubsub

    def _serve(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(self.server.call(self.command, self.path, body))

    def _send(self, value: dict[str, Any]) -> None:
        response = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(response)))
        self.end_headers()
        self.wfile.write(response)

    do_PUT = do_POST = _serve

    def do_GET(self) -> None:
        """The metadata server's token of the default service account."""
        assert self.path == "/computeMetadata/v1/instance/service-accounts/default/token"
        assert self.headers["Metadata-Flavor"] == "Google"
        self.server.tokens += 1
        token = {"access_token": f"token-{self.server.tokens}", "expires_in": 3599, "token_type": "Bearer"}
        self._send(token)

    def log_message(self, *_args: Any) -> None:
        pass


@pytest.fixture
def pubsub() -> Iterator[FakePubsub]:
    with FakePubsub() as pubsub:
        threading.Thread(target=pubsub.serve_forever, daemon=True).start()
        yield pubsub
        pubsub.shutdown()


def subscriber(server: str, pubsub: FakePubsub, **environ: str) -> Program:
    environ |= {"GOOGLE_CLOUD_PROJECT_ID": "p", "PUBSUB_EMULATOR_HOST": pubsub.host}
    return Program(sys.executable, SUBSCRIBER, server, **environ)


def test_pulled_updates_reach_the_clients(pubsub):
    """In order and as they were published; each is acknowledged, an invalid one too."""
    with run_server() as url, subscriber(url, pubsub) as program:
        program.wait_for_output(f"^pulling from {SUBSCRIPTION}$")
        assert pubsub.created == {TOPIC: {}, SUBSCRIPTION: {"topic": TOPIC}}
        with httpx.stream("GET", f"{url}/api/v1/jobs/j/events", timeout=20) as stream:
            updates = [UPDATE, {**UPDATE, "progress": 60}, {**UPDATE, "status": "completed", "progress": 100}]
            pubsub.publish(json.dumps(updates[0]).encode())
            lines = (line for line in stream.iter_lines() if line.startswith("data: "))
            received = [json.loads(next(lines)[6:])]
            pubsub.publish(b"not JSON")
            for update in updates[1:]:
                pubsub.publish(json.dumps(update).encode())
            received += [json.loads(line[6:]) for line in lines]
        assert received == updates
        wait_until(lambda: len(pubsub.acknowledged) == 4, "all messages are acknowledged")
        assert (pubsub.acknowledged, pubsub.released) == ([f"m-{n}" for n in range(1, 5)], [])
        assert program.wait(signal.SIGTERM) == 0


def test_updates_that_the_server_cannot_take_are_delivered_again(pubsub):
    """While it is full they stay in the subscription, in their order."""
    with run_server(max_sessions=1) as url, subscriber(url, pubsub) as program:
        httpx.post(f"{url}/api/sessions", json={"session_id": "other"}).raise_for_status()
        for progress in (40, 60):
            pubsub.publish(json.dumps({**UPDATE, "progress": progress}).encode())
        program.wait_for_output("cannot deliver: 503")
        assert pubsub.acknowledged == []
        httpx.delete(f"{url}/api/sessions/other").raise_for_status()
        wait_until(lambda: pubsub.acknowledged == ["m-1", "m-2"], "both are delivered")
        assert httpx.get(f"{url}/api/v1/jobs/j").json()["progress"] == 60
        assert program.wait(signal.SIGINT) == 0


def test_server_with_authentication(pubsub):
    """The subscriber delivers with a token of the server's."""
    token = make_token(sseserve={"publish": ["*"]})
    with run_server(jwt_key=SECRET) as url, subscriber(url, pubsub, SSESERVE_TOKEN=token):
        pubsub.publish(json.dumps(UPDATE).encode())
        wait_until(lambda: pubsub.acknowledged == ["m-1"], "the message is delivered")


def test_token_of_the_service_account(pubsub, monkeypatch):
    """Google's API gets the machine's access token, which is fetched once for as long as it is valid."""
    monkeypatch.setenv("GCE_METADATA_HOST", pubsub.host)
    authorizations = []

    def respond(request: httpx.Request) -> httpx.Response:
        authorizations.append(request.headers["Authorization"])
        return httpx.Response(200, json={})

    token = runpy.run_path(str(SUBSCRIBER))["MetadataToken"]()
    with httpx.Client(auth=token, transport=httpx.MockTransport(respond)) as client:
        for _ in range(2):
            client.post("https://pubsub.googleapis.com/v1/x:pull", json={})
    assert authorizations == ["Bearer token-1"] * 2


def test_without_a_project():
    """A sentence says which variable to set."""
    with Program(sys.executable, SUBSCRIBER, "http://127.0.0.1:1", GOOGLE_CLOUD_PROJECT_ID="") as program:
        assert program.wait() == 2
        assert "set GOOGLE_CLOUD_PROJECT_ID" in program.output
