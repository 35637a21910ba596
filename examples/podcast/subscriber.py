"""A pull subscriber for Google Cloud Pub/Sub: ``python subscriber.py http://127.0.0.1:8000``.

It pulls status updates from a subscription and delivers each to the server, as a push subscription would. A
message is acknowledged when the server has accepted it, or has dropped it as invalid; otherwise Pub/Sub
delivers it again.

Environment variables:
    GOOGLE_CLOUD_PROJECT_ID: the project.
    PUBSUB_STATUS_UPDATES_SUBSCRIPTION: the subscription, by default ``sse-service-subscription``.
    PUBSUB_STATUS_UPDATES_TOPIC: its topic, by default ``status-updates``; both are created in an emulator.
    PUBSUB_EMULATOR_HOST: host and port of an emulator. Without it the subscriber uses Google's API, with the
        service account of the machine that it runs on.
    SSESERVE_TOKEN: a token of the server that may publish to every session, if the server needs one.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Any

import httpx

API = "https://pubsub.googleapis.com"
TOKEN_PATH = "/computeMetadata/v1/instance/service-accounts/default/token"
MAX_MESSAGES = 100
RETRY_DELAY = 1.0  # seconds


class MetadataToken(httpx.Auth):
    """The access token of the machine's service account, from Google Cloud's metadata server."""

    def __init__(self) -> None:
        host = os.environ.get("GCE_METADATA_HOST", "metadata.google.internal")
        self._url = f"http://{host}{TOKEN_PATH}"
        self._token = ""
        self._expires_at = 0.0

    def auth_flow(self, request: httpx.Request) -> Any:
        if time.monotonic() >= self._expires_at:
            response = httpx.get(self._url, headers={"Metadata-Flavor": "Google"}, trust_env=False)
            token = response.raise_for_status().json()
            self._token = token["access_token"]
            self._expires_at = time.monotonic() + token["expires_in"] - 60
        request.headers["Authorization"] = f"Bearer {self._token}"
        yield request


class Subscription:
    """A subscription, over the REST API of Pub/Sub (https://cloud.google.com/pubsub/docs/reference/rest)."""

    def __init__(self, client: httpx.Client, project: str, name: str) -> None:
        self._client = client
        self._project = f"projects/{project}"
        self.name = f"{self._project}/subscriptions/{name}"

    def create(self, topic: str) -> None:
        """Create the topic and the subscription, if they do not exist."""
        topic = f"{self._project}/topics/{topic}"
        for name, body in ((topic, {}), (self.name, {"topic": topic})):
            response = self._client.put(f"/v1/{name}", json=body)
            if response.status_code != httpx.codes.CONFLICT:
                response.raise_for_status()

    def pull(self) -> list[dict[str, Any]]:
        """Wait for messages; returns none if none came for some time."""
        return self._post("pull", maxMessages=MAX_MESSAGES).get("receivedMessages", [])

    def acknowledge(self, messages: list[dict[str, Any]]) -> None:
        """Pub/Sub does not deliver these again."""
        if messages:
            self._post("acknowledge", ackIds=[message["ackId"] for message in messages])

    def release(self, messages: list[dict[str, Any]]) -> None:
        """Pub/Sub delivers these again, as soon as possible."""
        if messages:
            ids = [message["ackId"] for message in messages]
            self._post("modifyAckDeadline", ackIds=ids, ackDeadlineSeconds=0)

    def _post(self, method: str, **body: Any) -> Any:
        return self._client.post(f"/v1/{self.name}:{method}", json=body).raise_for_status().json()


def deliver(server: httpx.Client, subscription: str, message: dict[str, Any]) -> bool:
    """Deliver a message to the server; return whether it is done with."""
    body = {"message": message["message"], "subscription": subscription}
    try:
        response = server.post("/api/v1/pubsub/push", json=body)
    except httpx.TransportError as error:
        print(f"cannot deliver: {error}", file=sys.stderr, flush=True)
        return False
    if not response.is_success:
        print(f"cannot deliver: {response.status_code} {response.text}", file=sys.stderr, flush=True)
    return response.is_success


def deliver_all(server: httpx.Client, subscription: Subscription, messages: list[dict[str, Any]]) -> None:
    """Deliver messages in their order, up to the first that the server does not accept now."""
    done = 0
    while done < len(messages) and deliver(server, subscription.name, messages[done]):
        done += 1
    subscription.acknowledge(messages[:done])
    if done < len(messages):
        subscription.release(messages[done:])
        time.sleep(RETRY_DELAY)  # Pub/Sub delivers them again at once


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("server", help="URL of the server")
    args = parser.parse_args()
    if not (project := os.environ.get("GOOGLE_CLOUD_PROJECT_ID")):
        parser.error("set GOOGLE_CLOUD_PROJECT_ID")
    topic = os.environ.get("PUBSUB_STATUS_UPDATES_TOPIC", "status-updates")
    name = os.environ.get("PUBSUB_STATUS_UPDATES_SUBSCRIPTION", "sse-service-subscription")
    emulator = os.environ.get("PUBSUB_EMULATOR_HOST")
    pubsub = httpx.Client(
        base_url=f"http://{emulator}" if emulator else API,
        auth=None if emulator else MetadataToken(),
        timeout=120,  # a pull waits for messages
    )
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    token = os.environ.get("SSESERVE_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    with pubsub, httpx.Client(base_url=args.server, headers=headers) as server:
        subscription = Subscription(pubsub, project, name)
        if emulator:
            subscription.create(topic)
        print(f"pulling from {subscription.name}", flush=True)
        while True:
            try:
                deliver_all(server, subscription, subscription.pull())
            except httpx.HTTPError as error:
                print(f"Pub/Sub: {error}", file=sys.stderr, flush=True)
                time.sleep(RETRY_DELAY)  # not to ask a service that is away in a busy loop


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(0)
