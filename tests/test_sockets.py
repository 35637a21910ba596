"""What a server listens on: unix sockets, both families of IP, and a port that two servers share."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
import trio
from harness import HTTP2Client
from processes import Program, wait_until
from programs import require_program
from raw_client import RawConnection, RawWebSocket, request_bytes

import sseserve
from sseserve import Grant
from sseserve.config import Settings
from sseserve.errors import ConfigError
from sseserve.http.proxies import TrustedProxies
from sseserve.live.transport import peer_address
from sseserve.server import sockets as sockets_module
from sseserve.server.sockets import open_sockets_blocking

SERVE = (sys.executable, "-m", "sseserve", "serve")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "server.sock"


async def connect(path: Path) -> RawConnection:
    return RawConnection(await trio.open_unix_socket(str(path)))


def is_there(path: Path) -> bool:
    return stat.S_ISSOCK(path.lstat().st_mode) if os.path.lexists(path) else False


def leave_abandoned(path: Path) -> None:
    """Leave a unix socket as a process that was killed does."""
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))


# Unix sockets


async def test_unix_socket_serves_every_transport(path):
    """Requests, event streams, WebSockets and HTTP/2, as over TCP; it needs no --insecure."""
    async with sseserve.serve(unix_socket=str(path), host="0.0.0.0") as server:
        assert (server.url, server.host, server.port) == (f"unix:{path}", str(path), 0)
        connection = await connect(path)
        body = json.dumps({"progress": 1}).encode()
        assert (await connection.request("POST", "/api/sessions/a/progress", body)).status == 202
        stream = await connect(path)
        assert (await stream.watch("a")).status == 200
        assert json.loads((await stream.event()).data)["progress"] == 1
        web_socket = await RawWebSocket.open(await connect(path), "a")
        assert (await web_socket.message())["data"]["progress"] == 1
        async with await trio.open_unix_socket(str(path)) as http2_stream:
            client = HTTP2Client(RawConnection(http2_stream))
            (number,) = await client.request("/health")
            await client.read_until(lambda: number in client.ended)
            assert client.statuses[number] == 200
        await server.tracker.update("a", progress=2)
        assert json.loads((await stream.event()).data)["progress"] == 2
        for opened in (connection, stream):
            await opened.stream.aclose()
        await web_socket.connection.stream.aclose()
    assert not os.path.lexists(path)


@pytest.mark.parametrize("mode", ["0600", "660", "0666"])
def test_mode_is_that_of_the_setting(path, mode, monkeypatch):
    """Whatever the umask is, and before anybody can connect."""
    before = []
    chmod = Path.chmod

    def note(self, *arguments):
        before.append(stat.S_IMODE(self.stat().st_mode))
        chmod(self, *arguments)

    monkeypatch.setattr(Path, "chmod", note)
    for mask in (0, 0o077):
        umask = os.umask(mask)
        sockets = open_sockets_blocking(Settings(unix_socket=str(path), unix_socket_mode=mode))
        assert os.umask(umask) == mask
        assert stat.S_IMODE(path.stat().st_mode) == int(mode, 8)
        sockets.remove()
    assert before == [int(mode, 8), int(mode, 8) & 0o700]


@pytest.mark.parametrize("mode", ["", "rw", "0888", "77777"])
def test_wrong_mode(mode):
    """The message says how it is written."""
    with pytest.raises(ConfigError, match=r"unix_socket_mode .* octal digits, such as 0660, not"):
        sseserve.serve(unix_socket_mode=mode)


async def test_abandoned_socket_is_replaced(path):
    """As a server that was killed leaves it."""
    leave_abandoned(path)
    async with sseserve.serve(unix_socket=str(path)):
        await (await connect(path)).stream.aclose()
    assert not os.path.lexists(path)


async def test_nothing_else_is_replaced(path, tmp_path):
    """Neither a socket that somebody listens on, also if its queue is full, nor another file or link."""
    with socket.socket(socket.AF_UNIX) as listening, socket.socket(socket.AF_UNIX) as waiting:
        listening.bind(str(path))
        listening.listen(0)
        waiting.connect(str(path))  # fills the queue
        with pytest.raises(OSError, match="another process listens on it"):
            async with sseserve.serve(unix_socket=str(path)):
                pass
    assert is_there(path)
    file = tmp_path / "file"
    file.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(file)
    for other in (file, link):
        with pytest.raises(OSError, match="there is a file which is no socket"):
            async with sseserve.serve(unix_socket=str(other)):
                pass
    assert file.read_text() == "precious"


async def test_socket_of_another_server_is_left(path):
    """One that was started when this one did not listen any more, or whose file has replaced ours."""
    async with sseserve.serve(unix_socket=str(path)):
        path.unlink()
        other = open_sockets_blocking(Settings(unix_socket=str(path)))
    assert is_there(path)
    other.remove()
    assert not os.path.lexists(path)


async def test_socket_of_a_server_that_starts_during_the_drain_is_left(path):
    """Its file may get the number of the inode that has become free (on ext4, but not on tmpfs)."""
    async with sseserve.serve(unix_socket=str(path)) as server:
        server.stop()
        await server.app.listener.stopped.wait()
        other = open_sockets_blocking(Settings(unix_socket=str(path)))
    assert is_there(path)
    other.remove()
    assert not os.path.lexists(path)


def test_two_servers_do_not_take_each_others_socket(path, monkeypatch):
    """Who starts while another one replaces an abandoned socket waits, and then finds it in use."""
    leave_abandoned(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    sockets_module.fcntl.flock(descriptor, sockets_module.fcntl.LOCK_EX)
    command = (*SERVE, "--unix", path)
    with Program(*command) as program:
        wait_until(lambda: _waits_for_lock(program.pid), "the second server")
        path.unlink()
        with socket.socket(socket.AF_UNIX) as first:
            first.bind(str(path))
            first.listen()
            os.close(descriptor)
            assert program.wait() == 1
            assert f"cannot listen on {path}: another process listens on it" in program.output


def _waits_for_lock(pid: int) -> bool:
    return re.search(rf"-> FLOCK .* {pid} ", Path("/proc/locks").read_text()) is not None


async def _peers(settings: dict[str, object], path: Path, headers: list[tuple[str, str]], first: bytes = b""):
    """Return whose requests a server sees, over HTTP/1.1 and HTTP/2."""
    peers = []

    async def authenticate(request):
        peers.append(request.peer)
        return Grant("a", "admin")

    async with sseserve.serve(unix_socket=str(path), authenticate=authenticate, **settings):
        connection = await connect(path)
        await connection.send(first + request_bytes("GET", "/api/sessions", headers=headers))
        assert (await connection.read_response()).status == 200
        await connection.stream.aclose()
        async with await trio.open_unix_socket(str(path)) as stream:
            await stream.send_all(first)
            client = HTTP2Client(RawConnection(stream))
            lower = [(name.lower(), value) for name, value in headers]
            (number,) = await client.request("/api/sessions", headers=lower)
            await client.read_until(lambda: number in client.ended)
    return peers


FORWARDED = [("X-Forwarded-For", "198.51.100.1, 192.0.2.9")]


@pytest.mark.parametrize(
    ("settings", "first", "peer"),
    [
        ({}, b"", "unix"),
        ({"trusted_proxies": ["10.0.0.0/8"]}, b"", "unix"),
        ({"trusted_proxies": ["unix"]}, b"", "192.0.2.9"),
        ({"trusted_proxies": ["unix", "192.0.2.0/24"]}, b"", "198.51.100.1"),
        (
            {"trusted_proxies": ["unix"], "proxy_header": "proxy-protocol"},
            b"PROXY TCP4 192.0.2.7 10.0.0.1 1 2\r\n",
            "192.0.2.7",
        ),
    ],
)
async def test_peer_of_a_unix_socket_is_a_proxy_if_it_is_listed(path, settings, first, peer):
    """By the name unix: it has no address. Nobody else can take that name."""
    assert await _peers(settings, path, FORWARDED, first) == [peer, peer]
    spoofed = [("X-Forwarded-For", "unix"), ("Forwarded", "for=unix")]
    if not first:
        assert await _peers(settings, path, spoofed, first) == ["unix", "unix"]


@pytest.mark.parametrize(("limit_loopback", "status"), [(False, 200), (True, 429)])
async def test_limits_of_addresses(path, limit_loopback, status):
    """Who connects to a unix socket is on this machine: limited as the loopback interface is."""
    limits = {"max_streams_per_address": 1, "limit_loopback": limit_loopback}
    async with sseserve.serve(unix_socket=str(path), drain=0.1, **limits) as server:
        await server.tracker.update("a", progress=1)
        first, second = await connect(path), await connect(path)
        assert (await first.watch("a")).status == 200
        assert (await second.watch("a")).status == status
        for connection in (first, second):
            await connection.stream.aclose()


async def test_hosts_of_a_unix_socket(path):
    """Those of a server on the loopback interface: a proxy passes on names that have to be listed."""
    async with sseserve.serve(unix_socket=str(path), host="0.0.0.0", allowed_hosts=["a.example"]):
        for host, status in (("localhost", 200), ("a.example", 200), ("192.0.2.1", 421), ("b", 421)):
            connection = await connect(path)
            response = await connection.request("GET", "/api/sessions", headers=[("Host", host)])
            assert response.status == status, host
            await connection.stream.aclose()


def test_curl_over_a_unix_socket(path):
    """``--unix`` in the command; the file is gone when the server has ended."""
    with Program(*SERVE, "--unix", path, "--port", "1") as program:
        program.wait_for_output(rf"serving at unix:{path}$")
        command = [require_program("curl"), "-sS", "--unix-socket", path, "http://localhost/health"]
        assert json.loads(subprocess.check_output(command, timeout=20))["status"] == "ok"
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert "ERROR" not in program.output
    assert not os.path.lexists(path)


def test_workers_share_a_unix_socket(redis, path):
    """Each accepts from it; while they drain nobody can connect, and the parent removes it."""
    environ = {"SSESERVE_ENGINE": redis.url, "SSESERVE_DRAIN": "2"}
    with Program(*SERVE, "--unix", path, "--workers", "2", **environ) as program:
        program.wait_for_output(rf"serving at unix:{path} with 2 workers")
        workers = set()

        def ask() -> set[str]:
            transport = httpx.HTTPTransport(uds=str(path))
            with httpx.Client(transport=transport, base_url="http://localhost") as client:
                workers.add(re.search(r'worker="(\d)"', client.get("/metrics").text)[1])
            return workers

        wait_until(lambda: ask() == {"1", "2"}, "both workers")
        with socket.socket(socket.AF_UNIX) as held:
            held.connect(str(path))
            # A request that has begun keeps its worker for a second.
            held.sendall(b"GET /he")
            program.signal(signal.SIGTERM)
            wait_until(lambda: _is_refused(path), "a refused connection")
        assert program.wait() == 0, program.output
        assert "ERROR" not in program.output
    assert not os.path.lexists(path)


def test_duplicates_of_a_socket_do_not_block(path):
    """That is of all of them: a worker that was woken for a connection of another one would wait for ever."""
    sockets = open_sockets_blocking(Settings(unix_socket=str(path)))
    duplicates = [duplicate for _ in range(2) for duplicate in sockets.listen_beside()]
    for duplicate in duplicates:
        with pytest.raises(BlockingIOError):
            duplicate.accept()
        duplicate.close()
    sockets.remove()


def _is_refused(path: Path) -> bool:
    """Whether the file is there, and nobody listens on it."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == errno.ECONNREFUSED


@pytest.mark.parametrize(
    ("path", "message"),
    [("/nowhere/a.sock", "No such file or directory"), ("/tmp/" + 120 * "a", "AF_UNIX path too long")],
)
def test_path_that_cannot_be_used(path, message):
    """Said in one line, with the exit status of an address that cannot be listened on."""
    result = subprocess.run([*SERVE, "--unix", path], capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stderr) == (1, f"sseserve: cannot listen on {path}: {message}\n")


# Two servers on one port


def test_two_servers_on_one_port():
    """With reuse_port a new version serves before the old one is stopped; without it the port is taken."""
    with Program(*SERVE, "--port", "0", SSESERVE_REUSE_PORT="1") as old:
        url = old.wait_for_output(r"serving at (\S+)")[1]
        port = url.rpartition(":")[2]
        refused = subprocess.run([*SERVE, "--port", port], capture_output=True, text=True, timeout=20)
        assert (refused.returncode, "in use" in refused.stderr) == (1, True)
        with Program(*SERVE, "--port", port, SSESERVE_REUSE_PORT="1") as new:
            new.wait_for_output("serving at")
            instances = set()

            def ask() -> set[str]:
                instances.add(httpx.get(f"{url}/health").json()["instance"])
                return instances

            wait_until(lambda: len(ask()) == 2, "both servers")
            assert old.wait(signal.SIGTERM) == 0
            served = {httpx.get(f"{url}/health").json()["instance"] for _ in range(16)}
            assert len(served) == 1
            assert new.wait(signal.SIGTERM) == 0


# IPv6


@pytest.mark.parametrize("host", ["::", ""])
async def test_every_address_of_both_families(host):
    """``::`` is IPv4 too, as users expect it; each peer has the address of its own family."""
    peers = []

    async def authenticate(request):
        peers.append(request.peer)
        return Grant("a", "admin")

    async with sseserve.serve(host=host, port=0, authenticate=authenticate) as server:
        for address in ("127.0.0.1", "::1"):
            connection = RawConnection(await trio.open_tcp_stream(address, server.port))
            assert (await connection.request("GET", "/api/sessions")).status == 200
            await connection.stream.aclose()
    assert peers == ["127.0.0.1", "::1"]
    assert server.url == f"http://{'[::]' if host else '0.0.0.0'}:{server.port}"


async def test_ipv6_address():
    """The URL has brackets, and the host of it is one of this server; IPv4 is not served."""
    async with sseserve.serve(host="::1", port=0) as server, httpx.AsyncClient() as client:
        assert server.url == f"http://[::1]:{server.port}"
        response = await client.post(f"{server.url}/api/sessions/a/progress", json={"progress": 1})
        assert response.status_code == 202
        with pytest.raises(httpx.ConnectError):
            await client.get(f"http://127.0.0.1:{server.port}/health")
        for host in ("[::1]", f"[0:0:0:0:0:0:0:1]:{server.port}"):
            response = await client.get(f"{server.url}/api/sessions", headers={"Host": host})
            assert response.status_code == 200


def _link_local() -> str | None:
    """Return a link-local address of this machine, with its zone."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        digits, _, _, scope, _, name = line.split()
        if scope == "20":
            return f"{socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))}%{name}"
    return None


async def test_link_local_address():
    """Its zone is in the URL as RFC 6874 says; clients leave it out of the Host field."""
    if (address := _link_local()) is None:
        pytest.skip("this machine has no link-local address")
    async with sseserve.serve(host=address, port=0, insecure=True) as server:
        assert server.url == f"http://[{address.replace('%', '%25')}]:{server.port}"
        command = [require_program("curl"), "-sS", "-g", f"{server.url}/api/sessions"]
        output = await trio.run_process(command, capture_stdout=True)
        assert json.loads(output.stdout) == {"sessions": []}


def test_address_of_a_socket_that_serves_both_families():
    """An IPv4 address is the same, however the kernel writes it; others are left as they are."""
    assert peer_address(("::ffff:192.0.2.1", 1, 0, 0)) == "192.0.2.1"
    for address in ("192.0.2.1", "::1", "::ffff:0:192.0.2.1", "2001:db8::ffff:1"):
        assert peer_address((address, 1)) == address
    assert not TrustedProxies(["unix"]).trusts("")
