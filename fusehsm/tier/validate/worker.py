"""The process that reads files for validate, and may die of a read: `python -m fusehsm.tier.validate.worker SOCKET WINDOW ROOT` (descriptors).

A mapping is read as programs read it, by page faults of a user's process. A page that cannot be read kills the process with SIGBUS. (A copy by the
kernel, as in write(2) from the mapping into a pipe, would fail with EFAULT and keep the process. But that is another path in the kernel, which may
sleep where a page fault may not, and validate must report what programs see.) So there are two processes. The keeper forks the reader, waits for its
end, reports the signal that killed it, and forks the next one. A fork costs a millisecond, a new Python fifty.

Messages over SOCKET (SOCK_SEQPACKET) in the format of marshal:

    to the reader    (serial, path, size, base, [(steps, offset, length), ...])
                     WINDOW (a memfd, WINDOW bytes and a page) has the store's content from `base` on, and zeros after the file's end
    from the reader  for every step: (serial, index of the read or -1: the file cannot be opened, bytes compared, problem or None)
                     problem: (errno, 0, False), or (0, offset of the first byte that differs, whether zeros were seen)
    from the keeper  STARTED with the reader's pidfd, or DIED and a signal
"""

import ctypes
import errno
import marshal
import mmap
import os
import resource
import signal
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any, Final

from fusehsm.linux.beneath import open_beneath
from fusehsm.linux.syscalls import PAGE_SIZE, mapped_for_reading, prctl
from fusehsm.tier.validate.plan import WINDOW

STARTED: Final = "started"
DIED: Final = "died"
LONGEST_MESSAGE: Final = 128 << 10  # bytes; less than the default buffer of a socket
WINDOW_FILE_SIZE: Final = WINDOW + PAGE_SIZE  # bytes

Problem = tuple[int, int, bool]

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_READ: Final = os.O_RDONLY | os.O_NONBLOCK  # O_NONBLOCK: a FIFO in the place of a file must not make us wait


def main(connection: socket.socket, window: mmap.mmap, root_fd: int) -> None:
    """The keeper. Returns when the other end of `connection` is closed."""
    # The keeper ends with the thread that started it, the reader ends with the keeper.
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # A SIGBUS is expected here: it must not leave a core dump or a report of one.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        while True:
            pid = os.fork()
            if not pid:
                with suppress(ConnectionError):
                    _read_what_is_asked(connection, window, root_fd)
                os._exit(0)
            reader = os.pidfd_open(pid)
            socket.send_fds(connection, [marshal.dumps((STARTED, pid))], [reader])
            os.close(reader)
            _, status = os.waitpid(pid, 0)
            if not os.WIFSIGNALED(status):
                return
            connection.send(marshal.dumps((DIED, os.WTERMSIG(status))))
    except ConnectionError:
        return  # the other end has gone; the reader ends with this process


def _read_what_is_asked(connection: socket.socket, window: mmap.mmap, root_fd: int) -> None:
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    store = memoryview(window)
    while message := connection.recv(LONGEST_MESSAGE):
        serial, path, size, base, reads = marshal.loads(message)
        try:
            fd = _open(root_fd, path)
        except OSError as error:
            _answer(connection, serial, -1, 0, (error.errno or errno.EIO, 0, False))
            continue
        try:
            for number, (steps, offset, length) in enumerate(reads):
                for compared, problem in _read(fd, store[offset - base :], steps, offset, length, size):
                    _answer(connection, serial, number, compared, problem)
        finally:
            os.close(fd)


def _answer(connection: socket.socket, *answer: Any) -> None:
    connection.send(marshal.dumps(answer))


def _open(root_fd: int, path: str) -> int:
    fd = open_beneath(root_fd, path, _READ)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.ESTALE, "is not a file any more")
    return fd


def _read(
    fd: int, store: memoryview, steps: tuple[str, ...], offset: int, length: int, size: int
) -> Iterator[tuple[int, Problem | None]]:
    """Do the steps of a read and compare; `store` begins at `offset`. Yields the bytes compared and the problem of each step."""
    with ExitStack() as mapped:
        for step in steps:
            try:
                if step == "pread":
                    seen = _pread(fd, offset, length)
                    expected = store[: max(0, min(length, size - offset))]
                else:
                    seen = _mmap(mapped, fd, offset, length, size)
                    expected = store[: len(seen)]
            except OSError as error:
                yield 0, (error.errno or errno.EIO, 0, False)
                continue
            if seen == expected:
                yield len(expected), None
            else:
                at = _first_difference(seen, expected)
                yield len(expected), (0, offset + at, _is_page_of_zeros(seen, at, offset))


def _pread(fd: int, offset: int, length: int) -> bytes:
    """pread(2), repeated after a short read, up to the end of the file."""
    data = os.pread(fd, length, offset)
    while 0 < len(data) < length and (piece := os.pread(fd, length - len(data), offset + len(data))):
        data += piece
    return data


def _mmap(mapped: ExitStack, fd: int, offset: int, length: int, size: int) -> bytes:
    """The bytes in a mapping, up to the end of the file's last page: zeros follow the file's end there (mmap(2)). The mapping stays in `mapped`."""
    start = offset - offset % PAGE_SIZE
    end = -(-min(offset + length, size) // PAGE_SIZE) * PAGE_SIZE
    address = mapped.enter_context(mapped_for_reading(fd, start, end - start))
    return ctypes.string_at(address + offset - start, min(length, end - offset))


def _first_difference(seen: bytes, expected: memoryview) -> int:
    """The index of the first byte that differs, or that one side lacks. The two must differ."""
    low, high = 0, min(len(seen), len(expected))
    if seen[:high] == expected[:high]:
        return high
    while high - low > 1:  # the byte is in [low, high)
        middle = (low + high) // 2
        if seen[low:middle] == expected[low:middle]:
            low = middle
        else:
            high = middle
    return low


def _is_page_of_zeros(seen: bytes, at: int, offset: int) -> bool:
    """Whether the part of the page with the byte `at` that was read is all zeros, as a hole is."""
    start = at - (offset + at) % PAGE_SIZE
    page = seen[max(0, start) : start + PAGE_SIZE]
    return at < len(seen) and page.count(0) == len(page)


if __name__ == "__main__":
    _socket, _window, _root_fd = map(int, sys.argv[1:])
    main(socket.socket(fileno=_socket), mmap.mmap(_window, WINDOW_FILE_SIZE), _root_fd)
