"""What ``watch`` shows on the screen of a terminal, and the words for it."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Iterator

import httpx
import pytest
from processes import Program, run_server
from terminals import Terminal

from sseserve.client import ConnectionLost, ReceivedMessage
from sseserve.client.terminal import Bar
from sseserve.client.text import describe, display_width, render_bar, render_end, render_line, truncate

RUNNING = {
    "state": "running",
    "status": "running",
    "progress": 40.5,
    "stage": "read",
    "message": "page 3",
    "eta": 12,
}
BASE = "http://h:1"


def at(seconds: float) -> str:
    """Return a timestamp as the server sends it, for POSIX seconds below 60."""
    return f"1970-01-01T00:00:{seconds:06.3f}Z"


TIMED = {**RUNNING, "started_at": at(0), "updated_at": at(10)}


# With a real server, in a pseudo-terminal


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with run_server(heartbeat=1, drain=0.2) as url:
        yield url


@pytest.fixture
def session(server: str, request: pytest.FixtureRequest) -> str:
    """Return the URL of a session of the test's own name, with a title."""
    session_id = re.sub(r"\W+", "-", request.node.name)
    body = {"session_id": session_id, "title": "Quarterly report"}
    assert httpx.post(f"{server}/api/sessions", json=body).status_code == 201
    return f"{server}/api/sessions/{session_id}"


def publish(session: str, **progress: object) -> None:
    assert httpx.post(f"{session}/progress", json=progress).status_code == 202


def watch(session: str, *options: str, columns: int = 80) -> Terminal:
    return Terminal(sys.executable, "-m", "sseserve", "watch", session, *options, columns=columns)


ERROR = (
    "Traceback (most recent call last):\n"
    "  ValueError: the file /srv/uploads/2026/11/21/a-very-long-directory-name/recording-0001.wav is not "
    "a WAV file: its first four bytes are 'ID3\\x03', which begin an MP3; convert it and upload it again"
)


def test_failed_session(session):
    """The whole error is on the screen, however long it is, below the bar."""
    publish(session, progress=50, stage="reading", message="12 of 120 files")
    with watch(session) as terminal:
        terminal.wait_for(r"^\[#+-+\] 50% reading  12 of 120 files  elapsed 0:0\d$")
        publish(session, status="failed", error=ERROR)
        assert terminal.wait() == 1
        assert terminal.lines[0] == "Quarterly report"
        assert re.fullmatch(
            r"\[#{9}-{10}\] 50% failed reading  12 of 120 files  elapsed 0:0\d", terminal.lines[1]
        )
        assert "".join(terminal.text.split()).endswith("".join(f"error: {ERROR}".split()))


def test_end_of_a_long_message(session):
    """The last message is shown in full too."""
    message = "finished with " + " ".join(f"part-{number}" for number in range(30))
    with watch(session) as terminal:
        terminal.wait_for("queued")
        publish(session, status="completed", message=message)
        assert terminal.wait() == 0
        assert "".join(message.split()) in "".join(terminal.text.split())


def test_artifacts(session, server):
    """They are listed at the end, with URLs that can be opened."""
    artifacts = [
        {"name": "film.y4m", "type": "video/x-yuv4mpeg", "url": "/files/film.y4m", "size_bytes": 1234567},
        {"name": "log", "path": "/var/log/film.log"},
    ]
    publish(session, status="done", artifacts=artifacts)
    with watch(session) as terminal:
        assert terminal.wait() == 0
        # The terminal wraps the line in the middle.
        assert "".join(terminal.lines) == (
            "Quarterly report[###################] 100% done"
            f"artifact: film.y4m  video/x-yuv4mpeg  1.23 MB  {server}/files/film.y4m"
            "artifact: log  /var/log/film.log"
        )


def test_times_run_between_updates(session):
    """Every second the elapsed time counts up, and the ETA down."""
    publish(session, progress=0)
    with watch(session) as terminal:
        terminal.wait_for(r"0%  elapsed 0:03$")
        publish(session, progress=10)
        elapsed, eta = terminal.wait_for(r"10%  elapsed 0:(\d\d)  ETA 0:(\d\d)$").groups()
        for _ in range(2):
            later = terminal.wait_for(rf"10%  elapsed 0:(\d\d)  ETA 0:(?!{eta})(\d\d)$").groups()
            assert later[0] >= elapsed
            assert later[1] < eta
            elapsed, eta = later
        publish(session, status="cancelled")
        assert terminal.wait() == 4


def test_requested_pause(session):
    """It is on the bar until the worker pauses; a watcher that comes later sees it too."""
    publish(session, progress=40, stage="reading")
    with watch(session) as terminal:
        terminal.wait_for("40% reading")
        httpx.post(f"{session}/pause")
        terminal.wait_for(r"40% pause requested  reading")
        with watch(session) as later:
            later.wait_for(r"40% pause requested  reading")
        publish(session, status="paused")
        terminal.wait_for("40% paused reading")
        httpx.post(f"{session}/cancel")
        terminal.wait_for("40% cancel requested  paused reading")
        assert sum("40%" in line for line in terminal.lines) == 1


def test_other_events_are_above_the_bar(session):
    """In words where they are the server's; the bar stays the last line, and there is one."""
    publish(session, progress=40)
    with watch(session) as terminal:
        terminal.wait_for("40%")
        httpx.post(f"{session}/events", json={"type": "note", "data": "march.csv"})
        httpx.post(f"{session}/events", json={"type": "note", "data": {"row": 7}})
        terminal.wait_for("row")
        assert terminal.lines[:-1] == ["Quarterly report", "note  march.csv", 'note  {"row":7}']
        httpx.delete(session)
        assert terminal.wait() == 4
        assert terminal.lines[-2].startswith("[#######------------] 40%")
        assert terminal.lines[-1] == "the session was deleted"


@pytest.mark.parametrize("columns", [30, 45, 120])
def test_resized_window(session, columns):
    """One bar, as wide as the window; nothing is left of the one before."""
    publish(session, progress=40, stage="reading", message="a message that fills the line " * 5)
    with watch(session) as terminal:
        terminal.wait_for(r"^\[[#-]{19,20}\] 40% reading  a message")
        count = len(terminal.screens)
        terminal.resize(columns)
        bar = rf"^\[[#-]{{{min(20, (columns - 1) // 4)}}}\] 40% re.*\.\.\."
        terminal.wait_for(rf"\AQuarterly report\n{bar}")
        publish(session, progress=50)
        terminal.wait_for(r"50%")
        assert len(terminal.screens) > count
        assert [line[:3] for line in terminal.lines] == ["Qua", "[##"]
        assert all(len(line) < columns for line in terminal.lines)


def test_interrupted_watch(session):
    """Ctrl-C leaves the last bar, on a line of its own, and the status of an interrupted program."""
    publish(session, progress=40)
    with watch(session) as terminal:
        terminal.wait_for("40%")
        terminal.type(b"\x03")
        assert terminal.wait() == 130
        assert len(terminal.lines) == 2
        assert terminal.lines[1].startswith("[#######------------] 40%")


def test_server_is_away():
    """One line counts down to the next attempt; after a restart it says what happened to the log."""
    serve = (sys.executable, "-m", "sseserve", "serve", "--port")
    with Program(*serve, "0", SSESERVE_DRAIN="0.2", SSESERVE_RETRY_MS="1100") as program:
        url = program.wait_for_output(r"serving at (\S+)")[1]
        session = f"{url}/api/sessions/s"
        publish(session, progress=40, stage="reading")
        terminal = watch(session)
        terminal.wait_for("40% reading")
        program.wait(signal.SIGKILL)
    with terminal:
        bar = r"\A\[#{7}-{12}\] 40% "
        terminal.wait_for(bar + "retrying in 2 s: the server closed the connection$")
        # At the next second, which may be that of the attempt.
        terminal.wait_for(bar + "(retrying in 1 s|connecting): the server closed the connection$")
        terminal.wait_for(bar + r".*: Connection refused$")
        assert len(terminal.lines) == 1
        with Program(*serve, url.rpartition(":")[2], SSESERVE_DRAIN="0.2") as program:
            program.wait_for_output(r"serving at (\S+)")
            publish(session, progress=10)
            terminal.wait_for("10%")
            assert terminal.lines[0] == (
                "1 event is missing: the log was restarted, most likely together with the server"
            )
            publish(session, status="done")
            assert terminal.wait() == 0
            assert len(terminal.lines) == 2
            assert all(len(screen.splitlines()) <= 2 for screen in terminal.screens)


@pytest.mark.parametrize(
    ("path", "options"), [("sessions", ["--wait"]), ("interaction/events", [])], ids=["option", "dialect"]
)
def test_waiting_for_a_session(server, path, options):
    """One line says so, until the session is created; in a dialect that waits, without an option too."""
    session_id = "later-" + path.partition("/")[0]
    with watch(f"{server}/api/{path}/{session_id}", *options) as terminal:
        terminal.wait_for(rf"\A(retrying in 1 s|connecting): there is no session '{session_id}'$")
        publish(f"{server}/api/sessions/{session_id}", progress=100, status="done")
        assert terminal.wait() == 0
        assert terminal.lines == ["[###################] 100% done"]


def test_dumb_terminal(session):
    """Without control sequences there is a line for each message."""
    publish(session, progress=40, message="half")
    command = (sys.executable, "-m", "sseserve", "watch", session)
    with Terminal(*command, TERM="dumb") as terminal:
        terminal.wait_for("40% half")
        publish(session, status="done")
        assert terminal.wait() == 0
        assert terminal.lines == [" 40% half", "100% done  half"]


# A bar with a clock of its own


class Bars:
    """A bar in a terminal of 80 columns, and what it has written."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.now = 10.0
        self.columns = 80
        self.bar = Bar(BASE, lambda: self.columns, lambda: self.now)
        self._capsys = capsys

    def show(self, event: str, data: object) -> None:
        self.bar.show(ReceivedMessage("e-1", event, data))

    def written(self) -> str:
        """Return what has been written since the last call, without the control sequences."""
        return re.sub(r"\x1b\[\??[0-9]*[a-zA-Z]|\r", "", self._capsys.readouterr().out)


@pytest.fixture
def bars(capsys: pytest.CaptureFixture[str]) -> Bars:
    return Bars(capsys)


def test_bar_counts_between_updates(bars):
    """The ETA is of the time of the update, and no longer shown once it has passed."""
    bars.show("progress", TIMED)
    expected = {10: "elapsed 0:10  ETA 0:12", 15: "elapsed 0:15  ETA 0:07", 23: "elapsed 0:23"}
    bars.written()
    for now, times in expected.items():
        bars.now = now
        bars.bar.redraw()
        assert bars.written() == f"[#######------------] 40% read  page 3  {times}"


def test_bar_tolerates_another_clock(bars):
    """A client whose clock is behind the server's shows the times as they were at the update."""
    bars.now = 3.0
    bars.show("progress", TIMED)
    assert bars.written().endswith("elapsed 0:10  ETA 0:12")


def test_bar_counts_down_to_the_next_attempt(bars):
    """On the same line; the next message brings the session back."""
    bars.bar.reconnecting(ConnectionLost("Connection refused"), 1.5)
    assert bars.written() == "retrying in 2 s: Connection refused"
    bars.show("progress", TIMED)
    bars.bar.reconnecting(ConnectionLost("Connection refused"), 1.5)
    bars.written()
    bars.now += 0.6
    bars.bar.redraw()
    head = "[#######------------] 40%"
    assert bars.written() == f"{head} retrying in 1 s: Connection refused"
    bars.now += 1
    bars.bar.redraw()
    assert bars.written() == f"{head} connecting: Connection refused"
    bars.show("note", 1)
    assert bars.written() == f"note  1\n{head} read  page 3  elapsed 0:11  ETA 0:10"


def test_bar_at_the_end(bars):
    """The end is drawn once, by ``close``; without a connection it is the last that was known."""
    bars.show("progress", TIMED)
    bars.bar.reconnecting(ConnectionLost("Connection refused"), 1.5)
    bars.written()
    bars.bar.close()
    assert bars.written() == "[#######------------] 40% read  page 3  elapsed 0:10  ETA 0:12\n"
    lost = {"progress": 40, "state": "lost", "status": "lost", "started_at": at(0), "ended_at": at(30)}
    bars.show("error", lost)
    assert bars.written() == ""
    bars.bar.close()
    assert bars.written() == (
        "[#######------------] 40% lost  elapsed 0:30\nerror: the worker has published nothing for too long\n"
    )


# Words


def test_bar_shows_everything_if_it_fits():
    """Bar, percentage, stage, message, ETA; the elapsed time if the line is wide enough."""
    assert render_bar(RUNNING, 80) == "[########------------] 40% read  page 3  ETA 0:12"
    assert render_bar(TIMED, 80) == "[########------------] 40% read  page 3  elapsed 0:10  ETA 0:12"
    assert render_bar(TIMED, 59) == "[#####---------] 40% read  page 3  ETA 0:12"


def test_bar_without_a_percentage():
    """Where no percentage was published there is none to show."""
    data = {"progress": 0, "indeterminate": True, "state": "running", "stage": "read"}
    assert render_bar(data, 40) == "[..........] read"
    assert render_line(data) == "read"
    assert render_line({**data, "stage": None}) == "running"


@pytest.mark.parametrize("width", range(1, 100))
def test_bar_fits_every_width(width):
    """However narrow the terminal is, the line does not wrap."""
    data = {**TIMED, "message": "日本語 e\u0301 \x1b[2J\n" * 9, "eta": 4000}
    for note in ("", "pause requested"):
        line = render_bar(data, width, note=note)
        assert display_width(line) <= width
        assert line.isprintable()
        assert line.startswith("[")


def test_bar_truncates_the_message_and_keeps_the_eta():
    """The text in the middle is shortened first."""
    assert render_bar({**RUNNING, "message": "x" * 99}, 40) == "[####------] 40% read  xxxx...  ETA 0:12"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3600, "1:00:00"), (90061, "25:01:01"), (-5, "0:00")]
)
def test_durations(seconds, text):
    """Hours are shown only if there are any."""
    assert render_line({**RUNNING, "eta": seconds}).endswith(f"ETA {text}")


def test_other_payloads():
    """Missing and unexpected members are not errors."""
    assert render_line({}) == "  0%"
    assert render_line({"progress": None, "error": {"message": "no"}}) == "  0% error: no"
    assert render_bar({"progress": 250, "started_at": 5, "eta": "soon"}, 80) == f"[{'#' * 20}] 250%"
    assert render_end({"progress": 1, "error": {"code": 1}, "artifacts": [3]}, 40, BASE) == [
        "[----------] 1%",
        'error: {"code":1}',
    ]


def test_end_shows_every_member_of_an_error():
    """The message first, its lines kept; control characters are removed."""
    error = {"code": "E7", "message": "line 1\nline 2 \x1b[2J"}
    assert render_end({"progress": 1, "error": error}, 40, BASE)[1:] == [
        "error: line 1",
        "line 2  [2J",
        '{"code":"E7"}',
    ]


def test_end_has_the_sizes_and_addresses_of_artifacts():
    """A relative URL is one of the server's; a path stays as it is."""
    sizes = {0: "0 B", 999: "999 B", 1000: "1 kB", 1234567: "1.23 MB", 999_600_000: "1 GB", 5e12: "5e+03 GB"}
    artifacts = [{"name": "a", "size_bytes": size, "url": "/f"} for size in sizes]
    lines = render_end({"progress": 100, "artifacts": artifacts}, 40, "http://h:1/prefix")[1:]
    assert lines == [f"artifact: a  {text}  http://h:1/f" for text in sizes.values()]


@pytest.mark.parametrize(
    ("event", "data", "text"),
    [
        ("note", {"a": 1}, 'note  {"a":1}'),
        ("note", "text\x1b", "note  text "),
        ("deleted", {}, "the session was deleted"),
        ("control", {"control": "cancel"}, "cancel requested"),
        ("control", {"control": "x"}, 'control  {"control":"x"}'),
        (
            "stalled",
            {"lease": 1.0, "silent": 61.2},
            "stalled: the worker has published nothing for 1:01",
        ),
        ("stalled", None, "stalled  null"),
        ("degraded", {"reason": "the disk is full"}, "the server cannot store new events: the disk is full"),
        ("restored", {}, "the server can store new events again"),
        ("resume", {"status": "ok"}, None),
    ],
)
def test_words_for_messages(event, data, text):
    """Sentences for the server's own messages, the data of all others."""
    assert describe(ReceivedMessage("e-1", event, data)) == text


def test_truncate_keeps_wide_characters_whole():
    """A character of two columns is kept or removed."""
    assert truncate("日本語", 5) == "日本"
    assert truncate("日本語日本語", 8) == "日本..."
    assert truncate("abc", 0) == ""
