"""The scene of a workload's script: its directory, its accessors and its listeners. All that they do is noted in one stream.

async def script(scene: Scene) -> None:
    path = scene.file()
    listener = await scene.listen(scene.everywhere())
    await scene.call("pread_path", path, 100, 10)
"""

import errno
import os
import random
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import trio

from fusehsm.backends.base import Group
from fusehsm.conform.accessor import Accessor, AccessorDied, PendingCall, Zygote
from fusehsm.conform.sides import Side
from fusehsm.conform.stream import Did, Heard, Stream, heard, shown
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_ALLOW,
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_DENY,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    FAN_UNLIMITED_QUEUE,
    LINUX_6_14,
    RawEvent,
    decode_events,
    deny_errno,
    encode_response,
)
from fusehsm.linux.proc import process_of

PAGE = 4096
MIB = 1 << 20
SIZE = 20000  # bytes of a workload's file: not a multiple of the page size
# The first bytes of this are the content of every file of a workload. It is the same in every run.
CONTENT = random.Random(20000).randbytes(6 * MIB)

DIALECT = LINUX_6_14
PRE_ACCESS = DIALECT.pre_access
EVERYTHING = FAN_OPEN_PERM | FAN_OPEN_EXEC_PERM | FAN_ACCESS_PERM | PRE_ACCESS
PRE_GROUP = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE
READ_ONLY = os.O_RDONLY | os.O_CLOEXEC

PLAIN_DENY = -2  # an answer: FAN_DENY without an errno
HOLD = -1  # an answer: none for now
_UNNAMED = re.compile(r"(^|/)#\d+ \(deleted\)$")  # a file of O_TMPFILE: ext4 names it after its inode
# Files with a new name in every run: those of sed -i, git's test for symbolic links, git's new objects.
_TEMPORARY = re.compile(r"^(sed|\.git/t|\.git/objects/\w\w/tmp_obj_)\w{6}$")
PATIENCE = 30.0  # seconds for one workload


@dataclass(frozen=True, slots=True)
class Mark:
    """The arguments of fanotify_mark(2) for one mark."""

    mask: int
    #: A file in the workload's directory; "" is the directory itself.
    name: str = ""
    #: Flags in addition to FAN_MARK_ADD.
    flags: int = 0


@dataclass(frozen=True, slots=True)
class Question:
    """An event that a listener must answer."""

    #: The names of its bits without FAN_, separated by |.
    name: str
    #: The file, relative to the workload's directory.
    path: str
    #: The start of the range in bytes; None for an event without a range.
    offset: int | None
    #: The length of the range in bytes; None for an event without a range.
    count: int | None
    #: The event's descriptor.
    fd: int


Answer = Callable[[Question], int]


def allow(question: Question) -> int:
    """The answer of a listener that allows everything."""
    return 0


class Listener:
    """A group in a scene, with its reader. The events that it reads are in the scene's stream, in order."""

    def __init__(
        self, scene: "Scene", name: str, group: Group, answer: Answer, *, lazy: bool, noted: bool
    ) -> None:
        self.group = group
        self.name = name
        self.lazy = lazy
        self._noted = noted
        self.held: list[RawEvent] = []
        self._scene = scene
        self._answer = answer
        self._news = trio.Condition()
        self._reading = trio.CancelScope()
        self._closed = False
        self.heard = 0

    async def mark(self, flags: int, mask: int, name: str = "") -> None:
        """fanotify_mark(2) of a file in the scene's directory. The result is noted, an error too."""
        path = str(self._scene.path / name)
        what = f"fanotify_mark {flags:#x} {mask:#x} {name or 'the directory'}"
        await self._scene.note(self.name, what, lambda: self.group.mark(flags, mask, path=path))

    async def wait_for(self, number: int) -> None:
        """Wait until the listener has read `number` events in all."""
        async with self._news:
            while self.heard < number:
                await self._news.wait()

    def release(self, error: int = 0) -> None:
        """Answer all held events. This is not noted."""
        held, self.held = self.held, []
        for event in held:
            self._finish(event, error)

    def drain(self) -> None:
        """Read all queued events, if the group is still open."""
        while not self._closed:
            try:
                data = self.group.read(1 << 16)
            except BlockingIOError:
                return
            start = 0
            for event in decode_events(DIALECT, data):
                self._take(event, data[start : start + event.length])
                start += event.length

    async def read_until(self, name: str) -> None:
        """Read until an event about the file `name` has come."""
        while not any(isinstance(entry, Heard) and entry.path == name for entry in self._scene.stream):
            await self.group.wait_readable()
            self.drain()

    async def run(self) -> None:
        """Read until close()."""
        with self._reading, suppress(trio.ClosedResourceError):
            while True:
                await self.group.wait_readable()
                self.drain()
                async with self._news:
                    self._news.notify_all()

    def close(self) -> None:
        """Close the group, which allows all waiting accesses. A second call does nothing."""
        if self._closed:
            return
        self._closed = True
        self._reading.cancel()
        self.group.close()
        for event in self.held:
            _close(event)

    def _take(self, event: RawEvent, data: bytes) -> None:
        wanted = bool(event.mask & DIALECT.permission) and event.fd >= 0
        path = self._scene.relative(self.group.event_path(event)) if event.fd >= 0 else ""
        by, other = self._scene.part_of(event.pid), self._scene.part_of_pidfd(event.pidfd)
        entry = heard(self.name, by, other, path, event, data, DIALECT)
        verdict = 0
        if wanted:
            verdict = self._answer(Question(entry.names, path, event.offset, event.count, event.fd))
            entry = replace(entry, answer=_SAID.get(verdict) or errno.errorcode[verdict])
        if self._noted:
            self._scene.stream.append(entry)
        self.heard += 1
        if verdict == HOLD:
            self.held.append(event)
        else:
            self._finish(event, verdict)

    def _finish(self, event: RawEvent, error: int) -> None:
        if event.mask & DIALECT.permission and event.fd >= 0:
            response = FAN_ALLOW if not error else FAN_DENY if error == PLAIN_DENY else deny_errno(error)
            with suppress(FileNotFoundError):  # the accessor was killed
                self.group.write(encode_response(event.fd, response))
        _close(event)


_SAID = {0: "ALLOW", HOLD: "HELD", PLAIN_DENY: "DENY"}


def _close(event: RawEvent) -> None:
    for descriptor in (event.fd, event.pidfd):
        if descriptor is not None and descriptor >= 0:
            os.close(descriptor)


class Scene:
    """A directory on one side, with accessors and listeners that work in it, and the stream of their results and events."""

    def __init__(self, side: Side, name: str, zygote: Zygote, nursery: trio.Nursery) -> None:
        self.side = side
        self.backing, self.path = side.backing / name, side.path / name
        self.backing.mkdir()
        self.backing.chmod(0o777)
        self.stream: Stream = []
        self.listeners: list[Listener] = []
        #: The largest size in bytes that each file is known to have had, by its path in the stream.
        self.sizes: dict[str, int] = {}
        #: What else adds its entries to the stream before the result of a call.
        self.on_settle: list[Callable[[], None]] = []
        self._accessors: list[Accessor] = []
        self._parts: dict[int, str] = {os.getpid(): "the listener", 0: "nobody"}
        if side.emulator is not None:
            self._parts[side.emulator.pid] = "the emulator"
        self._zygote = zygote
        self._nursery = nursery

    # Files

    def file(self, name: str = "file", size: int = SIZE, mode: int = 0o644) -> str:
        """Make a file with the first `size` bytes of CONTENT. Returns its path for accessors."""
        (self.backing / name).write_bytes(CONTENT[:size])
        (self.backing / name).chmod(mode)
        self.sizes[name] = max(size, self.sizes.get(name, 0))
        return str(self.path / name)

    def measure(self) -> None:
        """Note the sizes of all files as they are now. On the real kernel's side this process could wait for itself: listeners hear it there."""
        for path in self.backing.rglob("*"):
            if path.is_file() and not path.is_symlink():
                name = str(path.relative_to(self.backing))
                self.sizes[name] = max(path.stat().st_size, self.sizes.get(name, 0))

    def content(self, name: str = "file") -> bytes:
        """The file's content now. Not while a listener watches the file: on the real kernel this process would wait for itself."""
        return (self.backing / name).read_bytes()

    def relative(self, path: str) -> str:
        """A path as it stands in the stream: relative to the scene's directory, without changing parts."""
        if path == str(self.path):
            return "."
        name = path.removeprefix(f"{self.path}/")
        return _TEMPORARY.sub(r"\1", _UNNAMED.sub(r"\1#inode (deleted)", name))

    # Accessors

    def accessor(self, *, uid: int = -1, gid: int = -1) -> Accessor:
        """Make another accessor. The first call() makes one by itself."""
        made = Accessor(self._zygote, uid=uid, gid=gid)
        number = len(self._accessors) + 1
        self._accessors.append(made)
        self._parts[made.pid] = "accessor" if number == 1 else f"accessor {number}"
        return made

    def part_of(self, pid: int) -> str:
        """The name of a process or thread in the stream. Each unknown one gets a name with a number."""
        if pid not in self._parts:
            kind = self._kind_of(pid)
            met = sum(part.startswith(kind) for part in self._parts.values())
            self._parts[pid] = f"{kind} {met + 1}"
        return self._parts[pid]

    def know(self, pid: int, part: str) -> None:
        """Give a process its name in the stream."""
        self._parts[pid] = part

    def part_of_pidfd(self, pidfd: int | None) -> str:
        """The name of the process of an event's pidfd; "" without a pidfd."""
        if pidfd is None or pidfd < 0:
            return ""
        with open(f"/proc/self/fdinfo/{pidfd}") as info:
            return self.part_of(next(int(line.split()[1]) for line in info if line.startswith("Pid:")))

    def _kind_of(self, pid: int) -> str:
        process = process_of(pid)
        if process != pid and process in self._parts:
            return f"thread of {self._parts[process]}"
        # "stranger": a process that no accessor has started. Its events do not belong to the workload.
        try:
            return "child" if os.getsid(pid) == self._zygote.session else "stranger"
        except ProcessLookupError:
            return "gone process"

    async def call(
        self, operation: str | Callable[..., Any], *arguments: Any, by: Accessor | None = None, what: str = ""
    ) -> Any:
        """Run an operation in an accessor and note the result. Returns it, or None if the operation failed."""
        return await self.end(self.start(operation, *arguments, by=by), what or _named(operation), by)

    def start(
        self, operation: str | Callable[..., Any], *arguments: Any, by: Accessor | None = None
    ) -> PendingCall:
        """Start an operation in an accessor."""
        return (by or self.first()).start(operation, *arguments)

    async def end(self, call: PendingCall, what: str, by: Accessor | None = None) -> Any:
        """Wait for a started operation and note the result. Returns it, or None if the operation failed."""
        return await self.note(self.part_of((by or self.first()).pid), what, call.wait)

    def first(self) -> Accessor:
        """The accessor that call() uses by default."""
        return self._accessors[0] if self._accessors else self.accessor()

    async def note(self, who: str, what: str, call: Callable[[], Any]) -> Any:
        """Await `call()` and note its result, after the events that listeners heard of it. Returns the result, or None if the call failed."""
        value: Any = None
        try:
            value = await call()
            result = shown(value)
        except OSError as error:
            result = errno.errorcode.get(error.errno or 0, repr(error))
        except AccessorDied as error:
            result = f"died of {error}"
        self.settle()
        self.stream.append(Did(who, what, result))
        return value

    def say(self, who: str, what: str, result: object) -> None:
        """Add an entry to the stream."""
        self.stream.append(Did(who, what, shown(result)))

    def settle(self) -> None:
        """Let all listeners except the lazy ones read their queued events, and those in other processes say what they did."""
        for listener in self.listeners:
            if not listener.lazy:
                listener.drain()
        for add in self.on_settle:
            add()

    # Listeners

    def everywhere(self, mask: int = EVERYTHING) -> Mark:
        """A mark on the whole file system."""
        return Mark(mask, "", FAN_MARK_FILESYSTEM)

    async def listen(
        self,
        *marks: Mark,
        flags: int = PRE_GROUP,
        event_f_flags: int = READ_ONLY,
        answer: Answer = allow,
        lazy: bool = False,
        noted: bool = True,
    ) -> Listener:
        """Make a group with these marks, and its reader.

        It reads at once; a `lazy` one reads when the script calls it. `noted`: its events are in the stream.
        """
        name = f"group {len(self.listeners) + 1}"
        group = await self.side.open_group(flags, event_f_flags)
        listener = Listener(self, name, group, answer, lazy=lazy, noted=noted)
        self.listeners.append(listener)
        for mark in marks:
            mask = mark.mask & ~self.side.without
            await group.mark(FAN_MARK_ADD | mark.flags, mask, path=str(self.path / mark.name))
        if not lazy:
            self._nursery.start_soon(listener.run)
        return listener

    def close(self) -> None:
        """End all listeners and accessors."""
        for listener in self.listeners:
            listener.close()
        for accessor in self._accessors:
            accessor.close()


def _named(operation: str | Callable[..., Any]) -> str:
    return operation if isinstance(operation, str) else operation.__name__


@asynccontextmanager
async def scene(side: Side, name: str, zygote: Zygote, patience: float = PATIENCE) -> AsyncIterator[Scene]:
    """A scene in a new directory `name`. Its listeners and accessors end with it. Raises trio.TooSlowError after `patience` seconds."""
    with trio.fail_after(patience):
        async with trio.open_nursery() as nursery:
            made = Scene(side, name, zygote, nursery)
            try:
                yield made
                made.settle()
            finally:
                nursery.cancel_scope.cancel()
                made.close()
