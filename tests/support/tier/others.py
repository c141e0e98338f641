"""Other users who are at work in the same directories while a test runs."""

import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
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
def silent_mount(user: int, place: Path, kind: bytes = b"fuse") -> Iterator[None]:
    """A FUSE filesystem of that user and type, which any user may enter, and whose server never answers."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        data = f"fd={device},rootmode=40000,user_id={user},group_id={user},allow_other".encode()
        syscalls.mount(b"silent", bytes(place), kind, 0, data)
        try:
            yield
        finally:
            with suppress(OSError):  # the test has unmounted it
                syscalls.umount2(bytes(place), syscalls.MNT_DETACH)
    finally:
        os.close(device)


@contextmanager
def listening_for(user: int, name: str) -> Iterator[socket.socket]:
    """A listening socket of that user where the user's servers have theirs. Who connects sees a process of that user."""
    place = Path(f"/tmp/fusehsm-{user}")
    place.mkdir(mode=0o700)
    os.chown(place, user, user)
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(place / name))
            # SO_PEERCRED tells the user who has called listen(2).
            os.seteuid(user)
            try:
                listener.listen(1)
            finally:
                os.seteuid(0)
            yield listener
    finally:
        shutil.rmtree(place)


@contextmanager
def answering(listener: socket.socket, answer: Callable[[bytes], Iterable[bytes]]) -> Iterator[list[bytes]]:
    """Answer each connection's first request in a thread, and hang up; yields the requests so far."""
    asked: list[bytes] = []
    listener.setblocking(True)

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                request = connection.recv(1 << 16)
                if not request:
                    continue  # a server that starts has looked whether this socket is stale
                asked.append(request)
                for part in answer(request):
                    connection.send(part)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield asked
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()
