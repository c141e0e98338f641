"""What brings files to the disk."""

import ctypes
import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from tests.conftest import MakeMount
from tests.support.tier.power import Disk

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


@pytest.fixture
def disk(ext4: Path, session_directory: Path, numbers: Iterator[int]) -> Iterator[Disk]:
    place = session_directory / f"disk-{next(numbers)}"
    place.mkdir()
    disk = Disk(place / "image", place / "root", 16)
    yield disk
    disk.close()


def call_syncfs(descriptor: int) -> int:

    libc = ctypes.CDLL(None, use_errno=True)
    return ctypes.get_errno() if libc.syncfs(descriptor) else 0


async def test_syncfs(disk: Disk, make_mount: MakeMount, accessor: Accessor) -> None:
    """Whatever means to write to a disk that has failed gets an error."""
    mount = make_mount(source=disk.root)
    below, through = [
        await accessor.run("open", str(place / name), os.O_CREAT | os.O_WRONLY)
        for place, name in ((disk.root, "below"), (mount.path, "through"))
    ]
    for descriptor in (below, through):
        await accessor.run("write", descriptor, b"content")
    disk.cut()
    assert await accessor.run(call_syncfs, below) == errno.EIO
    assert await accessor.run(call_syncfs, through) == 0
    for descriptor in (below, through):
        with pytest.raises(OSError) as caught:
            await accessor.run("fsync", descriptor)
        assert caught.value.errno == errno.EIO
