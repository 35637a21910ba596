"""Settings: what each is, where they come from, and what may be said of them."""

from __future__ import annotations

from .changes import Change, changes
from .environment import ignored_variables, service_variables
from .fields import SettingFields
from .secrets import hide_password
from .settings import Settings
from .sources import load, override
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
    "service_variables",
]
