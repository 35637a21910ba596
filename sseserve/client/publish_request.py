"""The HTTP request of a publisher, and the response to it. No I/O."""

from __future__ import annotations

import secrets
from urllib.parse import quote

import httpx
import msgspec

from ..model import check_id_type
from .errors import InvalidResponse, error_from_response
from .messages import PublishResult

__all__ = ["PublishRequest", "build_request", "decode_response"]

_decoder = msgspec.json.Decoder(PublishResult)


class PublishRequest(msgspec.Struct, frozen=True):
    """What all attempts of one call have in common; the idempotency key is among ``headers``."""

    url: str
    headers: dict[str, str]


def build_request(
    sessions_url: str,
    session_id: str,
    resource: str,
    *,
    media_type: str = "application/json",
    key: str | None = None,
) -> PublishRequest:
    """Return the request that publishes to ``{sessions_url}/{session_id}/{resource}``.

    Args:
        media_type: of the body.
        key: the idempotency key; None generates one.

    Raises:
        TypeError: ``session_id`` is not a string.
    """
    check_id_type(session_id)
    return PublishRequest(
        f"{sessions_url}/{quote(session_id, safe='')}/{resource}",
        {"Content-Type": media_type, "Idempotency-Key": key or secrets.token_hex(16)},
    )


def decode_response(url: str, response: httpx.Response) -> PublishResult:
    """Return the result that the server sent from ``url``.

    Raises:
        ClientError: the status says that the request failed; see ``errors.error_from_response``.
        InvalidResponse: the body is not a publish result.
    """
    if not response.is_success:
        raise error_from_response(response.status_code, response.headers, response.content)
    try:
        return _decoder.decode(response.content)
    except (msgspec.DecodeError, UnicodeError) as error:
        raise InvalidResponse(f"{url} did not respond with a publish result: {error}") from error
