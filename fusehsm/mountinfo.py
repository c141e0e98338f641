"""What is mounted where: /proc/self/mountinfo (proc_pid_mountinfo(5)) read into values."""

import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

FILESYSTEM_TYPE = "fuse.fusehsm"  # how our own mounts call themselves there

_OCTAL = re.compile(r"\\([0-7]{3})")


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

    @classmethod
    def parse(cls, line: str) -> "Mount":
        """One line of the file."""
        before, after = line.rstrip("\n").split(" - ", 1)
        mount_id, _parent, device, root, mount_point = before.split(" ")[:5]
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
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
        mount_id = next(int(line.split()[1]) for line in lines if line.startswith("mnt_id:"))
    for mount in read_mounts():
        if mount.mount_id == mount_id:
            return mount
    raise FileNotFoundError(errno.ENOENT, f"descriptor {descriptor} is on no mount of this mount namespace")


def _unescape(text: str) -> str:
    return _OCTAL.sub(lambda match: chr(int(match[1], 8)), text)
