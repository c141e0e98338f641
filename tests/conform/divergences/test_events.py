"""What events say: by whom, of which file, with what descriptor, heard through which mark."""

import fcntl
import mmap
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fusehsm.backends.base import Group
from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.backends.opening import DEFAULT_FLAGS
from fusehsm.conform.accessor import Accessor
from fusehsm.conform.scene import PRE_ACCESS
from fusehsm.fanotify.abi import FAN_MARK_ADD, FAN_MARK_MOUNT, O_LARGEFILE
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import mount_of
from tests.conform.divergences.sides import PAGE, READ_ONLY, Side
from tests.support.async_listener import Listener, listening

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


def read_in_child(descriptor: int) -> int:
    child = os.fork()
    if child == 0:
        os.pread(descriptor, 100, 0)
        os._exit(0)
    os.waitpid(child, 0)
    return child


async def test_pid_is_the_openers(kernel: Side, exact: Side, first_access: Side, accessor: Accessor) -> None:
    for side in (kernel, exact, first_access):
        path = side.file("inherited")
        async with side.listening() as listener:
            descriptor = await accessor.run("open", path, os.O_RDONLY)
            child = await accessor.run(read_in_child, descriptor)
            expected = accessor.pid if side.diverges("pid") else child
            assert [event.pid for event in listener.take()] == [expected]


async def test_mount_marks_cover_bind_mounts(
    kernel: Side, exact: Side, accessor: Accessor, session_directory: Path, numbers: Any
) -> None:
    for side in (kernel, exact):
        side.file("bound")
        elsewhere = session_directory / f"bind-{next(numbers)}"
        elsewhere.mkdir()
        syscalls.mount(os.fsencode(side.path), os.fsencode(elsewhere), None, syscalls.MS_BIND)
        try:
            async with side.listening(mark="mount") as listener:
                await accessor.run("pread_path", str(elsewhere / "bound"), 100, 0)
                assert listener.briefly() == ([] if side is kernel else [("PRE_ACCESS", 0, PAGE)])
        finally:
            syscalls.umount2(os.fsencode(elsewhere), syscalls.MNT_DETACH)


def read_in_a_namespace(path: str) -> None:
    subprocess.run(["unshare", "--mount", "head", "-c", "100", path], check=True, stdout=subprocess.DEVNULL)


async def test_mount_marks_cover_other_namespaces(
    kernel: Side, exact: Side, accessor: Accessor, session_directory: Path, numbers: Any
) -> None:
    """On the real kernel the copy of a mount in another namespace is another mount."""
    for side in (kernel, exact):
        path = side.file("elsewhere")
        place = session_directory / f"namespace-{next(numbers)}"
        place.mkdir()
        syscalls.mount(os.fsencode(side.path), os.fsencode(place), None, syscalls.MS_BIND)
        try:
            watched = place if side is kernel else side.path
            async with listening(watched, ["PRE_ACCESS"], mark="mount") as listener:
                await accessor.run("pread_path", str(watched / "elsewhere"), 100, 0)
                assert listener.briefly()
                await accessor.run(read_in_a_namespace, str(watched / Path(path).name))
                assert bool(listener.briefly()) is (side is not kernel)
        finally:
            syscalls.umount2(os.fsencode(place), syscalls.MNT_DETACH)


def send(path: str) -> None:
    descriptor, nowhere = os.open(path, os.O_RDONLY), os.open("/dev/null", os.O_WRONLY)
    assert os.sendfile(nowhere, descriptor, 0, 100) == 100
    os.close(descriptor)
    os.close(nowhere)


def touch_mapping(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    mapping = mmap.mmap(descriptor, 4096, mmap.MAP_PRIVATE, mmap.PROT_READ)
    assert mapping[0] == 0


@asynccontextmanager
async def listening_to_another_mount(side: Side, place: Path) -> AsyncIterator[Listener]:
    """A listener with a mark on `place`, a bind mount of that side."""
    place.mkdir()
    syscalls.mount(os.fsencode(side.path), os.fsencode(place), None, syscalls.MS_BIND)
    group: Group
    if side.engine:
        group = await EmulatedGroup.connect(mount_of(str(side.path)), DEFAULT_FLAGS, READ_ONLY)
    else:
        group = KernelGroup(DEFAULT_FLAGS, READ_ONLY)
    try:
        async with group, trio.open_nursery() as nursery:
            await group.mark(FAN_MARK_ADD | FAN_MARK_MOUNT, PRE_ACCESS, path=str(place))
            listener = Listener(group, lambda event: 0)
            await nursery.start(listener.run)
            yield listener
            nursery.cancel_scope.cancel()
    finally:
        syscalls.umount2(os.fsencode(place), syscalls.MNT_DETACH)


async def test_pages_of_every_mount(
    kernel: Side, exact: Side, first_access: Side, accessor: Accessor, session_directory: Path, numbers: Any
) -> None:
    for side in (kernel, exact, first_access):
        place = session_directory / f"pages-{next(numbers)}"
        async with listening_to_another_mount(side, place) as listener:
            for access in (send, touch_mapping):
                await accessor.run(access, side.file(access.__name__))
                assert bool(listener.briefly()) is (side is not kernel)
            await accessor.run("pread_path", side.file("read"), 100, 0)
            assert bool(listener.briefly()) is (side is first_access)


def truncate_through_proc(path: str) -> None:
    descriptor = os.open(path, os.O_PATH)
    os.truncate(f"/proc/self/fd/{descriptor}", 100)
    os.close(descriptor)


async def test_unknown_mounts(
    kernel: Side, exact: Side, accessor: Accessor, session_directory: Path, numbers: Any
) -> None:
    for side in (kernel, exact):
        place = session_directory / f"unknown-{next(numbers)}"
        async with listening_to_another_mount(side, place) as listener:
            await accessor.run(truncate_through_proc, side.file("unknown"))
            assert bool(listener.briefly()) is (side is not kernel)


async def test_hard_links_and_marks_on_directories(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        (side.backing / "marked").mkdir()
        (side.backing / "other").mkdir()
        inside = side.file("marked/name")
        os.link(side.backing / "marked/name", side.backing / "other/name")
        async with listening(side.path / "marked", ["PRE_ACCESS"], mark="children") as listener:
            await accessor.run("pread_path", inside, 100, 0)
            assert listener.briefly() == [("PRE_ACCESS", 0, PAGE)]
            await accessor.run("pread_path", str(side.path / "other/name"), 100, 0)
            assert listener.briefly() == ([] if side is kernel else [("PRE_ACCESS", 0, PAGE)])


async def test_the_event_descriptors_path(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("named")
        links: list[str] = []

        def note(event: Any, links: list[str] = links) -> int:
            links.append(os.readlink(f"/proc/self/fd/{event.fd}"))
            return 0

        async with side.listening(answer=note) as listener:
            await accessor.run("pread_path", path, 100, 0)
            assert [event.path for event in listener.take()] == [path]
        assert links == [str(side.backing / "named")]
        assert (links == [path]) == (side is kernel)


async def test_flags_of_event_descriptors(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("flagged")
        flags: list[tuple[int, int]] = []

        def note(event: Any, flags: list[tuple[int, int]] = flags) -> int:
            flags.append((fcntl.fcntl(event.fd, fcntl.F_GETFL), fcntl.fcntl(event.fd, fcntl.F_GETFD)))
            return 0

        async with side.listening(answer=note):
            await accessor.run("pread_path", path, 100, 0)
        shown = os.O_CLOEXEC if side is kernel else 0
        assert flags == [(os.O_RDONLY | O_LARGEFILE | shown, fcntl.FD_CLOEXEC)]


async def test_descriptors_of_directories(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = str(side.path)
        for access in (os.O_WRONLY, os.O_RDWR):
            flags: list[int] = []

            def note(event: Any, flags: list[int] = flags) -> int:
                flags.append(fcntl.fcntl(event.fd, fcntl.F_GETFL) & os.O_ACCMODE)
                return 0

            async with side.listening("OPEN_PERM", "ONDIR", answer=note, event_f_flags=access):
                await accessor.run("listdir", path)
            assert flags == [access if side is kernel else os.O_RDONLY]


async def test_paths_of_hard_links(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        first = side.file("linked")
        os.link(side.backing / "linked", side.backing / "link")
        second = str(side.path / "link")
        async with side.listening() as listener:
            for path in (first, second, first):
                await accessor.run("pread_path", path, 100, 0)
            # The third time both names are known, and nobody looks them up.
            assert [event.path for event in listener.take()] == (
                [first, second, first] if side is kernel else [first, second, second]
            )


def file_system_id(path: str) -> int:
    return os.statvfs(path).f_fsid


async def test_file_system_id(kernel: Side, exact: Side, accessor: Accessor) -> None:
    for side in (kernel, exact):
        path = side.file("identified")
        assert (await accessor.run(file_system_id, path) == 0) is (side is not kernel)
