"""fusehsm: Linux fanotify pre-content events on any kernel, with a FUSE overlay.

The names here are the handler API: `open_group` watches a path, `serve` passes each `Event` to a function of yours. See docs/handler.md.
"""

from typing import TYPE_CHECKING

from fusehsm.fanotify.abi import FAN_ACCESS_PERM as ACCESS_PERM
from fusehsm.fanotify.abi import FAN_OPEN_EXEC_PERM as OPEN_EXEC_PERM
from fusehsm.fanotify.abi import FAN_OPEN_PERM as OPEN_PERM
from fusehsm.fanotify.abi import LINUX_6_14
from fusehsm.version import VERSION as __version__

if TYPE_CHECKING:
    from fusehsm.backends.base import Group
    from fusehsm.backends.opening import open_group
    from fusehsm.backends.punch import drop, leased
    from fusehsm.events import Event
    from fusehsm.handler import serve

PRE_ACCESS = LINUX_6_14.pre_access

__all__ = [
    "ACCESS_PERM",
    "OPEN_EXEC_PERM",
    "OPEN_PERM",
    "PRE_ACCESS",
    "Event",
    "Group",
    "__version__",
    "drop",
    "leased",
    "open_group",
    "serve",
]

_HOMES = {
    "Event": "fusehsm.events",
    "Group": "fusehsm.backends.base",
    "drop": "fusehsm.backends.punch",
    "leased": "fusehsm.backends.punch",
    "open_group": "fusehsm.backends.opening",
    "serve": "fusehsm.handler",
}


def __getattr__(name: str) -> object:
    # On demand (PEP 562): without this, every command would import the event loop, which takes 0.1 s.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
