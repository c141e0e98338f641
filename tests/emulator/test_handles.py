"""Open files keep working however few backing descriptors may be open at once."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.emulator.handles import HandleTable, OpenFile

LIMIT = 8


def add(table: HandleTable[Path], path: Path, flags: int = os.O_RDONLY, uid: int = 0) -> OpenFile[Path]:
    return table.add(
        path, flags, os.open(path, flags), armed=None, direct=False, tid=1, pid=1, uid=uid, gid=0
    )


def add_unnamed(table: HandleTable[Path], path: Path, uid: int) -> OpenFile[Path]:
    descriptor = os.open(path, os.O_RDONLY)
    path.unlink()
    return table.add(path, os.O_RDONLY, descriptor, armed=None, direct=False, tid=1, pid=1, uid=uid, gid=0)


@pytest.fixture
def opened() -> list[int]:
    """The flags of every reopening."""
    return []


@pytest.fixture
def table(opened: list[int]) -> HandleTable[Path]:
    def open_backing(path: Path, flags: int) -> int:
        opened.append(flags)
        return os.open(path, flags)

    return HandleTable(open_backing, LIMIT)


def files(directory: Path, count: int) -> list[Path]:
    made = [directory / str(number) for number in range(count)]
    for path in made:
        path.write_text(path.name)
    return made


def open_descriptors(under: Path) -> int:
    links: list[str] = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return sum(link.startswith(str(under)) for link in links)


def content(table: HandleTable[Path], file: OpenFile[Path]) -> bytes:
    with table.backing(file) as descriptor:
        return os.pread(descriptor, 100, 0)


def test_more_files_than_descriptors(table: HandleTable[Path], tmp_path: Path) -> None:
    paths = files(tmp_path, 50)
    handles = [add(table, path) for path in paths]
    assert open_descriptors(tmp_path) == LIMIT
    for _ in range(2):
        assert [content(table, file) for file in handles] == [path.name.encode() for path in paths]
    assert open_descriptors(tmp_path) == LIMIT
    for file in handles:
        table.release(file.handle)
    assert open_descriptors(tmp_path) == 0
    assert len(table) == 0


def test_the_least_recently_used_is_closed(
    table: HandleTable[Path], tmp_path: Path, opened: list[int]
) -> None:
    handles = [add(table, path) for path in files(tmp_path, LIMIT + 1)]
    assert handles[0].descriptor is None
    content(table, handles[1])
    content(table, handles[0])
    assert len(opened) == 1
    assert handles[1].descriptor is not None
    assert handles[2].descriptor is None
    table.close()


def test_a_file_in_use_is_not_closed(table: HandleTable[Path], tmp_path: Path) -> None:
    paths = files(tmp_path, 30)
    first = add(table, paths[0])
    with table.backing(first) as descriptor:
        for path in paths[1:]:
            add(table, path)
        assert os.pread(descriptor, 10, 0) == b"0"
    table.close()


def test_a_file_released_in_use_is_closed_afterwards(table: HandleTable[Path], tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    file = add(table, path)
    with table.backing(file) as descriptor:
        table.release(file.handle)
        assert os.pread(descriptor, 10, 0) == b"0"
    assert open_descriptors(tmp_path) == 0
    with pytest.raises(OSError):
        table.backing(file)


def test_what_stands_for_a_node_goes_with_it(table: HandleTable[Path], tmp_path: Path) -> None:
    (path,) = files(tmp_path, 1)
    reading, writing = (table.stateless(path, None, writing=way) for way in (False, True))
    assert table.stateless(path, None, writing=False) is reading
    assert content(table, reading) == b"0"
    with table.backing(writing) as descriptor:
        os.pwrite(descriptor, b"new", 0)
    assert content(table, reading) == b"new"
    table.forget(path)
    assert len(table) == 0
    assert open_descriptors(tmp_path) == 0


def test_an_unlinked_file_is_not_closed(table: HandleTable[Path], tmp_path: Path) -> None:
    paths = files(tmp_path, 30)
    first = add(table, paths[0])
    paths[0].unlink()
    for path in paths[1:]:
        add(table, path)
    assert content(table, first) == b"0"
    table.close()


def test_reopening_neither_creates_nor_truncates(
    table: HandleTable[Path], tmp_path: Path, opened: list[int]
) -> None:
    target = tmp_path / "target"
    file = add(table, target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_EXCL)
    target.write_text("kept")
    for path in files(tmp_path, 20):
        add(table, path)
    assert content(table, file) == b"kept"
    assert opened == [os.O_RDWR]
    table.close()


def test_files_of_a_node(table: HandleTable[Path], tmp_path: Path) -> None:
    one, two = files(tmp_path, 2)
    mine = [add(table, one), add(table, one)]
    add(table, two)
    assert table.of_node(one) == mine
    table.close()


def test_an_unknown_handle_is_an_error(table: HandleTable[Path]) -> None:
    calls: list[Callable[[int], object]] = [table.get, table.release]
    for call in calls:
        with pytest.raises(OSError):
            call(7)


def test_a_user_with_many_files_that_must_stay_open(table: HandleTable[Path], tmp_path: Path) -> None:
    """They never had a name (O_TMPFILE). That user gets ENFILE, and another opens more files than there are descriptors."""
    hoarder, other = 1001, 1002
    hoarded = files(tmp_path, 30)
    held: list[OpenFile[Path]] = []
    with pytest.raises(OSError, match=os.strerror(errno.ENFILE)):
        for path in hoarded:
            held.append(add_unnamed(table, path, uid=hoarder))
    assert len(held) < 2 * LIMIT
    assert open_descriptors(tmp_path) == len(held)
    (tmp_path / "other").mkdir()
    paths = files(tmp_path / "other", 50)
    handles = [add(table, path, uid=other) for path in paths]
    assert open_descriptors(tmp_path) <= len(held) + LIMIT
    assert [content(table, file) for file in handles] == [path.name.encode() for path in paths]
    # What is given back can be used again.
    for file in held:
        table.release(file.handle)
    add(table, paths[0], uid=hoarder)
