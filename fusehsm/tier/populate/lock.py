"""Only one at a time may make or fill the stubs of a directory."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def locked(root_fd: int, path: str) -> Iterator[None]:
    """Be the only one who makes or fills stubs below a directory (flock(2)). Raises OSError EBUSY if somebody else is."""
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
