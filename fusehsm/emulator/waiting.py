"""Accessors that wait for a listener's answer, and the watch that ends the wait of a killed one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

import trio

from fusehsm.emulator.group import Group, Pending
from fusehsm.events import Access, EventShape

ORPHANED: Final = -1  # the verdict of a group that closed instead of answering

_INTERVAL: Final = 0.25  # seconds between two checks of all waits
_AT_ONCE: Final = 64  # waits checked before other tasks run

WaitT = TypeVar("WaitT")


@dataclass(slots=True, eq=False)
class Waiter:
    """One accessor that waits."""

    #: Its access.
    access: Access
    #: The event of this access that it waits for.
    shape: EventShape
    #: The path in the event.
    path: bytes
    #: The group that must answer; None: the accessor is parked until a group comes (--unattended hold).
    group: Group | None
    #: When the wait began, in monotonic seconds.
    since: float = field(default_factory=time.monotonic)
    #: 0 (allowed), an errno or ORPHANED; None as long as it waits.
    verdict: int | None = None
    #: Whether a listener has answered.
    answered: bool = False
    #: Set together with the verdict; None until wait() needs it.
    settled: trio.Event | None = None

    def settle(self, verdict: int) -> None:
        """End the wait with 0, an errno or ORPHANED. Only the first verdict counts."""
        if self.verdict is None:
            self.verdict = verdict
            if self.settled is not None:
                self.settled.set()

    def hear(self, pending: Pending) -> None:
        """`Pending.on_answer`: a listener has answered."""
        self.answered = True
        self.settle(pending.errno)

    async def wait(self) -> int:
        """Wait for the verdict, and return it."""
        if self.verdict is None:
            self.settled = trio.Event()
            await self.settled.wait()
        assert self.verdict is not None
        return self.verdict


class KillWatch(Generic[WaitT]):
    """Checks periodically whether a waiting accessor is being killed, because it cannot die before its request is answered.

    It is for waits whose engine is not told of every signal (docs/facts.md, section 15). `waits` is the owner's table. While the table is
    empty, the watch `sleeps`; code that adds a wait then calls wake().
    """

    def __init__(self, waits: Mapping[Any, WaitT], let_die: Callable[[WaitT], bool]) -> None:
        """`let_die` ends a wait if its accessor is being killed, and returns whether it is."""
        self.sleeps = False
        self._waits = waits
        self._let_die = let_die
        self._awake = trio.Event()

    def wake(self) -> None:
        """The table has a wait again."""
        self.sleeps = False
        self._awake.set()

    async def run(self) -> None:
        """Check the waits until the mount ends."""
        took = 0.0
        while True:
            if not self._waits:
                self._awake = trio.Event()
                self.sleeps = True
                await self._awake.wait()
            await trio.sleep(max(_INTERVAL, 10 * took))  # there may be thousands of waits
            began = trio.current_time()
            for number, wait in enumerate(list(self._waits.values()), 1):
                if self._let_die(wait) or number % _AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()
            took = trio.current_time() - began
