"""The disk fills up in the middle of fills: accesses are told so, nothing wrong is to be read, and all is right once there is room."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.conform.sides import ext4_image
from fusehsm.tier.stubs.stub import StubFile
from fusehsm.tier.stubs.tree import Tree
from tests.support.requirements import require_root
from tests.support.tier.fetching import fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.any_engine

MIB = 1 << 20


@pytest.fixture
def small_disk(session_directory: Path, numbers: Iterator[int]) -> Iterator[Path]:
    """32 MiB."""
    require_root()
    with ext4_image(session_directory / f"small-{next(numbers)}", 32) as root:
        yield root


def fill_up(path: Path, leaving: int = 0) -> None:
    """Take all the room there is, but for so many bytes."""
    room = os.statvfs(path.parent)
    with open(path, "wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(room.f_bavail * room.f_bsize - leaving - MIB // 2, 4096))
        try:
            while leaving == 0:
                file.seek(0, os.SEEK_END)
                file.write(bytes(1024))
        except OSError as error:
            assert error.errno == errno.ENOSPC
    os.sync()


def test_no_room(places: Callable[[str], Path], small_disk: Path, backend: str) -> None:
    store, target = places("store"), small_disk / "tree"
    target.mkdir()
    content = {f"f{number}": content_of(3 * MIB + number, number) for number in range(6)}
    for name, data in content.items():
        (store / name).write_bytes(data)
    plant(store, target)
    fill_up(small_disk / "ballast", leaving=8 * MIB)
    with fetching(store, target, "--backend", backend, "--block-size", "64K") as served:
        full = 0
        for name, data in content.items():
            fd = os.open(target / name, os.O_RDONLY)
            for offset in range(0, len(data), 65536):
                try:
                    assert os.pread(fd, 65536, offset) == data[offset : offset + 65536]
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    full += 1
            os.close(fd)
        assert full
        (small_disk / "ballast").unlink()
        for name in content:
            assert run("cmp", store / name, target / name).stdout == ""
        served.end()
    for name in content:
        assert run("cmp", store / name, target / name).stdout == ""


def test_no_room_for_the_record(small_disk: Path) -> None:
    """The blocks then do not count as here, and it is not the user who has changed the file."""
    path = small_disk / "stub"
    size = 400 * 4096
    path.touch()
    os.truncate(path, size)
    store, target = small_disk / "store", small_disk / "tree"
    store.mkdir()
    target.mkdir()
    os.rename(path, store / "stub")
    plant(store, target)
    fd = os.open(target / "stub", os.O_RDWR)
    try:
        # Other attributes leave a few bytes for it in the inode and its block.
        for number in range(100):
            try:
                os.setxattr(fd, f"user.ballast{number}", bytes(random.Random(number).randbytes(60)))
            except OSError:
                break
        status = os.fstat(fd)
        file = StubFile.recover(fd, "stub", Tree.of(fd), 4096)
        assert file is not None
        with pytest.raises(OSError) as raised:
            for block in range(0, 400, 2):
                file.fill(fd, block, block + 1, [(block * 4096, b"x" * 4096)], lambda: True)
        assert raised.value.errno == errno.ENOSPC
        assert file.missing(0, size)
        assert not file.modified
        assert os.fstat(fd).st_mtime_ns == status.st_mtime_ns
        for number in range(100):
            os.removexattr(fd, f"user.ballast{number}")
            if f"user.ballast{number + 1}" not in os.listxattr(fd):
                break
        for block in file.missing(0, size):
            file.fill(fd, block, block + 1, [(block * 4096, b"x" * 4096)], lambda: True)
        assert file.is_complete
        assert os.pread(fd, size, 0) == b"x" * size
    finally:
        os.close(fd)
