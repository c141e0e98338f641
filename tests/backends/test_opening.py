"""open_group: which backend it takes, what it marks, what it undoes, and what it says when nothing works."""

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.backends.opening import open_group
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from fusehsm.fanotify.abi import LINUX_6_14, PATCH_V2
from fusehsm.handler import serve
from fusehsm.linux.mountinfo import mount_of, read_mounts
from tests.conftest import MakeAccessor, MakeMount
from tests.support.harness import NOBODY, Mount, environment

pytest_plugins = ["tests.support.handler_fixtures"]
pytestmark = pytest.mark.any_engine

PAGE = 4096


@pytest.fixture
def tree(kernel_events: Path, places: Callable[[str], Path]) -> Path:
    """A directory with a stub, a subdirectory with a stub, and a stub beside it, on ext4 without a mount of its own."""
    outside = places("outside")
    (outside / "tree" / "sub").mkdir(parents=True)
    for name in ("tree/stub", "tree/sub/stub", "beside"):
        with (outside / name).open("wb") as file:
            file.truncate(PAGE)
    return outside / "tree"


def mount_points() -> list[str]:
    return [mount.mount_point for mount in read_mounts()]


async def test_the_kernel_is_taken_where_it_works(tree: Path) -> None:
    async with open_group(tree) as group:
        assert isinstance(group, KernelGroup)
        assert group.dialect is LINUX_6_14


async def test_the_emulator_is_taken_on_its_mounts(exact_mount: Mount) -> None:
    async with open_group(exact_mount.path) as group:
        assert isinstance(group, EmulatedGroup)
    async with open_group(exact_mount.path, backend="fuse") as group:
        assert isinstance(group, EmulatedGroup)


@pytest.mark.parametrize(
    ("mark", "heard"),
    [
        ("mount", {"stub", "sub/stub"}),
        ("children", {"stub"}),
        ("inode", set()),
        ("filesystem", {"stub", "sub/stub", "../beside"}),
    ],
)
async def test_what_a_mark_on_a_directory_covers(
    tree: Path, accessor: Accessor, mark: str, heard: set[str]
) -> None:
    seen: set[str] = set()

    async def look(event: Event) -> None:
        seen.add(os.path.relpath(event.path, tree))

    async with open_group(tree, mark=mark) as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, look)
        for name in ("stub", "sub/stub", "../beside"):
            await accessor.run("pread_path", str(tree / name), 1, 0)
        nursery.cancel_scope.cancel()
    assert seen == heard


async def test_a_directory_is_mounted_on_itself_only_while_it_is_watched(tree: Path) -> None:
    async with open_group(tree):
        assert mount_points().count(str(tree)) == 1
        async with open_group(tree):  # a mount point by now
            assert mount_points().count(str(tree)) == 1
    assert str(tree) not in mount_points()
    async with open_group(tree, mark="filesystem"):
        assert str(tree) not in mount_points()


async def test_mounts_below_stay_visible_and_what_is_busy_goes_all_the_same(
    tree: Path, accessor: Accessor
) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "none", tree / "sub"], check=True)
    try:
        (tree / "sub" / "on tmpfs").touch()
        async with open_group(tree):
            assert (tree / "sub" / "on tmpfs").exists()
            await accessor.run("chdir", str(tree / "sub"))
        assert str(tree) not in mount_points()
        assert (tree / "sub" / "on tmpfs").exists()
    finally:
        await accessor.run("chdir", "/")
        subprocess.run(["umount", tree / "sub"], check=True)


async def test_a_file_can_be_watched_through_a_symbolic_link(tree: Path, accessor: Accessor) -> None:
    (tree / "link").symlink_to("stub")
    seen: list[str] = []

    async def look(event: Event) -> None:
        seen.append(event.path)

    async with open_group(tree / "link", mark="inode") as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, look)
        await accessor.run("pread_path", str(tree / "link"), 1, 0)
        nursery.cancel_scope.cancel()
    assert seen == [str(tree / "stub")]


async def test_nothing_is_left_when_the_mark_fails(tree: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match="PRE_MODIFY"):
        async with open_group(tree, ["PRE_MODIFY"]):
            pass
    with pytest.raises(OSError):
        async with open_group(tree, 0x00200000):
            pass
    assert str(tree) not in mount_points()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "windows"}, "choose one of auto, kernel, fuse"),
        ({"mark": "everything"}, "choose one of inode, children, mount, filesystem"),
        ({"dialect": "klingon"}, "choose one of linux-6.14, patch-v2, patch-v1"),
    ],
)
async def test_words_that_are_none_are_refused(tree: Path, options: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        async with open_group(tree, **options):  # type: ignore[arg-type]
            pass


async def refusal(path: Path, **options: str) -> OSError:
    with pytest.raises(OSError) as refused:
        async with open_group(path, **options):  # type: ignore[arg-type]
            pass
    assert refused.value.strerror
    assert "\n" not in refused.value.strerror
    return refused.value


async def test_a_filesystem_without_events_names_the_fix() -> None:
    error = await refusal(Path("/dev/shm"))
    assert error.errno == errno.EOPNOTSUPP
    assert (
        error.strerror
        == "/dev/shm: tmpfs has no pre-content events; `fusehsm mount /dev/shm /dev/shm` emulates them"
    )


async def test_the_kernel_cannot_watch_an_emulated_mount(exact_mount: Mount) -> None:
    error = await refusal(exact_mount.path, backend="kernel")
    assert error.errno == errno.EOPNOTSUPP
    assert "fuse.fusehsm has no pre-content events" in str(error)


async def test_the_emulator_needs_one_of_its_mounts(tree: Path) -> None:
    error = await refusal(tree, backend="fuse")
    assert f"fusehsm mount {tree} {tree}" in str(error)


async def test_the_kernel_speaks_one_dialect(tree: Path) -> None:
    error = await refusal(tree, dialect="patch-v2")
    assert error.errno == errno.EOPNOTSUPP
    assert "patch-v2" in str(error)


async def test_a_path_that_is_not_there() -> None:
    error = await refusal(Path("/does/not/exist"))
    assert error.errno == errno.ENOENT


# Becomes that user only when everything is imported: the interpreter may lie where he must not look.
UNPRIVILEGED = """
import ctypes, os, sys, trio
from fusehsm.backends.opening import open_group
from fusehsm.linux.mountinfo import mount_of
mount_of("/")
os.setgroups([])
os.setgid(int(sys.argv[2]))
os.setuid(int(sys.argv[2]))
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: /proc/self is his own again
async def main():
    async with open_group(sys.argv[1]):
        print("watching")
try:
    trio.run(main)
except OSError as error:
    print(error.errno, error.strerror)
"""


def test_an_ordinary_user_is_told_to_mount(tree: Path) -> None:
    command = [sys.executable, "-c", UNPRIVILEGED, str(tree), str(NOBODY)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{errno.EPERM} {tree}: the kernel's pre-content events need root")
    assert f"fusehsm mount {tree} {tree}" in done.stdout


def test_an_ordinary_user_is_told_whose_a_mount_is(exact_mount: Mount) -> None:
    command = [sys.executable, "-c", UNPRIVILEGED, str(exact_mount.path), str(NOBODY)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout.startswith(
        f"{errno.EACCES} {exact_mount.path}: only root and its owner, user 0, may listen"
    )


# Dialects of a mount


@pytest.fixture(scope="module")
def patch_v2_mount(make_shared_mount: MakeMount) -> Mount:
    """A mount whose groups speak patch-v2 unless they say otherwise."""
    return make_shared_mount("--abi", "patch-v2", "--events", "exact")


async def test_the_mount_gives_the_dialect_unless_one_is_named(patch_v2_mount: Mount) -> None:
    async with open_group(patch_v2_mount.path) as group:
        assert group.dialect is PATCH_V2
    async with open_group(patch_v2_mount.path, dialect="linux-6.14") as group:
        assert group.dialect is LINUX_6_14


async def test_a_number_that_means_different_things_is_not_guessed_at(patch_v2_mount: Mount) -> None:
    for mask in (LINUX_6_14.pre_access, PATCH_V2.pre_access):
        with pytest.raises(OSError, match="means different events in different dialects") as refused:
            async with open_group(patch_v2_mount.path, mask):
                pass
        assert refused.value.errno == errno.EINVAL
    async with open_group(patch_v2_mount.path, PATCH_V2.pre_access, dialect=PATCH_V2):
        pass
    async with open_group(patch_v2_mount.path, ["PRE_ACCESS", "OPEN_PERM"]):
        pass


async def test_names_are_those_of_the_groups_dialect(
    patch_v2_mount: Mount, make_accessor: MakeAccessor
) -> None:
    with (patch_v2_mount.source / "stub").open("wb") as file:
        file.truncate(3 * PAGE)
    seen: list[tuple[list[str], int | None, int | None]] = []

    async def look(event: Event) -> None:
        seen.append((event.names, event.offset, event.count))

    path = str(patch_v2_mount.path / "stub")
    async with open_group(path, mark="inode") as group, trio.open_nursery() as nursery:
        nursery.start_soon(serve, group, look)
        await make_accessor().run("pread_path", path, 100, 10)
        await make_accessor().run("pwrite_path", path, b"x", 20)
        nursery.cancel_scope.cancel()
    assert seen == [
        (["PRE_ACCESS"], 0, 0),
        (["PRE_ACCESS"], 10, 100),
        (["PRE_MODIFY"], 0, 0),
        (["PRE_MODIFY"], 20, 1),
    ]


async def test_mount_of_follows_what_lies_on_top(tree: Path) -> None:
    under = await trio.to_thread.run_sync(mount_of, tree)
    async with open_group(tree):
        above = mount_of(tree / "stub")
    assert above.mount_point == str(tree)
    assert above.device == under.device
    assert above.mount_id != under.mount_id
