"""Gives each call that is being answered a thread: a call that waits for memory, a file system or a listener delays no other.

The threads receive the calls themselves, so that the usual call is answered without a switch of threads.
"""

import threading
from typing import Final

from fusehsm.supervisor.calls import Calls
from fusehsm.supervisor.notifier import Ended, Notifier

_MOST: Final = 8192  # threads; further calls wait until one is free
_IDLE: Final = 4  # idle threads that are kept
_STACK: Final = 512 * 1024  # bytes


class Workers:
    """Answers every call until no process runs under the filter any more."""

    def __init__(self, notifier: Notifier, calls: Calls) -> None:
        self._notifier = notifier
        self._calls = calls
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        threading.stack_size(_STACK)
        self._start()

    def _start(self) -> bool:
        """Start one more thread if the limits on threads allow it; returns whether it was started."""
        if self._threads >= _MOST:
            return False
        try:
            threading.Thread(target=self._work, name="worker", daemon=True).start()
        except RuntimeError:
            return False
        self._threads += 1
        self._idle += 1
        return True

    def _work(self) -> None:
        while True:
            try:
                call = self._notifier.receive()
            except Ended:
                return
            with self._lock:
                self._idle -= 1
                # The last thread that receives calls must not wait for the effect of another call.
                may_wait = self._idle > 0 or self._start()
            self._calls.answer(call, may_wait=may_wait)
            with self._lock:
                if self._idle >= _IDLE:
                    self._threads -= 1
                    return
                self._idle += 1
