"""The settings that are tables: issuers, claims and roles."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from .about import About
from .secrets import HidesSecrets

__all__ = ["ROLES", "Claims", "Issuer", "Right", "Role"]

Right = Literal["create", "watch", "publish", "control", "delete", "revoke"]


class Role(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the holders of a role may do, besides their list, tickets and refreshing: see ``http.auth``."""

    every: Annotated[
        frozenset[Right],
        About("Rights in every session", "workers publish to sessions that are not theirs"),
    ] = frozenset()
    own: Annotated[
        frozenset[Right],
        About("Rights in the sessions whose owner they are", "users see their own work and nobody else's"),
    ] = frozenset()
    assigned: Annotated[
        frozenset[Right],
        About(
            "Rights in the sessions whose owner is in their claim patients",
            "a therapist follows the sessions of their patients",
        ),
    ] = frozenset()
    viewer: Annotated[
        frozenset[Right],
        About("Rights in the sessions whose viewers name them", "an owner can share one session"),
    ] = frozenset()


ROLES = {
    "patient": Role(own=frozenset({"watch", "control"}), viewer=frozenset({"watch"})),
    "therapist": Role(
        own=frozenset({"watch", "control"}),
        assigned=frozenset({"watch", "control"}),
        viewer=frozenset({"watch"}),
    ),
    "service": Role(every=frozenset({"create", "watch", "publish", "control"})),
    "admin": Role(every=frozenset({"create", "watch", "publish", "control", "delete", "revoke"})),
}


class Issuer(HidesSecrets, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who issues tokens (RFC 7519), as one of several: a table ``[[issuers]]``.

    One of ``key`` and ``jwks_url`` is needed.
    """

    issuer: Annotated[str, About("The claim iss of its tokens", "it decides which key verifies a token")]
    audience: Annotated[
        str | None,
        About(
            "One of the claim aud of its tokens",
            "a token that was issued for another server is refused",
            unset="its tokens must have no audience",
        ),
    ] = None
    key: Annotated[
        str | None,
        About(
            "Its key, as jwt_key: a secret, or file:PATH of a secret or of a public key in PEM",
            "one of key and jwks_url is needed",
            unset="its keys are at jwks_url",
        ),
    ] = None
    jwks_url: Annotated[
        str | None,
        About(
            "URL of its public keys (JWK Set, RFC 7517)",
            "an identity provider replaces its keys without a change here",
            unset="its key is in key",
        ),
    ] = None
    roles: Annotated[
        tuple[str, ...] | None,
        About(
            "The roles that its tokens may have",
            "another party's issuer must not make administrators",
            unset="all roles, and capabilities",
        ),
    ] = None
    capabilities: Annotated[
        bool,
        About("Whether its tokens may have capabilities beside its roles", "they may allow more than roles"),
    ] = False
    subject_prefix: Annotated[
        str,
        About(
            "Is put before its subjects and patients",
            "a user of one issuer cannot have the name of another issuer's user",
        ),
    ] = ""

    @property
    def allowed_roles(self) -> frozenset[str] | None:
        """The roles that its tokens may have; None: all."""
        return None if self.roles is None else frozenset(self.roles)

    @property
    def allows_capabilities(self) -> bool:
        """Whether its tokens may have capabilities: what a role may not, they must not either."""
        return self.roles is None or self.capabilities


class Claims(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The names of the claims that a token's rights are read from."""

    subject: Annotated[str, About("Claim with the user", "it is the registered claim of RFC 7519")] = "sub"
    role: Annotated[str, About("Claim with the role", "identity providers name it differently")] = "role"
    patients: Annotated[
        str,
        About(
            "Claim with the users that are assigned to a therapist", "identity providers name it differently"
        ),
    ] = "patients"
    capabilities: Annotated[
        str, About("Claim with rights in the sessions whose ids match a pattern", "it is this server's own")
    ] = "sseserve"
