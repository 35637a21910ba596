"""Builds the app from the table of routes: ids, errors in their one shape, CORS, bounded sends."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import trio
from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, ASGISendEvent
from quart import Response, g, request, websocket
from quart.wrappers import Response as QuartResponse
from quart_trio import QuartTrio
from quart_trio.asgi import TrioASGIHTTPConnection
from quart_trio.wrappers import TrioRequest
from quart_trio.wrappers.request import TrioBody
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter

from ..context import Context
from ..errors import BadRequest, MethodNotAllowed, NotFound, SseserveError
from ..http.admission import authorize
from ..http.messages import Answer, Request, cors, error_answer, log_answer
from ..http.routes import ROUTES, Kind, Match, Route, methods
from . import jobs, operations, pages, sessions, watch

__all__ = ["Web", "create_app"]

Handler = Callable[[Context, Match, Request], Awaitable[Answer | QuartResponse]]

_HANDLERS: dict[str, Handler] = {
    **sessions.HANDLERS,
    **jobs.HANDLERS,
    **watch.HANDLERS,
    **pages.HANDLERS,
    **operations.HANDLERS,
}


MAX_UNREAD = 64 * 1024  # bytes of a body that wait for their handler


class _Body(TrioBody):
    """A request's body, of which no more is kept than one message beyond ``MAX_UNREAD``.

    ``room`` waits for the handler to read what there is. What nobody is going to read is not kept at all.
    """

    def __init__(self, *lengths: int | None) -> None:
        super().__init__(*lengths)
        self._dropped = False
        self._taken = trio.Event()

    async def __anext__(self) -> bytes:
        data = await super().__anext__()
        self._taken.set()
        return data

    def append(self, data: bytes) -> None:
        if not self._dropped:
            super().append(data)

    async def room(self) -> None:
        while len(self._data) >= MAX_UNREAD:
            self._taken = trio.Event()
            await self._taken.wait()

    def drop(self) -> None:
        """Nobody reads it, or reads on."""
        self._dropped = True
        self.clear()
        self._taken.set()


class _Request(TrioRequest):
    body_class: type[_Body] = _Body
    body: _Body


class _Connection(TrioASGIHTTPConnection):
    """One request. See ``server/hypercorn.py`` for the last message; all of them are bounded.

    Its body comes at the pace of its handler. Only while that is behind is it not noticed that the client
    leaves: of what is not read nobody knows what comes behind it. So the bodies of methods that have none
    are read and dropped, and so is the rest of one that was answered early.

    ``request.held`` is what it holds until its response is over, however it ends.
    """

    _body: _Body

    async def handle_messages(  # type: ignore[override]  # as the class above does
        self, nursery: trio.Nursery, request: _Request, receive: ASGIReceiveCallable
    ) -> None:
        while True:
            message = await receive()
            if message["type"] == "http.request":
                request.body.append(message.get("body", b""))
                if not message.get("more_body", False):
                    request.body.set_complete()
                await request.body.room()
            elif message["type"] == "http.disconnect":
                break
        nursery.cancel_scope.cancel()

    async def handle_request(  # type: ignore[override]  # as the class above does
        self, nursery: trio.Nursery, request: _Request, send: ASGISendCallable
    ) -> None:
        self._body = request.body
        if request.method != "POST":
            self._body.drop()
        with contextlib.ExitStack() as held:
            request.held = held  # type: ignore[attr-defined]
            await super().handle_request(nursery, request, send)

    async def _send_response(self, send: ASGISendCallable, response: Any) -> None:
        timeout = self.app.config["SEND_TIMEOUT"]

        async def bounded(message: ASGISendEvent) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            with trio.fail_after(timeout, shield=last):
                await send(message)

        self._body.drop()
        try:
            await super()._send_response(bounded, response)
        except trio.TooSlowError:
            # A reader that takes nothing has nothing to be told. Hypercorn's end of a response waits until
            # all that came before it is received, which nobody does when we are gone.
            with trio.move_on_after(timeout, shield=True):
                await send(None)  # type: ignore[arg-type]


class Web(QuartTrio):
    """The app of one server."""

    asgi_http_class = _Connection
    request_class = _Request


class _Segment(BaseConverter):
    """Any one path segment; what may be in it is the handler's to say."""

    regex = "[^/]+"


def create_app(context: Context) -> Web:
    """Register every route of the table."""
    app = Web(__name__, static_folder=None)
    app.config.update(
        SEND_TIMEOUT=context.settings.send_timeout,
        RESPONSE_TIMEOUT=None,  # long-polls and streams end by themselves
        BODY_TIMEOUT=None,  # ours are bounded by read_body's callers
        MAX_CONTENT_LENGTH=None,  # and so is their size
    )
    app.url_map.converters["segment"] = _Segment
    app.url_map.strict_slashes = True
    for route in ROUTES:
        path = route.path.replace("{", "<segment:").replace("}", ">")
        view = _view(context, route)
        app.add_url_rule(path, f"{route.method} {route.path}", view, methods=[route.method])
        if route.kind is Kind.SOCKET:
            app.add_websocket(path, f"WS {route.path}", _socket(context, route))
    app.add_url_rule("/static/<segment:name>", "static", _view(context, pages.STATIC), methods=["GET"])

    @app.before_request
    async def identify() -> None:
        g.request = _request()

    @app.after_request
    async def finish(response: QuartResponse) -> QuartResponse:
        asked: Request = g.request
        log_answer(asked, response.status_code)
        response.headers["X-Request-ID"] = asked.id
        for name, value in cors(context.settings.cors_origins, asked):
            response.headers[name] = value
        if asked.method == "OPTIONS" and "Access-Control-Allow-Origin" in response.headers:
            response.headers["Access-Control-Allow-Methods"] = ", ".join(methods(request.path))
            response.headers["Access-Control-Allow-Headers"] = (
                "Authorization, Content-Type, Idempotency-Key, If-None-Match, Last-Event-ID, "
                "X-Correlation-ID, X-Request-ID"
            )
            response.headers["Access-Control-Max-Age"] = "600"
        return response

    @app.errorhandler(HTTPException)
    async def refuse(error: HTTPException) -> QuartResponse:
        asked = _request()
        ours: SseserveError = BadRequest(error.description or error.name)
        if error.code == 404:
            ours = NotFound(f"nothing lives at {asked.path}")
        elif error.code == 405:
            ours = MethodNotAllowed(f"{asked.path} does not answer to {asked.method}")
        response = _response(error_answer(ours, asked))
        if error.code == 405:
            response.headers["Allow"] = ", ".join(methods(request.path))
        return response

    return app


def _request() -> Request:
    connection = request or websocket
    if (known := getattr(g, "request", None)) is not None:
        return known  # type: ignore[no-any-return]  # g is Any
    headers = ((n.encode("latin-1"), v.encode("latin-1")) for n, v in connection.headers)
    return Request.make(
        connection.method if request else "GET",
        connection.path,
        connection.query_string.decode("latin-1"),
        headers,
    )


def _response(answer: Answer) -> QuartResponse:
    response = Response(answer.body, answer.status)
    response.headers.pop("Content-Type", None)
    for name, value in answer.headers:
        response.headers[name] = value
    if answer.status in (204, 304):
        response.headers.pop("Content-Length", None)
    return response


def _view(context: Context, route: Route) -> Callable[..., Awaitable[QuartResponse]]:
    handler = _HANDLERS[route.name]

    async def view(**params: str) -> QuartResponse:
        asked: Request = g.request
        try:
            match = Match(route, params)
            if route.kind is not Kind.STREAM and route.kind is not Kind.SOCKET:  # these ask for themselves
                g.grant = await authorize(context, asked, match)
            answer = await handler(context, match, asked)
        except Exception as error:  # noqa: BLE001 - the boundary of a request: logged there, with its id
            answer = error_answer(error, asked)
        return _response(answer) if isinstance(answer, Answer) else answer

    return view


def _socket(context: Context, route: Route) -> Callable[..., Awaitable[QuartResponse | None]]:
    async def view(**params: str) -> QuartResponse | None:
        answer = await watch.socket(context, Match(route, params), _request())
        return None if answer is None else _response(answer)

    return view
