"""Fixtures of several test modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from redis_server import RedisServer


@pytest.fixture(scope="session")
def shared_redis(tmp_path_factory) -> Iterator[RedisServer]:
    """A redis-server for all tests; use ``redis``, which begins empty."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis(shared_redis) -> RedisServer:
    """A redis-server that holds nothing, and may not be stopped."""
    shared_redis.flush()
    return shared_redis
