"""Run a benchmark: ``python -m benchmarks COMMAND [OPTIONS]``. COMMAND ``--help`` lists its options."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "peers": "compare sseserve with other servers on this machine",
    "transports": "SSE or WebSocket? compare the transports of one server",
    "report": "make the report of a run again from its JSON file, or compare two runs",
    "engines": "appends per second of memory, SQLite and Redis",
    "event-loop": "the longest steps of a server with many sessions and streams",
    "http2": "event streams over HTTP/2 beside those over HTTP/1.1",
    "workers": "publish rates of one process and of several on one port",
    "rolling-restart": "restart instances in turn, and count what clients lose",
    "redis-outage": "take Redis away, and measure how soon all is well again",
    "sqlite-kill": "kill a server with a SQLite file again and again, and count what was lost",
    "hostile": "measure what others notice of hostile clients",
}
_PACKAGES = {"peers": "peers", "report": "report", "transports": "transports"}


def main() -> int:
    """Run the command that is named first; return its exit status, 2 for wrong usage."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name not in COMMANDS:
        lines = [f"  {command:16} {summary}" for command, summary in COMMANDS.items()]
        print("usage: python -m benchmarks COMMAND [OPTIONS]", *lines, sep="\n")
        return 0 if name in ("-h", "--help") else 2
    module = importlib.import_module(
        f".{_PACKAGES.get(name, 'operations.' + name.replace('-', '_'))}", __package__
    )
    sys.argv = [f"python -m benchmarks {name}", *arguments]
    return int(module.main())


if __name__ == "__main__":
    sys.exit(main())
