"""Reads the list of mounts: /proc/self/mountinfo (proc_pid_mountinfo(5)) as values."""

import errno
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from fusehsm.linux import syscalls
from fusehsm.linux.proc import descriptor_of

FILESYSTEM_TYPE = "fuse.fusehsm"  # the type of fusehsm's own mounts in mountinfo

_OCTAL = re.compile(r"\\([0-7]{3})")
_PACKED: Final = struct.Struct("=QQ")


@dataclass(frozen=True, slots=True)
class MountId:
    """The identity of a mount."""

    #: mountinfo's number. The kernel gives it to the next mount as soon as this one is gone.
    number: int
    #: A number that no other mount gets until the next boot. None before Linux 6.8, and for another user's mount without allow_other.
    unique: int | None

    def pack(self) -> bytes:
        """The id as bytes, for another process."""
        return _PACKED.pack(self.number, self.unique or 0)

    @classmethod
    def unpack(cls, packed: bytes) -> "MountId | None":
        """The id from pack()'s bytes; None for bytes of another length."""
        if len(packed) != _PACKED.size:
            return None
        number, unique = _PACKED.unpack(packed)
        return cls(number, unique or None)


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo. Paths are str; undecodable bytes are surrogates (os.fsdecode), as everywhere in Python's os."""

    #: mountinfo's number of this mount.
    mount_id: int
    #: (major, minor) of its files' st_dev. (On btrfs each subvolume has an st_dev of its own.)
    device: tuple[int, int]
    #: The directory of the filesystem that is this mount's root.
    root: str
    #: The path where it is mounted.
    mount_point: str
    #: The filesystem's type, with its subtype ("fuse.fusehsm").
    filesystem_type: str
    #: The source, as mount(2) got it.
    source: str
    #: The user who mounted it, if the filesystem tells it (FUSE's user_id=); else 0.
    owner_uid: int
    #: The number of the mount that it is mounted on.
    parent_id: int = 0
    #: Mounts below it appear in other mount namespaces, too (mount_namespaces(7)).
    is_shared: bool = False

    @classmethod
    def parse(cls, line: str) -> "Mount":
        """Parse one line of /proc/PID/mountinfo; octal escapes (\\040) are decoded. Raises ValueError for any other text."""
        before, after = line.rstrip("\n").split(" - ", 1)
        mount_id, parent, device, root, mount_point, _, *optional = before.split(" ")
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
            any(field.startswith("shared:") for field in optional),
        )

    @property
    def is_fusehsm(self) -> bool:
        return self.filesystem_type == FILESYSTEM_TYPE


def read_mounts(process: int | str = "self") -> Iterator[Mount]:
    """All mounts in a process's mount namespace (default: this process), in the file's order. A later line may hide an earlier one."""
    with open(f"/proc/{process}/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            yield Mount.parse(line)


def mount_of(path: str | bytes | os.PathLike[str]) -> Mount:
    """The mount of `path`; symbolic links are followed.

    Raises OSError as open(2) does, ENOTCONN for a FUSE mount whose server is gone. May wait for the filesystem's server.
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        return mount_of_descriptor(descriptor)
    finally:
        os.close(descriptor)


def mount_of_descriptor(descriptor: int) -> Mount:
    """The mount of an open file. Raises FileNotFoundError if that mount is not in the list: of a pipe, a memfd, or of the root of a chroot."""
    mount_id = _number_of(descriptor)
    for mount in read_mounts():
        if mount.mount_id == mount_id:
            return mount
    root = os.open("/", os.O_PATH | os.O_CLOEXEC)
    try:
        if _number_of(root) == mount_id:
            # The kernel lists the mounts below a process's root directory, and this one begins above it.
            raise FileNotFoundError(
                errno.ENOENT,
                "/ is not in the list of mounts, because this is a chroot of a directory that is no mount; "
                "run mount --bind DIR DIR before chroot DIR",
            )
    finally:
        os.close(root)
    raise FileNotFoundError(errno.ENOENT, f"descriptor {descriptor} is on no mount of this mount namespace")


def id_of_descriptor(descriptor: int) -> MountId:
    """The id of the mount of an open file. Sends no request to a filesystem's server."""
    try:
        unique = syscalls.unique_mount_id(descriptor)
    except PermissionError:  # another user's mount without allow_other
        unique = None
    return MountId(_number_of(descriptor), unique)


def id_at(mount_point: str) -> MountId:
    """The id of the topmost mount at a real path. Raises OSError as open(2) does.

    Sends requests only to the servers of the directories above.
    """
    descriptor = os.open(mount_point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return id_of_descriptor(descriptor)
    finally:
        os.close(descriptor)


def id_of(mount: Mount) -> MountId:
    """The id of a mount that was just read from the list. It lacks the unique number if another mount covers this one."""
    try:
        found = id_at(mount.mount_point)
    except OSError:  # the path is below a mount whose server is gone
        return MountId(mount.mount_id, None)
    return found if found.number == mount.mount_id else MountId(mount.mount_id, None)


def mounts_on(number: int) -> list[Mount]:
    """The mounts on the mount with that number: those inside it, and those that cover all of it."""
    return [mount for mount in read_mounts() if mount.parent_id == number and mount.mount_id != number]


def _number_of(descriptor: int) -> int:
    opened = descriptor_of(os.getpid(), descriptor)
    if opened is None:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return opened.mount_id


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
