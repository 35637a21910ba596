"""Who is trusted to issue tokens: the settings' keys, each with what its tokens may say."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec

from ..config import Issuer, Settings
from ..errors import ConfigError
from .jwks import RemoteKeys
from .keys import Key, read_key

__all__ = ["KeySource", "LocalKey", "TrustedIssuer", "trusted_issuers"]


class KeySource(Protocol):
    """The keys of one issuer. ``identity`` stands for the key, or for where they are."""

    identity: str
    on_change: Callable[[], None]

    async def find(self, key_id: str | None) -> Sequence[Key]:
        """Return the keys that a token may be signed with, whose header has this ``kid``."""


class LocalKey:
    """The one key that a setting has."""

    def __init__(self, key: Key) -> None:
        self._keys = (key,)
        self.identity = key.identity
        self.on_change: Callable[[], None] = lambda: None

    async def find(self, key_id: str | None) -> Sequence[Key]:  # noqa: ARG002 - there is only one
        return self._keys


class TrustedIssuer(msgspec.Struct, frozen=True, kw_only=True):
    """An issuer, and what its tokens may say; see ``config.Issuer``. ``issuer`` None: it has any name.

    ``foreign_prefixes`` are those of other issuers that its own users could have without that.
    """

    keys: KeySource
    issuer: str | None = None
    audience: str | None = None
    roles: frozenset[str] | None = None
    allows_capabilities: bool = True
    subject_prefix: str = ""
    foreign_prefixes: tuple[str, ...] = ()

    @property
    def trust(self) -> str:
        """What stands for the keys, and for what is read of a token besides them."""
        parts = self.keys.identity, self.audience, self.subject_prefix
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def trusted_issuers(settings: Settings, known: Sequence[RemoteKeys] = ()) -> list[TrustedIssuer]:
    """Return the issuers that the settings name.

    Args:
        settings: of the server.
        known: keys that are fetched already.

    Raises:
        ConfigError: one of them cannot be used.
    """
    issuers, remote = [], {keys.url: keys for keys in known}
    if settings.jwt_key is not None or settings.jwks_url is not None:
        keys = _keys(settings.jwt_key, settings.jwks_url, "jwt_key", "jwks_url", remote)
        issuers.append(TrustedIssuer(keys=keys, issuer=settings.jwt_issuer, audience=settings.jwt_audience))
    issuers += [_trusted(issuer, settings, remote) for issuer in settings.issuers]
    names = [issuer.issuer for issuer in issuers]
    if len(set(names)) < len(names):
        raise ConfigError("two of the issuers have the same name, so that their tokens cannot be told apart")
    prefixes = {issuer.subject_prefix for issuer in issuers}
    return [
        msgspec.structs.replace(issuer, foreign_prefixes=_within(issuer.subject_prefix, prefixes))
        for issuer in issuers
    ]


def _within(prefix: str, prefixes: set[str]) -> tuple[str, ...]:
    """Return the longer ones that begin with a prefix."""
    return tuple(other for other in prefixes if other != prefix and other.startswith(prefix))


def _trusted(issuer: Issuer, settings: Settings, remote: dict[str, RemoteKeys]) -> TrustedIssuer:
    whose = f"of the issuer {issuer.issuer!r}"
    if unknown := set(issuer.roles or ()) - settings.roles.keys():
        raise ConfigError(f"the roles {whose} have {min(unknown)!r}, which is none of the setting roles")
    return TrustedIssuer(
        keys=_keys(issuer.key, issuer.jwks_url, f"key {whose}", f"jwks_url {whose}", remote),
        issuer=issuer.issuer,
        audience=issuer.audience,
        roles=issuer.allowed_roles,
        allows_capabilities=issuer.allows_capabilities,
        subject_prefix=issuer.subject_prefix,
    )


def _keys(
    key: str | None, url: str | None, key_name: str, url_name: str, remote: dict[str, RemoteKeys]
) -> KeySource:
    if (key is None) == (url is None):
        raise ConfigError(f"set either {key_name} or {url_name}; several keys are several [[issuers]]")
    if key is not None:
        return LocalKey(read_key(key, key_name))
    assert url is not None
    if url not in remote:  # issuers with the same URL share what is fetched
        remote[url] = RemoteKeys(url, url_name)
    return remote[url]
