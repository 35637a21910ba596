"""The settings as keyword arguments, for type checkers."""

from __future__ import annotations

from typing import Literal, TypedDict

from .tables import Claims, Issuer, Role

__all__ = ["SettingFields"]


class SettingFields(TypedDict, total=False):
    """The fields of ``Settings`` as keyword arguments, for type checkers."""

    host: str
    port: int
    tls_cert: str | None
    tls_key: str | None
    unix_socket: str | None
    unix_socket_mode: str
    reuse_port: bool
    workers: int
    log_level: Literal["debug", "info", "warning", "error"]
    log_format: Literal["text", "json"]
    access_log: bool
    allowed_hosts: tuple[str, ...]
    cors_origins: tuple[str, ...]
    trusted_proxies: tuple[str, ...]
    proxy_header: Literal["x-forwarded-for", "forwarded", "proxy-protocol"]
    jwt_key: str | None
    jwks_url: str | None
    jwt_issuer: str | None
    jwt_audience: str | None
    issuers: tuple[Issuer, ...]
    claims: Claims
    roles: dict[str, Role]
    max_token_lifetime: float
    cookie: str
    insecure: bool
    pubsub_audience: str | None
    pubsub_email: str | None
    pubsub_jwks_url: str
    auto_create: bool
    ttl: float
    idle_ttl: float
    max_sessions: int
    history_events: int
    history_bytes: int
    job_workers: Literal["server", "remote"]
    max_running_jobs: int
    max_waiting_jobs: int
    demo_seconds: float
    buffer_events: int
    buffer_bytes: int
    retry_ms: int | None
    heartbeat: float | None
    max_age: float | None
    idle_timeout: float | None
    throttle: float | None
    max_streams_per_user: int | None
    max_streams_per_session: int | None
    max_streams: int | None
    max_streams_per_address: int | None
    enable_sse: bool
    send_timeout: float
    max_connections: int | None
    request_timeout: float
    ndjson_timeout: float
    keep_alive: float
    max_body: int
    drain: float
    max_head: int
    max_event: int
    max_connections_per_address: int | None
    connect_rate: float | None
    publish_rate: float | None
    ticket_rate: float | None
    limit_loopback: bool
    max_sessions_per_owner: int | None
    max_log_bytes: int | None
    engine: str | None
    redis_url: str | None
    redis_host: str | None
    redis_port: int
    redis_password: str | None
    durability: Literal["full", "normal"]
    redis_channels: tuple[str, ...] | None
    redis_publish: tuple[str, ...]
