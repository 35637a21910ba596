"""Mercure: a hub in Go, built into Caddy. Driven through the protocol of its releases from 1.0 on."""

from __future__ import annotations

import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import jwt

from ...load.publishers import PublishRequest
from ...servers import ServerProcess, free_port
from .base import Peer

__all__ = ["Mercure", "MercureBolt"]

HUB = "/.well-known/mercure"
ISSUER = "https://bench.example"
TOPIC = "https://bench.example/*"
CONFIG = """\
{{
  admin off
  auto_https off
  persist_config off
  log {{
    level WARN
  }}
}}
http://127.0.0.1:{port} {{
  bind 127.0.0.1
  mercure {{
    issuer {issuer} {{
      publisher {{
        jwt {key} HS256
      }}
      subscriber {{
        jwt {key} HS256
      }}
    }}
    resource_identifier {issuer}{hub}
    anonymous
    transport {transport}
  }}
  respond /ready 200
}}
"""


class Mercure(Peer):
    name = "mercure"
    title = "Mercure"
    language = "Go"
    source = "https://mercure.rocks/docs/production/load-testing"
    note = (
        "One process with a thread on each core, without history. Every publish request has a JSON Web "
        "Token, as Mercure demands; clients need none. It writes to a client in a goroutine of its own."
    )
    no_replay = 'the transport "local" keeps no history'
    transport = "local"

    def missing(self) -> str:
        if shutil.which("mercure"):
            return ""
        return "mercure (1.0 or later) is not on PATH: download it from https://github.com/dunglas/mercure/releases"

    def version(self) -> str:
        done = subprocess.run(["mercure", "version"], capture_output=True, text=True, timeout=20)
        found = re.search(r"Mercure\.rocks v?(\S+)", done.stdout)
        return found[1] if found else done.stdout.strip()

    def settings(self) -> str:
        config = CONFIG.format(port="PORT", issuer=ISSUER, hub=HUB, key="KEY", transport=self.transport)
        return config.strip()

    @cached_property
    def _key(self) -> str:
        return secrets.token_hex(32)

    @cached_property
    def publish(self) -> PublishRequest:  # type: ignore[override]
        now = int(time.time())
        claims = {
            "iss": ISSUER,
            "sub": "bench",
            "client_id": "bench",
            "jti": "bench",
            "iat": now,
            "aud": ISSUER + HUB,
            "exp": now + 7200,
            "authorization_details": [
                {
                    "type": "https://mercure.rocks/authorization-detail",
                    "actions": ["publish"],
                    "topics": [{"match": "*"}],
                }
            ],
        }
        token = jwt.encode(claims, self._key, algorithm="HS256", headers={"typ": "at+jwt"})
        return PublishRequest(
            HUB,
            f"topic={TOPIC}&data=".encode(),
            content_type="application/x-www-form-urlencoded",
            headers=f"Authorization: Bearer {token}\r\n",
            is_form=True,
        )

    def start(self) -> ServerProcess:
        port = free_port()

        def command(directory: Path) -> Sequence[str]:
            config = directory / "Caddyfile"
            transport = self.transport.replace("DIRECTORY", str(directory))
            config.write_text(
                CONFIG.format(port=port, issuer=ISSUER, hub=HUB, key=self._key, transport=transport)
            )
            return ["mercure", "run", "--config", str(config), "--adapter", "caddyfile"]

        return ServerProcess(self.name, command, port=port, ready="/ready")

    def watch_path(self, channel: str) -> str:
        return f"{HUB}?match={TOPIC.replace('*', channel)}"


class MercureBolt(Mercure):
    name = "mercure-bolt"
    title = "Mercure, history"
    note = "As mercure, with its default transport, which stores each event in a file before it is delivered."
    no_replay = ""
    transport = "bolt {\n      path DIRECTORY/mercure.db\n      size 10000\n    }"
    variant_of = "mercure"
    groups = frozenset({"many", "publish", "storm"})
