"""The facts that all stubs of a tree share: the namespace of their extended attributes, and the mount.

A process with CAP_SYS_ADMIN keeps the attributes of stubs in the namespace trusted.* (xattr(7)): only such a process can set them, so they prove that
root wrote them. Every other process uses user.*: it asks the store with its own rights, so a forged attribute gives its author nothing. A container
with a user namespace of its own has no trusted.* either (EPERM, docs/facts.md, section 18), and some network file systems have none.

A process without the right to trusted.* does not see these attributes at all: each stub looks like a file that the user made. So populate leaves a
note on the destination, which every user can read (`expect_visible`).
"""

import errno
import hashlib
import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final, Self

from fusehsm.linux import syscalls
from fusehsm.linux.proc import has_capability

_NOTE: Final = "user.fusehsm.tree"
_TRUSTED: Final = b"trusted"
_CAP_SYS_ADMIN: Final = 21  # linux/capability.h
_FIRST_USER_NAMESPACE: Final = 0xEFFFFFFD  # PROC_USER_INIT_INO, include/linux/proc_ns.h


class Namespace(Enum):
    """The namespace of a tree's attributes; the value is the beginning of their names."""

    # Set by root only.
    TRUSTED = "trusted.fusehsm."
    # Set by every user who may write to the file.
    USER = "user.fusehsm."

    @property
    def stub(self) -> str:
        """Name of the attribute with the mark (tier/stubs/mark.py)."""
        return self.value + "stub"

    @property
    def resident(self) -> str:
        """Name of the attribute with the record (tier/stubs/record.py)."""
        return self.value + "resident"

    @property
    def pinned(self) -> str:
        """Name of the attribute that keeps content here."""
        return self.value + "pinned"

    @classmethod
    def at(cls, fd: int) -> "Namespace":
        """The namespace that this process must use on the file system of `fd`, a file or directory. Changes nothing."""
        if not _may_trust():
            return cls.USER
        try:
            os.getxattr(fd, f"{cls.TRUSTED.value}trial")
        except OSError as error:
            if error.errno != errno.ENODATA:
                return cls.USER
        return cls.TRUSTED


def _may_trust() -> bool:
    """Whether this process may set trusted.*: it needs CAP_SYS_ADMIN in the first user namespace (xattr(7))."""
    try:
        is_first = os.stat("/proc/self/ns/user").st_ino == _FIRST_USER_NAMESPACE
    except OSError:
        return False
    return is_first and has_capability(threading.get_native_id(), _CAP_SYS_ADMIN)


@dataclass(frozen=True, slots=True)
class Tree:
    """A tree of stubs, as this process sees it."""

    # Of new attributes.
    namespace: Namespace
    # The namespaces in which a mark is believed, the first one first.
    believed: tuple[Namespace, ...]
    # place_of() the tree's mount, 8 bytes.
    place: bytes

    @classmethod
    def of(cls, fd: int) -> Self:
        """The tree with the root directory (or any file) `fd`, for a process that fills or changes stubs."""
        namespace = Namespace.at(fd)
        return cls(namespace, (namespace,), place_of(fd))

    @classmethod
    def to_look_at(cls) -> Self:
        """Any tree, for a process that only tells what is here: it believes the owners' marks, too."""
        return cls(Namespace.USER, tuple(Namespace), b"")


def place_of(fd: int) -> bytes:
    """A digest (8 bytes) of the boot and the mount. Before Linux 6.8 a mount has no unique number: the value is then random, and new at each call.

    A record names the mount on which it was written. If the mount is another one now, data that was not synced may be lost.
    """
    mount = syscalls.unique_mount_id(fd)
    if mount is None:
        return os.urandom(8)
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    return hashlib.blake2b(boot + mount.to_bytes(8, "little"), digest_size=8).digest()


def note_namespace(root_fd: int, namespace: Namespace) -> None:
    """Leave the note on the directory `root_fd`, for expect_visible(). Does nothing where the file system has no user.* attributes."""
    if namespace is Namespace.TRUSTED:
        with suppress(OSError):
            os.setxattr(root_fd, _NOTE, _TRUSTED)


def expect_visible(root_fd: int, path: str) -> None:
    """Raise OSError EPERM if root has populated the directory `root_fd`, and this process does not see its stubs."""
    if Namespace.at(root_fd) is Namespace.TRUSTED:
        return
    try:
        note = os.getxattr(root_fd, _NOTE)
    except OSError:
        return
    if note == _TRUSTED:
        why = "was populated by root, and only root can tell its stubs from other files; use sudo, or populate a directory of your own"
        raise OSError(errno.EPERM, why, path)
