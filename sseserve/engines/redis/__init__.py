"""Logs in Redis 7 or Valkey, which several instances share: one server, Sentinel, or a Cluster.

One script stores an append as a whole, or nothing of it; ``scripts`` has it, and the keys. Appends that wait
together are sent together. When ``append`` returns, Redis has executed it. What survives then:

============================ ==============================================================================
an instance is killed        everything
Redis is killed              with ``appendonly yes`` and ``appendfsync always`` everything; with ``everysec``
                             what is older than about two seconds, for Redis acknowledges before it writes;
                             with snapshots (``save``) what the last one has; else nothing
its machine loses power      the same
a replica takes its place    what the replica had, since replication is asynchronous;
                             ``min-replicas-to-write`` bounds for how long a primary that is cut off goes on
``append`` was not confirmed perhaps (``EngineUnavailable``): repeat it with the same idempotency key
============================ ==============================================================================

What was acknowledged and lost is detected: the log gets another epoch, and clients are told ``reset``.

- Generation. A log that was last written before a fail-over, or before a restart that may have lost
  something (all but those with ``appendfsync always``), gets another epoch at its next append, whether it
  has lost events or not. So does, in a Cluster, each log of a node that was restarted, or that is moved to
  another node.
- Nonce. After a restart or a fail-over each instance compares what it was acknowledged with the log, and
  what it has delivered each time it reads on. Another event in the same place has another nonce.

While Redis is away, or cannot store, ``problem`` says so, and appends fail: the first within about five
seconds, the others at once. When it is back, what was missed is read from the logs; then ``problem`` is
None. A log that is gone is a ``resync`` when another one begins, or some seconds later.

An instance subscribes to the channels of the sessions that it follows. ``ALL`` is a pattern; in a Cluster
each append is also announced on one channel, without its content, and read by those who follow all.

Retention is measured by the clock of the Redis server: each instance deletes what is due, and those on
which a session is watched extend its time before that. Keys that no instance deletes expire a day later.

Once a second each instance looks how much memory Redis uses. When that, and what all logs take by their own
sizes, is more than ``max_log_bytes``, it deletes sessions that have ended; if there are none left, it refuses
appends. So a little more than the limit may be stored, and what others keep in Redis does not count.

Redis must not evict keys (``maxmemory-policy noeviction``): publishers get 507 when its memory is full.
While a slot of a Cluster is moved, appends to its sessions wait, or fail with 503.
"""

from __future__ import annotations

from importlib.util import find_spec

from ...errors import ConfigError

# An optional dependency, which all modules of this package import
if find_spec("coredis") is None:
    raise ConfigError("Redis needs the package coredis: install it with pip install 'sseserve[redis]'")

from .client import RedisClient
from .engine import RedisEngine

__all__ = ["RedisClient", "RedisEngine"]
