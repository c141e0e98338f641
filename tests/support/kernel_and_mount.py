"""The two worlds that one expectation is held against: a real kernel's own events on ext4, and the emulator's on its mount.

The kernel is right. Where the emulator cannot do the same, a row says so with the name of an entry of fusehsm/conform/divergences.py.
"""

import errno
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from fusehsm.backends.base import Group
from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.conform.accessor import Accessor
from fusehsm.conform.divergences import DIVERGENCES
from fusehsm.conform.scene import CONTENT as CONTENT
from fusehsm.conform.scene import EVERYTHING as EVERYTHING
from fusehsm.conform.scene import MIB as MIB
from fusehsm.conform.scene import PAGE as PAGE
from fusehsm.conform.scene import PLAIN_DENY as PLAIN_DENY
from fusehsm.conform.scene import PRE_ACCESS as PRE_ACCESS
from fusehsm.conform.scene import PRE_GROUP as PRE_GROUP
from fusehsm.conform.scene import READ_ONLY as READ_ONLY
from fusehsm.conform.scene import SIZE as SIZE
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_DENY,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    LINUX_6_14,
    encode_response,
)
from fusehsm.linux.mountinfo import mount_of
from tests.support.async_listener import Answer, Heard, Listener
from tests.support.engines import diverges

OPEN_PERM, EXEC_PERM, ACCESS_PERM = FAN_OPEN_PERM, FAN_OPEN_EXEC_PERM, FAN_ACCESS_PERM

KNOWN_DIVERGENCES = frozenset(entry.name for entry in DIVERGENCES)


@dataclass(frozen=True, slots=True)
class Expected:
    """One event: its name, range in bytes, and the name of the file in the test's directory."""

    name: str
    offset: int | None = None
    count: int | None = None
    file: str = "file"

    def of(self, file: str) -> "Expected":
        """The same event about another file."""
        return Expected(self.name, self.offset, self.count, file)


O, X, A = Expected("OPEN_PERM"), Expected("OPEN_EXEC_PERM"), Expected("ACCESS_PERM")  # noqa: E741 (the facts' names)


def P(offset: int, count: int, file: str = "file") -> Expected:
    """A PRE_ACCESS event of `count` bytes at `offset`."""
    return Expected("PRE_ACCESS", offset, count, file)


@dataclass(frozen=True, slots=True)
class Failed:
    """What a call that fails is expected to return."""

    errno: int


@dataclass(frozen=True, slots=True)
class Mark:
    """An argument of fanotify_mark(2), FAN_MARK_ADD understood."""

    mask: int
    path: Path | str
    flags: int = 0


class WorldListener(Listener):
    """A listener that hears only of its own world's directory, may deny plainly, and hands out what it holds."""

    def __init__(self, group: Group, answer: Answer, place: str) -> None:
        super().__init__(group, answer)
        self._place = place

    def take(self) -> list[Heard]:
        """What was heard since the last take(). Other tests' files on the same filesystem are none of its business."""
        return [event for event in super().take() if event.path.startswith(self._place)]

    def take_held(self) -> list[Event]:
        """The held events, for the test to answer itself: their descriptors are its own now."""
        held, self._held = self._held, []
        return held

    def _finish(self, event: Event, error: int) -> None:
        if error != PLAIN_DENY:
            super()._finish(event, error)
            return
        self.group.write(encode_response(event.fd, FAN_DENY))
        os.close(event.fd)


def allow(event: Event) -> int:
    """The answer of a listener that lets everything pass."""
    return 0


@dataclass(frozen=True, slots=True)
class World:
    """A directory of its own for one test: made on `backing`, used and watched on `path` (the same on the real kernel)."""

    name: str
    backing: Path
    path: Path
    daemon: int | None = None
    engine: str = "devfuse"  # of the emulator

    @property
    def is_kernel(self) -> bool:
        """Whether this is the real thing."""
        return self.name == "kernel"

    def diverges(self, name: str) -> bool:
        """Whether the divergence of that name is to be seen here."""
        return not self.is_kernel and diverges(name, self.engine)

    def inside(self, name: str) -> "World":
        """A new directory within, for one test."""
        (self.backing / name).mkdir()
        return replace(self, backing=self.backing / name, path=self.path / name)

    def file(self, name: str = "file", size: int = SIZE) -> str:
        """Make a file of that many bytes of CONTENT; its path for accessors."""
        (self.backing / name).write_bytes(CONTENT[:size])
        return str(self.path / name)

    def content(self, name: str = "file") -> bytes:
        """What the file holds now. Not while a listener of ours watches: on the real kernel it would wait for itself."""
        return (self.backing / name).read_bytes()

    def everywhere(self, mask: int = EVERYTHING) -> Mark:
        """A mark on the whole filesystem."""
        return Mark(mask, self.path, FAN_MARK_FILESYSTEM)

    async def open_group(self, flags: int = PRE_GROUP, event_f_flags: int = READ_ONLY) -> Group:
        """fanotify_init(2)."""
        if self.is_kernel:
            return KernelGroup(flags, event_f_flags)
        return await EmulatedGroup.connect(mount_of(str(self.path)), flags, event_f_flags)

    @asynccontextmanager
    async def listener(
        self,
        *marks: Mark,
        flags: int = PRE_GROUP,
        event_f_flags: int = READ_ONLY,
        answer: Answer = allow,
    ) -> AsyncIterator[WorldListener]:
        """A group with those marks, and a listener that answers with `answer`; what it holds at the end is denied with EIO."""
        group = await self.open_group(flags, event_f_flags)
        try:
            for mark in marks:
                await group.mark(FAN_MARK_ADD | mark.flags, mark.mask, path=str(mark.path))
            async with trio.open_nursery() as nursery:
                listener = WorldListener(group, answer, f"{self.path}/")
                await nursery.start(listener.run)
                try:
                    yield listener
                finally:
                    nursery.cancel_scope.cancel()
                    listener.release(5)
        finally:
            group.close()

    def heard(self, events: list[Heard]) -> list[Expected]:
        """Events as rows have them: paths relative to this world's directory."""
        return [
            Expected("|".join(e.names), e.offset, e.count, e.path.removeprefix(f"{self.path}/"))
            for e in events
        ]


@dataclass(frozen=True, slots=True)
class Row:
    """What an accessor does, and what a listener for everything hears of it.

    `act(path, *arguments)` runs in the accessor, on a file of `size` bytes; `result` is what it returns, or Failed. `events` in order. Where the
    emulator cannot follow, `divergence` names why, and `emulated` and `emulated_result` are what it does instead.
    """

    name: str
    act: Callable[..., object]
    events: tuple[Expected, ...] = ()
    result: object = None
    arguments: tuple[object, ...] = ()
    size: int = SIZE
    divergence: str = ""
    emulated: tuple[Expected, ...] = ()
    emulated_result: object = None

    def __post_init__(self) -> None:
        assert not self.divergence or self.divergence in KNOWN_DIVERGENCES, self.divergence

    def expected(self, world: World) -> tuple[object, list[Expected]]:
        """(result, events) in that world."""
        if self.divergence and world.diverges(self.divergence):
            return self.emulated_result, list(self.emulated)
        return self.result, list(self.events)


def bytes_at(*places: int) -> list[bytes]:
    """What a file made by World.file() holds there."""
    return [CONTENT[place : place + 1] for place in places]


# What a listener may say, and what the accessor gets.
ANSWERS = {PLAIN_DENY: errno.EPERM} | {number: number for number in sorted(LINUX_6_14.deny_errnos) if number}


class Denier:
    """An answer that denies the event of that name, the one after `skip` others, as it is told."""

    def __init__(self, world: World, name: str) -> None:
        self._place = f"{world.path}/"
        self._name = name
        self.answer = 0
        self.skip = 0

    def __call__(self, event: Event) -> int:
        if not self.answer or self._name not in event.names or not event.path.startswith(self._place):
            return 0
        if self.skip:
            self.skip -= 1
            return 0
        return self.answer


async def outcome(call: Callable[[], object]) -> object:
    """What `await call()` returns, or Failed with its errno."""
    try:
        return await call()  # type: ignore[misc]
    except OSError as error:
        return Failed(error.errno or 0)


async def performed(world: World, accessor: Accessor, row: Row) -> tuple[list[Heard], object]:
    """The events that a row's call made in a new file of that world, and what it returned."""
    path = world.file(size=row.size)
    world.file("other", size=row.size)
    async with world.listener(world.everywhere()) as listener:
        returned = await outcome(lambda: accessor.run(row.act, path, *row.arguments))
        return listener.take(), returned


def command_line(pid: int) -> bytes:
    """The kernel reads it from the process's memory, whose lock it takes for that (proc(5))."""
    with open(f"/proc/{pid}/cmdline", "rb") as shown:
        return shown.read()
