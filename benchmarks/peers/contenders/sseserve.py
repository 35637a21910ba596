"""sseserve as it is run by default; with a token on every request; and over WebSocket."""

from __future__ import annotations

import secrets
import shutil
import subprocess
import time
import tomllib
from collections.abc import Sequence
from functools import cached_property

import jwt

from ...load.publishers import PublishRequest
from ...servers import ROOT, Server, ServerProcess
from .base import Peer

__all__ = ["Sseserve", "SseserveToken", "SseserveWebSocket"]

_PUBLISH = {"path": "/api/sessions/*/events", "prefix": b'{"type":"tick","data":', "suffix": b"}"}
VARIANTS = frozenset({"accept", "fanout", "idle", "many", "publish"})


class Sseserve(Peer):
    name = "sseserve"
    title = "sseserve"
    language = "Python"
    note = (
        "One process with everything on: the log of each session, heartbeats, limits, metrics. It "
        "responds to a publisher before the event is delivered, and joins events that wait into one write."
    )
    publish = PublishRequest(**_PUBLISH)  # type: ignore[arg-type]
    publish_lines = PublishRequest(**{**_PUBLISH, "content_type": "application/x-ndjson"})  # type: ignore[arg-type]

    def version(self) -> str:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        git = shutil.which("git")
        if git is None:
            return str(project["version"])
        command = [git, "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30).stdout.strip()
        return f"{project['version']} {commit}".strip()

    def settings(self) -> str:
        return "sseserve serve --log-level warning   (all settings are the defaults)"

    def start(self) -> ServerProcess:
        return Server()

    def prepare(self, server: ServerProcess, channels: Sequence[str]) -> None:
        assert isinstance(server, Server)
        server.create_sessions(channels)

    def watch_path(self, channel: str) -> str:
        return f"/api/sessions/{channel}/status/stream"


class SseserveToken(Sseserve):
    name = "sseserve-token"
    title = "sseserve, token"
    note = "Every request has a JSON Web Token, whose signature is checked. All clients have the same one."
    groups = VARIANTS
    variant_of = "sseserve"
    _key = secrets.token_hex(32)

    @cached_property
    def _authorization(self) -> str:
        now = int(time.time())
        claims = {"sub": "bench", "role": "admin", "iat": now, "exp": now + 7200}
        return f"Bearer {jwt.encode(claims, self._key, algorithm='HS256')}"

    @cached_property
    def publish(self) -> PublishRequest:  # type: ignore[override]
        return PublishRequest(**_PUBLISH, headers=f"Authorization: {self._authorization}\r\n")  # type: ignore[arg-type]

    @cached_property
    def publish_lines(self) -> PublishRequest:  # type: ignore[override]
        return PublishRequest(
            **{**_PUBLISH, "content_type": "application/x-ndjson"},  # type: ignore[arg-type]
            headers=f"Authorization: {self._authorization}\r\n",
        )

    def settings(self) -> str:
        return "SSESERVE_JWT_KEY=...\nSSESERVE_MAX_STREAMS_PER_USER=20000   (all clients are one user)"

    def start(self) -> ServerProcess:
        headers = {"Authorization": self._authorization}
        return Server(headers=headers, jwt_key=self._key, max_streams_per_user=20_000)

    def watch(self, channel: str, cursor: str = "") -> bytes:
        return super().watch(channel, cursor)[:-2] + f"Authorization: {self._authorization}\r\n\r\n".encode()


class SseserveWebSocket(Sseserve):
    name = "sseserve-ws"
    title = "sseserve, WebSocket"
    note = "The same events as WebSocket messages."
    groups = VARIANTS
    variant_of = "sseserve"
    watch_status = b"HTTP/1.1 101"

    def watch(self, channel: str, cursor: str = "") -> bytes:
        query = f"?last_event_id={cursor}" if cursor else ""
        return (
            f"GET /api/sessions/{channel}/status/ws{query} HTTP/1.1\r\n"
            "Host: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        ).encode()
