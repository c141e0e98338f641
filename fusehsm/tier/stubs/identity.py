"""Which file it is, whatever its name: an inode number that is used again comes with another generation."""

import os

from fusehsm.tier.stubs.mark import generation

Key = tuple[int, int, int]  # device, inode, generation


def key_of(fd: int, status: os.stat_result) -> Key:
    """The key of an open file; `status` is its fstat(2)."""
    return status.st_dev, status.st_ino, generation(fd)
