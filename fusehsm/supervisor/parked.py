"""Calls that wait for long, and what ends them besides what they wait for: a signal, or the death of their thread.

From Linux 5.19 on a call that we have taken is interrupted by nothing but death (SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV), so that what we do
for it is done once. Signals that a blocking read(2) must heed are therefore looked for here, and nobody tells of them, nor of a death.
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

#: The kernel's own, for a call that is to be made again, or end with EINTR, as the handler was set up (SA_RESTART). It never reaches a
#: program, as long as a signal really waits for its thread.
ERESTARTSYS: Final = 512

_SHORTEST, _LONGEST = 0.002, 0.05  # seconds between two looks
_AWAKE = 1.0  # seconds that it goes on looking when no call waits
_SHARE = 20  # of the time at most one in so many is spent on looking

_LOOKS_TO_LAST = 3  # in how many looks in a row a signal must wait to be one that nobody else takes

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Parked:
    """A call that waits. `end` is called at most once, in the thread that looks, and must not wait: with an errno that the call is to fail
    with, or None when it is over. `interruptible`: whether signals end it. `seen`: at how many looks in a row a signal of its process waited;
    `was_quiet`: whether at one there was none."""

    call: TrappedCall
    end: Callable[[int | None], None]
    interruptible: bool
    since: float = field(default_factory=time.monotonic)
    seen: int = 0
    was_quiet: bool = False


class _EventFd:
    """Goes with its thread."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self.descriptor)


class ParkedCalls:
    """Looks after the calls that wait. `killable`: whether only death ends a call that has been taken."""

    def __init__(self, notifier: Notifier, *, killable: bool) -> None:
        self._notifier = notifier
        self._killable = killable
        self._calls: dict[Parked, None] = {}
        self._changed = threading.Condition()
        self._asleep = False
        self._own = threading.local()
        threading.Thread(target=self._look_again_and_again, name="parked", daemon=True).start()

    def wake(self) -> int:
        """The calling thread's own eventfd(2), not to be closed: to make one for every event that is waited for would cost."""
        try:
            eventfd: _EventFd = self._own.eventfd
        except AttributeError:
            eventfd = self._own.eventfd = _EventFd()
        return eventfd.descriptor

    def park(self, parked: Parked) -> None:
        """Look after a call from now on."""
        with self._changed:
            self._calls[parked] = None
            if self._asleep:
                self._changed.notify()

    def unpark(self, parked: Parked) -> None:
        """It waits no more; `end` is not called from now on."""
        with self._changed:
            self._calls.pop(parked, None)

    def look_now(self) -> None:
        """Somebody may have died."""
        with self._changed:
            self._changed.notify()

    def _look_again_and_again(self) -> None:
        pause = _SHORTEST
        last = 0.0
        while True:
            with self._changed:
                # To be woken costs whoever parks a call more than these looks do, so that not every one is told of.
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
            # Soon for what has just begun to wait: a signal may have come together with it.
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
            # A process stops when each of its threads has; no signal is to be seen in the others, but each is told.
            if tasks.is_stopping(process):
                for parked in waiting:
                    self._end(parked, ERESTARTSYS)

    def _end_one(self, process: int, candidates: list[Parked]) -> None:
        """A signal of a process of several threads: the kernel has chosen one for it (complete_signal()), the main one if that takes it, and
        does not say which. If it goes on waiting, that one is waiting for us."""
        lasting = [parked for parked in candidates if parked.seen >= _LOOKS_TO_LAST]
        if not lasting:
            return
        takers = tasks.takers_of_shared_signals(process)
        is_only = len(takers) == 1
        if process in takers:
            # The kernel's first choice. If it does not wait here it takes the signal by itself, be it late (vfork(2), a page fault).
            takers = [process]
        for parked in lasting:
            if parked.call.tid in takers:
                # In a thread that the kernel has told of no signal, ERESTARTSYS would show as it is. The main one it has told of what came
                # while that waited; of what was there before, it may have told another one, which takes it just now.
                is_told = is_only or (parked.call.tid == process and parked.was_quiet)
                self._end(parked, ERESTARTSYS if is_told else errno.EINTR)
                return

    def _end(self, parked: Parked, number: int | None) -> None:
        with self._changed:
            if parked in self._calls:
                del self._calls[parked]
                parked.end(number)
