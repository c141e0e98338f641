"""`--events per-file`: exact events for the files that a group hears call by call, the page cache for all others, on one mount.

`auto` is this before Linux 6.6, and with pyfuse3: there a file with exact events cannot be mapped shared.
"""

import mmap
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from fusehsm.control.client import request
from fusehsm.control.protocol import Status
from fusehsm.engines.choice import maps_direct_files_shared
from fusehsm.linux.mountinfo import mount_of
from tests.conftest import MakeMount
from tests.support.async_listener import listening
from tests.support.harness import PATIENCE, Mount, fusehsm

pytestmark = pytest.mark.fuse

PAGE = 4096
SIZE = 16 * PAGE
EXACT = [("PRE_ACCESS", PAGE, PAGE), ("ACCESS_PERM", None, None)]


@pytest.fixture(scope="module")
def mount(make_shared_mount: MakeMount) -> Mount:
    return make_shared_mount("--events", "per-file")


def file(mount: Mount, name: str) -> Path:
    (mount.source / name).write_bytes(bytes(range(256)) * (SIZE // 256))
    return mount.path / name


def write_shared(path: str, offset: int, data: bytes) -> bytes:
    """Write through a shared mapping, and read it back by read(2)."""
    descriptor = os.open(path, os.O_RDWR)
    with mmap.mmap(descriptor, 0) as mapping:
        mapping[offset : offset + len(data)] = data
        mapping.flush()
    return os.pread(descriptor, len(data), offset)


def asked(listener_heard: list[tuple[str, int | None, int | None]], start: int, end: int) -> bool:
    return any(
        name == "PRE_ACCESS" and offset is not None and offset <= start and offset + (count or 0) >= end
        for name, offset, count in listener_heard
    )


async def test_its_name(mount: Mount) -> None:
    assert (await request(mount_of(str(mount.path)), Status()))["events"] == "per-file"


async def test_what_auto_means(make_mount: MakeMount, engine: str) -> None:
    status = await request(mount_of(str(make_mount().path)), Status())
    assert status["events"] == ("exact" if maps_direct_files_shared(engine) else "per-file")


async def test_a_file_of_which_only_content_is_asked_for_can_be_mapped_shared(
    mount: Mount, accessor: Accessor
) -> None:
    path = file(mount, "mapped")
    async with listening(mount.path) as listener:
        assert await accessor.run(write_shared, str(path), PAGE + 10, b"new") == b"new"
        assert asked(listener.briefly(), PAGE, 2 * PAGE)
    assert (mount.source / "mapped").read_bytes()[PAGE + 10 :][:3] == b"new"


async def test_its_cached_content_makes_no_event(mount: Mount, accessor: Accessor) -> None:
    path = file(mount, "cached")
    async with listening(mount.path) as listener:
        for _ in range(3):
            assert await accessor.run("pread_path", str(path), 10, PAGE) == bytes(range(10))
        heard = listener.briefly()
        assert asked(heard, PAGE, 2 * PAGE)
        assert len(heard) == 1


@pytest.mark.parametrize("mask", ["OPEN_PERM", "ACCESS_PERM", "OPEN_EXEC_PERM"])
async def test_a_file_with_permission_events_has_an_event_for_each_call(
    mount: Mount, accessor: Accessor, mask: str
) -> None:
    path = file(mount, f"exact-{mask}")
    async with listening(path, ("PRE_ACCESS", mask), mark="inode") as listener:
        for _ in range(2):
            assert await accessor.run("pread_path", str(path), 10, PAGE) == bytes(range(10))
            heard = [event for event in listener.briefly() if event[0] == "PRE_ACCESS"]
            assert heard == [("PRE_ACCESS", PAGE, PAGE)]


async def test_a_file_with_notifications_has_one_for_each_read(mount: Mount, accessor: Accessor) -> None:
    path = file(mount, "notified")
    async with listening(path, ("PRE_ACCESS", "ACCESS"), mark="inode") as listener:
        for number in (1, 2):
            await accessor.run("pread_path", str(path), 10, PAGE)
            names = [event.names for event in await listener.wait_for(2 * number)]
        assert [name for name in names if "PRE_ACCESS" in name] == [("PRE_ACCESS",)] * 2
        assert [name for name in names if "ACCESS" in name] == [("ACCESS",)] * 2


async def test_both_kinds_of_files_on_one_mount(mount: Mount, accessor: Accessor) -> None:
    cached, exact = file(mount, "one"), file(mount, "two")
    async with (
        listening(mount.path) as everywhere,
        listening(exact, ("ACCESS_PERM", "PRE_ACCESS"), mark="inode") as one_file,
    ):
        for _ in range(2):
            await accessor.run("pread_path", str(cached), 10, PAGE)
            await accessor.run("pread_path", str(exact), 10, PAGE)
        assert len([event for event in everywhere.take() if event.path == str(cached)]) == 1
        assert one_file.briefly() == EXACT * 2
        assert await accessor.run(write_shared, str(cached), 0, b"new") == b"new"


async def test_a_mark_for_permission_events_comes_late(mount: Mount, accessor: Accessor) -> None:
    """Pages in the cache do not answer for the calls of files that are opened after the mark."""
    path = file(mount, "late")
    async with listening(mount.path):
        descriptor = await accessor.run("open", str(path), os.O_RDWR)
        assert await accessor.run("pread", descriptor, 10, PAGE) == bytes(range(10))
        async with listening(path, ("ACCESS_PERM", "PRE_ACCESS"), mark="inode") as listener:
            for _ in range(2):
                assert await accessor.run("pread_path", str(path), 10, PAGE) == bytes(range(10))
            assert listener.briefly() == EXACT * 2
            # What goes past the page cache is seen by those who read from it, and the other way round.
            assert await accessor.run("pwrite_path", str(path), b"direct", PAGE) == 6
            assert await accessor.run("pread", descriptor, 6, PAGE) == b"direct"
            assert await accessor.run("pwrite", descriptor, b"cached", PAGE) == 6
            assert await accessor.run("pread_path", str(path), 6, PAGE) == b"cached"


async def test_permission_events_go_again(mount: Mount, accessor: Accessor) -> None:
    path = file(mount, "going")
    async with listening(mount.path) as listener:
        async with listening(path, ("ACCESS_PERM",), mark="inode"):
            await accessor.run("pread_path", str(path), 10, PAGE)
        # The mount hears a moment after close(2) that the group has gone.
        with trio.fail_after(PATIENCE):
            while len((await request(mount_of(str(mount.path)), Status()))["groups"]) > 1:
                await trio.sleep(0.01)
        listener.take()
        assert await accessor.run(write_shared, str(path), 0, b"new") == b"new"
        assert asked(listener.briefly(), 0, PAGE)


@pytest.mark.root
async def test_reads_ahead_where_no_call_is_asked_for(mount: Mount, accessor: Accessor) -> None:
    """Notifications that need no call of their own change nothing: without read-ahead there would be 256 events."""
    (mount.source / "long").write_bytes(bytes(1 << 20))
    async with listening(mount.path, ("PRE_ACCESS", "CLOSE_WRITE", "MODIFY")) as listener:
        await accessor.run("read_file", str(mount.path / "long"))
        heard = listener.briefly()
    assert {name for name, _, _ in heard} == {"PRE_ACCESS"}
    assert len(heard) < 40


@pytest.mark.root
async def test_a_mapping_brings_in_single_pages_where_calls_are_asked_for(
    mount: Mount, accessor: Accessor
) -> None:
    path = file(mount, "faults")
    async with listening(path, ("PRE_ACCESS", "OPEN_PERM"), mark="inode") as listener:
        descriptor = await accessor.run("open", str(path), os.O_RDONLY)
        number = await accessor.run("map_file", descriptor, PAGE, PAGE)
        listener.take()
        await accessor.run("touch", number, 0)
        assert listener.briefly() == [("PRE_ACCESS", PAGE, PAGE)]


def test_under_fusehsm_run_as_well(places: Callable[[str], Path]) -> None:
    """Which keeps unwatched files out of the page cache (--direct), where that does not forbid shared mappings."""
    place = places("run")
    (place / "mapped").write_bytes(bytes(SIZE))
    program = "import mmap, os; mmap.mmap(os.open('mapped', os.O_RDWR), 0)[0] = 7"
    done = fusehsm(
        "run",
        "--events",
        "per-file",
        "--accessor",
        "--mount",
        place,
        "--",
        sys.executable,
        "-c",
        program,
        cwd=place,
    )
    assert done.returncode == 0, done.stderr
    assert (place / "mapped").read_bytes()[0] == 7
