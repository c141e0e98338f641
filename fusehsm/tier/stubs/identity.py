"""Which file it is, whatever its name, and which mount of its file system it is on."""

import os
from hashlib import blake2b
from pathlib import Path

from fusehsm.linux import syscalls
from fusehsm.tier.stubs.mark import generation

# Which mount of a file system something was written on: what has not been brought to its disk may be gone when it is another one.


def place_of(fd: int) -> bytes:
    """A digest (8 bytes) of the boot and the mount; something new each time where the kernel has no unique numbers of mounts (before 6.8)."""
    mount = syscalls.unique_mount_id(fd)
    if mount is None:
        return os.urandom(8)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return blake2b(boot + mount.to_bytes(8, "little"), digest_size=8).digest()


Key = tuple[int, int, int]  # device, inode, generation


def key_of(fd: int, status: os.stat_result) -> Key:
    """The key of an open file; `status` is its fstat(2)."""
    return status.st_dev, status.st_ino, generation(fd)
