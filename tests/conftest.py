"""Fixtures of several test modules."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings
from redis_server import RedisCluster, RedisServer

# How long an example takes depends on what else the machine does.
settings.register_profile("tests", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


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


@pytest.fixture(scope="session")
def shared_redis_cluster(tmp_path_factory) -> Iterator[RedisCluster]:
    """A Redis Cluster for all tests; use ``redis_cluster``, which begins empty."""
    with RedisCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        yield cluster


@pytest.fixture
def redis_cluster(shared_redis_cluster) -> RedisCluster:
    """A Redis Cluster that holds nothing, and may not be stopped."""
    shared_redis_cluster.flush()
    return shared_redis_cluster
