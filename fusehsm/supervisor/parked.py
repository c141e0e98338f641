"""Watches calls that wait for long, for the two other things that end them: a signal, or the death of their thread.

From Linux 5.19 on only death interrupts a call that the supervisor has taken (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV), so its work for the call
is done once. But a blocking read(2) must heed signals. The kernel reports neither those signals nor a death, so this module looks for them.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from fusehsm.supervisor import tasks
from fusehsm.supervisor.notifier import Notifier, TrappedCall

#: The kernel's own errno for a call that is to be made again, or to end with EINTR, as the handler was set up (SA_RESTART). It never reaches
#: a program as long as a signal really waits for its thread.
ERESTARTSYS: Final = 512

_SHORTEST, _LONGEST = 0.002, 0.05  # seconds between two looks
_AWAKE = 1.0  # seconds for which the looks go on when no call waits
_SHARE = 20  # the looks take at most one part in this many of the time

_LOOKS_TO_LAST = 3  # a signal that waits for this many looks in a row is one that no other thread takes

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Parked:
    """A call that waits."""

    #: The call.
    call: TrappedCall
    #: Called at most once, in the thread that looks, and must not wait. Its argument: the errno for the call, or None if the call is over.
    end: Callable[[int | None], None]
    #: Whether signals end it.
    interruptible: bool
    #: When the wait began, seconds of time.monotonic().
    since: float = field(default_factory=time.monotonic)
    #: The number of looks in a row at which a signal of its process waited.
    seen: int = 0
    #: Whether no signal waited at one of the looks.
    was_quiet: bool = False


class _EventFd:
    """An eventfd(2) that is closed with its thread."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self.descriptor)


class ParkedCalls:
    """Watches the calls that wait. `killable`: only death ends a call that has been taken."""

    def __init__(self, notifier: Notifier, *, killable: bool) -> None:
        self._notifier = notifier
        self._killable = killable
        self._calls: dict[Parked, None] = {}
        self._changed = threading.Condition()
        self._asleep = False
        self._own = threading.local()
        threading.Thread(target=self._look_again_and_again, name="parked", daemon=True).start()

    def wake(self) -> int:
        """The calling thread's own eventfd(2), which the caller must not close. A new one for each wait would cost time."""
        try:
            eventfd: _EventFd = self._own.eventfd
        except AttributeError:
            eventfd = self._own.eventfd = _EventFd()
        return eventfd.descriptor

    def park(self, parked: Parked) -> None:
        """Watch a call from now on."""
        with self._changed:
            self._calls[parked] = None
            if self._asleep:
                self._changed.notify()

    def unpark(self, parked: Parked) -> None:
        """Stop watching a call that waits no more. From now on `end` is not called."""
        with self._changed:
            self._calls.pop(parked, None)

    def look_now(self) -> None:
        """Look at once, because a thread may have died."""
        with self._changed:
            self._changed.notify()

    def _look_again_and_again(self) -> None:
        pause = _SHORTEST
        last = 0.0
        while True:
            with self._changed:
                # A notice for each parked call would cost its thread more than these looks do.
                if not self._calls and time.monotonic() - last > _AWAKE:
                    self._asleep = True
                    self._changed.wait()
                    self._asleep = False
                    pause = _SHORTEST
                self._changed.wait(pause)
                calls = list(self._calls)
            begun, spent = time.monotonic(), time.thread_time()
            if calls:
                last = begun
            try:
                self._look(calls)
            except Exception:
                _log.exception("looking after waiting calls failed")
            newest = max((parked.since for parked in calls), default=begun)
            # Look soon at a call that has just begun to wait: a signal may have come together with it.
            pause = min(max((begun - newest) / 10, _SHORTEST), _LONGEST)
            pause = max(pause, (time.thread_time() - spent) * _SHARE)

    def _look(self, calls: list[Parked]) -> None:
        shared: dict[int, list[Parked]] = {}
        quiet: dict[int, list[Parked]] = {}
        for parked in calls:
            if not self._notifier.is_valid(parked.call):
                self._end(parked, None)
            elif parked.interruptible and self._killable:
                signals = tasks.signals_of(parked.call.tid)
                if signals is None:
                    continue
                if signals.own or (signals.shared and signals.threads == 1):
                    self._end(parked, ERESTARTSYS)
                elif signals.shared:
                    shared.setdefault(signals.process, []).append(parked)
                    parked.seen += 1
                else:
                    parked.seen = 0
                    parked.was_quiet = True
                    if signals.threads > 1:
                        quiet.setdefault(signals.process, []).append(parked)
        for process, candidates in shared.items():
            self._end_one(process, candidates)
        for process, waiting in quiet.items():
            # A process stops when each of its threads has stopped. The other threads show no signal, but each must be told.
            if tasks.is_stopping(process):
                for parked in waiting:
                    self._end(parked, ERESTARTSYS)

    def _end_one(self, process: int, candidates: list[Parked]) -> None:
        """End one call for a signal of a process of several threads.

        The kernel has chosen a thread for the signal (complete_signal()), the main thread if that takes it, and does not tell which. If the signal
        goes on waiting, the chosen thread waits here.
        """
        lasting = [parked for parked in candidates if parked.seen >= _LOOKS_TO_LAST]
        if not lasting:
            return
        takers = tasks.takers_of_shared_signals(process)
        is_only = len(takers) == 1
        if process in takers:
            # The kernel's first choice. If the main thread does not wait here, it takes the signal by itself, perhaps late (vfork(2), a page fault).
            takers = [process]
        for parked in lasting:
            if parked.call.tid in takers:
                # If the kernel has not told a thread of the signal, ERESTARTSYS would reach the program. It has told the main thread of a
                # signal that came during that thread's wait. It may have told another thread of an earlier signal, which takes it just now.
                is_told = is_only or (parked.call.tid == process and parked.was_quiet)
                self._end(parked, ERESTARTSYS if is_told else errno.EINTR)
                return

    def _end(self, parked: Parked, number: int | None) -> None:
        with self._changed:
            if parked in self._calls:
                del self._calls[parked]
                parked.end(number)
