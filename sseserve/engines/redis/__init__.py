"""Logs in Redis 7 or Valkey, which several instances share: one server, Sentinel, or a Cluster.

One script stores an append as a whole, or nothing of it; see ``scripts`` for the keys. When ``append``
returns, Redis has executed it, so it is as durable as Redis is configured to be: with ``appendonly yes`` and
``appendfsync always`` nothing is lost when Redis is killed. With any other configuration, and when a replica
is promoted, acknowledged events may be; then the logs get new epochs, and their watchers are told ``reset``.

Retention is measured by the clock of the Redis server. Redis must not evict keys: ``maxmemory-policy
noeviction``, under which publishers get 507 when memory is full.
"""

from __future__ import annotations

from .engine import RedisEngine

__all__ = ["RedisEngine"]
