"""Space on the disk: what mappings take."""

import errno
import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.conform.accessor import AccessorDied
from tests.conftest import MakeAccessor, MakeMount
from tests.support.harness import NOBODY
from tests.support.overlay_actions import mounted

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

SIZE = 1 << 20


@pytest.fixture
def disk(session_directory: Path, numbers: Iterator[int]) -> Iterator[Path]:
    """A directory on an ext4 of which half is kept for root. Users have nothing left. It holds `below` and `through`, all holes."""
    place = session_directory / f"space-{next(numbers)}"
    image = place.with_suffix(".img")
    with image.open("xb") as file:
        file.truncate(16 << 20)
    subprocess.run(
        ["mkfs.ext4", "-q", "-b", "4096", "-m", "50", "-O", "^has_journal", str(image)],
        check=True,
        timeout=60,
    )
    with mounted("-t", "ext4", "-o", "loop", str(image), at=place) as root:
        source = root / "source"
        source.mkdir()
        for name in ("below", "through"):
            with (source / name).open("wb") as file:
                file.truncate(SIZE)
            os.chown(source / name, NOBODY, NOBODY)
        with (source / "filler").open("wb") as file:
            status = os.statvfs(source)
            os.posix_fallocate(file.fileno(), 0, status.f_bavail * status.f_bsize)
        yield source
    image.unlink()


def store_and_synchronise(path: str, size: int) -> int:
    """Store into each page of a shared mapping; the errno of msync(2), 0 for none."""
    descriptor = os.open(path, os.O_RDWR)
    with mmap.mmap(descriptor, size) as mapping:
        for page in range(0, size, 4096):
            mapping[page] = 1
        try:
            mapping.flush()
        except OSError as error:
            return error.errno or -1
    return 0


def kept(disk: Path) -> int:
    """Free bytes that only root may take."""
    status = os.statvfs(disk)
    return (status.f_bfree - status.f_bavail) * status.f_bsize


@pytest.mark.parametrize("cache", ["shared", "private"])
async def test_space_for_mappings(
    disk: Path, make_mount: MakeMount, make_accessor: MakeAccessor, cache: str
) -> None:
    with pytest.raises(AccessorDied):
        await make_accessor(uid=NOBODY, gid=NOBODY).run(store_and_synchronise, str(disk / "below"), SIZE)
    before = kept(disk)
    mount = make_mount("--events", "first-access", "--cache", cache, "--allow-other", source=disk)
    path = str(mount.path / "through")
    user = make_accessor(uid=NOBODY, gid=NOBODY)
    assert await user.run(store_and_synchronise, path, SIZE) == errno.ENOSPC
    assert kept(disk) == before
