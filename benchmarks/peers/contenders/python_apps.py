"""Applications with Python libraries, as they would be written by hand: a queue for each client."""

from __future__ import annotations

import importlib.metadata
import sys

from ...load.publishers import PublishRequest
from ...servers import ROOT, ServerProcess, free_port
from .base import Peer

__all__ = ["QuartTrio", "SseStarlette"]

_APPS = "benchmarks.peers.apps"


def _versions(*packages: str) -> str:
    return ", ".join(f"{package} {importlib.metadata.version(package)}" for package in packages)


def _missing(*packages: str) -> str:
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"{package} is not installed: pip install -e '.[bench]'"
    return ""


class _PythonApp(Peer):
    """An application that an ASGI server runs: ``command`` with ``{port}``, which needs ``packages``."""

    language = "Python"
    publish = PublishRequest("/publish/*")
    no_replay = "keeps no log: replaying would be the application's work"
    packages: tuple[str, ...]
    command: tuple[str, ...]

    def missing(self) -> str:
        return _missing(*self.packages)

    def version(self) -> str:
        return _versions(*self.packages)

    def settings(self) -> str:
        return " ".join(("python -m", *self.command)).replace("{port}", "PORT")

    def start(self) -> ServerProcess:
        port = free_port()
        command = [sys.executable, "-m", *(part.format(port=port) for part in self.command)]
        return ServerProcess(self.name, lambda _: command, port=port)

    def watch_path(self, channel: str) -> str:
        return f"/watch/{channel}"


class SseStarlette(_PythonApp):
    name = "sse-starlette"
    title = "sse-starlette"
    source = "https://www.uvicorn.org/settings/"
    note = "On uvicorn with uvloop and httptools: an asyncio queue and a task for each client."
    packages = ("sse-starlette", "starlette", "uvicorn", "uvloop", "httptools")
    command = (
        *("uvicorn", f"{_APPS}.starlette_app:app", "--host", "127.0.0.1", "--port", "{port}"),
        *("--loop", "uvloop", "--http", "httptools", "--ws", "none", "--lifespan", "off"),
        *("--no-access-log", "--log-level", "warning", "--backlog", "4096"),
    )


class QuartTrio(_PythonApp):
    name = "quart-trio"
    title = "Quart-Trio"
    source = "https://hypercorn.readthedocs.io/en/latest/how_to_guides/configuring.html"
    note = (
        "On Hypercorn, with an async generator and a memory channel for each client: the naive form of "
        "sseserve's own parts."
    )
    packages = ("quart-trio", "quart", "hypercorn", "trio")
    command = (
        *("hypercorn", f"{_APPS}.quart_app:app", "--bind", "127.0.0.1:{port}"),
        *("--config", "benchmarks/peers/apps/hypercorn.toml"),
    )

    def settings(self) -> str:
        return f"{super().settings()}\n{(ROOT / self.command[-1]).read_text().strip()}"
