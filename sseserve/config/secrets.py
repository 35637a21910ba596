"""What is shown of settings that hold secrets: nothing of a secret, and of a URL all but its credentials."""

from __future__ import annotations

import re
from typing import Any

import msgspec

__all__ = ["SECRETS", "URLS", "HidesSecrets", "hide_password", "shown"]

# What is in these is shown to nobody: not in a representation, nor in an error.
SECRETS = frozenset({"jwt_key", "key", "redis_password"})
KEY_URLS = frozenset({"jwks_url", "pubsub_jwks_url"})  # what the query of one has may be a secret
URLS = KEY_URLS | {"engine", "redis_url"}


def hide_password(url: str) -> str:
    """Return a URL without its credentials, to be shown."""
    return re.sub(r"(password=)[^&#]*", r"\1***", re.sub(r"//.*@", "//***@", url))


def shown(name: str, value: Any) -> Any:
    """Return what may be shown of the value of a setting."""
    if value is None:
        return None
    if name in KEY_URLS:
        value = re.sub(r"\?.*", "?***", value)
    return "***" if name in SECRETS else hide_password(value) if name in URLS else value


class HidesSecrets(msgspec.Struct, frozen=True):
    """Is represented without its secrets."""

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, shown(name, value)) for name, value in msgspec.structs.asdict(self).items()]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__rich_repr__())
        return f"{type(self).__name__}({fields})"
