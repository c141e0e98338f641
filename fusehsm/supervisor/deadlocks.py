"""Ends the waits of a listener for itself: its thread waits in the kernel for a mount, and the mount waits for that listener's answer.

FUSE holds a lock while an access waits: the inode's for a write, a truncation or the change of a name, a page's for a page fault. A listener that
writes to the same file through the mount then waits for the access that waits for it. On a real kernel the access would hold no lock.
After one second a line on stderr names such a wait. After `timeout` seconds the access that the thread waits for is denied with EDEADLK.
"""

import errno
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from fusehsm.fanotify.abi import mask_names
from fusehsm.linux import proc, syscalls, system_call
from fusehsm.supervisor import tasks
from fusehsm.supervisor.groups import SupervisedGroup
from fusehsm.supervisor.sources import Outstanding
from fusehsm.text import shown

_INTERVAL: Final = 0.25  # seconds between two looks
_TOLD_AFTER: Final = 1.0  # seconds, if the timeout is longer
_MOST_THREADS: Final = 1000  # of one process that are looked at
_PATH_MAX: Final = 4096
# Where a thread waits that wants an answer of a FUSE server or a page (names of the kernel's functions, some of them older ones).
_WAITS: Final = re.compile(
    rb"request_wait_answer|fuse_|folio_wait|folio_lock|lock_folio|wait_on_page|lock_page"
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Wait:
    """A wait of one thread."""

    #: How often the thread has been off the CPU: as long as this is the same, it is the same wait.
    switches: int
    #: When it was first seen, seconds of time.monotonic().
    since: float


class DeadlockWatch:
    """Looks at the listeners of some groups, in a thread of its own."""

    def __init__(self, groups: Callable[[], Iterable[SupervisedGroup]], timeout: float, kcmp: int) -> None:
        """`groups` gives the groups that there are. `timeout`: seconds, more than 0. `kcmp`: the number of kcmp(2)."""
        self._groups = groups
        self._kcmp = kcmp
        self._timeout = timeout
        self._waits: dict[int, _Wait] = {}
        self._told: set[Outstanding] = set()
        threading.Thread(target=self._look_again_and_again, name="deadlocks", daemon=True).start()

    def _look_again_and_again(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            try:
                self._look()
            except Exception:
                _log.exception("looking for waits of the command for itself failed")

    def _look(self) -> None:
        now = time.monotonic()
        still: dict[int, _Wait] = {}
        for group in self._groups():
            # A listener that owes no answer, and whose own accesses wait for none, waits for something else.
            if not group.owes():
                continue
            processes = {proc.process_of(tid) for tid in group.listeners()}
            for process in _with_children(processes):
                for tid in proc.threads_of(process)[:_MOST_THREADS]:
                    wait = self._wait_of(tid, group, now)
                    if wait is None or (process not in processes and not self._works_for(process, group)):
                        continue
                    still[tid] = wait
                    if now - wait.since >= min(_TOLD_AFTER, self._timeout):
                        self._tell(group, tid, processes, deny=now - wait.since >= self._timeout)
        self._waits = still
        if not still:
            self._told.clear()

    def _wait_of(self, tid: int, group: SupervisedGroup, now: float) -> _Wait | None:
        """The wait of a thread for a mount of the group; None if it does not wait for one."""
        in_server = _waits_for_server(tid)
        # A lock's wait has the name of any function that takes it.
        if not (in_server or tasks.is_uninterruptible(tid)) or not _concerns(tid, group, fault=in_server):
            return None
        switches = tasks.switches_of(tid)
        known = self._waits.get(tid)
        return known if known is not None and known.switches == switches else _Wait(switches, now)

    def _works_for(self, process: int, group: SupervisedGroup) -> bool:
        """Whether a child of a listener holds the group and is no accessor of it, which may wait for as long as the listener likes."""
        return not group.asks_about(process) and any(
            tasks.watches(self._kcmp, process, number, group.bell.reading)
            for number in tasks.open_numbers(process)
        )

    def _tell(self, group: SupervisedGroup, tid: int, processes: set[int], *, deny: bool) -> None:
        """Name the accesses that a waiting thread may wait for, each once, and with `deny` deny them.

        They are those that have waited for the listener for as long as the thread has waited.
        """
        patience = self._timeout if deny else min(_TOLD_AFTER, self._timeout)
        for event in group.overdue(patience, processes):
            if event not in self._told:
                self._told.add(event)
                _log.warning("%s", _line(event, tid, group, self._timeout))
            if deny:
                group.deny(event, errno.EDEADLK)


def _with_children(processes: set[int]) -> list[int]:
    """The processes and all that descend from them."""
    found = dict.fromkeys(processes)
    waiting = list(processes)
    while waiting:
        for child in proc.children_of(waiting.pop()):
            if child not in found:
                found[child] = None
                waiting.append(child)
    return list(found)


def _line(event: Outstanding, tid: int, group: SupervisedGroup, timeout: float) -> str:
    path = shown(os.fsdecode(event.received.path))
    what = "|".join(mask_names(event.received.mask, group.dialect))
    return (
        f"{path}: thread {tid} of the command waits for this mount, and the access of process {event.received.pid} ({what}) waits for the "
        f"command; after {timeout:g} s it is denied with EDEADLK; start a daemon with --listener, where it does not wait for itself"
    )


def _waits_for_server(tid: int) -> bool:
    try:
        with open(f"/proc/{tid}/wchan", "rb", buffering=0) as file:
            return _WAITS.search(file.read(128)) is not None
    except OSError:
        return False


def _concerns(tid: int, group: SupervisedGroup, *, fault: bool) -> bool:
    """Whether the system call in which a thread waits has to do with a mount of the group. `fault`: the result for a page fault, which is no call."""
    call = system_call.call_of(tid)
    if call is None or call.number == system_call.PAGE_FAULT:
        return fault
    devices = {source.mount.device for source in group.sources()}
    points = [os.fsencode(source.mount.mount_point) for source in group.sources()]
    for argument in call.arguments[:3]:
        if argument < 1 << 20:
            if _is_on(tid, f"fd/{argument}", devices):
                return True
            continue
        try:
            path = tasks.read_string(tid, argument, _PATH_MAX)
        except OSError:
            continue
        if path.startswith(b"/"):
            if any(path == point or path.startswith(point + b"/") for point in points):
                return True
        elif path and _is_on(tid, "cwd", devices):
            return True
    return False


def _is_on(tid: int, where: str, devices: set[tuple[int, int]]) -> bool:
    """Whether an open file, or the working directory, lies on one of these mounts. Asks no file system's server."""
    try:
        descriptor = os.open(f"/proc/{tid}/{where}", os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return syscalls.mount_and_device(descriptor)[1] in devices
    except OSError:
        return False
    finally:
        os.close(descriptor)
