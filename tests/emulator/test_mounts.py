"""A mark on a mount means that mount: bind mounts, clones and copies in other namespaces are told apart, on the real kernel and on the emulator."""

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusehsm.backends.opening import open_group
from fusehsm.conform.accessor import Accessor
from fusehsm.fanotify.abi import (
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    FAN_OPEN,
)
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import mount_of
from tests.conftest import MakeAccessor, MakeMount
from tests.support.async_listener import Listener
from tests.support.kernel_and_mount import ACCESS_PERM, OPEN_PERM, PAGE, PRE_ACCESS, SIZE, Mark, World

pytestmark = [pytest.mark.fuse, pytest.mark.root]

OPEN_TREE, OPEN_TREE_CLONE = 428, 1  # open_tree(2)
ALL = OPEN_PERM | ACCESS_PERM | PRE_ACCESS
MOUNT = FAN_MARK_MOUNT
IGNORE = FAN_MARK_MOUNT | FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY


@contextmanager
def bound(directory: Path, place: Path) -> Iterator[Path]:
    """`place`, which is a bind mount of the directory meanwhile."""
    place.mkdir(exist_ok=True)
    syscalls.mount(bytes(directory), bytes(place), None, syscalls.MS_BIND)
    try:
        yield place
    finally:
        syscalls.umount2(bytes(place), syscalls.MNT_DETACH)


@pytest.fixture
def inside(world: World) -> World:
    """The world, in a directory of its own."""
    return world.inside("mounts")


@pytest.fixture
def view(inside: World, tmp_path: Path) -> Iterator[Path]:
    """Another mount of that directory."""
    with bound(inside.path, tmp_path / "view") as place:
        yield place


# What an accessor does with a file in a directory


def read(directory: str) -> None:
    descriptor = os.open(f"{directory}/file", os.O_RDONLY)
    os.pread(descriptor, 1, 0)
    os.close(descriptor)


def read_from_inside(directory: str) -> None:
    os.chdir(directory)
    descriptor = os.open("file", os.O_RDONLY)
    os.pread(descriptor, 1, 0)
    os.close(descriptor)
    os.chdir("/")


def read_from_below(directory: str) -> None:
    os.chdir(f"{directory}/below")
    descriptor = os.open("../file", os.O_RDONLY)
    os.pread(descriptor, 1, 0)
    os.close(descriptor)
    os.chdir("/")


def read_by_a_descriptor(directory: str) -> None:
    start = os.open(directory, os.O_PATH)
    descriptor = os.open("file", os.O_RDONLY, dir_fd=start)
    os.preadv(descriptor, [bytearray(1)], 0)
    os.close(descriptor)
    os.close(start)


def read_by_a_link(directory: str) -> None:
    descriptor = os.open(f"{directory}/link", os.O_RDONLY)
    os.pread(descriptor, 1, 0)
    os.close(descriptor)


def write(directory: str) -> None:
    descriptor = os.open(f"{directory}/file", os.O_RDWR)
    os.pwrite(descriptor, b"x", 0)
    os.ftruncate(descriptor, 9000)
    os.posix_fallocate(descriptor, 0, 100)
    os.close(descriptor)


def truncate(directory: str) -> None:
    os.truncate(f"{directory}/file", 9000)


def create(directory: str) -> None:
    descriptor = os.open(f"{directory}/new", os.O_RDWR | os.O_CREAT, 0o600)
    os.pwrite(descriptor, b"x", 0)
    os.close(descriptor)
    os.unlink(f"{directory}/new")


ACCESSES = [
    read,
    read_from_inside,
    read_from_below,
    read_by_a_descriptor,
    read_by_a_link,
    write,
    truncate,
    create,
]


def furnish(world: World) -> None:
    """What these accesses need."""
    world.file()
    (world.backing / "below").mkdir()
    (world.backing / "link").symlink_to("file")


def heard(listener: Listener) -> int:
    """How many events have come since the last call, by whatever path."""
    return len(Listener.take(listener))


@pytest.mark.parametrize("access", ACCESSES)
async def test_a_mark_on_another_mount(
    inside: World, view: Path, accessor: Accessor, access: Callable[[str], None]
) -> None:
    furnish(inside)
    async with inside.listener(Mark(ALL, view, MOUNT)) as listener:
        await accessor.run(access, str(inside.path))
        assert not heard(listener)
        await accessor.run(access, str(view))
        assert heard(listener)
        await listener.group.mark(FAN_MARK_REMOVE | MOUNT, ALL, path=str(view))
        await accessor.run(access, str(view))
        assert not heard(listener)


@pytest.mark.parametrize("access", ACCESSES)
async def test_an_ignore_mark_on_another_mount(
    inside: World, view: Path, accessor: Accessor, access: Callable[[str], None]
) -> None:
    furnish(inside)
    marks = Mark(ALL, inside.path, FAN_MARK_FILESYSTEM), Mark(ALL, view, IGNORE)
    async with inside.listener(*marks) as listener:
        await accessor.run(access, str(view))
        assert not heard(listener)
        await accessor.run(access, str(inside.path))
        assert heard(listener)


async def test_an_open_file_belongs_to_the_mount_of_its_open(
    inside: World, view: Path, make_accessor: MakeAccessor
) -> None:
    """This holds for every process that uses it, and also if it was opened before the mark."""
    inside.file()
    accessor = make_accessor()
    by_view = await accessor.run("open", str(view / "file"), os.O_RDONLY)
    by_path = await accessor.run("open", str(inside.path / "file"), os.O_RDONLY)
    async with inside.listener(Mark(ALL, inside.path, FAN_MARK_FILESYSTEM)) as listener:
        late_view = await accessor.run("open", str(view / "file"), os.O_RDONLY)
        late_path = await accessor.run("open", str(inside.path / "file"), os.O_RDONLY)
        heard(listener)
        await listener.group.mark(FAN_MARK_ADD | IGNORE, ALL, path=str(view))
        await accessor.run("pread", late_view, 1, 0)
        assert not heard(listener) or inside.engine == "pyfuse3"  # which does not know who reads
        await accessor.run("pread", late_path, 1, 0)
        assert heard(listener)
    for descriptor in (by_view, by_path):
        assert len(await accessor.run("pread", descriptor, 1, 0)) == 1


async def test_a_detached_clone(inside: World, accessor: Accessor) -> None:
    """The listener's private way to the files, as open_tree(2) makes it: marked by its descriptor."""
    inside.file()
    clone = ctypes.CDLL(None).syscall(OPEN_TREE, -100, bytes(inside.path), OPEN_TREE_CLONE | os.O_CLOEXEC)
    assert clone >= 0
    try:
        way = f"/proc/{os.getpid()}/fd/{clone}"
        async with inside.listener(
            Mark(ALL, inside.path, FAN_MARK_FILESYSTEM), Mark(ALL, f"/proc/self/fd/{clone}/.", IGNORE)
        ) as listener:
            await accessor.run(read, str(inside.path))
            assert heard(listener)
            # Such a path leads through a magic link, so the open is heard here; the read is of a known mount.
            descriptor = await accessor.run("open", f"{way}/file", os.O_RDONLY)
            assert not inside.is_kernel or not heard(listener)
            heard(listener)
            await accessor.run("pread", descriptor, 1, 0)
            assert not heard(listener) or inside.engine == "pyfuse3"  # which does not know who reads
    finally:
        os.close(clone)


async def test_notifications(inside: World, view: Path, accessor: Accessor) -> None:
    inside.file()
    group = await inside.open_group(FAN_CLASS_NOTIF | FAN_CLOEXEC)
    async with group:
        await group.mark(FAN_MARK_ADD | MOUNT, FAN_OPEN, path=str(view))
        await accessor.run(read, str(inside.path))
        with pytest.raises(BlockingIOError):
            group.take_events()
        await accessor.run(read, str(view))
        (event,) = group.take_events()
        os.close(event.fd)


async def test_pages_are_of_every_mount(
    inside: World, view: Path, accessor: Accessor, make_accessor: MakeAccessor
) -> None:
    """What one mount brings into the page cache is never read by the other without an event."""
    path = inside.file()
    async with inside.listener(Mark(PRE_ACCESS, view, MOUNT)) as listener:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        mapping = await accessor.run("map_file", descriptor, PAGE)
        await accessor.run("touch", mapping, 0)
        heard(listener)
        await make_accessor().run(read, str(view))
        assert heard(listener)


async def test_first_access_mode_asks_for_every_mount(
    make_mount: MakeMount, tmp_path: Path, accessor: Accessor
) -> None:
    mount = make_mount("--events", "first-access", "--cache", "private")
    world = World("first-access", mount.source, mount.path, mount.pid)
    world.file(size=SIZE)
    with bound(world.path, tmp_path / "view") as view:
        async with world.listener(Mark(PRE_ACCESS, view, MOUNT)) as listener:
            await accessor.run(read, str(world.path))
            assert heard(listener)


async def test_open_group_hears_every_mount(
    make_mount: MakeMount, tmp_path: Path, accessor: Accessor
) -> None:
    """Also if the path is on another mount of the tree: containers must not read zeros."""
    mount = make_mount("--events", "exact")
    exact = World("emulator", mount.source, mount.path, mount.pid)
    exact.file()
    with bound(exact.path, tmp_path / "view") as view:
        assert mount_of(view).is_fusehsm
        async with open_group(view, ("PRE_ACCESS",)) as group:
            call = accessor.start(read, str(exact.path))
            await group.wait_readable()
            (event,) = group.take_events()
            os.close(event.fd)
            group.answer(event, 0)
            await call.wait()
