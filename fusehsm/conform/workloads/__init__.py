"""All workloads, by family. A new workload goes into the list at the end of its family's module."""

from collections.abc import Sequence
from fnmatch import fnmatch

from fusehsm.conform.workload import Workload
from fusehsm.conform.workloads import (
    aio,
    allocating,
    calls,
    copying,
    denying,
    dying,
    executing,
    groups,
    mapping,
    marks,
    names,
    notifying,
    opening,
    processes,
    programs,
    reading,
    truncating,
    uring,
    writing,
)

_FAMILIES = (
    opening,
    reading,
    writing,
    truncating,
    allocating,
    copying,
    mapping,
    names,
    executing,
    processes,
    denying,
    marks,
    groups,
    dying,
    calls,
    notifying,
    aio,
    uring,
    programs,
)

WORKLOADS: tuple[Workload, ...] = tuple(workload for family in _FAMILIES for workload in family.WORKLOADS)


def chosen(patterns: Sequence[str]) -> list[Workload]:
    """The workloads whose family or key matches one of the shell patterns; all without patterns. Raises ValueError for a pattern without a match."""
    if not patterns:
        return list(WORKLOADS)
    for pattern in patterns:
        if not any(_fits(workload, pattern) for workload in WORKLOADS):
            raise ValueError(f"no workload is called {pattern}; `fusehsm conform --list` shows their names")
    return [workload for workload in WORKLOADS if any(_fits(workload, pattern) for pattern in patterns)]


def _fits(workload: Workload, pattern: str) -> bool:
    return workload.family == pattern or fnmatch(workload.key, pattern)
