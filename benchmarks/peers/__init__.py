"""Compare sseserve with other servers on this machine: throughput, latency, memory, and when things go wrong.

    python -m benchmarks peers [--quick] [--only many,accept] [--contenders sseserve,nchan] [--output DIR]

Contenders take turns, round by round, so that other load on the machine affects all of them; a figure is the
median of its rounds. README.md says what is measured and how to read it.
"""

from .command import main, measure

__all__ = ["main", "measure"]
