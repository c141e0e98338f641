"""Starts the command: it runs launch.py as a process, sends it orders over a socket, and the process then becomes the command (execve(2))."""

import marshal
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, Self

from fusehsm.linux.signals import signals_blocked
from fusehsm.supervisor.launch import FAILURE, VIEW

MOST_PLACES = 120  # one message may carry 253 descriptors (SCM_MAX_FD), and each place has two


class LaunchError(OSError):
    """The command was not started."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__(number, os.strerror(number))
        #: The step that failed: "view", "directory", "filter" or "command"; "" if the process was killed.
        self.step = step


class Launcher:
    """One process that becomes the command. Use it with `with`: a process that has not become the command ends with it."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # A descriptor that was left open for the command stays open.
            os.set_inheritable(theirs.fileno(), True)
            program = str(Path(__file__).with_name("launch.py"))
            # Signals are blocked there until the command begins, so that none ends it half-way.
            with signals_blocked():
                self.process = subprocess.Popen(
                    [sys.executable, "-I", "-S", program, str(theirs.fileno())], close_fds=False
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._control.close()

    def make_view(self, places: Sequence[str], *, user: bool) -> list[tuple[int, int]]:
        """Give the process a mount namespace with copies of the mounts at and below `places`, before anything is mounted there.

        Returns the descriptors of the roots of two copies of each place: the command's, and one that is mounted nowhere. `user`: with a user
        namespace. Raises LaunchError.
        """
        self._control.send(marshal.dumps({VIEW: list(places), "user": user}))
        _, descriptors = self._reply(2 * len(places))
        return list(zip(descriptors[: len(places)], descriptors[len(places) :], strict=True))

    def start(self, orders: dict[str, object]) -> tuple[int, bool]:
        """Start the command. Returns the filter's descriptor, and whether only death interrupts a call that was taken.

        Call confirm() when its calls are answered. Raises LaunchError.
        """
        self._control.send(marshal.dumps(orders))
        step, descriptors = self._reply(1)
        return descriptors[0], step.startswith("running")

    def confirm(self) -> None:
        """Wait until the process has become the command. Raises LaunchError."""
        message = self._control.recv(FAILURE.size)
        if message:
            self._fail(message)

    def _reply(self, most: int) -> tuple[str, list[int]]:
        message, descriptors, _, _ = socket.recv_fds(self._control, FAILURE.size, most)
        if not descriptors:
            self._fail(message)
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        return _unpacked(message)[0], descriptors

    def _fail(self, message: bytes) -> NoReturn:
        self.process.wait()
        if not message:
            raise LaunchError("", 0)
        raise LaunchError(*_unpacked(message))


def _unpacked(message: bytes) -> tuple[str, int]:
    """The step and the errno of a message of launch.py."""
    step, number = FAILURE.unpack(message)
    return step.rstrip(b"\0").decode(), number
