"""The sizes of the benchmark."""

from collections.abc import Callable
from dataclasses import dataclass

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of all parts."""

    #: Measurements of each case.
    repetitions: int
    #: (a), (j): calls of pread(2) in a measurement.
    preads: int
    #: (b): files.
    unwatched_files: int
    #: (c): bytes of the file.
    sequential_bytes: int
    #: (d): files.
    listed_files: int
    #: (e): files.
    walked_files: int
    #: (f): files.
    resident_files: int
    #: (g), (k): True: build a Linux kernel; False: build a few generated files.
    kernel_source: bool
    #: (h): accesses of each thread.
    waits: int
    #: (i): files.
    large_tree: int
    #: (k): bytes of the large file.
    fetched_bytes: int
    #: (k): bytes of the program.
    executable_bytes: int
    #: (k): number of small files.
    fetched_files: int


FULL = Sizes(5, 5_000, 2_000, 1 << 30, 50_000, 100_000, 20_000, True, 50, 1_000_000, 4 << 30, 1 << 30, 10_000)
QUICK = Sizes(5, 1_000, 500, 64 << 20, 2_000, 5_000, 1_000, False, 10, 20_000, 256 << 20, 64 << 20, 500)
