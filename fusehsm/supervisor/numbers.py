"""Numbers that Python does not have: system calls, structures and constants, for the two supported architectures.

Sources: asm/unistd_64.h, asm-generic/unistd.h, linux/seccomp.h, linux/audit.h, linux/filter.h.
"""

import errno
import os
from dataclasses import dataclass
from typing import Final

# seccomp(2)
SECCOMP_FILTER_FLAG_NEW_LISTENER: Final = 1 << 3
SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV: Final = 1 << 5  # Linux 5.19
SECCOMP_RET_ALLOW: Final = 0x7FFF0000
SECCOMP_RET_USER_NOTIF: Final = 0x7FC00000

PR_SET_CHILD_SUBREAPER: Final = 36  # prctl(2)


@dataclass(frozen=True, slots=True)
class Architecture:
    """An architecture: `audit` is its name in a filter, the other fields are its system call numbers (None: it lacks the call)."""

    audit: int
    seccomp: int
    faccessat2: int
    setfsuid: int
    setfsgid: int
    setgroups: int
    read: int
    readv: int
    preadv2: int
    write: int
    writev: int
    pwritev2: int
    ioctl: int
    fcntl: int
    dup: int
    dup2: int | None
    dup3: int
    sendmsg: int
    sendmmsg: int
    pidfd_getfd: int
    kcmp: int
    mmap: int
    fanotify_init: int
    fanotify_mark: int


X86_64: Final = Architecture(
    audit=0xC000003E,
    seccomp=317,
    faccessat2=439,
    setfsuid=122,
    setfsgid=123,
    setgroups=116,
    read=0,
    readv=19,
    preadv2=327,
    write=1,
    writev=20,
    pwritev2=328,
    ioctl=16,
    fcntl=72,
    dup=32,
    dup2=33,
    dup3=292,
    sendmsg=46,
    sendmmsg=307,
    pidfd_getfd=438,
    kcmp=312,
    mmap=9,
    fanotify_init=300,
    fanotify_mark=301,
)
AARCH64: Final = Architecture(
    audit=0xC00000B7,
    seccomp=277,
    faccessat2=439,
    setfsuid=151,
    setfsgid=152,
    setgroups=159,
    read=63,
    readv=65,
    preadv2=286,
    write=64,
    writev=66,
    pwritev2=287,
    ioctl=29,
    fcntl=25,
    dup=23,
    dup2=None,
    dup3=24,
    sendmsg=211,
    sendmmsg=269,
    pidfd_getfd=438,
    kcmp=272,
    mmap=222,
    fanotify_init=262,
    fanotify_mark=263,
)
_ARCHITECTURES: Final = {"x86_64": X86_64, "aarch64": AARCH64}


def architecture(machine: str | None = None) -> Architecture:
    """The numbers of this machine, or of the one that uname(2) calls `machine`. Raises OSError ENOSYS if its numbers are not known."""
    machine = machine or os.uname().machine
    try:
        return _ARCHITECTURES[machine]
    except KeyError:
        known = ", ".join(_ARCHITECTURES)
        raise OSError(
            errno.ENOSYS,
            f"fusehsm run: {machine}: its system calls are not known here, only those of {known}",
        ) from None
