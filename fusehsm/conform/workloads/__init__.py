"""All workloads, by family. A new workload goes into the list of its family at the end of a module."""

import hashlib
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Final

from fusehsm.conform.workload import Workload
from fusehsm.conform.workloads import (
    async_io,
    calls,
    copying,
    denying,
    groups,
    listener_does,
    listener_sees,
    mapping,
    marks,
    names,
    notifying,
    opening,
    processes,
    programs,
    reading,
    writing,
)

_MODULES = (
    opening,
    reading,
    writing,
    copying,
    mapping,
    names,
    processes,
    denying,
    marks,
    groups,
    calls,
    notifying,
    async_io,
    programs,
    listener_sees,
    listener_does,
)

WORKLOADS: tuple[Workload, ...] = tuple(workload for module in _MODULES for workload in module.WORKLOADS)


def chosen(patterns: Sequence[str]) -> list[Workload]:
    """The workloads whose family or key matches one of the shell patterns; all without patterns. Raises ValueError for a pattern without a match."""
    if not patterns:
        return list(WORKLOADS)
    for pattern in patterns:
        if not any(_fits(workload, pattern) for workload in WORKLOADS):
            raise ValueError(f"no workload is called {pattern}; `fusehsm conform --list` shows their names")
    return [workload for workload in WORKLOADS if any(_fits(workload, pattern) for pattern in patterns)]


#: The workloads that are about bytes and not about marks, groups or single calls: those that first-access mode can serve like the kernel.
BYTES: Final = (
    "reading",
    "writing",
    "copying",
    "mapping",
    "names",
    "processes",
    "denying/PRE_ACCESS-*",
    "aio",
    "uring",
    "programs",
)


def sample(workloads: Sequence[Workload], number: int | None) -> list[Workload]:
    """A fixed sample of so many workloads, in their order (None: all). A new workload changes it by one at most.

    Raises ValueError for a number below 1.
    """
    if number is None:
        return list(workloads)
    if number < 1:
        raise ValueError(f"a sample of {number} workloads has none; give a number from 1 on")
    kept = sorted(workloads, key=lambda workload: hashlib.sha256(workload.key.encode()).digest())[:number]
    return [workload for workload in workloads if workload in kept]


def _fits(workload: Workload, pattern: str) -> bool:
    return workload.family == pattern or fnmatch(workload.key, pattern)
