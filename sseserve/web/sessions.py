"""Sessions in any dialect: create, list, describe, history, control, delete."""

from __future__ import annotations

from collections import Counter
from operator import attrgetter
from typing import Any
from urllib.parse import urlencode

import msgspec
import trio

from ..concurrency import select, visit
from ..dialects import text_message
from ..dialects.base import encode_json
from ..engines.coordination import Coordination
from ..errors import Invalid, SessionNotFound
from ..http.auth import Action, Policy
from ..http.messages import Headers, Request, Response, json_response, matches_tag, read_body
from ..http.routing import Match, number_parameter
from ..http.schemas import HistoryPage, Watchers
from ..jsontext import decode
from ..live.broker import Broker
from ..live.resume import read_history
from ..model import Control, Session, State
from ..progress.queue import JobQueue
from ..progress.tracker import Tracker
from .dispatch import Handler

__all__ = ["SessionHandlers", "created_response"]

LIST_BYTES = 2**20  # of a page of a list
LIST_ITEM = 512  # bytes of its members whose size does not vary much
SPARE = 1000  # sessions that are sorted although they do not fit a page: some clocks may have been ahead


class SessionHandlers:
    """The handlers of sessions.

    Args:
        tracker: has the sessions.
        broker: knows who watches them, and when something is published.
        queue: counts the jobs that wait.
        coordination: knows who watches on all instances.
        policy: says who may do what.
        max_body: limit of a request's body, in bytes.
        buffer_bytes: about how much history one response holds, as that is what waits for a client.
        stopping: is set when the server begins to stop; nothing waits from then on.
    """

    def __init__(
        self,
        tracker: Tracker,
        broker: Broker,
        queue: JobQueue,
        coordination: Coordination,
        policy: Policy,
        *,
        max_body: int,
        buffer_bytes: int,
        stopping: trio.Event,
    ) -> None:
        self._tracker = tracker
        self._broker = broker
        self._queue = queue
        self._coordination = coordination
        self._policy = policy
        self._max_body = max_body
        self._buffer_bytes = buffer_bytes
        self._stopping = stopping

    def handlers(self) -> dict[str, Handler]:
        """The handlers by the names that the table of routes has for them."""
        return {
            "create": self.create,
            "list": self.list_sessions,
            "describe": self.describe,
            "status": self.status,
            "history": self.history,
            "cancel": self.cancel,
            "pause": self.pause,
            "resume": self.resume,
            "delete": self.delete,
            "watchers": self.watchers,
        }

    async def create(self, request: Request, match: Match) -> Response:
        body = await self._read_optional_body(request, match)
        owner = self._policy.creation_owner(request.grant, Action.CREATE, body.session_id, body.owner)
        session = await self._tracker.create(
            **{**msgspec.structs.asdict(body), "owner": owner}, trace=request.trace
        )
        return created_response(201, match, session)

    async def _read_optional_body(self, request: Request, match: Match) -> Any:
        """Read a body of the route's type; without one, all its members have their defaults."""
        assert match.route.body is not None
        body = await read_body(request, self._max_body)
        return decode(body, match.route.body) if body.strip() else match.route.body()

    async def list_sessions(self, request: Request, match: Match) -> Response:
        """List the sessions that the query asks for and the grant may watch, the newest first.

        A page ends after about ``LIST_BYTES``; the header ``Link`` (RFC 8288) has the address of the next.
        ``X-Total-Count`` is how many sessions there are on all pages.
        """
        query = request.query
        state = query.get("state")
        try:
            wanted = None if state is None else State(state)
        except ValueError:
            raise Invalid(f"there is no state {state!r}; the states are {', '.join(State)}") from None
        limit = int(number_parameter(query, match, "limit", 100))
        visible, after = self._policy.visible_to(request.grant), query.get("after")
        if wanted is None and visible is None and after is None:
            # What pages ask for again and again, of however many sessions.
            engine = self._tracker.engine
            sessions, total = await engine.sessions(limit + SPARE), await engine.count()
        else:
            sessions = await self._tracker.sessions(wanted)
            if visible is not None:
                sessions = await select(sessions, visible)
            total = len(sessions)
            if after is not None:
                place = _parse_place(after)
                sessions = await select(sessions, lambda session: _newest(session) < place)
            sessions = sessions[: limit + SPARE]
        sessions.sort(key=_newest, reverse=True)
        page = _take_page(sessions, limit)
        dialect, jobs = match.route.dialect, 0
        if dialect.counts_jobs:
            await self._queue.refresh()
            jobs = self._queue.waiting
        headers: Headers = (("X-Total-Count", str(total)),)
        if len(page) < len(sessions) and page:
            last = page[-1]
            known = {parameter.name for parameter in match.route.query}
            given = {name: value for name, value in query.items() if name in known}
            following = urlencode({**given, "after": f"{last.created_at!r},{last.id}"})
            headers += (("Link", f'<{match.route.path}?{following}>; rel="next"'),)
        items: list[msgspec.Raw] = []

        def describe(session: Session) -> None:
            items.append(msgspec.Raw(encode_json(dialect.describe_item(dialect, session))))

        await visit(page, describe)
        return json_response(200, dialect.describe_list(items, jobs), headers)

    async def describe(self, request: Request, match: Match) -> Response:
        session = await self._get(request, match)
        return json_response(200, await self._describe(match, session))

    async def _get(self, request: Request, match: Match) -> Session:
        """Return a session, if it is still one that the grant may watch."""
        session_id = match.params["id"]
        session = await self._tracker.find(session_id)
        if (check := self._policy.check(request.grant, Action.WATCH, session_id)) is not None:
            check(session)
        if session is None:
            raise SessionNotFound(f"there is no session {session_id!r}")
        return session

    async def _describe(self, match: Match, session: Session) -> Any:
        dialect = match.route.dialect
        total = 0
        if dialect.counts_watchers:
            watchers = await self._coordination.watchers(session.id)
            total = sum(count for counts in watchers.values() for count in counts.values())
        return dialect.describe(dialect, session, total)

    async def watchers(self, request: Request, match: Match) -> Response:
        """Count who watches a session, on all instances."""
        session = await self._get(request, match)
        protocols, dialects, instances = Counter[str](), Counter[str](), Counter[str]()
        for instance, counts in (await self._coordination.watchers(session.id)).items():
            for (protocol, dialect), count in counts.items():
                protocols[protocol] += count
                dialects[dialect] += count
                instances[instance] += count
        return json_response(200, Watchers(session.id, instances.total(), protocols, dialects, instances))

    async def status(self, request: Request, match: Match) -> Response:
        """The snapshot; with ``wait``, one that is newer than ``If-None-Match`` (or than now)."""
        session_id = match.params["id"]
        known = request.headers.get("if-none-match")
        wait = number_parameter(request.query, match, "wait", 0)
        session = await self._get(request, match)
        seen = known if known is not None else _etag(session) if wait else None
        deadline = trio.current_time() + wait
        while seen is not None and _matches(seen, session):
            with self._broker.wakeup(session_id) as wakeup:
                await self._tracker.engine.wait_followed(session_id)
                session = await self._get(request, match)
                if session.ended or self._stopping.is_set() or not _matches(seen, session):
                    break
                with trio.move_on_at(deadline) as scope:
                    await wakeup.wait()
            if scope.cancelled_caught:
                break
            session = await self._get(request, match)
        headers = (("ETag", _etag(session)),)
        if known is not None and _matches(known, session):
            return Response(304, headers=headers)
        return json_response(200, await self._describe(match, session), headers)

    async def history(self, request: Request, match: Match) -> Response:
        query = request.query
        limit = int(number_parameter(query, match, "limit", 1000))
        if limit < 1:
            raise Invalid("limit must be at least 1")
        session_id = match.params["id"]
        try:
            history = await read_history(
                self._tracker.engine,
                self._broker,
                match.route.dialect,
                session_id,
                after=query.get("after") or request.cursor,
                limit=limit,
                max_bytes=self._buffer_bytes,
                wait=number_parameter(query, match, "wait", 0),
                stopping=self._stopping,
                visible=self._policy.visible_to(request.grant),
            )
        except SessionNotFound:
            if (check := self._policy.check(request.grant, Action.WATCH, session_id)) is not None:
                check(None)
            raise
        page = HistoryPage(
            session_id=match.params["id"],
            resume=history.resume,
            events=[text_message(message) for message in history.messages],
            next=history.next,
            end=history.end,
        )
        return json_response(200, page)

    async def cancel(self, request: Request, match: Match) -> Response:
        return await self._control(request, match, Control.CANCEL)

    async def pause(self, request: Request, match: Match) -> Response:
        return await self._control(request, match, Control.PAUSE)

    async def resume(self, request: Request, match: Match) -> Response:
        return await self._control(request, match, Control.CONTINUE)

    async def _control(self, request: Request, match: Match, command: Control) -> Response:
        body = await self._read_optional_body(request, match)
        session_id = match.params["id"]
        check = self._policy.check(request.grant, Action.CONTROL, session_id)
        session = await self._tracker.control(session_id, command, force=body.force, check=check)
        visible = self._policy.visible_to(request.grant)
        if visible is not None and not visible(session):
            return Response(204)  # it may ask, but not see what comes of it
        return json_response(202, await self._describe(match, session))

    async def delete(self, request: Request, match: Match) -> Response:
        session_id = match.params["id"]
        check = self._policy.check(request.grant, Action.DELETE, session_id)
        await self._tracker.delete(session_id, check=check)
        return Response(204)


def created_response(status: int, match: Match, session: Session) -> Response:
    """Respond with a session that was just created, as its dialect describes it."""
    assert match.route.dialect.describe_created is not None
    path, created = match.route.dialect.describe_created(session)
    return json_response(status, created, (("Location", path),))


# The place of a session in a list.
_newest = attrgetter("created_at", "id")


def _parse_place(text: str) -> tuple[float, str]:
    created_at, _, session_id = text.partition(",")
    try:
        return float(created_at), session_id
    except ValueError:
        raise Invalid(f"after must be from the Link header of a list, not {text!r}") from None


def _take_page(sessions: list[Session], limit: int) -> list[Session]:
    """Return the first ``limit`` sessions, and about ``LIST_BYTES`` of them, but always one."""
    size = 0
    for number, session in enumerate(sessions[:limit]):
        size += LIST_ITEM + len(session.title or "") + (session.progress.size if session.progress else 0)
        if size > LIST_BYTES and number:
            return sessions[:number]
    return sessions[:limit]


def _etag(session: Session) -> str:
    return f'"{session.cursor}"'


def _matches(condition: str, session: Session) -> bool:
    return matches_tag(condition, _etag(session))
