"""Identity of a file, independent of its name, and of the mount of its file system."""

import os
from hashlib import blake2b
from pathlib import Path

from fusehsm.linux import syscalls
from fusehsm.tier.stubs.mark import generation

# A record names the mount on which it was written. If the mount is another one now, data that was not synced may be lost.


def place_of(fd: int) -> bytes:
    """A digest (8 bytes) of the boot and the mount. Before Linux 6.8 a mount has no unique number: the value is then random, and new at each call."""
    mount = syscalls.unique_mount_id(fd)
    if mount is None:
        return os.urandom(8)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return blake2b(boot + mount.to_bytes(8, "little"), digest_size=8).digest()


Key = tuple[int, int, int]  # device, inode, generation


def key_of(fd: int, status: os.stat_result) -> Key:
    """The key of an open file; `status` is its fstat(2)."""
    return status.st_dev, status.st_ino, generation(fd)
