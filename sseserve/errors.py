"""All errors of the server, each with its HTTP status and its code for programs.

    SseserveError
     +-- BadRequest            400 bad_request
     +-- Unauthorized          401 unauthorized
     |    +-- InvalidToken     401 invalid_token
     +-- Forbidden             403 forbidden
     +-- NotFound              404 not_found
     |    +-- SessionNotFound  404 session_not_found
     +-- MethodNotAllowed      405 method_not_allowed
     +-- RequestTimeout        408 request_timeout
     +-- Conflict              409 conflict
     |    +-- SessionExists    409 session_exists
     |    +-- SessionEnded     409 session_ended
     +-- PayloadTooLarge       413 payload_too_large
     +-- TargetTooLong         414 target_too_long
     +-- UnsupportedMediaType  415 unsupported_media_type
     +-- ExpectationFailed     417 expectation_failed
     +-- HostNotAllowed        421 host_not_allowed
     +-- Invalid               422 invalid
     |    +-- InvalidProgress  422 invalid_progress
     +-- UpgradeRequired       426 upgrade_required
     +-- TooManyRequests       429 too_many_requests
     |    +-- TooManyConnections 429 too_many_connections
     |    +-- TooManyStreams   429 too_many_streams
     |    +-- TooManySessions  429 too_many_sessions
     +-- HeadTooLarge          431 head_too_large
     +-- UnsupportedCoding     501 unsupported_coding
     +-- UnknownMethod         501 unknown_method
     +-- Unavailable           503 unavailable
     |    +-- EngineUnavailable 503 engine_unavailable
     |    +-- SSEDisabled      503 sse_disabled
     +-- VersionNotSupported   505 version_not_supported
     +-- InsufficientStorage   507 insufficient_storage
     +-- ConfigError           (start-up only)

An error changes nothing: whatever raises one of these has left the log as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

__all__ = [
    "BadRequest",
    "ConfigError",
    "Conflict",
    "EngineUnavailable",
    "ExpectationFailed",
    "Forbidden",
    "HeadTooLarge",
    "HostNotAllowed",
    "InsufficientStorage",
    "Invalid",
    "InvalidProgress",
    "InvalidToken",
    "MethodNotAllowed",
    "NotFound",
    "PayloadTooLarge",
    "RequestTimeout",
    "SSEDisabled",
    "SessionEnded",
    "SessionExists",
    "SessionNotFound",
    "SseserveError",
    "TargetTooLong",
    "TooManyConnections",
    "TooManyRequests",
    "TooManySessions",
    "TooManyStreams",
    "Unauthorized",
    "Unavailable",
    "UnknownMethod",
    "UnsupportedCoding",
    "UnsupportedMediaType",
    "UpgradeRequired",
    "VersionNotSupported",
]


class SseserveError(Exception):
    """Base of all errors that this package raises on purpose."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    # Seconds after which the same request may succeed, for the header Retry-After (RFC 9110, 10.2.3).
    retry_after: int | None = None
    # The setting whose limit is reached.
    limit: str | None = None
    # More members of the error object.
    details: Mapping[str, object] = MappingProxyType({})

    def __init__(self, *args: object, limit: str | None = None, retry_after: int | None = None) -> None:
        super().__init__(*args)
        if limit is not None:
            self.limit = limit
        if retry_after is not None:
            self.retry_after = retry_after


class BadRequest(SseserveError):
    """The request is malformed."""

    status = 400
    code = "bad_request"


class Unauthorized(SseserveError):
    """The request has no valid credentials."""

    status = 401
    code = "unauthorized"


class InvalidToken(Unauthorized):
    """The request has a token that is malformed, not from a trusted issuer, or not valid now."""

    code = "invalid_token"


class Forbidden(SseserveError):
    """The credentials do not allow this."""

    status = 403
    code = "forbidden"


class NotFound(SseserveError):
    """There is nothing at this path."""

    status = 404
    code = "not_found"


class SessionNotFound(NotFound):
    """There is no such session, or none that the caller may see."""

    code = "session_not_found"


class MethodNotAllowed(SseserveError):
    """The path does not support this method."""

    status = 405
    code = "method_not_allowed"


class RequestTimeout(SseserveError):
    """The head of a request did not arrive in time (RFC 9110, section 15.5.9)."""

    status = 408
    code = "request_timeout"


class Conflict(SseserveError):
    """The request is valid, but the session's state does not allow it."""

    status = 409
    code = "conflict"


class SessionExists(Conflict):
    """A session of that id already exists."""

    code = "session_exists"


class SessionEnded(Conflict):
    """The session has its terminal event; nothing follows it."""

    code = "session_ended"


class PayloadTooLarge(SseserveError):
    """A body, or a line of NDJSON, is larger than the limit."""

    status = 413
    code = "payload_too_large"


class TargetTooLong(SseserveError):
    """The request's target alone is larger than its head may be."""

    status = 414
    code = "target_too_long"


class UnsupportedMediaType(SseserveError):
    """The path does not accept a body of this content type."""

    status = 415
    code = "unsupported_media_type"


class ExpectationFailed(SseserveError):
    """The field ``Expect`` asks for something else than 100-continue."""

    status = 417
    code = "expectation_failed"


class HostNotAllowed(SseserveError):
    """The request is for a host that is not this server's (RFC 9110, section 15.5.20)."""

    status = 421
    code = "host_not_allowed"


class Invalid(SseserveError):
    """The request is well-formed, but a value in it is not allowed."""

    status = 422
    code = "invalid"


class InvalidProgress(Invalid):
    """A percentage that is not a number from 0 to 100, or that goes backwards."""

    code = "invalid_progress"


class UpgradeRequired(SseserveError):
    """The path is a WebSocket, and the request is not a handshake of its version."""

    status = 426
    code = "upgrade_required"


class TooManyRequests(SseserveError):
    """The client does this more often than a limit allows."""

    status = 429
    code = "too_many_requests"


class TooManyConnections(TooManyRequests):
    """The address has reached the limit of its connections."""

    code = "too_many_connections"
    retry_after = 5


class TooManySessions(TooManyRequests):
    """The owner of the session that is to be created has reached the limit of its sessions."""

    code = "too_many_sessions"


class TooManyStreams(TooManyRequests):
    """A limit of open streams is reached."""

    code = "too_many_streams"
    retry_after = 5


class HeadTooLarge(SseserveError):
    """The request's line and header fields are larger than the limit."""

    status = 431
    code = "head_too_large"


class UnsupportedCoding(SseserveError):
    """The body has a transfer coding other than chunked."""

    status = 501
    code = "unsupported_coding"


class UnknownMethod(SseserveError):
    """The request's method is known for no resource."""

    status = 501
    code = "unknown_method"


class VersionNotSupported(SseserveError):
    """The request is of another major version of HTTP than 1 and 2."""

    status = 505
    code = "version_not_supported"


class Unavailable(SseserveError):
    """The server is full or shutting down; try again later."""

    status = 503
    code = "unavailable"
    retry_after: int | None = 5


class EngineUnavailable(Unavailable):
    """The engine, where the logs live, does not answer. What was published may have been stored."""

    code = "engine_unavailable"
    retry_after = 1


class SSEDisabled(Unavailable):
    """Streaming is disabled; poll instead."""

    code = "sse_disabled"
    retry_after = None


class InsufficientStorage(SseserveError):
    """The disk is full or cannot be written (RFC 4918, section 11.5); nothing was stored."""

    status = 507
    code = "insufficient_storage"
    retry_after = 5


class ConfigError(SseserveError):
    """A setting is unknown or invalid."""
