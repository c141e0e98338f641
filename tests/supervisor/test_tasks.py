"""What the supervisor reads of a thread from /proc."""

import os
import signal
from collections.abc import Iterator

import pytest

from fusehsm.supervisor import tasks

pytestmark = pytest.mark.root

MANY = range(1_000_000_000, 1_000_060_000)  # the kernel allows 65536 (NGROUPS_MAX)


@pytest.fixture
def child_of_many_groups() -> Iterator[int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups(list(MANY))
            os.close(writer)
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_thread_of_many_groups(child_of_many_groups: int) -> None:
    """Its /proc/TID/status is long, and what matters comes after the groups."""
    found = tasks.signals_of(child_of_many_groups)
    assert found is not None
    assert (found.own, found.shared, found.process, found.threads) == (0, 0, child_of_many_groups, 1)
    rights = tasks.rights_of(child_of_many_groups)
    assert rights is not None
    assert rights.groups == tuple(MANY)
    assert tasks.switches_of(child_of_many_groups) >= 0
