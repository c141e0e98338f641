"""Changes that fail half-way, mostly for want of room on the disk: what a mount shows afterwards is what its backing holds."""

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusehsm.conform.sides import ext4_image
from tests.conftest import POSIX_WORLDS, MakeMount
from tests.support.engines import diverges
from tests.support.harness import NOBODY, Mount, start
from tests.support.posix_trees import PATIENCE, WATCHED, Errno, allowing_everything, in_child, outcome

pytestmark = pytest.mark.fuse

MIB = 1 << 20
KEEP_SIZE, ZERO_RANGE = 0x01, 0x10  # fallocate(2)
FREEZE, THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW of linux/fs.h
CONTENT = b"content" * 20_000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class File:
    """A file of a mount, where it is shown and where it is held."""

    shown: Path
    held: Path
    disk: Path

    def expect_the_same(self) -> tuple[object, ...]:
        """The mount shows what the backing holds now, which is returned."""
        held = look(self.held)
        assert in_child(lambda: look(self.shown)) == held
        return held


def look(path: Path) -> tuple[object, ...]:
    """What a file has and is."""
    status = os.stat(path)
    content = path.read_bytes()
    return status.st_size, status.st_blocks, oct(status.st_mode), content.rstrip(b"\0"), len(content)


@pytest.fixture(scope="module")
def disk(ext4: Path) -> Iterator[Path]:
    """A small file system, to be filled up."""
    with ext4_image(ext4 / "small", 32) as root:
        yield root


@pytest.fixture(scope="module", params=POSIX_WORLDS)
def mount(
    request: pytest.FixtureRequest, make_shared_mount: MakeMount, disk: Path, engine: str
) -> Iterator[Mount]:
    """Each kind of mount over a directory of the small disk."""
    source = disk / f"{engine}-{request.param}"
    source.mkdir()
    source.chmod(0o777)
    mount = make_shared_mount(*POSIX_WORLDS[request.param], "--allow-other", source=source)
    with allowing_everything(mount.path) if request.param in WATCHED else nullcontext():
        yield mount


@pytest.fixture
def file(mount: Mount, disk: Path, numbers: Iterator[int]) -> Iterator[File]:
    """An ordinary user's file of CONTENT, which the mount has cached, on a disk with 2 MiB left."""
    name = f"file-{next(numbers)}"
    file = File(mount.path / name, mount.source / name, disk)

    def make() -> None:
        fd = os.open(file.shown, os.O_CREAT | os.O_WRONLY, 0o755)
        os.write(fd, CONTENT)
        os.fsync(fd)
        assert look(file.shown) == look(file.held)

    in_child(make, uid=NOBODY)
    fill(disk, left=2 * MIB)
    yield file
    for other in [*disk.glob("filling-*"), file.held]:
        other.unlink()


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    if _libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
        raise OSError(ctypes.get_errno(), "")


def fill(disk: Path, *, left: int) -> None:
    """Leave so many bytes of free space, about."""
    free = os.statvfs(disk)
    fd = os.open(disk / f"filling-{left}", os.O_CREAT | os.O_WRONLY)
    # At the very end it takes what there is, and fails.
    outcome(fallocate, fd, 0, 0, free.f_bavail * free.f_bsize - left)
    os.close(fd)


@pytest.mark.parametrize("mode", [0, KEEP_SIZE, ZERO_RANGE, ZERO_RANGE | KEEP_SIZE])
def test_an_allocation_without_room(file: File, engine: str, mode: int) -> None:
    before = look(file.held)

    def act() -> tuple[object, bool, int]:
        fd = os.open(file.shown, os.O_RDWR)
        # What is mapped is seen without another call.
        with mmap.mmap(fd, len(CONTENT), mmap.MAP_PRIVATE, mmap.PROT_READ) as mapped:
            assert mapped[:7] == b"content"
            failed = outcome(fallocate, fd, mode, 0, 24 * MIB)
            return failed, mapped[:7] == os.pread(fd, 7, 0), os.fstat(fd).st_size

    failed, same, size = in_child(act)
    after = file.expect_the_same()
    assert (same, size) == (True, after[0])
    if diverges("fallocate", engine):
        assert (failed, after) == (Errno(errno.EOPNOTSUPP), before)
    else:
        # It has done a part.
        assert failed == Errno(errno.ENOSPC)
        assert after != before


def test_writing_without_room(file: File) -> None:
    def act() -> object:
        fill(file.disk, left=0)
        fd = os.open(file.shown, os.O_RDWR)
        written = [outcome(os.pwrite, fd, b"x" * 65536, offset) for offset in range(0, 4 * MIB, 65536)]
        return written[0], written[-1]

    assert in_child(act) == (65536, Errno(errno.ENOSPC))
    file.expect_the_same()


def test_a_mapping_without_room(file: File) -> None:
    def act() -> object:
        fill(file.disk, left=0)
        fd = os.open(file.shown, os.O_RDWR)
        os.ftruncate(fd, 4 * MIB)
        try:
            written = mmap.mmap(fd, 4 * MIB)
        except OSError as error:
            return Errno(error.errno or 0)  # exact, with pyfuse3
        with written:
            written[MIB:] = b"mapped--" * (3 * MIB // 8)
            return outcome(written.flush)

    assert in_child(act) in (Errno(errno.ENOSPC), Errno(errno.ENODEV))
    file.expect_the_same()


def test_a_truncation_that_the_backing_refuses(file: File) -> None:
    def act() -> object:
        fd = os.open(file.shown, os.O_RDWR)
        os.fchmod(fd, 0o4755)
        assert os.fstat(fd).st_mode & 0o7777 == 0o4755
        # ext4's files end at 16 TiB.
        return outcome(os.ftruncate, fd, 1 << 60)

    assert in_child(act, uid=NOBODY) == Errno(errno.EFBIG)
    file.expect_the_same()


def test_truncating_a_program_that_runs_below(mount: Mount) -> None:
    program = shutil.which("sleep")
    assert program
    file = File(mount.path / "program", mount.source / "program", mount.source)
    shutil.copyfile(program, file.held)
    os.chown(file.held, NOBODY, NOBODY)
    file.held.chmod(0o4755)
    with start([str(file.held), "inf"]) as process:
        shown = in_child(lambda: file.shown.stat().st_mode)
        assert shown & 0o7777 == 0o4755
        failed = in_child(lambda: outcome(os.open, file.shown, os.O_WRONLY | os.O_TRUNC), uid=NOBODY)
        process.kill()
    assert failed == Errno(errno.ETXTBSY)
    file.expect_the_same()
    file.held.unlink()


@contextmanager
def frozen(disk: Path) -> Iterator[None]:
    """Whatever changes the file system waits meanwhile."""
    fd = os.open(disk, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, FREEZE, 0)
        try:
            yield
        finally:
            fcntl.ioctl(fd, THAW, 0)
    finally:
        os.close(fd)


def allocate(fd: int) -> None:
    fallocate(fd, ZERO_RANGE, 0, 100_000)


def copy(fd: int) -> None:
    os.copy_file_range(fd, fd, 60_000, 70_001, 0)


@pytest.mark.engine("devfuse")
@pytest.mark.parametrize("change", [allocate, copy])
def test_a_change_that_outlives_its_accessor(file: File, mount: Mount, change: Callable[[int], None]) -> None:
    before = look(file.held)
    fd = os.open(file.shown, os.O_RDWR)
    with frozen(file.disk):
        child = os.fork()
        if child == 0:
            change(fd)
            os._exit(0)
        wait_until(lambda: "D" in states_of_threads(mount.pid))
        os.kill(child, signal.SIGKILL)
        wait_until(lambda: os.waitpid(child, os.WNOHANG)[0] == child)
        assert look(file.held) == before
    os.close(fd)
    wait_until(lambda: look(file.held) != before)
    # Nobody waits for the mount to notice.
    wait_until(lambda: in_child(lambda: look(file.shown)) == look(file.held))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE / 2
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def states_of_threads(pid: int) -> set[str]:
    """The states of proc(5) that a process's threads are in."""
    return {
        (task / "stat").read_text().rpartition(")")[2].split()[0]
        for task in Path(f"/proc/{pid}/task").iterdir()
    }
