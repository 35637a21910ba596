"""The settings that say where the server listens, what it logs, and who may use it."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from .about import About
from .secrets import HidesSecrets
from .tables import ROLES, Claims, Issuer, Role

__all__ = ["AccessSettings", "Count", "Positive"]

Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]


class AccessSettings(HidesSecrets, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The first part of ``Settings``."""

    host: Annotated[
        str,
        About(
            "Address or host name to listen on; 0.0.0.0 is every IPv4 address, :: every address",
            "only this machine can connect until another address is chosen",
            heading="Address",
        ),
    ] = "127.0.0.1"
    port: Annotated[
        Annotated[int, Meta(ge=0, le=65535)],
        About("TCP port to listen on; 0 takes a free one", "ports below 1024 need a privilege"),
    ] = 8000
    tls_cert: Annotated[
        str | None,
        About(
            "Path of the certificate (PEM) for https, and of those that sign it; a new file is used at once",
            "without a proxy nothing else encrypts, and browsers speak HTTP/2 over TLS only",
            unset="no TLS",
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        About(
            "Path of the key of tls_cert (PEM)",
            "it is not encrypted, as there is nobody to ask for a password",
            unset="no TLS",
        ),
    ] = None
    unix_socket: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        About(
            "Unix socket to listen on instead of host and port: a path",
            "a proxy on the same machine needs no TCP port, and file permissions say who may connect",
            unset="a TCP port",
        ),
    ] = None
    unix_socket_mode: Annotated[
        str,
        About(
            "Permissions of the unix socket, as chmod(1) takes them: whoever may write can connect",
            "the proxy is in the group of the server",
        ),
    ] = "0660"
    reuse_port: Annotated[
        bool,
        About(
            "Let other servers of the same user listen on the port, too (SO_REUSEPORT)",
            "a new version is started before the old one is stopped; a second start by mistake is no error",
        ),
    ] = False
    workers: Annotated[
        Count,
        About(
            "Processes that serve the port; more than one share a Redis. Limits are of each process",
            "one process uses one core",
            "processes",
        ),
    ] = 1

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        About(
            "Minimum level to log",
            "debug has a line for each request",
            heading="Logs",
            reloads=True,
        ),
    ] = "info"
    log_format: Annotated[
        Literal["text", "json"],
        About("Format of the log", "collectors of logs read JSON, people read text"),
    ] = "text"
    access_log: Annotated[
        bool,
        About(
            "Log each request at level info; off: at debug, but for errors",
            "publishers may send thousands of requests a second",
            reloads=True,
        ),
    ] = False

    allowed_hosts: Annotated[
        tuple[str, ...],
        About(
            "More host names of this server; .a.example is a.example and every name below it, * any name",
            "a page could otherwise make its own name resolve to this server (DNS rebinding)",
            heading="Hosts and origins",
            reloads=True,
        ),
    ] = ()
    cors_origins: Annotated[
        tuple[str, ...],
        About(
            "Origins whose pages may do everything; * is all others, without credentials",
            "browsers let pages of other origins read nothing unless they are listed",
            reloads=True,
        ),
    ] = ()

    trusted_proxies: Annotated[
        tuple[str, ...],
        About(
            "Addresses and networks of the proxies that say who their client is, such as 10.0.0.0/8; unix is "
            "whoever connects to a unix socket",
            "anybody could send the header and so take another address",
            heading="Proxies",
        ),
    ] = ()
    proxy_header: Annotated[
        Literal["x-forwarded-for", "forwarded", "proxy-protocol"],
        About("How trusted proxies say who their client is", "most send X-Forwarded-For"),
    ] = "x-forwarded-for"

    jwt_key: Annotated[
        str | None,
        About(
            "Key that verifies tokens: a secret, or file:PATH of a secret or of a public key in PEM",
            "without a key everybody who can connect may do everything; a secret has 32 bytes or more",
            unset="no key",
            heading="Authentication",
            reloads=True,
        ),
    ] = None
    jwks_url: Annotated[
        str | None,
        About(
            "URL of the public keys that verify tokens (JWK Set, RFC 7517)",
            "an identity provider replaces its keys without a change here",
            unset="no key",
            reloads=True,
        ),
    ] = None
    jwt_issuer: Annotated[
        str | None,
        About(
            "What the claim iss of tokens must be",
            "a key may be used by more than one issuer",
            unset="anything",
            reloads=True,
        ),
    ] = None
    jwt_audience: Annotated[
        str | None,
        About(
            "What the claim aud of tokens must contain",
            "a token that was issued for another server is refused",
            unset="tokens must have no audience",
            reloads=True,
        ),
    ] = None
    issuers: Annotated[
        tuple[Issuer, ...],
        About(
            "Several issuers of tokens, each with its key",
            "users come from more than one place",
            reloads=True,
        ),
    ] = ()
    claims: Annotated[
        Claims,
        About(
            "Names of the claims that a token's rights are read from",
            "identity providers name them differently",
            reloads=True,
        ),
    ] = Claims()
    roles: Annotated[
        dict[str, Role],
        About(
            "What the holders of each role may do; a file's roles replace all of these",
            "your roles may have other names",
            reloads=True,
        ),
    ] = msgspec.field(default_factory=lambda: dict(ROLES))
    max_token_lifetime: Annotated[
        Positive,
        About(
            "A token that expires later than this is refused",
            "a stolen token must not be valid for ever",
            "seconds",
            reloads=True,
        ),
    ] = 30 * 86400.0
    cookie: Annotated[
        str,
        About(
            "Name of the cookie that may hold a token",
            "the prefix __Host- makes browsers send it to this host only, and only over HTTPS",
        ),
    ] = "__Host-sseserve"
    insecure: Annotated[
        bool,
        About(
            "Listen without a key on other addresses than those of the loopback interface, too",
            "everybody who can connect may then do everything",
        ),
    ] = False
    pubsub_audience: Annotated[
        str | None,
        About(
            "Audience of the tokens that Google Cloud Pub/Sub sends with its pushes",
            "its pushes cannot have a token of yours",
            unset="pushes need a token as all requests do",
        ),
    ] = None
    pubsub_email: Annotated[
        str | None,
        About(
            "Service account of the tokens that Pub/Sub sends",
            "everybody can have a token of Google's",
            unset="pushes need a token as all requests do",
        ),
    ] = None
    pubsub_jwks_url: Annotated[
        str, About("URL of the public keys of those tokens", "the default is Google's")
    ] = "https://www.googleapis.com/oauth2/v3/certs"

    @property
    def has_token_keys(self) -> bool:
        """Whether requests need a token: the settings say what verifies it."""
        return self.jwt_key is not None or self.jwks_url is not None or bool(self.issuers)
