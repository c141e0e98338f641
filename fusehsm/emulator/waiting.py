"""Accessors that wait: for a listener's answer, and what becomes of those that are killed meanwhile."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import trio

from fusehsm.emulator.group import Group, Pending
from fusehsm.events import Access, EventShape

ORPHANED: Final = -1  # the verdict of a group that closed instead of answering

_INTERVAL: Final = 0.25  # seconds between two looks at those that wait
_AT_ONCE: Final = 64  # how many are looked at before others get a turn

WaitT = TypeVar("WaitT")


@dataclass(slots=True, eq=False)
class Waiter:
    """An accessor that is waiting: for the answer of `group`, or parked for any group to come (`group` None)."""

    access: Access
    shape: EventShape
    path: bytes
    group: Group | None
    since: float = field(default_factory=time.monotonic)
    verdict: int | None = None
    answered: bool = False
    settled: trio.Event | None = None

    def settle(self, verdict: int) -> None:
        """End the wait with 0, an errno, or ORPHANED; the first verdict counts."""
        if self.verdict is None:
            self.verdict = verdict
            if self.settled is not None:
                self.settled.set()

    def hear(self, pending: Pending) -> None:
        """`Pending.on_answer`: a listener has answered."""
        self.answered = True
        self.settle(pending.errno)

    async def wait(self) -> int:
        """The verdict, once there is one."""
        if self.verdict is None:
            self.settled = trio.Event()
            await self.settled.wait()
        assert self.verdict is not None
        return self.verdict


class KillWatch(Generic[WaitT]):
    """Looks again and again at accessors that wait, because one that is being killed cannot die until it is answered.

    For waits whose engine is not told of every signal. `waits` is the owner's own table; who adds to it calls wake() if the watch
    `sleeps`, which it does while nobody waits.
    """

    def __init__(self, waits: Mapping[Any, WaitT], let_die: Callable[[WaitT], bool]) -> None:
        """`let_die` ends a wait if its accessor is being killed, and says whether it is."""
        self.sleeps = False
        self._waits = waits
        self._let_die = let_die
        self._awake = trio.Event()

    def wake(self) -> None:
        """Somebody waits again."""
        self.sleeps = False
        self._awake.set()

    async def run(self) -> None:
        """Look after them, as long as the mount lives."""
        took = 0.0
        while True:
            if not self._waits:
                self._awake = trio.Event()
                self.sleeps = True
                await self._awake.wait()
            await trio.sleep(max(_INTERVAL, 10 * took))  # they may be thousands
            began = trio.current_time()
            for number, wait in enumerate(list(self._waits.values()), 1):
                if self._let_die(wait) or number % _AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
            took = trio.current_time() - began
