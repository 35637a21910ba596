"""Reads tokens: their parts, the registered claims (RFC 7519, section 4.1), and the rights in them. Pure.

What is wrong is an ``InvalidToken`` that says which claim it is, and never what is in it.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..config import Claims
from ..errors import InvalidToken
from ..http.auth import LEEWAY, Action, Grant

__all__ = ["MAX_TOKEN", "check_audience", "check_times", "parse", "read_grant"]

MAX_TOKEN = 8192  # characters
MAX_NAME = 256  # characters of a subject, an issuer, a role, an owner, a pattern
_TOKEN = re.compile(r"([A-Za-z0-9_-]+)\.([A-Za-z0-9_-]+)\.[A-Za-z0-9_-]+")
# Control characters, line and paragraph ends, and halves of characters, which UTF-8 cannot encode.
_NO_TEXT = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_CAPABILITIES = {
    action.value: action
    for action in (Action.CREATE, Action.WATCH, Action.PUBLISH, Action.CONTROL, Action.DELETE)
}


def parse(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the header and the claims of a token (RFC 7515, section 7.1). Nothing in them is verified.

    Raises:
        InvalidToken: it is none.
    """
    if len(token) > MAX_TOKEN:
        raise InvalidToken(f"the token is longer than {MAX_TOKEN} characters")
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise InvalidToken("the token is not a signed JWT")
    return _object(match[1], "header"), _object(match[2], "payload")


def _object(part: str, name: str) -> dict[str, Any]:
    try:
        text = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)).decode()
        value = json.loads(text, object_pairs_hook=_members, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidToken(f"the token's {name} is not JSON, or has a member twice") from None
    if not isinstance(value, dict):
        raise InvalidToken(f"the token's {name} is not a JSON object")
    return value


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # Two parsers may take different ones of two equal names (RFC 7519, section 4).
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a name is there twice")
    return members


def _refuse_constant(_text: str) -> NoReturn:
    raise ValueError("NaN and Infinity are not JSON")


def check_times(claims: Mapping[str, Any], now: float, max_lifetime: float) -> None:
    """Check ``exp``, ``nbf`` and ``iat`` at a time, in POSIX seconds. Clocks may differ by ``LEEWAY``.

    Raises:
        InvalidToken: the token is not valid then.
    """
    expires_at = _time(claims, "exp")
    if expires_at is None:
        raise InvalidToken("the token has no claim exp: it must say when it expires")
    if now >= expires_at + LEEWAY:
        raise InvalidToken("the token has expired")
    if expires_at > now + max_lifetime:
        raise InvalidToken(
            f"the token expires later than {max_lifetime:.0f} seconds from now (max_token_lifetime)"
        )
    for name in ("nbf", "iat"):
        # One that seems issued in the future would escape a revocation.
        begins_at = _time(claims, name)
        if begins_at is not None and begins_at > now + LEEWAY:
            raise InvalidToken(f"the token is not valid yet: its claim {name} is in the future")


def _time(claims: Mapping[str, Any], name: str) -> float | None:
    """Return a NumericDate (RFC 7519, section 2)."""
    value = claims.get(name)
    if value is None and name not in claims:
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            if math.isfinite(seconds := float(value)):
                return seconds
        except OverflowError:
            pass
    raise InvalidToken(f"the token's claim {name} must be a number of seconds")


def check_audience(claims: Mapping[str, Any], audience: str | None) -> None:
    """Check the claim ``aud`` (RFC 7519, section 4.1.3).

    Raises:
        InvalidToken: the token is for somebody else.
    """
    value = claims.get("aud", [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise InvalidToken("the token's claim aud must be a string or an array of strings")
    if audience is None and "aud" in claims:
        raise InvalidToken("the token is for an audience, and this server has none (setting jwt_audience)")
    if audience is not None and audience not in values:
        raise InvalidToken("the token is for another audience")


def read_grant(
    claims: Mapping[str, Any],
    names: Claims,
    *,
    prefix: str = "",
    foreign_prefixes: tuple[str, ...] = (),
    roles: frozenset[str] | None = None,
    allows_capabilities: bool = True,
) -> Grant:
    """Return the grant of a verified token.

    Args:
        claims: of the token.
        names: how the claims are called that rights are read from.
        prefix: is put before its subject and patients.
        foreign_prefixes: those of other issuers, with which they must not begin then.
        roles: those that it may have; None: any.
        allows_capabilities: it may have some.

    Raises:
        InvalidToken: a claim has the wrong type, or is not allowed.
    """
    if (subject := _text(claims, names.subject)) is None:
        raise InvalidToken(f"the token has no claim {names.subject}: it must say whose it is")
    if (role := _text(claims, names.role)) is not None and roles is not None and role not in roles:
        raise InvalidToken(f"the token's claim {names.role} is a role that its issuer may not give")
    capabilities = _capabilities(claims, names.capabilities)
    if capabilities and not allows_capabilities:
        raise InvalidToken(f"the token has the claim {names.capabilities}, which its issuer may not give")
    users = [prefix + name for name in (subject, *_texts(claims, names.patients))]
    if any(user.startswith(foreign_prefixes) for user in users):
        raise InvalidToken("the token names a user of another issuer")
    return Grant(
        users[0],
        role,
        frozenset(users[1:]),
        capabilities,
        issuer=_text(claims, "iss"),
        token_id=_text(claims, "jti"),
        issued_at=_time(claims, "iat"),
        expires_at=_time(claims, "exp"),
    )


def _text(claims: Mapping[str, Any], name: str) -> str | None:
    if (value := claims.get(name)) is None:
        return None
    if not _is_name(value):
        raise InvalidToken(f"the token's claim {name} must be {_NAME}")
    assert isinstance(value, str)
    return value


_NAME = f"a string of 1 to {MAX_NAME} characters without control characters"


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 1 <= len(value) <= MAX_NAME and not _NO_TEXT.search(value)


def _texts(claims: Mapping[str, Any], name: str) -> list[str]:
    values = claims.get(name)
    if values is None:
        return []
    if not isinstance(values, list) or not all(map(_is_name, values)):
        raise InvalidToken(f"the token's claim {name} must be an array, of strings such as {_NAME[2:]}")
    return values


def _capabilities(claims: Mapping[str, Any], name: str) -> dict[Action, tuple[str, ...]]:
    value = claims.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict) or not value.keys() <= _CAPABILITIES.keys():
        raise InvalidToken(
            f"the token's claim {name} must be an object with no members but {', '.join(_CAPABILITIES)}"
        )
    for patterns in value.values():
        if not isinstance(patterns, list) or not all(map(_is_name, patterns)):
            raise InvalidToken(f"in the token's claim {name} each member must be an array of ids or patterns")
    return {_CAPABILITIES[action]: tuple(patterns) for action, patterns in value.items() if patterns}
