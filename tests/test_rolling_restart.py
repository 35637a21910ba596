"""``python -m benchmarks rolling-restart`` with few clients: nothing is lost when instances are replaced."""

from __future__ import annotations

import re
import sys
from collections import Counter

from processes import Program
from programs import require_program

from benchmarks.load.event_sources import EventSource


def test_clients_lose_nothing():
    """Each client is at one of the instances that stop, and comes back to another with its cursor."""
    require_program("nginx")
    require_program("redis-server")
    options = [
        "--clients",
        "60",
        "--instances",
        "2",
        "--sessions",
        "3",
        "--rate",
        "30",
        "--drain",
        "0.5",
        "--pause",
        "0.2",
    ]
    with Program(sys.executable, "-m", "benchmarks", "rolling-restart", *options) as program:
        assert program.wait() == 0, program.output
        for name in ("lost", "doubled", "reordered"):
            assert f"events {name}: 0, clients affected: 0" in program.output
        found = re.search(r"^reconnections: (\d+), resumed ok: (\d+)$", program.output, re.MULTILINE)
        assert found, program.output
        assert int(found[1]) >= int(found[2]) >= 60


def test_client_counts_what_is_lost_doubled_and_reordered():
    """What comes late was not lost, and what comes again counts once."""
    client, told = EventSource("s", 1), Counter()
    numbers = "".join(f'event: tick\ndata: {{"n":{n}}}\nid: a-{n}\n\n' for n in (0, 1, 1, 4, 3, 6))
    resume = 'event: resume\ndata: {"status":"gap","missed":2}\n\n'
    assert client.feed(f"HTTP/1.1 200 OK\r\n\r\n{numbers}{resume}".encode(), told) is None
    assert (client.next, client.missing, client.doubled, client.reordered) == (7, {2, 5}, 1, 1)
    assert told == {"resumed gap": 1}
    assert b"Last-Event-ID: a-6" in client.request()


def test_client_gives_up_at_another_status():
    """As an EventSource does, which never reconnects after 502."""
    status = EventSource("s", 1).feed(b"HTTP/1.1 502 Bad Gateway\r\n\r\n", Counter())
    assert status == "HTTP/1.1 502 Bad Gateway"
