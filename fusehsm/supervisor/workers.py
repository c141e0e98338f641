"""A thread for every call that is being answered: one that waits, for memory, a file system or a listener, keeps nobody else waiting.

The threads wait for calls themselves, so that the usual call is answered without a change of threads.
"""

import threading
from typing import Final

from fusehsm.supervisor.calls import Calls
from fusehsm.supervisor.notifier import Ended, Notifier

_MOST: Final = 8192  # threads: beyond that calls wait for others to end
_IDLE: Final = 4  # threads that go on waiting when there is nothing to do
_STACK: Final = 512 * 1024  # bytes


class Workers:
    """Answer every call that comes, until nobody runs under the filter any more."""

    def __init__(self, notifier: Notifier, calls: Calls) -> None:
        self._notifier = notifier
        self._calls = calls
        self._lock = threading.Lock()
        self._threads = 0
        self._idle = 0
        threading.stack_size(_STACK)
        self._start()

    def _start(self) -> bool:
        """Whether there is another thread: the limits on threads hold for us, too."""
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
                # The last thread that takes calls must not wait for anything that others bring about by theirs.
                may_wait = self._idle > 0 or self._start()
            self._calls.answer(call, may_wait=may_wait)
            with self._lock:
                if self._idle >= _IDLE:
                    self._threads -= 1
                    return
                self._idle += 1
