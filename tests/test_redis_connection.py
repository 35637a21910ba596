"""Connections to Redis: URLs, a server that is away or hangs, Sentinel and Cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest
import trio
from ports import free_port
from programs import require_program
from redis.crc import key_slot
from redis_server import RedisServer

from sseserve.concurrency import raise_single_error
from sseserve.engines.redis import client as client_module
from sseserve.engines.redis import connection
from sseserve.engines.redis.address import RedisAddress
from sseserve.engines.redis.client import RedisClient, Script
from sseserve.engines.redis.connection import hash_slot
from sseserve.engines.redis.faults import LOST
from sseserve.errors import ConfigError, EngineUnavailable

FIRST_WORD = Script("return {KEYS[1], ARGV[1]}")


@pytest.fixture
def quick(monkeypatch):
    """Let what waits for a server that is away give up sooner."""
    monkeypatch.setattr(connection, "COMMAND_TIMEOUT", 0.5)
    monkeypatch.setattr(client_module, "DEADLINE", 0.2)
    monkeypatch.setattr(client_module, "CHECK", 0.1)


@asynccontextmanager
async def connected(url, on_availability=lambda _problem: None):
    """A client that runs."""
    client = RedisClient(url)
    client.on_availability.append(on_availability)
    with raise_single_error():
        async with trio.open_nursery() as nursery:
            await nursery.start(client.run)
            yield client
            nursery.cancel_scope.cancel()


async def wait_until(condition):
    """Poll until a condition holds."""
    with trio.fail_after(20):
        while not condition():
            await trio.sleep(0.01)


async def repeat(function, *arguments):
    """Call a function until it raises an error."""
    with trio.fail_after(20):
        while True:
            await function(*arguments)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://localhost", RedisAddress((("localhost", 6379),))),
        ("redis://u:p%40@h:1/2", RedisAddress((("h", 1),), None, "u", "p@", 2)),
        ("rediss://:p@[::1]:1?db=3", RedisAddress((("::1", 1),), None, None, "p", 3, True)),
        ("unix:///run/a.sock?db=1", RedisAddress((), "/run/a.sock", db=1)),
        ("unix://:p@/run/a.sock", RedisAddress((), "/run/a.sock", None, "p")),
        (
            "redis://a:1,b/4?sentinel=m",
            RedisAddress((("a", 1), ("b", 26379)), db=4, options={"sentinel": "m"}),
        ),
    ],
)
def test_urls(url, address):
    assert RedisAddress.parse(url) == address


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("redis://", "must name its host"),
        ("redis://:secret@h/x", "the database in redis://[*]{3}@h/x must be a number, not 'x'"),
        ("redis://:secret@h:x/1", "must name its host"),
        ("redis://:secret@h:65536/1", "the port in redis://[*]{3}@h:65536/1 must be from 1 to 65535"),
        ("redis://h:0", "must be from 1 to 65535"),
        ("redis://h?tls=1", "unknown option 'tls'"),
        ("redis://h?db", "cannot be read"),
        ("unix://a", "absolute path"),
        ("rediss://h?ssl_ca_certs=/nonexistent", None),
    ],
)
def test_wrong_urls(url, message):
    """The message says what to write, without the password."""
    with pytest.raises(ConfigError, match=message) as raised:
        RedisClient(url)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "key", [b"123456789", b"{user1000}.following", b"foo{}{bar}", b"foo{{bar}}zap", b"foo{bar}{zap}", b""]
)
def test_hash_slots(key):
    """The examples of the Redis Cluster specification, as redis-py computes them."""
    assert hash_slot(key) == key_slot(key)


async def test_commands(redis):
    """Responses are as in RESP3; an error of the command is raised as it is."""
    async with connected(redis.url) as client:
        assert await client.execute("SET", "a", "é") == b"OK"
        assert await client.execute("GET", "a") == "é".encode()
        await client.execute("HSET", "h", "f", 1)
        assert await client.execute("HGETALL", "h") == {b"f": b"1"}
        assert await client.execute("GET", "none") is None
        with pytest.raises(Exception, match="wrong number of arguments"):
            await client.execute("GET")
        assert await client.execute("DBSIZE", key="") == 2
        assert client.problem is None


async def test_script_is_loaded_again(redis):
    """When the server has forgotten it."""
    async with connected(redis.url) as client:
        for _ in range(2):
            assert await client.evaluate(FIRST_WORD, ["k"], ["x"]) == [b"k", b"x"]
            redis.command("SCRIPT", "FLUSH")


async def test_nothing_connects_once_it_is_closed(redis):
    """What was about to connect again when the server stopped gets an error that it expects."""
    async with connected(redis.url) as client:
        pass
    with pytest.raises(LOST, match="closed"):
        await client.connect()


async def test_server_that_cannot_be_reached():
    """The error at startup says why, and what to do."""
    message = r"cannot use the Redis at 127\.0\.0\.1:\d+: .*connection refused; start it, or name another"
    with pytest.raises(ConfigError, match=message):
        async with connected(f"redis://127.0.0.1:{free_port()}"):
            pass


@pytest.mark.parametrize("variables", [{"SSESERVE_ENGINE": "redis://h"}, {"REDIS_URL": "redis://h"}], ids=str)
@pytest.mark.parametrize("arguments", [(), ("--workers", "2")], ids=str)
def test_without_the_extra(variables, arguments):
    """Where coredis is not installed, the error says what to install."""
    program = "import sys; sys.modules['coredis'] = None; from sseserve.cli import main; main()"
    command = (sys.executable, "-c", program, "serve", "--port", "0", *arguments)
    found = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True)
    expected = "sseserve: Redis needs the package coredis: install it with pip install 'sseserve[redis]'\n"
    assert (found.returncode, found.stderr) == (2, expected)


async def test_unix_socket_and_password(tmp_path):
    """With a database of its own."""
    path = tmp_path / "redis.sock"
    with RedisServer(tmp_path / "redis", unixsocket=path, unixsocketperm=700) as redis:
        redis.command("CONFIG", "SET", "requirepass", "p@ss")
        with pytest.raises(ConfigError, match="invalid username-password pair"):
            async with connected(f"unix://:wrong@{path}"):
                pass
        async with connected(f"unix://:p%40ss@{path}?db=3") as client:
            assert await client.execute("SET", "a", 1) == b"OK"
            assert b"db3:keys=1" in await client.execute("INFO", "keyspace")


@pytest.mark.parametrize("fault", ["pause", "kill"])
async def test_server_that_is_away(tmp_path, quick, fault):
    """Commands fail within a bounded time, then at once; it is used again as soon as it is back."""
    problems = []
    with RedisServer(tmp_path / "redis") as redis:
        async with connected(redis.url, problems.append) as client:
            await client.execute("SET", "a", 1)
            getattr(redis, fault)()
            with pytest.raises(EngineUnavailable):
                await repeat(client.execute, "GET", "a")
            await wait_until(lambda: client.problem is not None)
            with pytest.raises(EngineUnavailable, match="Redis"):
                await client.execute("GET", "a")
            if fault == "pause":
                redis.resume()
            else:
                redis.start()
            await wait_until(lambda: client.problem is None)
            assert await client.execute("SET", "a", 2) == b"OK"
            assert problems == [problems[0], None]
            if fault == "kill":
                assert problems[0] == "cannot connect to Redis: connection refused"


async def test_short_restart_is_not_noticed(tmp_path):
    """A command that can be repeated is, for some seconds."""
    with RedisServer(tmp_path / "redis") as redis:
        async with connected(redis.url) as client, trio.open_nursery() as nursery:
            await client.execute("SET", "a", 1)
            redis.kill()
            nursery.start_soon(client.execute, "GET", "a")
            await trio.testing.wait_all_tasks_blocked()
            await trio.to_thread.run_sync(redis.start)


async def test_command_that_must_not_be_repeated(tmp_path):
    """It is not sent a second time once its fate is unknown."""
    with RedisServer(tmp_path / "redis", appendonly="yes", appendfsync="always") as redis:
        async with connected(redis.url) as client:
            script = Script("redis.call('INCR', KEYS[1]) while true do end")

            async def kill_when_it_runs() -> None:
                while client._connections._connections[None].statistics.requests_pending == 0:
                    await trio.sleep(0.01)
                await trio.sleep(0.05)
                redis.kill()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(kill_when_it_runs)
                with pytest.raises(EngineUnavailable, match="did not confirm"):
                    await client.evaluate(script, ["n"], repeatable=False)
            redis.start()
            await wait_until(lambda: client.problem is None)
            assert await client.execute("GET", "n") in (None, b"1")


@pytest.fixture
def tls_redis(tmp_path):
    """A server with TLS alone, and a certificate that only its own file vouches for."""
    certificate, key = tmp_path / "redis.pem", tmp_path / "redis.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    files = ["-keyout", str(key), "-out", str(certificate)]
    command = [require_program("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    subprocess.run([*command, *subject, *files], check=True, capture_output=True)
    options = {"tls_cert_file": certificate, "tls_key_file": key, "tls_ca_cert_file": certificate}
    port = free_port()
    with RedisServer(tmp_path / "redis", tls_port=port, tls_auth_clients="no", **options):
        yield f"rediss://127.0.0.1:{port}/0", certificate


async def test_tls(tls_redis):
    """``rediss:`` connects to a server whose certificate is trusted, and to no other."""
    url, certificate = tls_redis
    async with connected(f"{url}?ssl_ca_certs={certificate}") as client:
        assert await client.execute("SET", "a", 1) == b"OK"
    async with connected(f"{url}?ssl_cert_reqs=none") as client:
        assert await client.execute("GET", "a") == b"1"
    with pytest.raises(ConfigError, match="certificate"):
        async with connected(url):
            pass
