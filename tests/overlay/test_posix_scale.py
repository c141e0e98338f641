"""Mounts under load: many files with few descriptors and little memory, and accessors that mean harm."""

import mmap
import os
import random
import re
import resource
import signal
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.harness import Mount
from tests.support.posix_trees import in_child, outcome

pytestmark = pytest.mark.fuse

FILES = 100_000
A_DIRECTORY = 500
BYTES_A_NODE = 1536
DESCRIPTORS = 1024
OPEN_AT_ONCE = 3000
HOSTILE_PROCESSES = 4
HOSTILE_OPERATIONS = 1500


def resident(pid: int) -> int:
    """VmRSS in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError


@pytest.fixture(scope="module")
def large(make_shared_mount: Callable[..., Mount]) -> Iterator[Mount]:
    """100,000 files in memory, under a daemon that may hold 1024 descriptors."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="fusehsm-tests-") as base:
        for number in range(FILES // A_DIRECTORY):
            directory = os.path.join(base, f"directory {number % 10}", f"{number:04}")
            os.makedirs(directory)
            here = os.open(directory, os.O_PATH)
            for index in range(A_DIRECTORY):
                fd = os.open(b"%04d.dat" % index, os.O_WRONLY | os.O_CREAT, 0o644, dir_fd=here)
                os.write(fd, b"%d/%d" % (number, index))
                os.close(fd)
            os.close(here)
        mount = make_shared_mount(source=Path(base), descriptors=DESCRIPTORS)
        limits = Path(f"/proc/{mount.pid}/limits").read_text()
        assert re.search(rf"Max open files +{DESCRIPTORS} +{DESCRIPTORS} ", limits), limits
        yield mount
        mount.close()


def walk(top: Path) -> tuple[int, int]:
    """How many files and directories there are, each of them stat'ed."""
    files = directories = 0
    waiting = [os.fspath(top)]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            status = entry.stat()
            assert status.st_nlink > 0
            if entry.is_dir():
                directories += 1
                waiting.append(entry.path)
            else:
                files += 1
    return files, directories


def test_a_hundred_thousand_files(large: Mount) -> None:
    in_child(lambda: os.listdir(large.path))
    before = resident(large.pid)
    files, directories = in_child(lambda: walk(large.path))
    assert files == FILES
    each = (resident(large.pid) - before) / (files + directories)
    print(f"{each:.0f} bytes a node")
    assert each < BYTES_A_NODE

    def read() -> int:
        right = 0
        for number in range(FILES // A_DIRECTORY):
            here = os.open(large.path / f"directory {number % 10}" / f"{number:04}", os.O_PATH)
            for index in range(A_DIRECTORY):
                fd = os.open(b"%04d.dat" % index, os.O_RDONLY, dir_fd=here)
                right += os.read(fd, 100) == b"%d/%d" % (number, index)
                os.close(fd)
            os.close(here)
        return right

    assert in_child(read, timeout=150) == FILES
    assert (resident(large.pid) - before) / (files + directories) < BYTES_A_NODE
    assert large.process.poll() is None


def test_many_files_open_at_once(large: Mount) -> None:
    def act() -> object:
        resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_AT_ONCE + 100,) * 2)
        paths = [
            large.path / f"directory {number % 10}" / f"{number:04}" / f"{index:04}.dat"
            for number in range(6)
            for index in range(A_DIRECTORY)
        ]
        fds = [os.open(path, os.O_RDWR) for path in paths]
        contents = {os.pread(fd, 100, 0) for fd in fds}
        for fd in fds[::7]:
            os.pwrite(fd, b"W", 0)
        # Directories too, and files without a name among them.
        os.unlink(paths[0])
        directories = [os.open(path.parent, os.O_RDONLY) for path in paths[:50]]
        listed = {len(os.listdir(fd)) for fd in directories}
        return len(contents), os.pread(fds[0], 3, 0), os.pread(fds[7], 3, 0), listed

    assert in_child(act) == (OPEN_AT_ONCE, b"W/0", b"W/7", {A_DIRECTORY - 1})
    assert len(os.listdir(f"/proc/{large.pid}/fd")) < DESCRIPTORS


# Accessors that mean harm


def misbehave(top: Path, seed: int) -> None:
    """Calls with flags, sizes, offsets and names that no program needs, on files that other threads move and remove meanwhile.

    Only inside the mount: "..", and symbolic links that lead up, would reach the machine's own directories, so the mount becomes this
    process's root first.
    """
    os.chroot(top)
    os.chdir("/")
    # Not a byte may be changed elsewhere, so be sure before anything is.
    assert os.path.exists("/inside the mount")
    chance = random.Random(seed)
    flags = [1 << bit for bit in range(32) if 1 << bit != os.O_NONBLOCK]
    offsets = [0, 1, 4095, -1, 1 << 31, 1 << 32, (1 << 63) - 1, (1 << 44), -(1 << 63)]
    sizes = [0, 1, 4096, 1 << 20, 3 << 20]
    names = [f"/{letter}" for letter in "abcd"] + [f"/d{n}" for n in range(2)]
    names += [f"{names[4]}/{letter}" for letter in "ab"] + ["/" + "n" * 256, "/..", f"{names[4]}/.."]
    fds: list[int] = []

    def opened() -> None:
        mask = (
            os.O_NONBLOCK
            | chance.choice([os.O_RDONLY, os.O_WRONLY, os.O_RDWR, 3])
            | os.O_CREAT * chance.randrange(2)
        )
        for flag in chance.sample(flags, chance.randrange(4)):
            mask |= flag
        fds.append(os.open(chance.choice(names), mask & 0x7FFFFFFF, chance.randrange(1 << 12)))

    def mapped() -> None:
        with mmap.mmap(chance.choice(fds), 4096) as mapping:
            mapping.flush()

    operations: list[Callable[[], object]] = [
        opened,
        opened,
        opened,
        mapped,
        lambda: os.pread(chance.choice(fds), chance.choice(sizes), chance.choice(offsets)),
        lambda: os.pwrite(chance.choice(fds), b"x" * chance.choice(sizes[:4]), chance.choice(offsets[:4])),
        lambda: os.pwrite(chance.choice(fds), b"x", chance.choice(offsets)),
        lambda: os.lseek(chance.choice(fds), chance.choice(offsets), chance.randrange(6)),
        lambda: os.ftruncate(chance.choice(fds), chance.choice(offsets)),
        lambda: os.truncate(chance.choice(names), chance.choice(offsets)),
        lambda: os.posix_fallocate(chance.choice(fds), chance.choice(offsets), chance.choice(sizes)),
        lambda: os.close(fds.pop(chance.randrange(len(fds)))),
        lambda: os.close(fds.pop(chance.randrange(len(fds)))),
        lambda: os.rename(chance.choice(names), chance.choice(names)),
        lambda: os.unlink(chance.choice(names)),
        lambda: os.rmdir(chance.choice(names)),
        lambda: os.mkdir(chance.choice(names), chance.randrange(1 << 12)),
        lambda: os.link(chance.choice(names), chance.choice(names)),
        lambda: os.symlink(chance.choice(names), chance.choice(names)),
        lambda: os.mknod(
            chance.choice(names), chance.choice([stat.S_IFREG, stat.S_IFIFO, stat.S_IFSOCK, 0]) | 0o644
        ),
        lambda: os.listdir(chance.choice(fds)),
        lambda: os.utime(chance.choice(names), ns=(chance.randrange(-(1 << 62), 1 << 62),) * 2),
        lambda: os.chmod(chance.choice(names), chance.randrange(1 << 12)),
        lambda: os.chown(chance.choice(names), chance.randrange(1 << 32), chance.randrange(1 << 32)),
        lambda: os.setxattr(
            chance.choice(names), "user." + "n" * chance.randrange(260), bytes(chance.randrange(70000))
        ),
        lambda: os.getxattr(
            chance.choice(names),
            chance.choice(["user.n", "security.capability", "x", "system.posix_acl_access"]),
        ),
        lambda: os.fsync(chance.choice(fds)),
        lambda: os.fstat(chance.choice(fds)),
        lambda: os.statvfs(chance.choice(names)),
    ]
    for _ in range(HOSTILE_OPERATIONS):
        if len(fds) > 50:
            os.close(fds.pop(0))
        try:
            chance.choice(operations)()
        except (OSError, IndexError, ValueError, OverflowError):
            continue


@pytest.mark.parametrize(
    "arguments",
    [("--events", "first-access"), ("--events", "exact", "--unattended", "allow")],
    ids=["first-access", "exact"],
)
def test_no_accessor_can_end_a_mount(make_mount: Callable[..., Mount], arguments: tuple[str, ...]) -> None:
    mount = make_mount(*arguments)
    (mount.source / "inside the mount").touch()
    around = [directory for path in (mount.path, mount.source) for directory in path.parents]
    before = [(status.st_mode, status.st_uid, status.st_gid) for status in map(os.stat, around)]

    def act() -> object:
        children = []
        for number in range(HOSTILE_PROCESSES):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    signal.alarm(100)
                    misbehave(mount.path, number)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        return [os.waitpid(child, 0)[1] for child in children]

    assert in_child(act, timeout=120) == [0] * HOSTILE_PROCESSES
    assert [(status.st_mode, status.st_uid, status.st_gid) for status in map(os.stat, around)] == before
    assert mount.process.poll() is None
    assert in_child(lambda: outcome(lambda: (mount.path / "after").write_bytes(b"works"))) == 5
    assert (mount.source / "after").read_bytes() == b"works"
    complaints = [
        line for line in mount.log.lines if "Traceback" in line or " failed" in line or "Error" in line
    ]
    assert not complaints, complaints
