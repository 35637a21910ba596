"""Compare the transports of one server: SSE, WebSocket, long polling, polling, and SSE over HTTP/2.

    python -m benchmarks transports [--quick] [--only latency,memory] [--output DIRECTORY]

README.md describes what is measured and how to read the figures.
"""

from .command import main

__all__ = ["main"]
