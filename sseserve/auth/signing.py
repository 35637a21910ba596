"""Makes tokens, for the command ``sseserve token``."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import jwt

from ..config import Settings
from ..errors import ConfigError
from .claims import check_times, read_grant
from .keys import read_private_key

__all__ = ["make_token"]


def make_token(
    settings: Settings,
    *,
    now: float,
    lifetime: float,
    subject: str,
    role: str | None = None,
    patients: Sequence[str] = (),
    capabilities: Mapping[str, Sequence[str]] | None = None,
    issuer: str | None = None,
    audience: str | None = None,
    key: str | None = None,
) -> str:
    """Return a signed token that a server with these settings accepts.

    Args:
        settings: of the server: names of claims; issuer, audience and key, where none are given.
        now: when it is issued, in POSIX seconds.
        lifetime: how long it is valid, in seconds.
        subject: whose it is.
        role: of that; None: it has none.
        patients: that are assigned to it.
        capabilities: what it may do, with sessions of which ids.
        issuer, audience: None: those of the settings.
        key: as for ``read_private_key``; None: that of the settings.

    Raises:
        ConfigError: the key cannot sign.
        InvalidToken: the server would refuse it; the message says why.
    """
    trusted = next((known for known in settings.issuers if known.issuer == issuer), None)
    if trusted is not None:
        audience, text, name = audience or trusted.audience, trusted.key, f"key of the issuer {issuer!r}"
    else:
        issuer, audience = issuer or settings.jwt_issuer, audience or settings.jwt_audience
        text, name = settings.jwt_key, "jwt_key"
    if key is not None:
        text, name = key, "--key"
    if text is None:
        raise ConfigError("a key is needed to sign with: --key or jwt_key (SSESERVE_JWT_KEY)")
    signing = read_private_key(text, name)
    issued_at = int(now)
    names = settings.claims
    claims: dict[str, Any] = {
        names.subject: subject,
        "iat": issued_at,
        "exp": issued_at + int(lifetime),
        "jti": secrets.token_urlsafe(16),
        "iss": issuer,
        "aud": audience,
        names.role: role,
        names.patients: list(patients) or None,
        names.capabilities: {right: list(ids) for right, ids in (capabilities or {}).items() if ids} or None,
    }
    claims = {name: value for name, value in claims.items() if value is not None}
    check_times(claims, now, settings.max_token_lifetime)
    if trusted is None:
        read_grant(claims, names)
    else:
        read_grant(
            claims,
            names,
            roles=trusted.allowed_roles,
            allows_capabilities=trusted.allows_capabilities,
        )
    return jwt.encode(claims, signing.material, signing.algorithm)
