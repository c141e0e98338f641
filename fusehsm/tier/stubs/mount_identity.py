"""Which mount of a file system something was written on: what has not been brought to its disk may be gone when it is another one."""

import os
from hashlib import blake2b
from pathlib import Path

from fusehsm.linux import filesystem_calls as syscalls


def place_of(fd: int) -> bytes:
    """A digest (8 bytes) of the boot and the mount; something new each time where the kernel has no unique numbers of mounts (before 6.8)."""
    mount = syscalls.unique_mount_id(fd)
    if mount is None:
        return os.urandom(8)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return blake2b(boot + mount.to_bytes(8, "little"), digest_size=8).digest()
