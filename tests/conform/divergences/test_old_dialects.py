"""The dialects of the patch series: what the emulator does otherwise than they were posted."""

import os
from typing import Any

import pytest

from fusehsm.conform.accessor import Accessor
from tests.conform.divergences.sides import PAGE, READ_ONLY, Side, covers
from tests.support.async_listener import listening

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


def send(descriptor: int, offset: int, count: int) -> int:
    reader, writer = os.pipe()
    try:
        return os.sendfile(writer, descriptor, offset, count)
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("dialect", ["patch-v1", "patch-v2"])
async def test_page_cache_in_the_old_dialects(exact: Side, accessor: Accessor, dialect: str) -> None:
    path = exact.file(f"sent-{dialect}")
    async with exact.listening(dialect=dialect) as listener:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        assert await accessor.run(send, descriptor, 10, 100) == 100
        events = listener.briefly()
        await accessor.run("close", descriptor)
    assert events == [
        ("PRE_ACCESS", 0, 0),
        ("PRE_ACCESS", 0, PAGE),
    ]  # at open as posted; posted for sendfile: 10, 100


OLD_DIALECTS = pytest.mark.parametrize("dialect", ["patch-v1", "patch-v2"])
OPENED, MAPPED = ("PRE_ACCESS", 0, 0), ("PRE_ACCESS", 0, PAGE)


def copy_range(path: str, name: str, offset: int, count: int) -> int:
    source, target = os.open(path, os.O_RDONLY), os.open(name, os.O_WRONLY)
    try:
        return os.copy_file_range(source, target, count, offset, 0)
    finally:
        os.close(source)
        os.close(target)


@OLD_DIALECTS
async def test_copies_in_the_old_dialects(exact: Side, accessor: Accessor, dialect: str) -> None:
    path, other = exact.file(f"copied-{dialect}"), exact.file(f"copy-{dialect}")
    async with listening(path, dialect=dialect, mark="inode", event_f_flags=READ_ONLY) as listener:
        assert await accessor.run(copy_range, path, other, 10, 100) == 100
        asked = MAPPED if exact.diverges("copies (patch-v1, patch-v2)") else ("PRE_ACCESS", 10, 100)
        assert listener.briefly() == [OPENED, asked]


@OLD_DIALECTS
async def test_page_faults_in_the_old_dialects(exact: Side, accessor: Accessor, dialect: str) -> None:
    path = exact.file(f"faulted-{dialect}")
    names = ("ACCESS_PERM", "PRE_ACCESS", "PRE_MODIFY")
    how: dict[str, Any] = {"dialect": dialect, "mark": "inode", "event_f_flags": READ_ONLY}
    async with listening(path, names, **how) as listener:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        private = await accessor.run("map_file", descriptor, PAGE, 0, False, True)
        await accessor.run("put", private, 10, b"new")
        # As posted: PRE_MODIFY.
        assert listener.briefly() == [OPENED, ("ACCESS_PERM", None, None), MAPPED]
    if exact.diverges("shared mappings (exact)"):
        return
    for heard, asked in ((names, ("PRE_MODIFY", 0, PAGE)), (("PRE_ACCESS",), MAPPED)):
        async with listening(path, heard, **how) as listener:
            descriptor = await accessor.run("open", path, os.O_RDWR)
            listener.take()
            shared = await accessor.run("map_file", descriptor, PAGE, 0, True, True)
            await accessor.run("touch", shared, 0, 1)
            # As posted: ACCESS_PERM and PRE_ACCESS.
            assert listener.briefly() == [asked]
            await accessor.run("unmap", shared)


@OLD_DIALECTS
async def test_page_faults_and_marks_on_directories_in_the_old_dialects(
    exact: Side, accessor: Accessor, dialect: str
) -> None:
    (exact.backing / dialect).mkdir()
    path = exact.file(f"{dialect}/file")
    names = ("ACCESS_PERM", "PRE_ACCESS")
    how: dict[str, Any] = {"dialect": dialect, "mark": "children", "event_f_flags": READ_ONLY}
    async with listening(os.path.dirname(path), names, **how) as listener:
        descriptor = await accessor.run("open", path, os.O_RDONLY)
        number = await accessor.run("map_file", descriptor, PAGE)
        assert listener.briefly() == [OPENED]
        await accessor.run("touch", number, 0, 1)
        assert listener.briefly() == [MAPPED]  # as posted: none


@OLD_DIALECTS
async def test_files_opened_before_the_mark_in_the_old_dialects(
    exact: Side, accessor: Accessor, dialect: str
) -> None:
    path = exact.file(f"before-{dialect}")
    descriptor = await accessor.run("open", path, os.O_RDWR)
    names = ("ACCESS_PERM", "PRE_ACCESS", "PRE_MODIFY")
    async with listening(path, names, dialect=dialect, mark="inode", event_f_flags=READ_ONLY) as listener:
        # As posted: ACCESS_PERM, and PRE_ACCESS of 100 bytes at 10, both times.
        await accessor.run("pread", descriptor, 100, 10)
        heard = listener.briefly()
        assert covers(heard, 0, PAGE)
        assert {name for name, _, _ in heard} == {"PRE_ACCESS"}
        await accessor.run("pread", descriptor, 100, 10)
        assert listener.take() == []
        await accessor.run("pwrite", descriptor, b"new", 10)
        assert listener.briefly() == [("PRE_MODIFY", 10, 3)]
