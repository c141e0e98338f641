"""Reads the state of a thread of the command from /proc. No function touches another file system, so none of them waits."""

import os
import re
from dataclasses import dataclass

from fusehsm.linux import mountinfo, proc

_FIELD = re.compile(rb"^([A-Za-z_]+):[ \t]*(.*)$", re.MULTILINE)
_SIGNAL_FIELDS = (b"SigPnd", b"ShdPnd", b"SigBlk")


@dataclass(frozen=True, slots=True)
class Signals:
    """Signals that wait for a thread and are not blocked there, as bit masks (bit 0: signal 1)."""

    #: The signals of the thread.
    own: int
    #: The signals of its process.
    shared: int
    #: The process id.
    process: int
    #: The number of threads in the process.
    threads: int


@dataclass(frozen=True, slots=True)
class Rights:
    """The ids with which a thread opens files."""

    #: The filesystem user id.
    uid: int
    #: The filesystem group id.
    gid: int
    #: The supplementary groups.
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """A thread's effective capabilities. Those of another user namespace do not count here."""

    #: One bit for each capability.
    mask: int

    def has(self, number: int) -> bool:
        """Whether it has the capability of that number (linux/capability.h)."""
        return bool(self.mask >> number & 1)


def pipe_of(tid: int, descriptor: int) -> str | None:
    """The name of a descriptor's pipe ("pipe:[12345]"); None if it is not a pipe or is closed."""
    try:
        link = os.readlink(f"/proc/{tid}/fd/{descriptor}")
    except OSError:
        return None
    return link if link.startswith("pipe:") else None


def is_open(tid: int, descriptor: int) -> bool:
    """Whether the descriptor is in use."""
    return os.path.lexists(f"/proc/{tid}/fd/{descriptor}")


def signals_of(tid: int) -> Signals | None:
    """The signals that wait for a thread; None if it has gone."""
    fields = _status(tid)
    if fields is None:
        return None
    own, shared, blocked = (int(fields.get(name, b"0"), 16) for name in _SIGNAL_FIELDS)
    return Signals(own & ~blocked, shared & ~blocked, int(fields[b"Tgid"]), int(fields[b"Threads"]))


def is_stopping(process: int) -> bool:
    """Whether a signal has stopped a thread of the process."""
    return any((_status(tid) or {}).get(b"State", b"").startswith(b"T") for tid in proc.threads_of(process))


def takers_of_shared_signals(process: int) -> list[int]:
    """The threads of a process that the kernel may give a signal of the process."""
    takers = []
    for tid in proc.threads_of(process):
        fields = _status(tid)
        if fields is not None and not fields[b"State"].startswith((b"Z", b"X")):
            shared, blocked = (int(fields[name], 16) for name in (b"ShdPnd", b"SigBlk"))
            if shared & ~blocked:
                takers.append(tid)
    return takers


def rights_of(tid: int) -> Rights | None:
    """The rights of a thread; None if it has gone."""
    fields = _status(tid)
    if fields is None:
        return None
    groups = tuple(sorted(int(group) for group in fields[b"Groups"].split()))
    return Rights(int(fields[b"Uid"].split()[3]), int(fields[b"Gid"].split()[3]), groups)


def capabilities_of(tid: int) -> Capabilities:
    """The capabilities of a thread; none if it has gone."""
    try:
        here = os.readlink(f"/proc/{tid}/ns/user") == os.readlink("/proc/self/ns/user")
    except OSError:
        here = False
    fields = _status(tid) if here else None
    return Capabilities(0 if fields is None else int(fields.get(b"CapEff", b"0"), 16))


def _status(tid: int) -> dict[bytes, bytes] | None:
    try:
        with open(f"/proc/{tid}/status", "rb", buffering=0) as file:
            return dict(_FIELD.findall(file.read(8192)))
    except (OSError, ValueError):
        return None


def mount_of(tid: int, mount_id: int) -> mountinfo.Mount | None:
    """The mount of that number in the thread's mount namespace; None if there is none."""
    try:
        mounts = list(mountinfo.read_mounts(tid))
    except OSError:
        return None
    return next((mount for mount in mounts if mount.mount_id == mount_id), None)
