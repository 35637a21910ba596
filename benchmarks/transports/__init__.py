"""Compare the transports of one server: SSE, WebSocket, long polling, polling, and SSE over HTTP/2.

    python -m benchmarks transports [--quick] [--only latency,cuts] [--output DIRECTORY]

README.md describes what is measured and how to read the figures.
"""

from __future__ import annotations

__all__ = ["main"]


def main() -> int:
    """Run the command, which is imported here: the processes of the load need nothing of it."""
    from .command import main as run_command

    return run_command()
