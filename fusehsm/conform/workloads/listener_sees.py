"""What a listener sees and can do with its files: identity, links, holes, locks, ioctls. On the emulator it runs under `fusehsm run --listener`."""

import ctypes
import fcntl
import os
import struct

from fusehsm.conform.listener import LOOK
from fusehsm.conform.listener import listener_row as row
from fusehsm.conform.listener_worker import (
    PAGE,
    Listener,
    data_in,
    extents,
    file_handle,
    fill,
    in_child,
    libc,
    lock,
    mount_of,
)
from fusehsm.conform.scene import PRE_ACCESS
from fusehsm.fanotify.abi import FAN_EVENT_ON_CHILD, FAN_MARK_MOUNT

# These functions run in the listener's process. They can use the names of listener_worker.py, and no others of this module. On the real kernel the
# listener's accesses through other descriptors than the event's and `own` make events for itself, so it does not read or write through them.

# Identity


def compare(listener: Listener) -> None:
    event = listener.hear()
    seen = os.fstat(event.fd)
    for name, other in (("own descriptor", os.fstat(listener.own)), ("path", os.stat(listener.path()))):
        fields = [field for field in dir(seen) if field.startswith("st_") and "atime" not in field]
        differing = [field for field in fields if getattr(seen, field) != getattr(other, field)]
        listener.say(f"fields of stat(2) that are others by its {name}", differing)
    system = os.fstatvfs(event.fd)
    listener.say("the same f_fsid by path", system.f_fsid == os.statvfs(listener.path()).f_fsid)
    listener.say("f_fsid is set", system.f_fsid != 0)
    listener.say("the same st_dev as the directory", seen.st_dev == os.stat(listener.path("")).st_dev)
    listener.answer(event)


def compare_mounts(listener: Listener) -> None:
    directory = os.open(listener.path(""), os.O_PATH)
    event = listener.hear()
    listener.say("the mount of its own descriptor", mount_of(event.fd) == mount_of(listener.own))
    listener.say("the mount of the directory", mount_of(event.fd) == mount_of(directory))
    listener.answer(event)


def compare_handles(listener: Listener) -> None:
    event = listener.hear()
    handle = file_handle(event.fd)
    listener.say("the handle by path", handle == file_handle(-100, listener.path(), 0))
    listener.say("the handle of its own descriptor", handle == file_handle(listener.own))
    directory = os.open(listener.path(""), os.O_RDONLY)
    opened = listener.do(
        "open by handle", lambda: libc.open_by_handle_at(directory, handle, os.O_RDONLY) >= 0
    )
    if opened:
        found = libc.open_by_handle_at(directory, handle, os.O_RDONLY)
        listener.say("the same file", os.path.sameopenfile(found, event.fd))
        listener.say("its path", os.readlink(f"/proc/self/fd/{found}") == listener.path())
    listener.answer(event)


def look_at_descriptor(listener: Listener) -> None:
    event = listener.hear()
    link = f"/proc/self/fd/{event.fd}"
    listener.say("flags", fcntl.fcntl(event.fd, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK))
    listener.say("its path", os.readlink(link) == listener.path())
    os.rename(listener.path(), listener.path("renamed"))
    listener.say("its path when renamed", os.readlink(link) == listener.path("renamed"))
    os.mkdir(listener.path("below"))
    os.rename(listener.path("renamed"), listener.path("below/moved"))
    listener.say("its path when moved", os.readlink(link) == listener.path("below/moved"))
    os.unlink(listener.path("below/moved"))
    listener.say("its path when unlinked", os.readlink(link) == listener.path("below/moved") + " (deleted)")
    listener.say("its links", os.fstat(event.fd).st_nlink)
    listener.answer(event)


def open_again(listener: Listener) -> None:
    event = listener.hear()
    for name, flags in (("for writing", os.O_RDWR), ("with O_PATH", os.O_PATH)):
        again = os.open(f"/proc/self/fd/{event.fd}", flags)
        listener.say(f"the same file {name}", os.path.sameopenfile(again, event.fd))
    listener.answer(event)


def link(listener: Listener, by_path: bool) -> None:
    event = listener.hear()
    if by_path:
        source, place, flags = f"/proc/self/fd/{event.fd}", -100, 0x400  # AT_SYMLINK_FOLLOW
    else:
        source, place, flags = "", event.fd, 0x1000  # AT_EMPTY_PATH
    listener.do("linkat", libc.linkat, place, source, -100, listener.path("linked"), flags)
    listener.say("links", os.fstat(event.fd).st_nlink)
    listener.say("the same file", os.path.samestat(os.fstat(event.fd), os.stat(listener.path("linked"))))
    listener.answer(event)


# Holes


def look_at_holes(listener: Listener) -> None:
    event = listener.hear()
    fills = (("a stub", -1), ("filled by event", event.fd), ("filled by own", listener.own))
    for number, (when, descriptor) in enumerate(fills):
        if descriptor >= 0:
            fill(descriptor, 2 * number * PAGE, PAGE)
        os.fsync(event.fd)
        by_path = os.open(listener.path(), os.O_RDONLY)
        for name, looked_at in (("event", event.fd), ("own", listener.own), ("path", by_path)):
            listener.say(f"{when}: data by {name}", data_in(looked_at))
        listener.say(f"{when}: extents", [extents(event.fd), extents(listener.own), extents(by_path)])
    listener.answer(event)


def punch(listener: Listener, by_event: bool) -> None:
    event = listener.hear()
    fill(listener.own, 0, 16384)
    descriptor = event.fd if by_event else listener.own
    keep_size, punch_hole = 1, 2
    count = ctypes.c_int64(2 * PAGE)
    listener.do("punch", libc.fallocate, descriptor, keep_size | punch_hole, ctypes.c_int64(PAGE), count)
    os.fsync(descriptor)
    listener.say("data by the other", data_in(listener.own if by_event else event.fd))
    fill(listener.own, PAGE, PAGE)
    listener.answer(event)


def allocate(listener: Listener) -> None:
    event = listener.hear()
    keep_size = 1
    listener.do("allocate", libc.fallocate, event.fd, keep_size, ctypes.c_int64(0), ctypes.c_int64(4 * PAGE))
    listener.say("data by own", data_in(listener.own))
    fill(event.fd, 0, PAGE)
    listener.answer(event)


# Locks


def lock_whole(listener: Listener) -> None:
    by_path = os.open(listener.path(), os.O_RDWR)
    event = listener.hear()
    now = fcntl.LOCK_NB
    listener.do("flock by event", fcntl.flock, event.fd, fcntl.LOCK_EX | now)
    listener.do("flock by path", fcntl.flock, by_path, fcntl.LOCK_EX | now)
    listener.do("shared flock by own", fcntl.flock, listener.own, fcntl.LOCK_SH | now)
    listener.do("unlock by event", fcntl.flock, event.fd, fcntl.LOCK_UN)
    listener.do("shared flock by path", fcntl.flock, by_path, fcntl.LOCK_SH | now)
    listener.do("shared flock by own", fcntl.flock, listener.own, fcntl.LOCK_SH | now)
    listener.do("flock by event", fcntl.flock, event.fd, fcntl.LOCK_EX | now)
    listener.answer(event)


def lock_ranges(listener: Listener) -> None:
    by_path = os.open(listener.path(), os.O_RDWR)
    event = listener.hear()
    get, put = 36, 37  # F_OFD_GETLK, F_OFD_SETLK
    read, write, none = fcntl.F_RDLCK, fcntl.F_WRLCK, fcntl.F_UNLCK
    listener.do("lock by event", lock, event.fd, put, write, 0, 100)
    listener.do("lock by path", lock, by_path, put, write, 50, 100)
    listener.do("lock beside it by path", lock, by_path, put, write, 100, 100)
    listener.do("question by own", lock, listener.own, get, write, 0, 50)
    listener.do("read lock by own", lock, listener.own, put, read, 100, 1)
    listener.do("unlock by event", lock, event.fd, put, none, 0, 0)
    listener.do("read lock by own", lock, listener.own, put, read, 0, 100)
    listener.answer(event)


def lock_in_child(listener: Listener) -> None:
    event = listener.hear()
    put = fcntl.F_SETLK
    listener.do("lock by event", lock, event.fd, put, fcntl.F_WRLCK, 0, 100)
    listener.do("lock by own", lock, listener.own, put, fcntl.F_WRLCK, 0, 100)
    path = listener.path()
    listener.say(
        "lock by a child",
        in_child(lambda: lock(os.open(path, os.O_RDWR), fcntl.F_SETLK, fcntl.F_WRLCK, 99, 1)),
    )
    listener.say(
        "lock beside it by a child",
        in_child(lambda: lock(os.open(path, os.O_RDWR), fcntl.F_SETLK, fcntl.F_WRLCK, 100, 1)),
    )
    listener.answer(event)


def lease(listener: Listener) -> None:
    event = listener.hear()
    take = fcntl.F_SETLEASE
    listener.do("lease by event", fcntl.fcntl, event.fd, take, fcntl.F_WRLCK)
    listener.do("read lease by own", fcntl.fcntl, listener.own, take, fcntl.F_RDLCK)
    listener.answer(event)


def lock_against_accessor(listener: Listener) -> None:
    event = listener.hear()
    now, put = fcntl.LOCK_NB, 37  # F_OFD_SETLK
    listener.do("flock by event", fcntl.flock, event.fd, fcntl.LOCK_EX | now)
    listener.do("flock by own", fcntl.flock, listener.own, fcntl.LOCK_SH | now)
    listener.do("lock by own", lock, listener.own, put, fcntl.F_WRLCK, 0, 100)
    listener.do("lock beside it by own", lock, listener.own, put, fcntl.F_WRLCK, 0, 50)
    listener.answer(event)


# Ioctls


def ask_by_ioctl(listener: Listener) -> None:
    by_path = os.open(listener.path(), os.O_RDONLY)
    event = listener.hear()
    requests = {
        "FS_IOC_GETFLAGS": (0x80086601, 8),
        "FS_IOC_GETVERSION": (0x80087601, 8),
        "FS_IOC_FSGETXATTR": (0x801C581F, 28),
        "FIGETBSZ": (2, 4),
        "FIONREAD": (0x541B, 4),
    }
    for name, (request, size) in requests.items():
        by_event, by_own, others = (
            fcntl.ioctl(descriptor, request, bytes(size)) for descriptor in (event.fd, listener.own, by_path)
        )
        listener.say(name, "the same" if by_event == by_own == others else (by_event, by_own, others))
        if name != "FS_IOC_GETVERSION":
            listener.say(name, by_event)
    listener.answer(event)


def set_by_ioctl(listener: Listener) -> None:
    event = listener.hear()
    get, put, no_dump, no_atime = 0x80086601, 0x40086602, 0x40, 0x80
    flags = int.from_bytes(fcntl.ioctl(event.fd, get, bytes(8))[:4], "little")
    listener.do("set by event", fcntl.ioctl, event.fd, put, struct.pack("=q", flags | no_dump))
    listener.say("flags by own", fcntl.ioctl(listener.own, get, bytes(8)))
    listener.do("set by own", fcntl.ioctl, listener.own, put, struct.pack("=q", flags | no_atime))
    listener.say("flags by event", fcntl.ioctl(event.fd, get, bytes(8)))
    listener.answer(event)


# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def read_with_flock(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return os.pread(descriptor, 10, 0)


def read_with_lock(path: str, command: int) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 50, 10, 0)
    fcntl.fcntl(descriptor, command, lock)
    return os.pread(descriptor, 10, 0)


WORKLOADS = [
    row("stat", compare),
    row("stat with a mark of the mount", compare, flags=FAN_MARK_MOUNT),
    row("stat with a mark of the directory", compare, mark="", mask=PRE_ACCESS | FAN_EVENT_ON_CHILD),
    row("stat while a write waits", compare, calls=(("pwrite_path", b"new", 100),)),
    row("mounts", compare_mounts),
    row("file handles", compare_handles),
    row("the descriptor's path", look_at_descriptor),
    row("the file opened again", open_again),
    row("link by proc", link, True, calls=(LOOK,)),
    row("link by descriptor", link, False, calls=(LOOK,)),
    row("holes", look_at_holes),
    row("a hole punched by own", punch, False),
    row("a hole punched by event", punch, True),
    row("room allocated", allocate),
    row("flock", lock_whole),
    row("OFD locks", lock_ranges),
    row("locks of processes", lock_in_child),
    row("leases", lease),
    row("flock of the accessor", lock_against_accessor, calls=((read_with_flock,),)),
    row("OFD lock of the accessor", lock_against_accessor, calls=((read_with_lock, 37),)),
    row("lock of the accessor", lock_against_accessor, calls=((read_with_lock, fcntl.F_SETLK),)),
    row("ioctls", ask_by_ioctl),
    row("ioctls that set", set_by_ioctl),
]
