"""`fusehsm status`: show the mounts of this machine, their groups, and the accesses that wait."""

import errno
import json
import os
from collections.abc import Iterator
from types import NoneType
from typing import Any, Final

import trio

from fusehsm.control.client import request
from fusehsm.control.protocol import Release, Request, Status
from fusehsm.control.shape import Shape, fitting
from fusehsm.linux.beneath import follow
from fusehsm.linux.mountinfo import Mount, mount_of_descriptor, read_mounts
from fusehsm.text import shown

# Seconds. A server that does not answer within this time is stuck or stopped.
_PATIENCE = 3.0

# What a server tells of its mount (Gate.status() in the emulator). It may be another user's, who can have it tell anything.
_NUMBER_OR_NONE: Final = (int, NoneType)
_MARK: Final[Shape] = {
    "type": str,
    "inode": _NUMBER_OR_NONE,
    "mount": _NUMBER_OR_NONE,
    "mflags": int,
    "mask": int,
    "ignored_mask": int,
    "events": [str],
    "ignored_events": [str],
}
_GROUP: Final[Shape] = {
    "class": str,
    "abi": str,
    "pid": _NUMBER_OR_NONE,
    "flags": int,
    "event_flags": int,
    "marks": [_MARK],
    "statistics": {str: (int, float)},
}
_WAITER: Final[Shape] = {
    "pid": int,
    "path": str,
    "event": [str],
    "offset": _NUMBER_OR_NONE,
    "count": _NUMBER_OR_NONE,
    "seconds": float,
    "group": _NUMBER_OR_NONE,
}
_LOCK_WAITER: Final[Shape] = {
    "pid": int,
    "path": str,
    "kind": str,
    "exclusive": bool,
    "seconds": float,
    "holders": [int],
}
_STATUS: Final[dict[str, Shape]] = {
    "events": str,
    "abi": str,
    "nodes": int,
    "open_files": int,
    "groups": [_GROUP],
    "waiting": [_WAITER],
    "locks": [_LOCK_WAITER],
    "leases": [{"path": str, "waiting": int}],
    "requests": {str: int},
}
_RELEASED: Final[dict[str, Shape]] = {"released": int}


def status(path: str | None, *, as_json: bool, release: bool) -> int:
    """Print the state of the mount that `path` lies on; None: of all mounts. `release`: first let go the accesses that `hold` keeps waiting.

    Returns the exit code: 1 if a mount did not answer, else 0. Raises OSError EINVAL if `path` is not on a mount of fusehsm.
    """
    mounts = list(_all_mounts()) if path is None else [_mount_at(path)]
    found = [_describe(mount, release=release) for mount in mounts]
    if as_json:
        print(
            json.dumps(found, indent=2).replace("\x7f", "\\u007f"), flush=True
        )  # the one control character that json leaves
    elif not found:
        print("no fusehsm mounts")
    else:
        for mount in found:
            print("\n".join(map(shown, _as_text(mount))))
    return 1 if any("error" in mount for mount in found) else 0


def is_stuck(path: str) -> bool:
    """Whether `path` is on a mount of fusehsm whose server does not answer. A lookup of such a path would wait for the server."""
    mount = _mount_above(path)
    return mount is not None and mount.is_fusehsm and "error" in _describe(mount, release=False)


def _all_mounts() -> Iterator[Mount]:
    return (mount for mount in read_mounts() if mount.is_fusehsm)


def _mount_at(path: str) -> Mount:
    # Compare names first: a lookup of the path would wait for the server, which may be stuck.
    best = _mount_above(path)
    if best is None or not best.is_fusehsm:
        fd, _ = follow(path)
        try:
            best = mount_of_descriptor(fd)
        finally:
            os.close(fd)
    if not best.is_fusehsm:
        raise OSError(errno.EINVAL, f"{path}: not on a fusehsm mount; `fusehsm status` lists them")
    return best


def _mount_above(path: str) -> Mount | None:
    name = os.path.abspath(path)
    above = [
        mount
        for mount in read_mounts()
        if name == mount.mount_point or name.startswith(mount.mount_point.rstrip("/") + "/")
    ]
    return max(above, key=lambda mount: len(mount.mount_point), default=None)


def _describe(mount: Mount, *, release: bool) -> dict[str, Any]:
    description: dict[str, Any] = {
        "mount_id": mount.mount_id,
        "destination": mount.mount_point,
        "source": mount.source,
        "device": f"{mount.device[0]}:{mount.device[1]}",
        "owner_uid": mount.owner_uid,
    }
    try:
        if release:
            description |= trio.run(_ask, mount, Release(), _RELEASED)
        description |= trio.run(_ask, mount, Status(), _STATUS)
    except OSError as error:
        message = error.strerror or str(error)
        if error.errno == errno.ENOTCONN and "fusehsm umount" not in message:
            # Without a daemon there may be no socket either: the next mount removes the socket of a dead daemon.
            message += f"; if its daemon is gone, `fusehsm umount {mount.mount_point}` cleans up"
        description["error"] = message
    return description


async def _ask(mount: Mount, question: Request, shape: dict[str, Shape]) -> dict[str, Any]:
    """The fields of the answer. They do not include those that are known from the list of mounts: another user's server could tell others."""
    with trio.move_on_after(_PATIENCE):
        answer = await request(mount, question)
        try:
            fields: dict[str, Any] = fitting(answer, shape)
        except ValueError:
            why = "the answer of its daemon makes no sense; it may be of another version"
            raise OSError(errno.EPROTO, f"{mount.mount_point}: {why}") from None
        return fields
    point = mount.mount_point
    raise OSError(
        errno.ETIMEDOUT,
        f"{point}: its daemon does not answer; if it is stuck, kill it and `fusehsm umount {point}`",
    )


def fdinfo(group: dict[str, Any], mount: dict[str, Any]) -> Iterator[str]:
    """A group and its marks as the lines of /proc/PID/fdinfo/FD for a group of the kernel (proc_pid_fdinfo(5)), without file handles.

    Numbers are hexadecimal; `sdev` is the kernel's form of a device number.
    """
    yield f"fanotify flags:{group['flags']:x} event-flags:{group['event_flags']:x}"
    major, minor = map(int, mount["device"].split(":"))
    device = f"sdev:{major << 20 | minor:x}"
    for mark in group["marks"]:
        where = {
            "inode": f"ino:{mark['inode'] or 0:x} {device}",
            "mount": f"mnt_id:{mark.get('mount') or mount['mount_id']:x}",
        }.get(mark["type"], device)
        yield (
            f"fanotify {where} mflags:{mark['mflags']:x} mask:{mark['mask']:x} ignored_mask:{mark['ignored_mask']:x}"
        )


def _as_text(mount: dict[str, Any]) -> Iterator[str]:
    yield f"{mount['destination']} (from {mount['source']})"
    if "error" in mount:
        yield f"  {mount['error']}"
        return
    yield f"  events {mount['events']}, abi {mount['abi']}, {mount['nodes']} nodes, {mount['open_files']} open files"
    if "released" in mount:
        yield f"  released: {mount['released']}"
    for index, group in enumerate(mount["groups"]):
        listener = f", process {group['pid']}" if group.get("pid") else ""
        yield f"  group {index}: {group['class']}, abi {group['abi']}, {len(group['marks'])} marks{listener}"
        for line in fdinfo(group, mount):
            yield f"    {line}"
    if not mount["groups"]:
        yield "  no groups: no listener"
    for waiter in mount["locks"]:
        holders = ", ".join(f"process {pid}" for pid in waiter["holders"]) or "a process that is not known"
        yield (
            f"  waiting {waiter['seconds']:.1f} s for {'an exclusive' if waiter['exclusive'] else 'a shared'} lock: "
            f"process {waiter['pid']}, {waiter['kind']} {waiter['path']}, held by {holders}"
        )
    for waiter in mount["waiting"]:
        span = "" if waiter["offset"] is None else f" {waiter['offset']}+{waiter['count']}"
        on = "for a group to come" if waiter["group"] is None else f"on group {waiter['group']}"
        event = "|".join(waiter["event"])
        yield f"  waiting {waiter['seconds']:.1f} s {on}: process {waiter['pid']}, {event}{span} {waiter['path']}"
