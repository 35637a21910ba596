"""What can go wrong, once, with its HTTP status and machine code.

    SseserveError
     +-- BadRequest            400 bad_request
     +-- Unauthorized          401 unauthorized
     +-- Forbidden             403 forbidden
     +-- NotFound              404 not_found
     |    +-- SessionNotFound  404 session_not_found
     +-- MethodNotAllowed      405 method_not_allowed
     +-- Conflict              409 conflict
     |    +-- SessionExists    409 session_exists
     |    +-- SessionEnded     409 session_ended
     +-- PayloadTooLarge       413 payload_too_large
     +-- UnsupportedMediaType  415 unsupported_media_type
     +-- Invalid               422 invalid
     |    +-- InvalidProgress  422 invalid_progress
     +-- UpgradeRequired       426 upgrade_required
     +-- TooManyStreams        429 too_many_streams
     +-- Unavailable           503 unavailable
     |    +-- SSEDisabled      503 sse_disabled
     +-- ConfigError           (start-up only)

An error changes nothing: whoever raises one of these has left the log as it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

__all__ = [
    "BadRequest",
    "ConfigError",
    "Conflict",
    "Forbidden",
    "Invalid",
    "InvalidProgress",
    "MethodNotAllowed",
    "NotFound",
    "PayloadTooLarge",
    "SSEDisabled",
    "SessionEnded",
    "SessionExists",
    "SessionNotFound",
    "SseserveError",
    "TooManyStreams",
    "Unauthorized",
    "Unavailable",
    "UnsupportedMediaType",
    "UpgradeRequired",
]


class SseserveError(Exception):
    """Base of all errors that this package raises on purpose."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    # More members of the error object, for the error that has something to add.
    details: Mapping[str, object] = MappingProxyType({})


class BadRequest(SseserveError):
    """The request cannot be read at all."""

    status = 400
    code = "bad_request"


class Unauthorized(SseserveError):
    """The request says nothing sound of who makes it."""

    status = 401
    code = "unauthorized"


class Forbidden(SseserveError):
    """Who makes the request may not do this."""

    status = 403
    code = "forbidden"


class NotFound(SseserveError):
    """Nothing lives at this path."""

    status = 404
    code = "not_found"


class SessionNotFound(NotFound):
    """There is no such session, or none that the caller may see."""

    code = "session_not_found"


class MethodNotAllowed(SseserveError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"


class Conflict(SseserveError):
    """The request is sound, but the session's state forbids it."""

    status = 409
    code = "conflict"


class SessionExists(Conflict):
    """A session of that id exists already."""

    code = "session_exists"


class SessionEnded(Conflict):
    """The session has its terminal event; nothing follows it."""

    code = "session_ended"


class PayloadTooLarge(SseserveError):
    """A body or a line of a batch is over the limit."""

    status = 413
    code = "payload_too_large"


class UnsupportedMediaType(SseserveError):
    """The body is of a type that this path does not read."""

    status = 415
    code = "unsupported_media_type"


class Invalid(SseserveError):
    """The request can be read, but says something that cannot be."""

    status = 422
    code = "invalid"


class InvalidProgress(Invalid):
    """A percentage that is no number from 0 to 100, or one that goes backwards."""

    code = "invalid_progress"


class UpgradeRequired(SseserveError):
    """A WebSocket lives here, and this is none of a version that we speak."""

    status = 426
    code = "upgrade_required"


class TooManyStreams(SseserveError):
    """This user has as many streams open as one may have."""

    status = 429
    code = "too_many_streams"


class Unavailable(SseserveError):
    """The server is full or about to stop; come back."""

    status = 503
    code = "unavailable"


class SSEDisabled(Unavailable):
    """Streaming is switched off here; poll instead."""

    code = "sse_disabled"


class ConfigError(SseserveError):
    """A setting is unknown or makes no sense."""
