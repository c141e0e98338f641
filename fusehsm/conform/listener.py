"""Starts a listener in a process of its own, which sees what a listener sees: on the real kernel, and under `fusehsm run --listener`.

async with listening(scene, act) as place:                   act(listener) runs in listener_worker.py
    await scene.call("pread_path", str(place / "file"), 100, 10)
"""

import ast
import marshal
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import IO, Any, Final

import trio

from fusehsm.conform.listener_worker import DID, EVENT, PID, PRE_ACCESS, Order
from fusehsm.conform.scene import DIALECT, SIZE, Scene
from fusehsm.conform.stream import Did, heard
from fusehsm.conform.workload import Workload
from fusehsm.fanotify.abi import decode_events
from fusehsm.linux.subprocesses import own_command, own_environment
from fusehsm.linux.syscalls import MNT_DETACH, MS_BIND, mount, umount2

_NAME: Final = "the listener"
_WORKER: Final = str(Path(__file__).with_name("listener_worker.py"))
_ENDS_WITHIN: Final = 10.0  # seconds


class ListenerEnded(Exception):
    """The listener has ended before its time. The message is the last line of its complaint."""


class _Lines:
    """The lines of a listener, which become entries of the scene's stream in the order in which they were written."""

    def __init__(self, scene: Scene, process: trio.Process, complaint: IO[bytes]) -> None:
        assert process.stdout is not None
        self._scene = scene
        self._process = process
        self._complaint = complaint
        self._stdout = process.stdout
        # This object reads the pipe itself, because an entry's place in the stream is decided without waiting.
        self._descriptor = self._stdout.fileno()  # type: ignore[attr-defined]
        self._rest = b""
        self.is_ready = False
        self.has_ended = False

    def drain(self) -> None:
        """Add all lines that are there to the stream."""
        while not self.has_ended:
            try:
                data = os.read(self._descriptor, 1 << 16)
            except BlockingIOError:
                return
            self.has_ended = not data
            *lines, self._rest = (self._rest + data).split(b"\n")
            for line in lines:
                self._take(*ast.literal_eval(line.decode()))

    async def wait_ready(self) -> None:
        """Wait until its mark is set. Raises ListenerEnded."""
        await self._read_until(lambda: self.is_ready)
        if not self.is_ready:
            raise await self.failure()

    async def wait_end(self) -> None:
        """Wait until it has ended. Raises ListenerEnded if it was not in good order."""
        await self._read_until(lambda: False)
        if await self._process.wait():
            raise await self.failure()

    async def failure(self) -> ListenerEnded:
        """The cause of an end that was too early."""
        await self._process.wait()
        self._complaint.seek(0)
        said = self._complaint.read().decode(errors="replace").strip().splitlines()
        return ListenerEnded(said[-1] if said else f"exit code {self._process.returncode}")

    async def _read_until(self, condition: Callable[[], bool]) -> None:
        while True:
            self.drain()
            if self.has_ended or condition():
                return
            await trio.lowlevel.wait_readable(self._descriptor)

    def _take(self, kind: str, *values: object) -> None:
        if kind == PID:
            (pid,) = values
            assert isinstance(pid, int)
            self._scene.know(pid, _NAME)
            self.is_ready = True
        elif kind == EVENT:
            data, path, pid = values
            assert isinstance(data, bytes)
            assert isinstance(path, str)
            assert isinstance(pid, int)
            (event,) = decode_events(DIALECT, data)
            entry = heard(_NAME, self._scene.part_of(pid), "", path, event, data, DIALECT)
            self._scene.stream.append(replace(entry, answer="HELD"))
        elif kind == DID:
            what, value = values
            self._scene.say(_NAME, str(what), value)
        else:
            what, error = values
            self._scene.stream.append(Did(_NAME, str(what), str(error)))


@asynccontextmanager
async def listening(
    scene: Scene,
    act: Callable[..., object],
    *arguments: object,
    mark: str | None = "file",
    flags: int = 0,
    mask: int = PRE_ACCESS,
) -> AsyncIterator[Path]:
    """Run `act(listener, *arguments)` in a listener, until the block is left. Gives the directory that accessors use, a mount of its own.

    The directory is the scene's. The files in it must be there before, and nobody but accessors uses it meanwhile. Raises ListenerEnded.
    """
    assert isinstance(act, types.FunctionType)
    assert not act.__closure__, "a function for another process cannot use variables of its surroundings"
    order = Order(marshal.dumps(act.__code__), arguments, mark, flags, mask)
    with tempfile.TemporaryFile() as complaint, _in_memory(pickle.dumps(astuple(order))) as orders:
        command = [sys.executable, "-S", _WORKER, str(scene.backing), str(orders)]
        with _started(scene, command) as whole:
            start = partial(
                trio.lowlevel.open_process,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=complaint,
                start_new_session=True,
                pass_fds=[orders],
                env=dict(own_environment()),
            )
            process = await start(whole)
            lines = _Lines(scene, process, complaint)
            scene.on_settle.append(lines.drain)
            try:
                await lines.wait_ready()
                yield scene.backing
                assert process.stdin is not None
                await process.stdin.aclose()
                await lines.wait_end()
            finally:
                scene.on_settle.remove(lines.drain)
                await _end(process)


@contextmanager
def _in_memory(data: bytes) -> Iterator[int]:
    """A descriptor of a file that has this content and no name."""
    descriptor = os.memfd_create("order")
    try:
        os.pwrite(descriptor, data, 0)
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _started(scene: Scene, command: list[str]) -> Iterator[list[str]]:
    """The words that start a listener in the scene's directory, which is a mount of its own meanwhile."""
    place = str(scene.backing)
    if not scene.side.is_kernel:
        yield [*own_command("run", "--listener", "--events", "exact", "--mount", place), "--", *command]
        return
    # What `fusehsm run` does to it, too. Without it a mark of the mount would hear everybody.
    mount(os.fsencode(place), os.fsencode(place), None, MS_BIND)
    try:
        yield command
    finally:
        umount2(os.fsencode(place), MNT_DETACH)


async def _end(process: trio.Process) -> None:
    """End it if it still runs: `fusehsm run` then unmounts."""
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(_ENDS_WITHIN):
            await process.wait()
        # Its children, too; `fusehsm run` and its command are of one process group.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                await stream.aclose()


# Workloads


def read_and_look(path: str, count: int, offset: int) -> tuple[object, ...]:
    """Read, and look at the file and at its directory. It runs in an accessor."""
    descriptor = os.open(path, os.O_RDONLY)
    data = os.pread(descriptor, count, offset)
    seen = os.fstat(descriptor)
    names = sorted(os.listdir(os.path.dirname(path)))
    was_set = seen.st_mtime_ns if seen.st_mtime_ns < 10**18 + 10 else 0
    owner = oct(seen.st_mode), seen.st_uid, seen.st_gid
    return data, seen.st_size, was_set, owner, seen.st_nlink, os.listxattr(descriptor), names


Call = tuple[str | Callable[..., Any], *tuple[Any, ...]]
READ: Final[Call] = ("pread_path", 100, 10)
LOOK: Final[Call] = (read_and_look, 100, 10)


def stubs(place: Path) -> None:
    """Make "file" and "other": holes of SIZE bytes."""
    for name in ("file", "other"):
        (place / name).touch(0o644)
        os.truncate(place / name, SIZE)


def listener_row(
    name: str,
    act: Callable[..., object],
    *arguments: object,
    calls: tuple[Call, ...] = (READ,),
    make: Callable[[Path], None] = stubs,
    mark: str | None = "file",
    flags: int = 0,
    mask: int = PRE_ACCESS,
    differs: str | tuple[str, ...] = (),
) -> Workload:
    """A workload: `act(listener, *arguments)` runs in a listener, and an accessor makes the calls with the path of "file", one after the other."""

    async def script(scene: Scene) -> None:
        make(scene.backing)
        async with listening(scene, act, *arguments, mark=mark, flags=flags, mask=mask) as place:
            for operation, *values in calls:
                await scene.call(operation, str(place / "file"), *values)
        for left in sorted(scene.backing.iterdir()):
            if left.is_file():
                scene.say("afterwards", f"{left.name} holds", left.read_bytes())

    return Workload("listener", name, script, differs, needs_root=True)
