"""Trees that are deeper than paths, descriptors and Python's stack are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.tier.fetching import run

LEVELS = 3000  # a path of 6,000 bytes


@contextmanager
def nested(place: Path, levels: int = LEVELS, name: str = "d") -> Iterator[int]:
    """Make so many directories one in the other in `place`; a descriptor of the innermost. All are gone at the end."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(levels):
            os.mkdir(name, dir_fd=fd)
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd
    finally:
        os.close(fd)
        run("rm", "-rf", place / name)


def innermost(place: Path, name: str = "d") -> int:
    """A descriptor of the last directory of that name that lies in one of that name, and so on, from `place` down."""
    fd = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    while True:
        try:
            inner = os.open(name, os.O_RDONLY | os.O_DIRECTORY, dir_fd=fd)
        except FileNotFoundError:
            return fd
        os.close(fd)
        fd = inner
