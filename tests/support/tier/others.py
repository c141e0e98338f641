"""Other users who are at work in the same directories while a test runs."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fusehsm.linux import syscalls

MALLORY = 54_321
"""The user who tries to get what is not theirs. No account is needed."""

ALICE = 54_322
"""The user whose files they are."""

_LONGEST = 60  # seconds, in case that the test does not get to its end


@contextmanager
def at_work(user: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` again and again, in a process of that user. An OSError of it does not end that."""
    pid = os.fork()
    if pid == 0:
        try:
            signal.alarm(_LONGEST)
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            while True:
                with suppress(OSError):
                    act()
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def exchange(one: Path, other: Path) -> None:
    """Let two files change places (RENAME_EXCHANGE)."""
    syscalls.rename(syscalls.AT_FDCWD, bytes(one), syscalls.AT_FDCWD, bytes(other), syscalls.RENAME_EXCHANGE)


@contextmanager
def silent_mount(user: int, place: Path) -> Iterator[None]:
    """A FUSE filesystem of that user, which any user may enter, and whose server never answers."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        data = f"fd={device},rootmode=40000,user_id={user},group_id={user},allow_other".encode()
        syscalls.mount(b"silent", bytes(place), b"fuse", 0, data)
        try:
            yield
        finally:
            syscalls.umount2(bytes(place), syscalls.MNT_DETACH)
    finally:
        os.close(device)
