"""Accessors: processes that touch files for a workload or a test. One that waits for ever can be killed without harm to the test.

    accessor.call("pread", descriptor, 100, 0)      an operation of accessor_worker.py, or else of the module os
    accessor.call(lambda path: os.stat(path).st_size, path)    any function without closures; it can use os, mmap, errno, ...
    call = accessor.start("read_file", path)        without waiting: call.done, call.result(), await call.wait()

Accessors are forked from a small process with few imports, so a new one costs about 2 ms.
"""

import marshal
import os
import select
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

import trio

from fusehsm.conform.accessor_worker import FORK, NUMBER, STATUS

PATIENCE = 60.0  # seconds for one call of an accessor; a call without a fault takes much less


class AccessorTimeout(Exception):
    """The accessor did not return in time."""


class AccessorDied(Exception):
    """The accessor ended during a call. `signal` is the number of the signal that killed it, or 0."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name if number else "it exited")
        self.signal = number


class Zygote:
    """The process from which accessors are forked."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-S",
                    str(Path(__file__).with_name("accessor_worker.py")),
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    @property
    def session(self) -> int:
        """The session of all accessors and of their children."""
        return self._process.pid

    def fork(self, descriptor: int, uid: int, gid: int) -> tuple[int, int]:
        """Fork a worker that serves the connection `descriptor`. Returns its pid and a pidfd."""
        socket.send_fds(self._control, [FORK.pack(b"f", uid, gid)], [descriptor])
        message, descriptors, _, _ = socket.recv_fds(self._control, 64, 1)
        (pid,) = NUMBER.unpack(message)
        return pid, descriptors[0]

    def status(self, pid: int) -> int:
        """The wait status of a worker that has ended."""
        self._control.send(STATUS.pack(b"s", pid))
        (status,) = NUMBER.unpack(self._control.recv(64))
        return int(status)

    def close(self) -> None:
        """End this process and all workers."""
        self._control.close()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()


class PendingCall:
    """One operation of an accessor, running or finished."""

    def __init__(self, accessor: "Accessor", connection: Connection) -> None:
        self._accessor = accessor
        self._connection = connection
        self._outcome: tuple[bool, Any] | None = None

    @property
    def done(self) -> bool:
        """Whether the operation has finished, so that result() does not wait."""
        return self._outcome is not None or self._connection.poll(0)

    def result(self, timeout: float = PATIENCE) -> Any:
        """Wait at most `timeout` seconds and return the operation's result.

        Raises the operation's exception, AccessorTimeout (the accessor is killed then) or AccessorDied.
        """
        if self._outcome is None and not self._connection.poll(timeout):
            self._accessor.kill()
            raise AccessorTimeout(f"no result within {timeout:g} s")
        self.collect()
        assert self._outcome is not None
        succeeded, value = self._outcome
        if succeeded:
            return value
        raise value

    async def wait(self, timeout: float = PATIENCE) -> Any:
        """result() for callers in an event loop."""
        if not self.done:
            with trio.move_on_after(timeout):
                await trio.lowlevel.wait_readable(self._connection.fileno())
        return self.result(0)

    def collect(self) -> None:
        """Read the outcome from the connection. It must be there."""
        if self._outcome is not None:
            return
        try:
            self._outcome = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._outcome = (False, AccessorDied(self._accessor.wait_exit()))


class Accessor:
    """A process that runs operations on files, one at a time. `uid` and `gid` (-1: unchanged) set its user and group."""

    def __init__(self, zygote: Zygote, *, uid: int = -1, gid: int = -1) -> None:
        self._zygote = zygote
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self.pid, self._pidfd = zygote.fork(theirs.fileno(), uid, gid)
        self._connection = Connection(ours.detach())
        self._signal: int | None = None
        self._call: PendingCall | None = None

    def start(self, operation: str | Callable[..., Any], *arguments: Any) -> PendingCall:
        """Start an operation without waiting for it."""
        if self._call is not None:
            assert self._call.done, "an accessor is at one call at a time"
            self._call.collect()
        name, code, defaults = (
            (operation, None, None) if isinstance(operation, str) else (None, *_pack(operation))
        )
        self._connection.send((name, code, defaults, arguments))
        self._call = PendingCall(self, self._connection)
        return self._call

    def call(self, operation: str | Callable[..., Any], *arguments: Any, timeout: float = PATIENCE) -> Any:
        """Run an operation and return its result. Raises as PendingCall.result()."""
        return self.start(operation, *arguments).result(timeout)

    async def run(
        self, operation: str | Callable[..., Any], *arguments: Any, timeout: float = PATIENCE
    ) -> Any:
        """call() for callers in an event loop."""
        return await self.start(operation, *arguments).wait(timeout)

    def signal(self, number: int) -> None:
        """Send the process a signal."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def kill(self) -> None:
        """Send SIGKILL. The process may be unable to die before its request is answered."""
        self.signal(signal.SIGKILL)

    def exited(self, timeout: float = 0) -> bool:
        """Whether the process has ended, or ends within `timeout` seconds."""
        return self._signal is not None or bool(select.select([self._pidfd], [], [], timeout)[0])

    def wait_exit(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the process. Returns the signal that killed it, or 0. Raises AccessorTimeout."""
        if self._signal is None:
            if not self.exited(timeout):
                raise AccessorTimeout(f"not dead within {timeout:g} s")
            status = self._zygote.status(self.pid)
            self._signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return self._signal

    def close(self) -> None:
        """End the process, also during a call. A worker that cannot die stays until its mount ends."""
        self._connection.close()
        self.kill()
        if self.exited(1):
            self.wait_exit()
        os.close(self._pidfd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pack(function: Callable[..., Any]) -> tuple[bytes, tuple[Any, ...] | None]:
    assert isinstance(function, types.FunctionType), "a function or lambda"
    assert not function.__closure__, (
        "a function for another process cannot use variables of its surroundings: pass them"
    )
    return marshal.dumps(function.__code__), function.__defaults__
