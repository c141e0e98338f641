"""fallocate(2) in all modes."""

import ctypes
import os
from functools import partial

from fusehsm.conform.accessor_worker import libc
from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import one_call

row = partial(one_call, "allocating", differs="fallocate")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def fallocate(path: str, mode: int, offset: int, length: int, flags: int = os.O_RDWR) -> int:
    descriptor = os.open(path, flags)
    if libc.fallocate(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "fallocate")
    return os.fstat(descriptor).st_size


def posix_fallocate(path: str, offset: int, length: int) -> int:
    descriptor = os.open(path, os.O_RDWR)
    os.posix_fallocate(descriptor, offset, length)
    return os.fstat(descriptor).st_size


def allocate_in_child(path: str) -> int:
    descriptor = os.open(path, os.O_RDWR)
    child = os.fork()
    if child == 0:
        os._exit(libc.fallocate(descriptor, 0, ctypes.c_int64(5000), ctypes.c_int64(100)) != 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


MODES = ("fallocate", "fallocate modes")
KEEP, PUNCH, COLLAPSE, ZERO, INSERT, UNSHARE = 1, 2, 8, 0x10, 0x20, 0x40  # linux/falloc.h
WORKLOADS = [
    row("within", fallocate, 0, 5000, 100),
    row("beyond the end", fallocate, 0, 5000, 95000),
    row("far beyond the end", fallocate, 0, MIB, 100),
    row("large", fallocate, 0, 100, 3 * MIB),
    row("keeping the size", fallocate, KEEP, 5000, 95000),
    row("a hole", fallocate, PUNCH | KEEP, PAGE, 2 * PAGE),
    row("a hole in odd places", fallocate, PUNCH | KEEP, 5000, 9000),
    row("a hole to beyond the end", fallocate, PUNCH | KEEP, 2 * PAGE, MIB),
    row("a hole at the end", fallocate, PUNCH | KEEP, SIZE, PAGE),
    row("zeros", fallocate, ZERO, 5000, 9000),
    row("zeros beyond the end", fallocate, ZERO, 19000, 9000),
    row("zeros keeping the size", fallocate, ZERO | KEEP, 19000, 9000),
    row("collapse", fallocate, COLLAPSE, PAGE, PAGE, differs=MODES),
    row("insert", fallocate, INSERT, PAGE, PAGE, differs=MODES),
    row("unshare", fallocate, UNSHARE, PAGE, PAGE, differs=MODES),
    row("zeros on the device", fallocate, 0x80, PAGE, PAGE, differs=("fallocate", "calls that fail")),
    row("zeros on the device, keeping the size", fallocate, 0x80 | KEEP, PAGE, PAGE, differs=()),
    row("collapse to the end", fallocate, COLLAPSE, PAGE, 10 * PAGE, differs=MODES),
    row("insert beyond the end", fallocate, INSERT, 10 * PAGE, PAGE, differs=MODES),
    row("collapse in odd places", fallocate, COLLAPSE, 100, PAGE, differs=MODES),
    row("what appends", fallocate, 0, 5000, 95000, os.O_WRONLY | os.O_APPEND),
    row("a hole without keeping the size", fallocate, PUNCH, 0, PAGE, differs=()),
    row("an unknown mode", fallocate, 0x1000, 0, PAGE, differs=()),
    row("nothing", fallocate, 0, 0, 0, differs=()),
    row("less than nothing", fallocate, 0, 0, -1, differs=()),
    row("at a negative place", fallocate, 0, -1, PAGE, differs=()),
    row("more than can be", fallocate, 0, 2**63 - 10, 100, differs=("fallocate", "calls that fail")),
    row("what is open for reading", fallocate, 0, 0, PAGE, os.O_RDONLY, differs=()),
    row("posix_fallocate", posix_fallocate, 5000, 95000),
    row("in a child", allocate_in_child),
]
