"""No byte of a session reaches a client that may not see it, in any interleaving of what may happen.

Everything that is recorded holds a marker of its session's life. Whatever a client receives is searched for
markers, and each must be of a session that one of the client's tokens allowed to see in that moment: by rules
that are written down here once more, not by those of the server.
"""

from __future__ import annotations

import re
from collections import Counter
from contextlib import suppress
from typing import NamedTuple

import msgspec
import trio
from harness import ServerHarness
from hypothesis import given, settings
from hypothesis import strategies as st
from live_harness import run
from trio.testing import wait_all_tasks_blocked
from watch_clients import Authority, WatchClient, bearer

from sseserve import Action, Grant
from sseserve.errors import SseserveError

LEEWAY = 30.0
MARKER = re.compile(rb"life-(\d+)-")
MARKER_SIZE = 20  # bytes that one has at most
WAYS = (
    "sse",
    "sse over h2",
    "bundle",
    "bundle over h2",
    "list",
    "websocket",
    "websocket over h2",
    "status",
    "history",
)
ONCE = ("/api/sessions/{}/events", "/api/sessions/{}/status", "/api/sessions", "/api/sessions/{}/watchers",
        "/api/jobs/{}", "/api/v1/jobs/{}", "/api/v1/sessions/{}/status")  # fmt: skip
SEEN = Counter[str]()  # over all examples: what was received, and what was refused


class Life(NamedTuple):
    """One session, from its creation to its deletion."""

    session_id: str
    owner: str | None
    viewers: tuple[str, ...]


class Client(NamedTuple):
    """A client, its tokens, and whether it makes a request again and again."""

    watcher: WatchClient
    tokens: list[str]
    opened_at: float
    session_ids: frozenset[str] | None  # None: the list


class World:
    """A server, the sessions there have been, the tokens, and the clients."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.authority = Authority(root=Grant("root", "admin"))
        self.server = ServerHarness(nursery, authenticate=self.authority.authenticate)
        self.nursery = nursery
        self.lives: list[Life] = []
        self.current: dict[str, int] = {}  # the number of the life of each session
        self.count = 0
        self.revoked: set[str] = set()  # tokens
        self.clients: list[Client] = []
        self.searched: dict[WatchClient, int] = {}
        self.moments: list[tuple[float, frozenset[str]]] = []

    @property
    def now(self) -> float:
        return self.server.tracker.clock()

    def allows(
        self, token: str, life: Life, now: float, revoked: frozenset[str], client: Client | None
    ) -> bool:
        """Whether a token allows to see a session, by the rules of the README."""
        grant = self.authority.tokens[token]
        if token in revoked:
            return False
        if (end := grant.expires_at) is not None:
            # Who comes late is let in for half a minute more; a stream that is open ends in time.
            is_open = client is not None and client.watcher.transport not in ("status", "history")
            if now > (end if is_open and client.opened_at < end else end + LEEWAY):
                return False
        if grant.role == "admin":
            return True
        if any(pattern in ("*", life.session_id) for pattern in grant.capabilities.get(Action.WATCH, ())):
            return True
        if grant.role is None:
            return False
        is_assigned = grant.role == "therapist" and life.owner in grant.patients
        return life.owner == grant.subject or grant.subject in life.viewers or is_assigned

    def note(self) -> None:
        """Remember this moment: what is received until the next search may have been sent in it."""
        self.moments.append((self.now, frozenset(self.revoked)))

    def search(self, data: bytes, tokens: list[str], client: Client | None, done: int = 0) -> None:
        """Search for markers, but for those that end in the first ``done`` bytes."""
        found = MARKER.finditer(data, max(0, done - MARKER_SIZE))
        for number in {int(match[1]) for match in found if match.end() > done}:
            life = self.lives[number]
            assert any(
                self.allows(token, life, now, revoked, client)
                for token in tokens
                for now, revoked in self.moments
            ), (life, tokens, client, data)
            if client is not None and client.session_ids is not None:
                assert life.session_id in client.session_ids
            SEEN["received"] += 1

    async def settle(self) -> None:
        await wait_all_tasks_blocked()
        self.note()
        for client in self.clients:
            done = self.searched.get(client.watcher, 0)
            self.searched[client.watcher] = len(client.watcher.raw)
            self.search(client.watcher.raw, client.tokens, client, done)
        self.moments = self.moments[-1:]

    # What happens

    async def create(self, session_id, owner, viewers):
        life = len(self.lives)
        self.lives.append(Life(session_id, owner, viewers))
        with suppress(SseserveError):
            await self.server.tracker.create(
                session_id, owner=owner, viewers=list(viewers), title=f"life-{life}-title"
            )
            self.current[session_id] = life
            await self.publish(session_id, "progress")

    async def publish(self, session_id, kind):
        if (life := self.current.get(session_id)) is None:
            return
        self.count += 1
        text = f"life-{life}-{self.count}"
        with suppress(SseserveError):
            if kind == "event":
                await self.server.tracker.emit(session_id, "note", {"text": text})
            elif kind == "end":
                await self.server.tracker.update(session_id, status="processed", message=text)
            else:
                await self.server.tracker.update(session_id, message=text, data={"text": text})

    async def delete(self, session_id):
        if self.current.pop(session_id, None) is not None:
            await self.server.tracker.delete(session_id)

    async def issue(self, grant, seconds):
        expires_at = None if seconds is None else self.now + seconds
        name = f"token-{len(self.authority.tokens)}"
        self.authority.tokens[name] = msgspec.structs.replace(
            grant, token_id=name, issued_at=self.now, expires_at=expires_at
        )

    def token(self, number):
        return list(self.authority.tokens)[number % len(self.authority.tokens)]

    async def open(self, way, session_ids, number, by_ticket):
        token, ticket = self.token(number), None
        path, watched = None, frozenset(session_ids[:1])
        if way.startswith("bundle"):
            path = "/api/streams?" + "&".join(f"session={session_id}" for session_id in session_ids)
            watched = frozenset(session_ids)
        if by_ticket and way not in ("status", "history"):
            body = {"list": True} if way == "list" else {"sessions": session_ids}
            response = await self.server.post("/api/tickets", body, bearer(token))
            if response.status != 201:
                SEEN["refused"] += 1
                return
            ticket = response.json["ticket"]
        watcher = WatchClient(
            self.server, way, session_ids[0], token=None if ticket else token, ticket=ticket, path=path
        )
        self.clients.append(Client(watcher, [token], self.now, None if way == "list" else watched))
        self.nursery.start_soon(watcher.run)

    async def get(self, path, session_id, number):
        token = self.token(number)
        response = await self.server.get(path.format(session_id), bearer(token))
        self.note()
        self.search(str(response.headers).encode() + response.body, [token], None)
        SEEN["refused"] += response.status in (401, 403)

    async def refresh(self, number):
        token = self.token(number)
        user = self.authority.tokens[token].user
        for client in self.clients:
            if self.authority.tokens[client.tokens[0]].user == user:
                client.tokens.append(token)
        await self.server.post("/api/tokens/refresh", headers=bearer(token))

    async def revoke(self, number, by_subject):
        token = self.token(number)
        grant = self.authority.tokens[token]
        if grant.role == "admin":
            return
        body = {"subject": grant.subject} if by_subject else {"token_id": token}
        response = await self.server.post("/api/revocations", body, bearer("root"))
        assert response.status == 204
        self.revoked |= {
            name
            for name, other in self.authority.tokens.items()
            if name == token or (by_subject and other.subject == grant.subject and other.role != "admin")
        }

    async def wait(self, seconds):
        await self.settle()
        await trio.sleep(seconds)

    async def leave(self, number):
        if self.clients:
            self.clients[number % len(self.clients)].watcher.leave()


IDS = st.sampled_from(["s-1", "s-2", "s-3"])
USERS = st.sampled_from(["ann", "bob", "lee"])
NUMBERS = st.integers(1, 8)
GRANTS = st.one_of(
    st.builds(Grant, USERS, st.just("patient")),
    st.builds(Grant, USERS, st.just("therapist"), st.frozensets(USERS, max_size=2)),
    st.builds(Grant, USERS, st.none(), capabilities=st.builds(lambda name: {Action.WATCH: (name,)}, IDS)),
    st.builds(Grant, USERS),
)
CREATE = st.tuples(
    st.just("create"), IDS, st.one_of(st.none(), USERS), st.lists(USERS, max_size=1).map(tuple)
)
ISSUE = st.tuples(st.just("issue"), GRANTS, st.sampled_from([None, 20, 50, 500]))
OPEN = st.tuples(
    st.just("open"),
    st.sampled_from(WAYS),
    st.lists(IDS, min_size=1, max_size=2, unique=True),
    NUMBERS,
    st.booleans(),
)
STEPS = st.lists(
    st.tuples(
        st.one_of(
            CREATE,
            OPEN,
            OPEN,
            ISSUE,
            st.tuples(st.just("publish"), IDS, st.sampled_from(["event", "progress", "progress", "end"])),
            st.tuples(st.just("publish"), IDS, st.sampled_from(["event", "progress"])),
            st.tuples(st.just("delete"), IDS),
            st.tuples(st.just("get"), st.sampled_from(ONCE), IDS, NUMBERS),
            st.tuples(st.just("refresh"), NUMBERS),
            st.tuples(st.just("revoke"), NUMBERS, st.booleans()),
            st.tuples(st.just("wait"), st.sampled_from([0.5, 15, 40])),
            st.tuples(st.just("leave"), NUMBERS),
        ),
        st.booleans(),
    ),
    min_size=10,
    max_size=40,
)  # fmt: skip


SESSIONS = [("create", "s-1", "ann", ()), ("create", "s-2", "bob", ("ann",)), ("create", "s-3", None, ())]
HOLDERS = [
    Grant("ann", "patient"),
    Grant("bob", "patient"),
    Grant("lee", "therapist", frozenset({"ann"})),
    Grant("eve", capabilities={Action.WATCH: ("s-3",)}),
]
WATCHED = ("s-1", "s-2", "s-1", "s-3")  # by each of them
SECONDS = st.lists(st.sampled_from([None, 20, 50, 500]), min_size=len(HOLDERS), max_size=len(HOLDERS))


async def play(seconds, ways, steps):
    async with trio.open_nursery() as nursery:
        world = World(nursery)
        world.note()
        for _, *values in SESSIONS:
            await world.create(*values)
        for grant, lifetime in zip(HOLDERS, seconds, strict=True):
            await world.issue(grant, lifetime)
        for number, (session_id, way) in enumerate(zip(WATCHED, ways, strict=True), 1):
            await world.open(way, [session_id], number, False)
        for (kind, *values), settles in steps:
            await getattr(world, kind)(*values)
            if settles:
                await world.settle()
            else:
                world.note()
        await world.settle()
        nursery.cancel_scope.cancel()


@settings(max_examples=100)
@given(SECONDS, st.lists(st.sampled_from(WAYS), min_size=4, max_size=4), STEPS)
def _check_examples(seconds, ways, steps):
    run(play, seconds, ways, steps)


def test_no_byte_of_a_session_reaches_who_may_not_see_it():
    """And many examples are about something: sessions are seen, and requests refused."""
    SEEN.clear()
    _check_examples()
    assert SEEN["received"] > 200
    assert SEEN["refused"] > 10
