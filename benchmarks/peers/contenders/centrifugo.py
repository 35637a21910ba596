"""Centrifugo: a real-time server in Go, with its HTTP API and its unidirectional SSE endpoint."""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

from ...load.publishers import PublishRequest
from ...servers import ServerProcess, free_port
from .base import Peer

__all__ = ["Centrifugo"]

CONFIG = {
    "http_server": {"address": "127.0.0.1"},
    "client": {"allow_anonymous_connect_without_token": True},
    "channel": {
        "without_namespace": {
            "allow_subscribe_for_client": True,
            "allow_subscribe_for_anonymous": True,
            "history_size": 10_000,
            "history_ttl": "1h",
            "force_recovery": True,
        }
    },
    "uni_sse": {"enabled": True},
    "health": {"enabled": True},
    "log": {"level": "error"},
}


class Centrifugo(Peer):
    name = "centrifugo"
    title = "Centrifugo"
    language = "Go"
    source = "https://centrifugal.dev/docs/server/infra_tuning"
    note = (
        "One process with a thread on each core, and a history of 10,000 events of each channel in memory. "
        "Its unidirectional SSE endpoint takes the place to resume from in the address, not in a header."
    )

    def missing(self) -> str:
        if shutil.which("centrifugo"):
            return ""
        return (
            "centrifugo (6.0 or later) is not on PATH: "
            "https://centrifugal.dev/docs/getting-started/installation says how to get it"
        )

    def version(self) -> str:
        done = subprocess.run(["centrifugo", "version"], capture_output=True, text=True, timeout=20)
        found = re.search(r"v(\d\S*)", done.stdout)
        return found[1] if found else done.stdout.strip()

    def settings(self) -> str:
        return json.dumps(CONFIG, indent=1)

    @cached_property
    def _key(self) -> str:
        return secrets.token_hex(16)

    @cached_property
    def publish(self) -> PublishRequest:  # type: ignore[override]
        prefix = b'{"channel":"*","data":'
        return PublishRequest("/api/publish", prefix, b"}", headers=f"X-API-Key: {self._key}\r\n")

    def start(self) -> ServerProcess:
        port = free_port()

        def command(directory: Path) -> Sequence[str]:
            config = directory / "config.json"
            address = {"address": "127.0.0.1", "port": str(port)}
            config.write_text(json.dumps({**CONFIG, "http_server": address, "http_api": {"key": self._key}}))
            return ["centrifugo", "--config", str(config)]

        return ServerProcess(self.name, command, port=port, ready="/health")

    def find_cursor(self, data: bytes) -> str:
        """Return the epoch of the channel and the offset of its last event."""
        epoch = re.findall(rb'"epoch":"([^"]+)"', data)
        offset = re.findall(rb'"offset":(\d+)', data)
        return f"{epoch[-1].decode()} {offset[-1].decode()}" if epoch and offset else ""

    def watch_path(self, channel: str, cursor: str = "") -> str:
        subscription: dict[str, object] = {}
        if cursor:
            epoch, offset = cursor.split()
            subscription = {"recover": True, "epoch": epoch, "offset": int(offset)}
        request = json.dumps({"subs": {channel: subscription}}, separators=(",", ":"))
        return f"/connection/uni_sse?cf_connect={quote(request)}"

    def watch(self, channel: str, cursor: str = "") -> bytes:
        return (
            super()
            .watch(channel)
            .replace(self.watch_path(channel).encode(), self.watch_path(channel, cursor).encode())
        )
