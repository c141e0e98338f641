"""Groups for notifications that are read only when a test says so, in either world."""

import os
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import trio

from fusehsm.backends.base import Group
from fusehsm.conform.accessor import Accessor
from fusehsm.fanotify.abi import (
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_OPEN,
    NOTIFICATION_EVENTS,
    RawEvent,
    decode_events,
    mask_names,
)
from tests.support.harness import PATIENCE
from tests.support.kernel_and_mount import (
    Mark,
    World,
)

NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC
READ_WRITE = os.O_RDWR | os.O_CLOEXEC
SURVIVING = FAN_MARK_IGNORED_SURV_MODIFY
ALL = NOTIFICATION_EVENTS
FENCE = "fence"


@dataclass(frozen=True, slots=True)
class Told:
    """One notification: the names of its bits, the file's name in the test's directory ("" is the directory), the process."""

    names: frozenset[str]
    file: str
    pid: int


class Notes:
    """A group that is read only when the test says so, so that what is merged does not depend on time."""

    def __init__(self, world: World, group: Group, fencer: Accessor) -> None:
        self.group = group
        self._world = world
        self._fencer = fencer
        self._fence = str(world.path / FENCE)

    async def read(self) -> list[RawEvent]:
        """All that was queued until now. One queue: what stands before an open that this makes is all there is."""
        await self._fencer.run("open", self._fence, os.O_RDONLY)
        taken: list[RawEvent] = []
        with trio.fail_after(PATIENCE):
            while True:
                await self.group.wait_readable()
                try:
                    events = decode_events(self.group.dialect, self.group.read(4096))
                except BlockingIOError:
                    continue
                for event in events:
                    if event.fd >= 0 and self.group.event_path(event) == self._fence:
                        close(event)
                        return taken
                    taken.append(event)

    async def told(self) -> list[Told]:
        """read(), as values; other tests' files are none of its business."""
        told = []
        for event in await self.read():
            path = self.group.event_path(event)
            close(event)
            if path == str(self._world.path) or path.startswith(f"{self._world.path}/"):
                names = frozenset(mask_names(event.mask, self.group.dialect))
                told.append(Told(names, path[len(str(self._world.path)) + 1 :], event.pid))
        return told

    async def names(self) -> list[str]:
        """told(), as the kernel names the bits, in the order of their numbers: "ACCESS|OPEN"."""
        return [named(told) for told in await self.told()]


def named(told: Told) -> str:
    return "|".join(sorted(told.names))


def close(event: RawEvent) -> None:
    """Close an event's descriptors."""
    for descriptor in (event.fd, event.pidfd):
        if descriptor is not None and descriptor >= 0:
            os.close(descriptor)


TakeNotes = Callable[..., AbstractAsyncContextManager[Notes]]


def note_taker(world: World, fencer: Accessor) -> TakeNotes:
    """`async with note_taker(world, fencer)(*marks, flags=..., event_f_flags=...) as notes`: a group with those marks, by default one for
    every notification. The accessor `fencer` is its own."""
    world.file(FENCE)

    @asynccontextmanager
    async def take_notes(
        *marks: Mark, flags: int = NOTIF_GROUP, event_f_flags: int = os.O_RDONLY | os.O_CLOEXEC
    ) -> AsyncIterator[Notes]:
        group = await world.open_group(flags, event_f_flags)
        try:
            for mark in marks or (world.everywhere(ALL),):
                await group.mark(FAN_MARK_ADD | mark.flags, mark.mask, path=str(mark.path))
            await group.mark(FAN_MARK_ADD, FAN_OPEN, path=str(world.path / FENCE))
            yield Notes(world, group, fencer)
        finally:
            group.close()

    return take_notes


def on(name: str, mask: int, flags: int = 0) -> Callable[[World], Mark]:
    """A mark on something in the test's directory; "" is the directory."""
    return lambda world: Mark(mask, world.path / name if name else world.path, flags)


# What accessors do


def read_whole(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    length = len(os.read(descriptor, 100))
    os.close(descriptor)
    return length


def write_some(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    length = os.write(descriptor, b"new")
    os.close(descriptor)
    return length


def open_and_exit(path: str) -> int:
    child = os.fork()
    if child == 0:
        os.open(path, os.O_RDWR)
        os._exit(0)
    os.waitpid(child, 0)
    return child
