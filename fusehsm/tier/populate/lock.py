"""The lock of a destination: only one process at a time makes or fills its stubs."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def locked(root_fd: int, path: str) -> Iterator[None]:
    """Hold the exclusive lock (flock(2)) of the directory `root_fd`. Raises OSError EBUSY if another fetch or populate holds it."""
    lock = os.open(f"/proc/self/fd/{root_fd}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            why = "another fusehsm fetch or populate is at work here; wait for it or end it"
            raise OSError(errno.EBUSY, why, path) from None
        yield
    finally:
        os.close(lock)
