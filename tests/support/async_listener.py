"""A listener for tests that are an event loop: it notes what it hears, and allows, denies or holds it."""

import errno
import os
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from fusehsm.backends.base import Group
from fusehsm.backends.opening import open_group
from fusehsm.events import Event
from fusehsm.fanotify.abi import mask_names
from tests.support.harness import PATIENCE

HOLD = -1  # what `answer` returns for an event to be answered later, by release()

Answer = Callable[[Event], int]


@dataclass(frozen=True, slots=True)
class Heard:
    """One event, comparable: names without FAN_, bytes, and the accessor's path and process."""

    names: tuple[str, ...]
    offset: int | None
    count: int | None
    path: str
    pid: int

    @property
    def brief(self) -> tuple[str, int | None, int | None]:
        """Its name and range."""
        return "|".join(self.names), self.offset, self.count


class Listener:
    """What a group has heard, in order, and what of it is held."""

    def __init__(self, group: Group, answer: Answer) -> None:
        self.group = group
        self.heard: list[Heard] = []
        self._answer = answer
        self._held: list[Event] = []
        self._news = trio.Condition()

    def take(self) -> list[Heard]:
        """What has been heard since the last take()."""
        taken, self.heard = self.heard, []
        return taken

    def briefly(self) -> list[tuple[str, int | None, int | None]]:
        """take(), as names and ranges."""
        return [event.brief for event in self.take()]

    async def wait_for(self, number: int) -> list[Heard]:
        """Wait until so many have been heard and not taken; they are not taken."""
        await self.wait_until(lambda: len(self.heard) >= number)
        return list(self.heard)

    async def wait_until_named(self, *names: str) -> None:
        """Wait until events of all these names have been heard and not taken."""
        await self.wait_until(lambda: {*names} <= {name for event in self.heard for name in event.names})

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that holds after some event."""
        with trio.fail_after(PATIENCE):
            async with self._news:
                while not condition():
                    await self._news.wait()

    def release(self, error: int = 0) -> int:
        """Answer what is held; how many that were."""
        held, self._held = self._held, []
        for event in held:
            self._finish(event, error)
        return len(held)

    def _finish(self, event: Event, error: int) -> None:
        if event.mask & self.group.permission_events:
            with suppress(FileNotFoundError):  # its accessor has been killed
                self.group.answer(event, error)
        if event.fd >= 0:
            os.close(event.fd)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen until cancelled."""
        task_status.started()
        while True:
            await self.group.wait_readable()
            try:
                events = self.group.take_events()
            except BlockingIOError:
                continue
            for event in events:
                names = tuple(mask_names(event.mask, self.group.dialect))
                self.heard.append(Heard(names, event.offset, event.count, event.path, event.pid))
                verdict = self._answer(event)
                if verdict == HOLD:
                    self._held.append(event)
                else:
                    self._finish(event, verdict)
            async with self._news:
                self._news.notify_all()


@asynccontextmanager
async def listening(
    path: Path | str,
    mask: int | Iterable[str] | None = None,
    *,
    answer: Answer = lambda event: 0,
    **how: Any,
) -> AsyncIterator[Listener]:
    """A listener on `path` whose mark stands; `answer(event)` gives 0, an errno or HOLD; `how` goes to open_group.

    At the end what is held is denied with EIO before the group closes.
    """
    async with open_group(path, mask, **how) as group, trio.open_nursery() as nursery:
        listener = Listener(group, answer)
        await nursery.start(listener.run)
        try:
            yield listener
        finally:
            nursery.cancel_scope.cancel()
            with suppress(OSError):
                listener.release(errno.EIO)
