"""How much the benchmark does."""

from collections.abc import Callable
from dataclasses import dataclass

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much there is to do; `kernel_source`: whether a Linux kernel is built, or else a few generated files."""

    repetitions: int
    preads: int
    unwatched_files: int
    sequential_bytes: int
    listed_files: int
    walked_files: int
    resident_files: int
    kernel_source: bool
    waits: int
    large_tree: int
    fetched_bytes: int
    executable_bytes: int
    fetched_files: int


FULL = Sizes(5, 5_000, 2_000, 1 << 30, 50_000, 100_000, 20_000, True, 50, 1_000_000, 4 << 30, 1 << 30, 10_000)
QUICK = Sizes(5, 1_000, 500, 64 << 20, 2_000, 5_000, 1_000, False, 10, 20_000, 256 << 20, 64 << 20, 500)
