"""Sequences of small generated steps: opens, reads, writes and marks, in any order.

A step is a tuple of its name and plain values. Two accessors work on the files "one" and "two". A group of class PRE_CONTENT watches PRE_ACCESS
of all files from beginning to end, so every file is armed and no result depends on earlier page-cache content. A second group, of class CONTENT,
is opened and closed by steps.

    ("open", accessor, file, flags)                     the value `open` below is the number of such a step, from 0
    ("pread", open, count, offset), ("read", open, count), ("lseek", open, offset)
    ("pwrite", open, count, offset), ("write", open, count), ("ftruncate", open, size), ("fallocate", open, mode, offset, count)
    ("sendfile", open, offset, count), ("map", open, offset, count), ("close", open)
    ("truncate", accessor, file, size), ("rename", accessor, file, file), ("unlink", accessor, file)
    ("mark", group, flags, mask, target)                target: a file's name, or "" for the directory
    ("group",), ("close group",)                        the second group
    ("deny", name, error)                               the first group denies events of this name from now on; error 0: it allows them
"""

import ctypes
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

from fusehsm.conform.accessor import Accessor
from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import PRE_ACCESS, Listener, Mark, Question, Scene
from fusehsm.conform.workload import Script
from fusehsm.fanotify.abi import FAN_CLASS_CONTENT, FAN_CLOEXEC, FAN_MARK_FILESYSTEM

Step = tuple[Any, ...]
FILES = ("one", "two")
ACCESSORS = 2

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def lseek(descriptor: int, offset: int) -> int:
    return os.lseek(descriptor, offset, os.SEEK_SET)


def pwrite(descriptor: int, count: int, offset: int) -> int:
    return os.pwrite(descriptor, b"w" * count, offset)


def write(descriptor: int, count: int) -> int:
    return os.write(descriptor, b"W" * count)


def fallocate(descriptor: int, mode: int, offset: int, count: int) -> None:
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(count)):
        raise OSError(ctypes.get_errno(), "fallocate")


def send(descriptor: int, offset: int, count: int) -> bytes:
    if offset >= os.fstat(descriptor).st_size:
        return b""  # the divergence "empty reads and writes"
    target = os.memfd_create("target")
    try:
        return os.pread(target, os.sendfile(target, descriptor, offset, count), 0)
    finally:
        os.close(target)


def map_and_touch(descriptor: int, offset: int, count: int) -> bytes:
    if offset >= os.fstat(descriptor).st_size or fcntl.fcntl(descriptor, fcntl.F_GETFL) & 3 == os.O_WRONLY:
        return b""  # the divergences "mappings ask when touched" and "calls that fail"
    # By libc: mmap.mmap refuses ranges beyond the end of the file. Only the first page, which is inside the file, is touched.
    address = libc.mmap(None, count, mmap.PROT_READ, mmap.MAP_PRIVATE, descriptor, offset)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    try:
        return ctypes.string_at(address, 1)
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(count))


_OPEN_FILE: dict[str, str | Callable[..., Any]] = {
    "pread": "pread",
    "read": "read",
    "lseek": lseek,
    "pwrite": pwrite,
    "write": write,
    "ftruncate": "ftruncate",
    "fallocate": fallocate,
    "sendfile": send,
    "map": map_and_touch,
    "close": "close",
}


class _Run:
    """One sequence that runs in a scene."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._accessors = [scene.accessor() for _ in range(ACCESSORS)]
        self._opened: list[tuple[Accessor, int | None]] = []
        self._denied: dict[str, int] = {}
        self._groups: list[Listener | None] = []

    async def begin(self) -> None:
        for name in FILES:
            self._scene.file(name)
        mark = Mark(PRE_ACCESS, "", FAN_MARK_FILESYSTEM)
        self._groups = [await self._scene.listen(mark, answer=self._answer), None]

    def _answer(self, question: Question) -> int:
        return self._denied.get(question.name, 0)

    async def do(self, name: str, *values: Any) -> None:
        step = getattr(self, f"_{name.replace(' ', '_')}", None)
        await (step(*values) if step else self._use(name, *values))

    async def _use(self, name: str, number: int, *values: Any) -> None:
        accessor, descriptor = self._opened[number]
        if descriptor is not None:
            await self._do(accessor, _OPEN_FILE[name], descriptor, *values, what=name)

    async def _do(
        self, accessor: Accessor, operation: str | Callable[..., Any], *values: Any, what: str = ""
    ) -> Any:
        """Make a call; the sequence goes on after a failure too. An argument that Python itself refuses is a result as well."""
        try:
            return await self._scene.call(operation, *values, by=accessor, what=what)
        except (ValueError, OverflowError) as error:
            self._scene.settle()
            self._scene.say(self._scene.part_of(accessor.pid), what or str(operation), repr(error))
            return None

    async def _open(self, accessor: int, file: str, flags: int) -> None:
        by = self._accessors[accessor]
        descriptor = await self._do(by, "open", self._path(file), flags, 0o600)
        self._opened.append((by, descriptor))

    async def _truncate(self, accessor: int, file: str, size: int) -> None:
        await self._do(self._accessors[accessor], "truncate", self._path(file), size)

    async def _rename(self, accessor: int, file: str, new: str) -> None:
        await self._do(self._accessors[accessor], "rename", self._path(file), self._path(new))

    async def _unlink(self, accessor: int, file: str) -> None:
        await self._do(self._accessors[accessor], "unlink", self._path(file))

    async def _mark(self, group: int, flags: int, mask: int, target: str) -> None:
        listener = self._groups[group]
        if listener is not None:
            await listener.mark(flags, mask, target)

    async def _group(self) -> None:
        if self._groups[1] is None:
            self._groups[1] = await self._scene.listen(flags=FAN_CLASS_CONTENT | FAN_CLOEXEC)

    async def _close_group(self) -> None:
        listener = self._groups[1]
        if listener is not None:
            listener.close()
            self._groups[1] = None

    async def _deny(self, name: str, error: int) -> None:
        self._denied[name] = error

    def _path(self, file: str) -> str:
        return str(self._scene.path / file)

    async def end(self) -> None:
        for listener in self._groups:
            if listener is not None:
                listener.close()
        for path in sorted(self._scene.backing.iterdir()):
            self._scene.say("afterwards", f"{path.name} holds", path.read_bytes())


def sequence(steps: Sequence[Step]) -> Script:
    """The script that runs these steps."""

    async def script(scene: Scene) -> None:
        run = _Run(scene)
        await run.begin()
        for name, *values in steps:
            await run.do(name, *values)
        await run.end()

    return script
