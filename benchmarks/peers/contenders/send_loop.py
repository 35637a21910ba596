"""The smallest possible send loop in Python: what one thread and the kernel allow."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from ...load.publishers import PublishRequest
from ...servers import ServerProcess, free_port
from .base import Peer

__all__ = ["SendLoop"]

APP = Path(__file__).resolve().parents[1] / "apps" / "send_loop.py"


class SendLoop(Peer):
    name = "send-loop"
    title = "send loop"
    language = "Python"
    note = (
        "The smallest send loop in Python, no server that one would use: it reads the path and nothing "
        "else, keeps no log, and sends each event with one system call for each client. A server that joins "
        "events into one write can be faster."
    )
    is_limit = True
    publish = PublishRequest("/*")
    no_replay = "keeps no log"

    def version(self) -> str:
        return f"Python {platform.python_version()}"

    def settings(self) -> str:
        return "benchmarks/peers/apps/send_loop.py PORT"

    def start(self) -> ServerProcess:
        port = free_port()
        return ServerProcess(self.title, lambda _: [sys.executable, str(APP), str(port)], port=port)

    def watch_path(self, channel: str) -> str:
        return f"/{channel}"
