"""The Redis channels of other systems: their programs publish there, and read there what this server knows.

Guarantee: each message is recorded once, in the order of its session's channel, by one of the instances that
share their logs. What this server publishes is marked, and no server records it; what came from a system's
channel is not published there again, and what is published is in the order of the log. Redis's publish and
subscribe itself promises nothing: what is published while no instance is connected is lost, but for the
newest message of a system that keeps it in a key.
"""

from __future__ import annotations

from .service import Channels

__all__ = ["Channels"]
