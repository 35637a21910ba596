"""Several processes on one port: started, replaced and ended together by a parent."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import httpx
import httpx_sse
import pytest
from harness import ServerHarness
from processes import ROOT, Program, wait_until

import sseserve
from sseserve.config import Settings
from sseserve.errors import ConfigError
from sseserve.logs import configure
from sseserve.server import run
from sseserve.server.sockets import open_sockets_blocking

MAINS = ROOT / "tests" / "worker_mains.py"


@contextmanager
def run_mains(main: str, *, count: int = 2, drain: float = 10, ready: bool = True) -> Iterator[Program]:
    """Run workers of ``worker_mains``; the block begins when all of them serve."""
    with Program(sys.executable, MAINS, main, str(count), str(drain)) as program:
        if ready:
            program.wait_for_output("all workers serve")
        yield program


def pids(program: Program, number: int) -> list[int]:
    """Return the processes that a worker has had."""
    return [
        int(pid) for pid in re.findall(rf"^worker {number} is process (\d+)$", program.output, re.MULTILINE)
    ]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_signal_drains_all_workers(number):
    """The parent returns, with status 0, when the last of them has ended."""
    with run_mains("serve", count=3) as program:
        assert program.wait(number) == 0, program.output
        for worker in (1, 2, 3):
            assert f"worker {worker} has drained" in program.output
        assert f"got {number.name}; stopping" in program.output
        assert "ERROR" not in program.output


def test_interrupt_from_the_terminal_drains_once():
    """It reaches all processes; the parent decides, so each worker drains, and none is replaced."""
    with run_mains("serve") as program:
        program.press_ctrl_c()
        assert program.wait() == 0, program.output
        assert program.output.count("has drained") == 2
        assert "replaced" not in program.output
        assert "Traceback" not in program.output


def test_killed_worker_is_replaced_and_the_others_continue():
    """The log says which and why; the replacement drains with the others."""
    with run_mains("serve") as program:
        first, second = pids(program, 1)[0], pids(program, 2)[0]
        os.kill(first, signal.SIGKILL)
        wait_until(lambda: len(pids(program, 1)) == 2, "the replacement")
        assert f"worker 1 (process {first}) was killed by SIGKILL; it is replaced at once" in program.output
        assert sorted(children(program.pid)) == sorted([pids(program, 1)[1], second])
        assert program.wait(signal.SIGTERM) == 0
        assert program.output.count("has drained") == 2
        assert program.output.count("all workers serve") == 1


def test_waiting_connections_outlive_a_killed_worker():
    """What it has not accepted is accepted by its replacement."""
    with run_mains("stall_once", count=1) as program:
        port = int(program.wait_for_output(r"listening on (\d+)")[1])
        with socket.create_connection(("127.0.0.1", port), 10) as client:
            os.kill(children(program.pid)[0], signal.SIGKILL)
            assert client.recv(100) == b"accepted"
        assert program.wait(signal.SIGTERM) == 0


def test_connections_are_refused_while_workers_drain():
    """Once they have stopped to accept: neither the parent nor another worker holds their sockets."""
    with run_mains("drain_for_ever", count=3, drain=1) as program:
        port = int(program.wait_for_output(r"listening on (\d+)")[1])
        program.signal(signal.SIGTERM)
        for worker in (1, 2, 3):
            program.wait_for_output(f"worker {worker} accepts nothing")
        for _ in range(32):
            with socket.socket() as client:
                assert client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED
        assert program.wait() == 0


def test_worker_that_is_replaced_later_takes_no_connections():
    """Until then nothing would accept them; where there are other workers, these do."""
    with run_mains("end_soon", count=1) as program:
        port = int(program.wait_for_output(r"listening on (\d+)")[1])

        def is_refused() -> bool:
            with socket.socket() as client:
                return client.connect_ex(("127.0.0.1", port)) == errno.ECONNREFUSED

        wait_until(is_refused, "a refused connection")
        assert program.wait(signal.SIGTERM) == 0


def test_second_signal_changes_nothing():
    """It is logged; a worker that hangs is killed when its time is over, and the exit status is 0."""
    with run_mains("hang", drain=0.2) as program:
        program.signal(signal.SIGTERM)
        program.wait_for_output("got SIGTERM; stopping")
        assert program.wait(signal.SIGTERM) == 0, program.output
        assert "got SIGTERM; the workers are already stopping" in program.output
        for worker in (1, 2):
            assert re.search(
                rf"worker {worker} \(process \d+\) did not end in time; killing it", program.output
            )


def test_workers_end_with_a_killed_parent():
    """Nothing is left behind, though the parent could tell nobody."""
    with run_mains("serve", count=3) as program:
        workers = [pids(program, number)[0] for number in (1, 2, 3)]
        program.wait(signal.SIGKILL)
        wait_until(lambda: not any(map(is_alive, workers)), "the end of the workers")
        assert program.output.count("has drained") == 3


def test_worker_that_ends_again_and_again_is_replaced_after_growing_delays():
    """The first time at once, then after FIRST_DELAY, twice that, and so on."""
    with run_mains("end_soon", count=1) as program:
        program.wait_for_output(r"ended with status 0; it is replaced in 0.4 s")
        delays = re.findall(r"it is replaced (.*)$", program.output, re.MULTILINE)
        assert delays == ["at once", "in 0.2 s", "in 0.4 s"]
        assert program.wait(signal.SIGTERM) == 0


def test_worker_that_ends_now_and_then_is_replaced_at_once():
    """What happened before it served for a minute (here: at all) does not count."""
    with run_mains("end_later", count=1) as program:
        program.wait_for_output(r"(?s)(replaced.*){3}")
        delays = re.findall(r"it is replaced (.*)$", program.output, re.MULTILINE)
        assert set(delays) == {"at once"}
        assert program.wait(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("main", "message"),
    [
        ("refuse", "ConfigError: no Redis at 127.0.0.1:1"),
        ("fail", "ChildProcessError: the first worker ended with status 1, before it served"),
        ("be_killed", "ChildProcessError: the first worker was killed by SIGKILL, before it served"),
    ],
)
def test_nothing_starts_if_the_first_worker_cannot(main, message):
    """The parent says why, once, and gives up."""
    with run_mains(main, count=4, ready=False) as program:
        assert program.wait() == 1
        assert program.output.splitlines()[-1] == message
        assert program.output.count(message) == 1
        assert program.output.count("RuntimeError: a defect") == (main == "fail")
        assert "replaced" not in program.output


def test_later_worker_that_cannot_start_is_tried_again():
    """What stops one worker from starting does not end those that serve."""
    with run_mains("end_second", ready=False) as program:
        program.wait_for_output(r"ended with status 1: no more memory; it is replaced in 0.2 s")
        assert pids(program, 1)[0] in children(program.pid)
        assert program.wait(signal.SIGTERM) == 0
        assert "worker 1 has drained" in program.output


def test_worker_that_cannot_be_forked_is_tried_again():
    """The others serve meanwhile."""
    with run_mains("serve_once_forked", ready=False) as program:
        program.wait_for_output(
            r"worker 2 cannot be forked: Resource temporarily unavailable; it is replaced in 0.2 s$"
        )
        assert program.wait(signal.SIGTERM) == 0
        assert "worker 1 has drained" in program.output


def test_inherited_processes_are_reaped():
    """As process 1 of a container the parent gets all orphans; none stays a zombie."""
    with run_mains("orphan", count=1) as program:
        orphan = int(program.wait_for_output(r"orphan (\d+)")[1])
        wait_until(lambda: not Path(f"/proc/{orphan}").exists(), "the orphan's end")
        assert children(program.pid) == pids(program, 1)
        assert program.wait(signal.SIGTERM) == 0


@pytest.mark.parametrize(
    ("engine", "reason"),
    [("memory:", "each process would have logs of its own"), ("sqlite:x.db", "one process owns the file")],
)
def test_workers_need_an_engine_that_they_can_share(engine, reason):
    """The message says why, and what to do."""
    with pytest.raises(ConfigError, match=rf"2 workers need a Redis \(--engine redis://.*{reason}"):
        run(Settings(workers=2, engine=engine))


def test_program_is_one_process():
    """``serve`` does not ignore the setting."""
    with pytest.raises(ConfigError, match="workers = 2: a program is one process"):
        sseserve.serve(workers=2)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_workers_listen_on_one_port(host):
    """Each connection goes to one of them; another server cannot use the port, even one with workers."""
    reserved = open_sockets_blocking(Settings(host=host, port=0))
    port = reserved.port
    workers = [reserved.listen_beside() for _ in range(2)]
    assert {listener.getsockname()[1] for listeners in workers for listener in listeners} == {port}
    with pytest.raises(OSError, match="in use"):
        open_sockets_blocking(Settings(host=host, port=port))
    clients = [socket.create_connection((host, port), 5) for _ in range(64)]
    accepted = [0, 0]
    for worker, listeners in enumerate(workers):
        for listener in listeners:
            listener.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    listener.accept()[0].close()
                    accepted[worker] += 1
            listener.close()
    assert sum(accepted) == 64
    assert min(accepted) > 0
    for opened in (*clients, reserved):
        opened.close()


async def test_metrics_name_the_worker(nursery):
    """Each worker has its own; whoever asks gets those of any of them."""
    one, alone = ServerHarness(nursery, worker=2), ServerHarness(nursery)
    samples = [line for line in (await one.get("/metrics")).body.decode().splitlines() if line[0] != "#"]
    assert samples
    assert all('worker="2"' in line for line in samples)
    assert "worker" not in (await alone.get("/metrics")).body.decode()


def connect_to_both(url: str) -> dict[str, httpx.Client]:
    """Return a client for each of two workers, connected to it."""
    clients: dict[str, httpx.Client] = {}
    while len(clients) < 2:
        client = httpx.Client(base_url=url, timeout=10)
        worker = re.search(r'worker="(\d)"', client.get("/metrics").text)[1]
        if clients.setdefault(worker, client) is not client:
            client.close()
    return clients


def test_workers_serve_the_same_sessions(redis):
    """What one has accepted is watched at the other; one that is killed takes nothing with it."""
    command = (sys.executable, "-m", "sseserve", "serve", "--port", "0", "--workers", "2")
    with Program(*command, "--engine", redis.url, SSESERVE_DRAIN="2") as program, ExitStack() as stack:
        url = program.wait_for_output(r"serving at (\S+) with 2 workers$")[1]
        clients = {
            name: stack.enter_context(closing(client)) for name, client in connect_to_both(url).items()
        }
        clients["1"].post("/api/sessions/s/progress", json={"progress": 1}).raise_for_status()
        source = stack.enter_context(
            httpx_sse.connect_sse(clients["2"], "GET", "/api/sessions/s/status/stream")
        )
        events = source.iter_sse()
        assert json.loads(next(events).data)["progress"] == 1
        clients["1"].post("/api/sessions/s/progress", json={"progress": 2}).raise_for_status()
        assert json.loads(next(events).data)["progress"] == 2
        os.kill(children(program.pid)[0], signal.SIGKILL)
        program.wait_for_output(r"worker 1 \(process \d+\) was killed by SIGKILL")
        wait_until(lambda: len(children(program.pid)) == 2, "the replacement")
        httpx.post(f"{url}/api/sessions/s/progress", json={"progress": 3}).raise_for_status()
        assert json.loads(next(events).data)["progress"] == 3
        program.signal(signal.SIGTERM)
        assert list(events) == []
        assert program.wait() == 0, program.output
        assert "worker 2 sseserve.server.drain: stopping" in program.output
        assert program.output.count("serving at") == 1


@pytest.mark.parametrize("url", ["redis://127.0.0.1:1/0", "redis://127.0.0.1:1/0?wrong=1"])
def test_wrong_redis_is_reported_once(url):
    """In one line, with the exit status of a wrong setting."""
    command = (sys.executable, "-m", "sseserve", "serve", "--port", "0", "--workers", "3")
    with Program(*command, "--engine", url) as program:
        assert program.wait() == 2
        assert program.output.count("127.0.0.1:1") == 1
        assert "Traceback" not in program.output


def test_json_log_names_the_worker(capsys, monkeypatch):
    """As the text does; the parent, and a server without workers, are not named."""
    monkeypatch.setattr(logging.root, "handlers", [])
    monkeypatch.setattr(logging.root, "level", logging.INFO)
    configure("info", "json", 2)
    logging.getLogger("a").warning("b")
    configure("info", "json")
    logging.getLogger("a").warning("c")
    worker, other = map(json.loads, capsys.readouterr().err.splitlines())
    assert (worker["worker"], worker["message"]) == (2, "b")
    assert "worker" not in other
