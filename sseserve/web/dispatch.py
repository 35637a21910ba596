"""From a request to a response: one path for every HTTP version.

Rights, the handler, errors in their one shape, CORS and the request's id, in that order. Streams and
WebSockets take their connection over elsewhere; here they only answer HEAD requests and bad handshakes.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from functools import partial

import msgspec
import trio

from ..errors import (
    BadRequest,
    ConfigError,
    InvalidToken,
    MethodNotAllowed,
    NotFound,
    SseserveError,
    UnknownMethod,
    UpgradeRequired,
)
from ..http.admission import Admission, validate_handshake
from ..http.auth import Action
from ..http.messages import (
    STREAM_HEADERS,
    ClientDisconnected,
    Headers,
    Request,
    Response,
    cors_headers,
    error_response,
    finish_response,
    log_response,
)
from ..http.open_streams import Poll
from ..http.origins import check_host
from ..http.publishing import Publishing
from ..http.routing import Kind, Match, Routes
from ..logs import note_user
from ..metrics import Counters
from ..tracing import Tracing
from .turns import Turn, Turns

__all__ = ["Dispatcher", "Handler"]

# Those that are known, with or without a route (RFC 9110, section 9.1).
_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "QUERY", "TRACE"})

Handler = Callable[[Request, Match], Awaitable[Response]]

_ALLOWED_HEADERS = (
    "Authorization, Content-Type, Idempotency-Key, If-None-Match, Last-Event-ID, "
    "Traceparent, Tracestate, X-Correlation-ID, X-Request-ID"
)


# What a request that waits is for.
_POLLS = (Action.WATCH, Action.DIAGNOSE)


class Dispatcher:
    """Serves every request that is not a stream.

    Args:
        routes: the table.
        handlers: by the names that the table has for them.
        publishing: serves the routes that publish.
        admission: decides who may do what.
        counters: count what is refused because of a limit.
        cors_origins: the origins whose pages may read.
    """

    def __init__(
        self,
        routes: Routes,
        handlers: Mapping[str, Handler],
        *,
        publishing: Publishing,
        admission: Admission,
        counters: Counters,
        cors_origins: tuple[str, ...] = (),
    ) -> None:
        self.routes = routes
        self.tracing: Tracing | None = None
        self._admission = admission
        self._counters = counters
        self._turns = Turns(admission.limited)
        self.cors_origins = cors_origins
        self._methods = _METHODS.union(route.method for route in routes)
        self._handlers: dict[str, Handler] = {}
        for route in routes:
            if route.kind is Kind.REQUEST:
                if (name := route.handler or route.name) not in handlers:
                    raise ConfigError(f"route {route.name!r}: there is no handler {name!r}")
                self._handlers[route.name] = handlers[name]
            elif route.kind is Kind.PUBLISH:
                self._handlers[route.name] = publishing.handle
            else:
                self._handlers[route.name] = self._respond_without_watching

    def match(self, request: Request) -> Match | None:
        """Find the route of a request; a HEAD request has that of GET."""
        return self.routes.match("GET" if request.method == "HEAD" else request.method, request.raw_path)

    async def respond(self, request: Request, match: Match | None) -> Response:
        """Serve a request to the end; never raises because of it.

        Raises:
            ClientDisconnected: there is nobody to respond to.
        """
        handle = self._handle if self.tracing is None else self._handle_traced
        try:
            response = await handle(request, match)
        except SseserveError as error:
            response = error_response(error, request)
            if isinstance(error, MethodNotAllowed):
                response = _with_headers(response, (("Allow", self._allow(request)),))
        except ClientDisconnected:
            raise
        except Exception as error:  # noqa: BLE001 - the boundary of a request: logged there, with its id
            response = error_response(error, request)
        return self.finish(request, response)

    async def respond_in_turn(self, request: Request, match: Match | None, turn: Turn) -> Response:
        """Do the same; a large response waits until few others of its client's address are being sent.

        ``turn`` must be ended when the response has been sent, or cannot be.
        """
        response = await self.respond(request, match)
        if (slots := self._turns.slots(request, response)) is None:
            return response
        try:
            slots.acquire_nowait()
        except trio.WouldBlock:
            del response  # it would be what takes the memory; a GET may be served again
            await slots.acquire()
            turn.begin(slots)
            return await self.respond(request, match)
        turn.begin(slots)
        return response

    def finish(self, request: Request, response: Response) -> Response:
        """Log and count a response, and add the headers that every response has."""
        responses = self._counters.responses
        responses[response.status] = responses.get(response.status, 0) + 1
        if response.limit is not None:
            self._counters.count_refusal(response.limit)
        log_response(request, response.status, response.reason, response.body)
        return finish_response(request, response, self.cors_origins)

    async def _handle(self, request: Request, match: Match | None) -> Response:
        if match is None:
            return self._respond_unmatched(request)
        if match.route.kind is Kind.REQUEST or match.route.kind is Kind.PUBLISH:
            grant = await self._admission.authorize(request, match)
            if grant is not None:
                note_user(grant.subject)
                check = partial(self._admission.check, grant)
                request = msgspec.structs.replace(request, grant=grant, check_grant=check)
            # A worker that waits for a job opens its own: a claim that is being stored must not be cancelled.
            if match.route.may_wait and "wait" in request.query and match.route.action in _POLLS:
                return await self._respond_later(request, match)
        return await self._handlers[match.route.name](request, match)

    async def _handle_traced(self, request: Request, match: Match | None) -> Response:
        assert self.tracing is not None
        route = None if match is None else match.route.path
        with self.tracing.request(
            request.method, route, request.path, request.http_version, request.peer, request.trace
        ) as span:
            try:
                response = await self._handle(request, match)
            except ClientDisconnected:
                raise  # there is no response; so it is if the client of a long-poll leaves
            except Exception as error:
                self.tracing.note_status(span, error.status if isinstance(error, SseserveError) else 500)
                raise
            self.tracing.note_status(span, response.status)
        return response

    async def _respond_later(self, request: Request, match: Match) -> Response:
        """Respond to a long-poll: it is counted as a stream is, and ends with its token."""
        scope = trio.CancelScope()
        poll = Poll(scope.cancel)
        with await self._admission.open_poll(request, match) as stream:
            stream.attach(poll)
            with scope:
                poll.check()
                return await self._handlers[match.route.name](request, match)
        raise InvalidToken(poll.reason)

    def _respond_unmatched(self, request: Request) -> Response:
        check_host(request)
        if request.method not in self._methods:
            raise UnknownMethod("the request's method is known for nothing here")
        if request.raw_path == "*" and request.method == "OPTIONS":
            return Response(200, headers=(("Allow", _allow({route.method for route in self.routes})),))
        if request.raw_path[:1] != "/":
            raise BadRequest("the request's target must be a path, or a URL with http or https")
        if not self.routes.methods(request.raw_path):
            raise NotFound(f"there is nothing at {request.path}")
        if request.method != "OPTIONS":
            raise MethodNotAllowed(
                f"{request.path} does not support {request.method}; it supports {self._allow(request)}"
            )
        headers: Headers = (("Allow", self._allow(request)),)
        if any(name == "Access-Control-Allow-Origin" for name, _ in cors_headers(self.cors_origins, request)):
            # A preflight (Fetch Standard, section 3.2.3).
            headers += (
                ("Access-Control-Allow-Methods", ", ".join(self.routes.methods(request.raw_path))),
                ("Access-Control-Allow-Headers", _ALLOWED_HEADERS),
                ("Access-Control-Max-Age", "600"),
            )
        return Response(200, headers=headers)

    def _allow(self, request: Request) -> str:
        return _allow(self.routes.methods(request.raw_path))

    async def _respond_without_watching(self, request: Request, match: Match) -> Response:
        """Respond to a HEAD of a stream, and to a request for a WebSocket that is not a valid handshake."""
        watch = await self._admission.check_watch_request(request, match)
        if match.route.kind is Kind.SOCKET:
            error = UpgradeRequired("this path is a WebSocket")
            return validate_handshake(request) or error_response(error, request)
        if watch.is_complete:
            return Response(204)
        with await self._admission.open_stream(watch):
            return Response(200, None, STREAM_HEADERS)


def _allow(methods: Collection[str]) -> str:
    return ", ".join(sorted({*methods, "OPTIONS", *(("HEAD",) if "GET" in methods else ())}))


def _with_headers(response: Response, headers: Headers) -> Response:
    return msgspec.structs.replace(response, headers=(*response.headers, *headers))
