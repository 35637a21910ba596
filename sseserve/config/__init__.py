"""Settings: what each is, where they come from, and what may be said of them."""

from __future__ import annotations

from .changes import Change, changes
from .fields import SettingFields
from .secrets import hide_password
from .settings import Settings
from .sources import ignored_variables, load, override
from .tables import ROLES, Claims, Issuer, Role

__all__ = [
    "ROLES",
    "Change",
    "Claims",
    "Issuer",
    "Role",
    "SettingFields",
    "Settings",
    "changes",
    "hide_password",
    "ignored_variables",
    "load",
    "override",
]
