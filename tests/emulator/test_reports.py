"""One expectation, two worlds: what a group of which flags tells its listener, and what is told of the group."""

import errno
import fcntl
import os
import shutil
import struct
import subprocess
from functools import partial
from pathlib import Path

import pytest
import trio

from fusehsm.backends.base import Group
from fusehsm.conform.accessor import Accessor
from fusehsm.control.protocol import CREDIT
from fusehsm.fanotify.abi import (
    FAN_ALLOW,
    FAN_AUDIT,
    FAN_DENY,
    FAN_ENABLE_AUDIT,
    FAN_EVENT_ON_CHILD,
    FAN_INFO,
    FAN_MARK_ADD,
    FAN_MARK_EVICTABLE,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_MOUNT,
    FAN_ONDIR,
    FAN_OPEN,
    FAN_Q_OVERFLOW,
    FAN_REPORT_FD_ERROR,
    FAN_REPORT_PIDFD,
    FAN_REPORT_TID,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
    O_LARGEFILE,
    decode_events,
    encode_response,
    mask_names,
)
from fusehsm.linux.mountinfo import mount_of
from tests.conftest import MakeAccessor
from tests.support.harness import PATIENCE, fusehsm
from tests.support.kernel_and_mount import (
    CONTENT,
    OPEN_PERM,
    PRE_ACCESS,
    PRE_GROUP,
    Failed,
    Mark,
    World,
    outcome,
)
from tests.support.notification_groups import (
    ALL,
    NOTIF_GROUP,
    READ_WRITE,
    SURVIVING,
    TakeNotes,
    close,
    open_and_exit,
    read_whole,
)

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


# What listeners read


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR], ids=["read-only", "read-write"])
async def test_event_descriptors(world: World, accessor: Accessor, notes: TakeNotes, flags: int) -> None:
    path = world.file()
    async with notes(event_f_flags=flags | os.O_CLOEXEC) as group:
        await accessor.run(read_whole, path)
        (event,) = await group.read()
        assert (event.length, event.offset, event.pidfd) == (24, None, None)
        assert fcntl.fcntl(event.fd, fcntl.F_GETFL) & ~os.O_CLOEXEC == flags | O_LARGEFILE
        # What is done through it is not told.
        assert os.pread(event.fd, 100, 0) == CONTENT[:100]
        if flags == os.O_RDWR:
            os.pwrite(event.fd, b"new", 0)
        with pytest.raises(FileNotFoundError):
            group.group.write(encode_response(event.fd, FAN_ALLOW))
        os.close(event.fd)
        assert await group.names() == []


async def test_what_is_changed_through_it(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    """Is seen by the accessor, although it does not wait for that."""
    path = world.file()
    async with notes(event_f_flags=READ_WRITE) as group:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        (event,) = await group.read()
        for size in (100, 50000):
            assert await accessor.run(size_of, descriptor) != size
            os.ftruncate(event.fd, size)
            with trio.fail_after(PATIENCE):
                while await accessor.run(size_of, descriptor) != size:
                    assert not world.is_kernel
        close(event)


def size_of(descriptor: int) -> int:
    return os.fstat(descriptor).st_size


async def test_pidfds(world: World, make_accessor: MakeAccessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes(flags=NOTIF_GROUP | FAN_REPORT_PIDFD) as group:
        accessor = make_accessor()
        for _ in range(2):
            await accessor.run(read_whole, path)
        (event,) = await group.read()
        assert (event.length, event.pid) == (32, accessor.pid)
        assert event.pidfd is not None
        with open(f"/proc/self/fdinfo/{event.pidfd}") as lines:
            assert f"Pid:\t{accessor.pid}\n" in lines
        close(event)


@pytest.mark.parametrize("tells", [False, True], ids=["plain", "FAN_REPORT_FD_ERROR"])
async def test_the_process_is_dead(
    world: World, make_accessor: MakeAccessor, notes: TakeNotes, tells: bool
) -> None:
    path = world.file()
    flags = NOTIF_GROUP | FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR * tells
    async with notes(flags=flags) as group:
        child = await make_accessor().run(open_and_exit, path)
        (event,) = await group.read()
        close(event)
    assert (event.pid, event.pidfd) == (child, -errno.ESRCH if tells else -1)


async def test_a_file_that_cannot_be_opened(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    """A program that runs cannot be opened for writing: the notification is lost, or with FAN_REPORT_FD_ERROR says why."""
    path, sleep = world.file(), shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, world.backing / "busy")
    # On the backing: what runs from a FUSE mount, its server may write to.
    with subprocess.Popen([world.backing / "busy", "infinity"]) as busy:
        try:
            async with (
                notes(event_f_flags=READ_WRITE) as plain,
                notes(flags=NOTIF_GROUP | FAN_REPORT_FD_ERROR, event_f_flags=READ_WRITE) as telling,
            ):
                await accessor.run(read_whole, path)
                await accessor.run(read_whole, str(world.path / "busy"))
                first, second = await telling.read()
                close(first)
                assert second.fd == -errno.ETXTBSY
                assert set(mask_names(second.mask, telling.group.dialect)) == {
                    "OPEN",
                    "ACCESS",
                    "CLOSE_NOWRITE",
                }
                assert [one.file for one in await plain.told()] == ["file"]
        finally:
            busy.kill()


# What a group looks like from outside


def introspected(world: World, group: Group) -> list[str]:
    """The lines that tell of a group and its marks: its fdinfo, or what `fusehsm status` says; the file's own number as "FILE" etc."""
    if world.is_kernel:
        with open(f"/proc/self/fdinfo/{group.fileno()}") as file:
            lines = [line.split(" fhandle-bytes")[0].strip() for line in file if line.startswith("fanotify")]
    else:
        shown = fusehsm("status", world.path).stdout
        lines = [line.strip() for line in shown.splitlines() if line.startswith("    fanotify")]
    found = mount_of(str(world.path))
    major, minor = found.device
    names = {f"mnt_id:{found.mount_id:x}": "MOUNT", f"sdev:{major << 20 | minor:x}": "DEVICE"}
    for path in world.path.iterdir():
        names[f"ino:{path.stat().st_ino:x}"] = path.name
    return [" ".join(names.get(word, word) for word in line.split()) for line in lines]


async def test_introspection(world: World) -> None:
    path, other = world.file(), world.file("other")
    (world.backing / "sub").mkdir()
    flags = PRE_GROUP | FAN_UNLIMITED_MARKS | FAN_ENABLE_AUDIT | FAN_REPORT_TID
    group = await world.open_group(flags, READ_WRITE)
    try:
        for mark_flags, mask, place in (
            (FAN_MARK_MOUNT, ALL | FAN_EVENT_ON_CHILD, path),
            (FAN_MARK_FILESYSTEM, PRE_ACCESS | OPEN_PERM, path),
            (FAN_MARK_EVICTABLE, ALL, path),
            (FAN_MARK_IGNORE | SURVIVING, FAN_OPEN, path),
            (FAN_MARK_IGNORED_MASK | SURVIVING, PRE_ACCESS, other),
            (0, ALL | FAN_ONDIR | FAN_EVENT_ON_CHILD, str(world.path / "sub")),
        ):
            await group.mark(FAN_MARK_ADD | mark_flags, mask, path=place)
        lines = await trio.to_thread.run_sync(introspected, world, group)
    finally:
        group.close()
    # On the real kernel the handler API opens with O_NONBLOCK, so that it waits for no lease.
    assert lines[0] == f"fanotify flags:13b event-flags:{'88802' if world.is_kernel else '88002'}"
    assert sorted(lines[1:]) == [
        "fanotify DEVICE mflags:0 mask:110000 ignored_mask:0",
        "fanotify MOUNT mflags:0 mask:103b ignored_mask:0",
        "fanotify file DEVICE mflags:440 mask:103b ignored_mask:20",
        "fanotify other DEVICE mflags:40 mask:0 ignored_mask:100000",
        "fanotify sub DEVICE mflags:0 mask:4800103b ignored_mask:0",
    ]


async def test_unlimited_queues_and_marks(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes(flags=NOTIF_GROUP | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS) as group:
        await accessor.run(read_whole, path)
        assert await group.names() == ["ACCESS|CLOSE_NOWRITE|OPEN"]


async def test_a_full_queue(world: World, accessor: Accessor) -> None:
    """What does not fit is one overflow event for all; an unlimited queue takes it. What travels ahead of being read makes more room."""
    (world.backing / "many").mkdir()
    for number in range(MORE_THAN_FIT):
        (world.backing / "many" / str(number)).touch()
    directory = str(world.path / "many")
    mark = Mark(FAN_OPEN | FAN_EVENT_ON_CHILD, directory)
    groups = [
        await world.open_group(NOTIF_GROUP | FAN_REPORT_FD_ERROR | more) for more in (0, FAN_UNLIMITED_QUEUE)
    ]
    try:
        for group in groups:
            await group.mark(FAN_MARK_ADD, mark.mask, path=str(mark.path))
        await accessor.run(open_each, directory, MORE_THAN_FIT)
        limited, unlimited = [await masks_and_descriptors(group) for group in groups]
    finally:
        for group in groups:
            group.close()
    assert len(unlimited) == MORE_THAN_FIT
    assert {mask for mask, _ in unlimited} == {FAN_OPEN}
    *taken, overflow = limited
    assert QUEUE_LIMIT <= len(taken) <= QUEUE_LIMIT + (0 if world.is_kernel else CREDIT)
    assert {mask for mask, _ in taken} == {FAN_OPEN}
    assert overflow == (FAN_Q_OVERFLOW, -errno.EBADF)


QUEUE_LIMIT = 16384
MORE_THAN_FIT = QUEUE_LIMIT + 100


def open_each(directory: str, number: int) -> None:
    for name in range(number):
        os.close(os.open(f"{directory}/{name}", os.O_RDONLY))


async def masks_and_descriptors(group: Group) -> list[tuple[int, int]]:
    """What is queued until an overflow, or until there is no more of MORE_THAN_FIT; descriptors only where there is none."""
    found: list[tuple[int, int]] = []
    with trio.fail_after(PATIENCE):
        while len(found) < MORE_THAN_FIT and not (found and found[-1][0] & FAN_Q_OVERFLOW):
            await group.wait_readable()
            try:
                events = decode_events(group.dialect, group.read(4096))
            except BlockingIOError:
                continue
            for event in events:
                close(event)
                found.append((event.mask, min(event.fd, 0)))
    return found


async def test_evictable_marks(world: World) -> None:
    """They go when the kernel needs the inode's memory; a mark that is not evictable keeps it."""
    kinds = {
        "evictable": [FAN_MARK_EVICTABLE],
        "ignoring": [FAN_MARK_EVICTABLE | FAN_MARK_IGNORE | SURVIVING],
        "kept": [0],
        "kept-later": [FAN_MARK_EVICTABLE, 0],
    }
    for kind in kinds:
        world.file(kind, size=0)
    group = await world.open_group()
    try:
        for kind, all_flags in kinds.items():
            for flags in all_flags:
                await group.mark(FAN_MARK_ADD | flags, FAN_OPEN, path=str(world.path / kind))
        with trio.fail_after(PATIENCE):
            left = set(kinds)
            while len(left) > 2:
                # Names and inodes only, of which pages hold none here: a blunter tool than memory running out.
                await trio.to_thread.run_sync(Path("/proc/sys/vm/drop_caches").write_text, "2")
                lines = await trio.to_thread.run_sync(introspected, world, group)
                left = {kind for kind in kinds if any(f" {kind} " in line for line in lines)}
    finally:
        group.close()
    assert left == {"kept", "kept-later"}


# The same flags with permission events


async def test_pidfds_of_permission_events(world: World, accessor: Accessor, notes: TakeNotes) -> None:
    path = world.file()
    async with notes(Mark(PRE_ACCESS, path), flags=PRE_GROUP | FAN_REPORT_PIDFD) as group:
        call = accessor.start("pread_path", path, 100, 5000)
        await group.group.wait_readable()
        (event,) = decode_events(group.group.dialect, group.group.read(4096))
        assert (event.length, event.pid, event.offset, event.count) == (56, accessor.pid, 4096, 4096)
        assert event.pidfd is not None
        with open(f"/proc/self/fdinfo/{event.pidfd}") as lines:
            assert f"Pid:\t{accessor.pid}\n" in lines
        assert not os.get_inheritable(event.pidfd)
        group.group.write(encode_response(event.fd, FAN_ALLOW))
        close(event)
        assert await call.wait() == CONTENT[5000:5100]


async def test_a_permission_event_whose_file_cannot_be_opened(
    world: World, accessor: Accessor, notes: TakeNotes
) -> None:
    sleep = shutil.which("sleep")
    assert sleep is not None
    shutil.copy(sleep, world.backing / "busy")
    path = str(world.path / "busy")
    flags = PRE_GROUP | FAN_REPORT_FD_ERROR
    with subprocess.Popen([world.backing / "busy", "infinity"]) as busy:
        try:
            async with notes(Mark(PRE_ACCESS, path), flags=flags, event_f_flags=READ_WRITE) as group:
                call = accessor.start("pread_path", path, 100, 5000)
                await group.group.wait_readable()
                (event,) = decode_events(group.group.dialect, group.group.read(4096))
                assert await outcome(call.wait) == Failed(errno.EPERM)
                assert (event.fd, event.mask, event.pid) == (-errno.ETXTBSY, PRE_ACCESS, accessor.pid)
                assert (event.offset, event.count) == (4096, 4096)
                assert await outcome(lambda: written(group.group, event.fd, FAN_ALLOW)) == Failed(
                    errno.EINVAL
                )
        finally:
            busy.kill()


async def written(group: Group, fd: int, response: int, more: bytes = b"") -> int:
    return group.write(encode_response(fd, response) + more)


RULE = struct.pack(
    "=BBHIII", 1, 0, 16, 42, 0, 0
)  # fanotify_response_info_audit_rule: type, pad, len, rule, trusts


@pytest.mark.parametrize(
    ("response", "more", "audited", "plain"),
    [
        (FAN_AUDIT, b"", 8, Failed(errno.EINVAL)),
        (FAN_INFO, RULE, 24, 24),
        (FAN_AUDIT | FAN_INFO, RULE, 24, Failed(errno.EINVAL)),
        (FAN_INFO, b"", Failed(errno.EINVAL), Failed(errno.EINVAL)),
    ],
    ids=["FAN_AUDIT", "FAN_INFO", "both", "FAN_INFO without a rule"],
)
async def test_audit(
    world: World,
    accessor: Accessor,
    notes: TakeNotes,
    response: int,
    more: bytes,
    audited: object,
    plain: object,
) -> None:
    path = world.file()
    for flags, expected in ((PRE_GROUP | FAN_ENABLE_AUDIT, audited), (PRE_GROUP, plain)):
        for decision, result in ((FAN_ALLOW, CONTENT[:100]), (FAN_DENY, Failed(errno.EPERM))):
            async with notes(Mark(PRE_ACCESS, path), flags=flags) as group:
                call = accessor.start("pread_path", path, 100, 0)
                await group.group.wait_readable()
                (event,) = decode_events(group.group.dialect, group.group.read(4096))
                answer = partial(written, group.group, event.fd)
                assert await outcome(partial(answer, decision | response, more)) == expected
                if isinstance(expected, Failed):
                    await answer(decision)
                close(event)
                assert await outcome(call.wait) == result
