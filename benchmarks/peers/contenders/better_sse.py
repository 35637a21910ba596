"""better-sse on Node, which is installed from npm into a cache directory of the user."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

from ...load.publishers import PublishRequest
from ...servers import ServerProcess, free_port
from .base import Peer

__all__ = ["BetterSse"]

APP = Path(__file__).resolve().parents[1] / "apps" / "better_sse.mjs"
PACKAGE = "better-sse"
RELEASE = "^0.16.1"
INSTALL_TIMEOUT = 60.0


class BetterSse(Peer):
    name = "better-sse"
    title = "better-sse"
    language = "JavaScript"
    source = "https://matthewwid.github.io/better-sse/guides/channels/"
    note = "A channel of better-sse for each session, on Node's HTTP server, in one process."
    publish = PublishRequest("/*")
    no_replay = "keeps no log: replaying would be the application's work"

    @property
    def _cache(self) -> Path:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(base) / "sseserve-benchmarks"

    @property
    def _package(self) -> Path:
        return self._cache / "node_modules" / PACKAGE

    def missing(self) -> str:
        if shutil.which("node") is None:
            return "node is not installed: apt-get install nodejs npm"
        if (self._package / "package.json").exists():
            return ""
        npm = shutil.which("npm")
        if npm is None:
            return "npm is not installed: apt-get install npm"
        self._cache.mkdir(parents=True, exist_ok=True)
        options = ["--no-fund", "--no-audit", "--prefix", str(self._cache), f"{PACKAGE}@{RELEASE}"]
        try:
            done = subprocess.run(
                [npm, "install", *options], capture_output=True, text=True, timeout=INSTALL_TIMEOUT
            )
        except subprocess.TimeoutExpired:
            return f"npm install {' '.join(options)} took longer than {INSTALL_TIMEOUT:g} s"
        if done.returncode:
            return f"npm install {' '.join(options)} failed: {done.stderr.strip()[-200:]}"
        return ""

    def version(self) -> str:
        node = subprocess.run(["node", "--version"], capture_output=True, text=True, timeout=10).stdout
        package = json.loads((self._package / "package.json").read_text())
        return f"{package['version']}, Node {node.strip().removeprefix('v')}"

    def settings(self) -> str:
        return "NODE_ENV=production node benchmarks/peers/apps/better_sse.mjs MODULE PORT"

    def start(self) -> ServerProcess:
        port = free_port()
        command = ["node", str(APP), str(self._package / "build" / "index.mjs"), str(port)]
        return ServerProcess(self.name, lambda _: command, port=port, environ={"NODE_ENV": "production"})

    def watch_path(self, channel: str) -> str:
        return f"/{channel}"
