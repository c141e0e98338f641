"""Ends the waits of the supervisor for the command that it works for.

A call's memory may be a mapped page of a file whose event waits for the command: a buffer of read(2), an answer, a path. The supervisor, which
reads or writes that memory in the kernel's place, is then the accessor, and keeps the process's memory locked meanwhile: another thread of it that
maps something cannot be killed, and whoever reads its /proc/PID/cmdline waits, too. On a real kernel the command is the accessor, and can be killed.
After `timeout` seconds the supervisor's access is denied with EDEADLK, so the call fails with EFAULT.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from fusehsm.supervisor import tasks
from fusehsm.supervisor.groups import SupervisedGroup
from fusehsm.text import shown

_INTERVAL: Final = 0.25  # seconds between two looks
_LONGEST: Final = 60.0  # seconds, where the command may wait for itself without a limit

_log = logging.getLogger(__name__)


class OwnAccesses:
    """Looks at the supervisor's own accesses, in a thread that reads nobody's memory."""

    def __init__(self, groups: Callable[[], Iterable[SupervisedGroup]], timeout: float) -> None:
        """`groups` gives the groups that there are. `timeout`: seconds, 0 for a minute."""
        self._groups = groups
        self._timeout = timeout or _LONGEST
        threading.Thread(target=self._look_again_and_again, name="own accesses", daemon=True).start()

    def _look_again_and_again(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            try:
                # The groups are looked at only then: that takes their events from the sockets.
                if tasks.longest_access() >= self._timeout:
                    self._deny_all()
            except Exception:
                _log.exception("looking for own accesses that wait for the command failed")

    def _deny_all(self) -> None:
        for group in self._groups():
            for event in group.accesses_of(os.getpid()):
                _log.warning(
                    "%s: memory of the command is a page of this file, which waits for the command: denied after %g s; "
                    "give its calls memory that is no mapping of a watched file",
                    shown(os.fsdecode(event.received.path)),
                    self._timeout,
                )
                group.deny(event, errno.EDEADLK)
