"""Chooses and makes the engine of a mount."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fusehsm.linux.syscalls import kernel_version

if TYPE_CHECKING:
    from fusehsm.emulator.gate import Gate
    from fusehsm.engines.base import Engine

ENGINES: Final = ("pyfuse3", "devfuse", "auto")
# The first kernel with MAP_SHARED of FOPEN_DIRECT_IO files, if INIT asks for it (fuse.h: protocol 7.39; docs/facts.md, section 13).
_SHARED_DIRECT_MAPPINGS: Final = (6, 6)


def resolved(name: str) -> str:
    """The engine's name. `auto` is devfuse, which gets more information than pyfuse3 and needs no library."""
    return "devfuse" if name == "auto" else name


def maps_direct_files_shared(name: str) -> bool:
    """Whether MAP_SHARED works for the files of exact mode with that engine on this kernel."""
    return resolved(name) == "devfuse" and kernel_version() >= _SHARED_DIRECT_MAPPINGS


def make(name: str, gate: Gate, *, private: bool, shares_locks: bool | None = None) -> Engine:
    """The engine of that name, not mounted yet. `private`: the backing changes only through the mount or through event fds. `shares_locks`:
    locks on files are locks on the backing (None: where that costs nothing), which pyfuse3 cannot do."""
    # Imported here, because only the pyfuse3 engine needs the library pyfuse3.
    if resolved(name) == "devfuse":
        from fusehsm.engines.devfuse import DevFuse

        return DevFuse(gate, private=private, shares_locks=shares_locks)
    from fusehsm.engines.pyfuse3 import PyFuse3

    return PyFuse3(gate, private=private)
