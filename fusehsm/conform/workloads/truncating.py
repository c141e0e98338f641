"""Ways to truncate a file."""

import os
from functools import partial

from fusehsm.conform.scene import MIB, PAGE, SIZE
from fusehsm.conform.workload import one_call

row = partial(one_call, "truncating")

# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def truncate(path: str, size: int) -> int:
    os.truncate(path, size)
    return os.stat(path).st_size


def ftruncate(path: str, size: int, flags: int = os.O_RDWR) -> int:
    descriptor = os.open(path, flags)
    os.ftruncate(descriptor, size)
    return os.fstat(descriptor).st_size


WORKLOADS = [
    *(
        row(f"{act.__name__} to {size}", act, size)
        for size in (0, 100, PAGE, 5000, SIZE, 30000, MIB)
        for act in (truncate, ftruncate)
    ),
    row("truncate to -1", truncate, -1),
    row("truncate of what is empty", truncate, 0, size=0),
    row("ftruncate of what is open for reading", ftruncate, 5, os.O_RDONLY),
    row("ftruncate of what appends", ftruncate, 5000, os.O_WRONLY | os.O_APPEND),
]
