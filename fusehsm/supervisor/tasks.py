"""What /proc tells of a thread of the command. Nothing here touches a file system but proc, so none of it waits."""

import os
import re
from dataclasses import dataclass

from fusehsm.linux import mountinfo, proc

_FIELD = re.compile(rb"^([A-Za-z_]+):[ \t]*(.*)$", re.MULTILINE)
_SIGNAL_FIELDS = (b"SigPnd", b"ShdPnd", b"SigBlk")


@dataclass(frozen=True, slots=True)
class Signals:
    """Of a thread: signals that wait to be handled and are not blocked, as bit masks (bit 0: signal 1): its own, and its process's.
    `process`: the process's number, and `threads`: how many it has."""

    own: int
    shared: int
    process: int
    threads: int


@dataclass(frozen=True, slots=True)
class Rights:
    """By whose rights a thread opens files."""

    uid: int
    gid: int
    groups: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """The effective ones of a thread, as a bit mask; none of another user namespace's counts here."""

    mask: int

    def has(self, number: int) -> bool:
        """Whether it has the one of that number (linux/capability.h)."""
        return bool(self.mask >> number & 1)


def pipe_of(tid: int, descriptor: int) -> str | None:
    """The name of the pipe that a descriptor is an end of ("pipe:[12345]"), None where it is something else or closed."""
    try:
        link = os.readlink(f"/proc/{tid}/fd/{descriptor}")
    except OSError:
        return None
    return link if link.startswith("pipe:") else None


def is_open(tid: int, descriptor: int) -> bool:
    """Whether a descriptor is in use."""
    return os.path.lexists(f"/proc/{tid}/fd/{descriptor}")


def signals_of(tid: int) -> Signals | None:
    """None for a thread that has gone."""
    fields = _status(tid)
    if fields is None:
        return None
    own, shared, blocked = (int(fields.get(name, b"0"), 16) for name in _SIGNAL_FIELDS)
    return Signals(own & ~blocked, shared & ~blocked, int(fields[b"Tgid"]), int(fields[b"Threads"]))


def is_stopping(process: int) -> bool:
    """Whether some thread of a process has been stopped by a signal."""
    return any((_status(tid) or {}).get(b"State", b"").startswith(b"T") for tid in proc.threads_of(process))


def takers_of_shared_signals(process: int) -> list[int]:
    """The threads of a process that may be given a signal that waits for it."""
    takers = []
    for tid in proc.threads_of(process):
        fields = _status(tid)
        if fields is not None and not fields[b"State"].startswith((b"Z", b"X")):
            shared, blocked = (int(fields[name], 16) for name in (b"ShdPnd", b"SigBlk"))
            if shared & ~blocked:
                takers.append(tid)
    return takers


def rights_of(tid: int) -> Rights | None:
    """None for a thread that has gone."""
    fields = _status(tid)
    if fields is None:
        return None
    groups = tuple(sorted(int(group) for group in fields[b"Groups"].split()))
    return Rights(int(fields[b"Uid"].split()[3]), int(fields[b"Gid"].split()[3]), groups)


def capabilities_of(tid: int) -> Capabilities:
    """What a thread may do that ordinary users may not; nothing, for one that has gone."""
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
    """The mount of that number in the thread's mount namespace; None where there is none."""
    try:
        mounts = list(mountinfo.read_mounts(tid))
    except OSError:
        return None
    return next((mount for mount in mounts if mount.mount_id == mount_id), None)
