"""What is mounted where: /proc/self/mountinfo (proc_pid_mountinfo(5)) read into values."""

import errno
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.linux.proc import descriptor_of

FILESYSTEM_TYPE = "fuse.fusehsm"  # how our own mounts call themselves there

_OCTAL = re.compile(r"\\([0-7]{3})")
_PACKED: Final = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class MountId:
    """Which mount something is. `number`: mountinfo's; the kernel gives it to the next mount as soon as this one is gone. `unique`: no other mount
    gets it until the next boot; None where it cannot be had: before Linux 6.8, and for mounts that other users keep for themselves."""

    number: int
    unique: int | None

    def pack(self) -> bytes:
        """For another process."""
        return _PACKED.pack(self.number, self.unique or 0)

    @classmethod
    def unpack(cls, packed: bytes) -> "MountId | None":
        """What another process has packed; None where that is nothing."""
        if len(packed) != _PACKED.size:
            return None
        number, unique = _PACKED.unpack(packed)
        return cls(number, unique or None)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. Paths are str with undecodable bytes as surrogates (os.fsdecode), as in all of Python's os."""

    mount_id: int
    device: tuple[
        int, int
    ]  # major, minor of its files' st_dev (not on btrfs, which gives every subvolume one of its own)
    root: str  # the directory of the filesystem that forms this mount's root
    mount_point: str
    filesystem_type: str
    source: str
    owner_uid: int  # the user who mounted it, where the filesystem tells (FUSE's user_id=); else 0
    parent_id: int = 0  # of the mount that it is mounted on

    @classmethod
    def parse(cls, line: str) -> "Mount":
        """One line of the file."""
        before, after = line.rstrip("\n").split(" - ", 1)
        mount_id, parent, device, root, mount_point = before.split(" ")[:5]
        filesystem_type, source, options = [*after.split(" "), "", ""][:3]
        major, minor = device.split(":")
        owner = next((option[8:] for option in options.split(",") if option.startswith("user_id=")), "0")
        return cls(
            int(mount_id),
            (int(major), int(minor)),
            _unescape(root),
            _unescape(mount_point),
            filesystem_type,
            _unescape(source),
            int(owner),
            int(parent),
        )

    @property
    def is_fusehsm(self) -> bool:
        return self.filesystem_type == FILESYSTEM_TYPE


def read_mounts(process: int | str = "self") -> Iterator[Mount]:
    """Every mount of a process's mount namespace, by default this one's, in the file's order (a later line may hide an earlier one)."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            yield Mount.parse(line)


def mount_of(path: str | bytes | os.PathLike[str]) -> Mount:
    """The mount that `path` (symbolic links followed) lies on.

    Raises OSError as open(2) does; ENOTCONN for a FUSE mount whose server is gone. May wait as long as the filesystem's server does.
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return mount_of_descriptor(descriptor)
    finally:
        os.close(descriptor)


def mount_of_descriptor(descriptor: int) -> Mount:
    """The mount that an open file lies on. Raises FileNotFoundError where that is none of this namespace (a pipe, a memfd)."""
    mount_id = _number_of(descriptor)
    for mount in read_mounts():
        if mount.mount_id == mount_id:
            return mount
    raise FileNotFoundError(errno.ENOENT, f"descriptor {descriptor} is on no mount of this mount namespace")


def id_of_descriptor(descriptor: int) -> MountId:
    """The mount that an open file lies on. Asks no server."""
    try:
        unique = syscalls.unique_mount_id(descriptor)
    except PermissionError:  # another user's mount without allow_other
        unique = None
    return MountId(_number_of(descriptor), unique)


def id_at(mount_point: str) -> MountId:
    """The mount on top at a real path. Asks no server but those of the directories above. Raises OSError as open(2) does."""
    descriptor = os.open(mount_point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return id_of_descriptor(descriptor)
    finally:
        os.close(descriptor)


def id_of(mount: Mount) -> MountId:
    """A mount that has just been read from the list; without its unique number where another mount covers it."""
    try:
        found = id_at(mount.mount_point)
    except OSError:  # below a mount whose server is gone
        return MountId(mount.mount_id, None)
    return found if found.number == mount.mount_id else MountId(mount.mount_id, None)


def mounts_on(number: int) -> list[Mount]:
    """What is mounted on the mount of that number: inside it, or covering it as a whole."""
    return [mount for mount in read_mounts() if mount.parent_id == number and mount.mount_id != number]


def _number_of(descriptor: int) -> int:
    opened = descriptor_of(os.getpid(), descriptor)
    if opened is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return opened.mount_id


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
