"""A process that keeps files locked in the kernel: it writes to them from memory that never comes (userfaultfd(2)).

`python -m tests.support.tier.locking PATH...`: a thread for each file, which writes 4096 bytes at offset 100. For each directory a thread lists it,
and another one waits to make a name in it. Root only.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support import harness
from tests.support.requirements import require

_CALL = {"x86_64": 323, "aarch64": 282}  # userfaultfd(2)
_LIST = {"x86_64": 217, "aarch64": 61}  # getdents64(2)
_UFFDIO_API = 0xC018AA3F  # linux/userfaultfd.h
_UFFDIO_REGISTER = 0xC020AA00
_MISSING = 1


@contextmanager
def locked(*paths: Path) -> Iterator[None]:
    """These files are locked meanwhile."""
    require(platform.machine() in _CALL, f"needs the number of userfaultfd(2) on {platform.machine()}")
    command = [sys.executable, "-m", "tests.support.tier.locking", *map(str, paths)]
    process = subprocess.Popen(command, cwd=harness.ROOT)
    try:
        end = time.monotonic() + harness.PATIENCE
        number = sum(1 + path.is_dir() for path in paths)
        while sum(map(_waits, Path(f"/proc/{process.pid}/task").iterdir())) < number:
            assert process.poll() is None
            assert time.monotonic() < end, "the files are not locked"
            time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait(harness.PATIENCE)


def _waits(task: Path) -> bool:
    try:
        # A wait for a lock is in state D.
        return (
            "handle_userfault" in (task / "wchan").read_text()
            or "\nState:\tD" in (task / "status").read_text()
        )
    except OSError:
        return False


def main() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fault_fd = libc.syscall(_CALL[platform.machine()], os.O_CLOEXEC)
    assert fault_fd >= 0, os.strerror(ctypes.get_errno())
    fcntl.ioctl(fault_fd, _UFFDIO_API, struct.pack("=QQQ", 0xAA, 0, 0))
    memory = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(fault_fd, _UFFDIO_REGISTER, struct.pack("=QQQQ", address, mmap.PAGESIZE, _MISSING, 0))

    def write(path: str) -> None:
        fd = os.open(path, os.O_RDWR)
        libc.pwrite(fd, ctypes.c_void_p(address), ctypes.c_size_t(4096), ctypes.c_long(100))

    def list_names(path: str) -> None:
        fd = os.open(path, os.O_RDONLY)
        threading.Timer(0.5, os.mkdir, (f"{path}/new",)).start()
        libc.syscall(_LIST[platform.machine()], fd, ctypes.c_void_p(address), ctypes.c_size_t(4096))

    threads = [
        threading.Thread(target=list_names if os.path.isdir(path) else write, args=(path,))
        for path in sys.argv[1:]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    memory.close()


if __name__ == "__main__":
    main()
