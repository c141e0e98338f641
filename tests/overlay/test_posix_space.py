"""Space that a file system keeps for root: a user gets no more of it through root's mount than without the mount."""

import ctypes
import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from fusehsm.linux.proc import has_capability
from fusehsm.linux.syscalls import syncfs
from tests.conftest import MakeMount
from tests.support import engines
from tests.support.harness import NOBODY
from tests.support.overlay_actions import mounted
from tests.support.posix_trees import in_child
from tests.support.requirements import require, require_root

IMAGE = 16 << 20
LEFT = 1 << 18  # bytes that users may still take when a test begins
PIECE = 1 << 14
RESERVE_GROUP = 4244
CAP_SYS_RESOURCE = 24
PR_SET_KEEPCAPS = 8


@dataclass(frozen=True)
class Disk:
    """An ext4 of which half is kept for root and a group; `path` is where users write to it."""

    backing: Path
    path: Path
    engine: str  # none natively

    def space(self) -> tuple[int, int]:
        """Bytes free for root, and of these for users."""
        status = os.statvfs(self.backing)
        return status.f_bfree * status.f_bsize, status.f_bavail * status.f_bsize

    def reserve(self) -> int:
        for_root, for_users = self.space()
        assert for_users > 0
        return for_root - for_users

    def is_kept(self, reserve: int) -> bool:
        """Whether nobody has taken anything of the reserve."""
        # The tree of a file's extents may grow by a block of its own.
        return self.space()[0] >= reserve - 8 * 4096


@pytest.fixture(scope="module", params=engines.parameters("native", words=("first-access", "exact")))
def whole_disk(request: pytest.FixtureRequest, session_directory: Path) -> Iterator[Disk]:
    require_root()
    require(shutil.which("mkfs.ext4") is not None, "needs mkfs.ext4")
    mode, engine = request.param
    place = session_directory / f"space-{engine}-{mode}"
    image = place.with_suffix(".img")
    with image.open("xb") as file:
        file.truncate(IMAGE)
    subprocess.run(
        ["mkfs.ext4", "-q", "-b", "4096", "-m", "50", "-O", "^has_journal", str(image)],
        check=True,
        timeout=60,
    )
    with mounted("-t", "ext4", "-o", f"loop,resgid={RESERVE_GROUP}", str(image), at=place) as root:
        source = root / "source"
        source.mkdir()
        path = source
        if engine:
            make_mount: MakeMount = request.getfixturevalue("make_engine_mount")
            mount = make_mount("--engine", engine, "--events", mode, "--allow-other", source=source)
            path = mount.path
        yield Disk(source, path, engine)
        if engine:
            mount.close()
    image.unlink()


@pytest.fixture
def disk(whole_disk: Disk, numbers: Iterator[int]) -> Iterator[Disk]:
    """In a directory of its own: `file`, all holes, `content`, and `small`, many empty files, all the user's. LEFT bytes are for users."""
    # No name is used twice: the mount would remember it.
    name = f"test-{next(numbers)}"
    disk = replace(whole_disk, backing=whole_disk.backing / name, path=whole_disk.path / name)
    source = disk.backing
    source.mkdir()
    (source / "small").mkdir()
    with (source / "file").open("wb") as file:
        file.truncate(2 * LEFT)
    (source / "content").write_bytes(os.urandom(2 * LEFT))
    for number in range(2 * LEFT // 4096):
        (source / f"small/{number}").touch()
    for each in (source / "file", source / "content", *(source / "small").iterdir()):
        os.chown(each, NOBODY, NOBODY)
    with (source / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, disk.space()[1] - LEFT)
        syncfs(file.fileno())
    yield disk
    shutil.rmtree(source)


def append(path: Path) -> None:
    with (path / "file").open("ab", buffering=0) as file:
        for _ in range(2 * LEFT // PIECE):
            file.write(b"x" * PIECE)


def append_synchronously(path: Path) -> None:
    descriptor = os.open(path / "file", os.O_WRONLY | os.O_APPEND | os.O_DSYNC)
    for _ in range(2 * LEFT // PIECE):
        os.write(descriptor, b"x" * PIECE)


def fill_holes(path: Path) -> None:
    descriptor = os.open(path / "file", os.O_RDWR)
    for offset in range(0, 2 * LEFT, PIECE):
        os.pwrite(descriptor, b"x" * PIECE, offset)


def allocate(path: Path) -> None:
    descriptor = os.open(path / "file", os.O_RDWR)
    for offset in range(0, 2 * LEFT, PIECE):
        os.posix_fallocate(descriptor, offset, PIECE)


def copy(path: Path) -> None:
    source = os.open(path / "content", os.O_RDONLY)
    target = os.open(path / "file", os.O_RDWR)
    done = 0
    while done < 2 * LEFT:
        done += os.copy_file_range(source, target, PIECE, done, done)


def set_attributes(path: Path) -> None:
    for name in (path / "small").iterdir():
        os.setxattr(name, "user.large", os.urandom(3000))  # equal ones would share a block


WAYS: list[Callable[[Path], None]] = [
    append,
    append_synchronously,
    fill_holes,
    allocate,
    copy,
    set_attributes,
]


def refused(take: Callable[[Path], None], path: Path) -> str:
    try:
        take(path)
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    return "all taken"


@pytest.mark.parametrize("take", WAYS)
def test_a_user_does_not_get_it(disk: Disk, take: Callable[[Path], None]) -> None:
    reserve = disk.reserve()
    assert in_child(lambda: refused(take, disk.path), uid=NOBODY) == "ENOSPC"
    assert disk.is_kept(reserve)


@pytest.mark.parametrize("take", WAYS)
def test_a_member_of_its_group_gets_it(disk: Disk, take: Callable[[Path], None]) -> None:
    reserve = disk.reserve()
    assert in_child(lambda: refused(take, disk.path), uid=NOBODY, groups=(RESERVE_GROUP,)) == "all taken"
    assert not disk.is_kept(reserve)


# Root of a container, or of a sandbox, cannot get the capability, so there is no such test there. `make oldkernel` has it.
if has_capability(os.getpid(), CAP_SYS_RESOURCE):

    @pytest.mark.parametrize("take", [append, fill_holes, allocate])
    def test_a_user_with_the_capability_gets_it(disk: Disk, take: Callable[[Path], None]) -> None:
        def do() -> str:
            libc = ctypes.CDLL(None, use_errno=True)
            assert libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0
            os.setresuid(NOBODY, NOBODY, NOBODY)
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            capability = 1 << CAP_SYS_RESOURCE
            assert libc.capset(header, (ctypes.c_uint32 * 6)(capability, capability, 0, 0, 0, 0)) == 0
            return refused(take, disk.path)

        assert in_child(do) == "all taken"


@pytest.mark.parametrize("take", WAYS)
def test_root_gets_it(disk: Disk, take: Callable[[Path], None]) -> None:
    reserve = disk.reserve()
    assert in_child(lambda: refused(take, disk.path)) == "all taken"
    assert not disk.is_kept(reserve)


def test_who_writes_counts_not_who_has_opened(disk: Disk) -> None:
    """A user writes to a descriptor that root has opened. pyfuse3 does not tell who writes, so there the opener counts."""
    descriptor = os.open(disk.path / "file", os.O_WRONLY | os.O_APPEND)

    def write() -> None:
        for _ in range(2 * LEFT // PIECE):
            os.write(descriptor, b"x" * PIECE)

    try:
        said = in_child(lambda: refused(lambda path: write(), disk.path), uid=NOBODY)
        assert said == ("all taken" if disk.engine == "pyfuse3" else "ENOSPC")
        in_child(write)
    finally:
        os.close(descriptor)


def test_what_a_user_has_can_be_written_again(disk: Disk) -> None:
    """Also when nothing is left."""

    def do() -> list[str]:
        said = [refused(append, disk.path)]
        descriptor = os.open(disk.path / "content", os.O_RDWR)
        for offset in range(0, 2 * LEFT, PIECE):
            assert os.pwrite(descriptor, b"y" * PIECE, offset) == PIECE
        os.fsync(descriptor)
        return said

    assert in_child(do, uid=NOBODY) == ["ENOSPC"]
    assert (disk.backing / "content").read_bytes() == b"y" * 2 * LEFT
