"""Files: one expectation, held against a plain ext4 directory and against mounts over others, with and without a listener."""

import errno
import fcntl
import mmap
import os
import socket
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.engines import diverges
from tests.support.posix_trees import Errno, Tree, outcome

pytestmark = pytest.mark.fuse

GIB = 1 << 30


def make(path: Path, content: bytes = b"", mode: int = 0o644) -> str:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    os.write(fd, content)
    os.close(fd)
    return str(path)


def test_open_flags(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", b"content")
        os.symlink("file", path / "link")
        os.mkdir(path / "directory")
        found = {}
        for label, target, flags in (
            ("exclusive", "file", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
            ("exclusive link", "link", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
            ("nofollow", "link", os.O_RDONLY | os.O_NOFOLLOW),
            ("directory", "file", os.O_RDONLY | os.O_DIRECTORY),
            ("write a directory", "directory", os.O_WRONLY),
            ("create a directory", "directory/", os.O_RDONLY | os.O_CREAT),
            ("missing", "missing", os.O_RDONLY),
            ("below a file", "file/below", os.O_RDONLY),
            ("slash", "file/", os.O_RDONLY),
        ):
            found[label] = outcome(os.open, f"{path}/{target}", flags)
        fd = os.open(path / "link", os.O_PATH | os.O_NOFOLLOW)
        found["link itself"] = stat.S_ISLNK(os.fstat(fd).st_mode)
        os.close(fd)
        fd = os.open(name, os.O_RDWR | os.O_TRUNC)
        found["truncated"] = os.fstat(fd).st_size, os.read(fd, 10)
        os.write(fd, b"new")
        found["written"] = os.fstat(fd).st_size
        os.close(fd)
        os.close(os.open(path / "made by link target", os.O_CREAT | os.O_WRONLY, 0o640))
        return found

    assert tree.run(act) == {
        "exclusive": Errno(errno.EEXIST),
        "exclusive link": Errno(errno.EEXIST),
        "nofollow": Errno(errno.ELOOP),
        "directory": Errno(errno.ENOTDIR),
        "write a directory": Errno(errno.EISDIR),
        "create a directory": Errno(errno.EISDIR),
        "missing": Errno(errno.ENOENT),
        "below a file": Errno(errno.ENOTDIR),
        "slash": Errno(errno.ENOTDIR),
        "link itself": True,
        "truncated": (0, b""),
        "written": 3,
    }


def test_create_through_a_dangling_link(tree: Tree) -> None:
    def act(path: Path) -> object:
        os.symlink("target", path / "link")
        os.close(os.open(path / "link", os.O_CREAT | os.O_WRONLY, 0o600))
        return oct(os.stat(path / "target").st_mode)

    assert tree.run(act) == "0o100600"


def test_append(tree: Tree) -> None:
    def act(path: Path) -> tuple[bytes, int, int]:
        name = make(path / "file", b"begin ")
        one, two = (os.open(name, os.O_WRONLY | os.O_APPEND) for _ in range(2))
        other = os.open(name, os.O_RDWR)
        for number in range(50):
            os.write(one, b"1-%d " % number)
            os.write(two, b"2-%d " % number)
            if number == 10:
                # Bytes through a descriptor that does not append; then the flag comes and goes.
                os.pwrite(other, b"BEGIN", 0)
        fcntl.fcntl(one, fcntl.F_SETFL, 0)
        os.pwrite(one, b"x", 1)
        fcntl.fcntl(other, fcntl.F_SETFL, os.O_APPEND)
        os.write(other, b"end")
        return os.pread(other, 20, 0), os.lseek(one, 0, os.SEEK_CUR), os.fstat(one).st_size

    start, position, size = tree.run(act)
    assert start == b"BxGIN 1-0 2-0 1-1 2-"
    assert position == size - 3 - len(b"2-49 ")


def test_appending_processes_lose_nothing(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        children = []
        for number in range(4):
            child = os.fork()
            if child == 0:
                fd = os.open(name, os.O_WRONLY | os.O_APPEND)
                for _ in range(50):
                    os.write(fd, bytes([65 + number]) * 100)
                os._exit(0)
            children.append(child)
        codes = [os.waitpid(child, 0)[1] for child in children]
        content = Path(name).read_bytes()
        records = [content[at : at + 100] for at in range(0, len(content), 100)]
        whole = all(record == record[:1] * 100 for record in records)
        Path(name).write_bytes(b"")
        return codes, len(records), whole

    assert tree.run(act) == ([0] * 4, 200, True)


def test_direct_io(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", b"0123456789abcdef" * 1024)
        fd = os.open(name, os.O_RDWR | os.O_DIRECT)
        with mmap.mmap(-1, 8192) as buffer:
            count = os.preadv(fd, [memoryview(buffer)], 4096)
            got = buffer[:16]
            buffer[:] = b"direct!!" * 1024
            written = os.pwritev(fd, [memoryview(buffer)], 8192)
        flags = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        os.close(fd)
        with open(name, "rb") as file:
            file.seek(8190)
            return count, got, written, bool(flags), file.read(8)

    assert tree.run(act) == (8192, b"0123456789abcdef", 8192, True, b"efdirect")


def test_reads_and_writes(tree: Tree) -> None:
    def act(path: Path) -> object:
        fd = os.open(path / "file", os.O_RDWR | os.O_CREAT, 0o644)
        return (
            os.write(fd, b"0123456789"),
            os.pread(fd, 100, 5),
            os.pread(fd, 5, 10),
            os.pread(fd, 5, 1000),
            os.pwritev(fd, [b"ab", b"", b"cd"], 20),
            os.pread(fd, 100, 0),
            os.lseek(fd, 0, os.SEEK_END),
            outcome(os.pread, fd, 1, -1),
            outcome(os.lseek, fd, -1, os.SEEK_SET),
            os.write(fd, b"x" * (3 << 20)),
            os.fstat(fd).st_size,
            os.pread(fd, 4 << 20, 0)[-4:],
            outcome(os.write, os.open(path / "file", os.O_RDONLY), b"x"),
            outcome(os.read, os.open(path / "file", os.O_WRONLY), 1),
            outcome(os.fsync, fd),
            outcome(os.fdatasync, fd),
        )

    size = 24 + (3 << 20)
    assert tree.run(act) == (
        10,
        b"56789",
        b"",
        b"",
        4,
        b"0123456789" + bytes(10) + b"abcd",
        24,
        Errno(errno.EINVAL),
        Errno(errno.EINVAL),
        3 << 20,
        size,
        b"xxxx",
        Errno(errno.EBADF),
        Errno(errno.EBADF),
        None,
        None,
    )


def test_truncation(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", b"0123456789" * 1000)
        fd = os.open(name, os.O_RDWR)
        found: list[object] = []
        for size in (5000, 20000, 4096, 0, 10):
            os.ftruncate(fd, size)
            content = os.pread(fd, 30000, 0)
            found.append((os.stat(name).st_size, len(content), content[4998:5002]))
        os.truncate(name, 3)
        found.append(os.fstat(fd).st_size)
        found.append(outcome(os.ftruncate, os.open(name, os.O_RDONLY), 1))
        found.append(outcome(os.truncate, path, 1))
        found.append(outcome(os.truncate, name, -1))
        return found

    assert tree.run(act) == [
        (5000, 5000, b"89"),
        (20000, 20000, b"89\0\0"),
        (4096, 4096, b""),
        (0, 0, b""),
        (10, 10, b""),
        3,
        Errno(errno.EINVAL),
        Errno(errno.EISDIR),
        Errno(errno.EINVAL),
    ]


def test_beyond_four_gib_and_holes(tree: Tree) -> None:
    def act(path: Path) -> object:
        fd = os.open(path / "file", os.O_RDWR | os.O_CREAT, 0o644)
        os.pwrite(fd, b"far", 5 * GIB + 7)
        os.pwrite(fd, b"edge", 4 * GIB - 2)
        os.fsync(fd)
        status = os.stat(path / "file")
        used = int(
            subprocess.run(["du", "-k", path / "file"], capture_output=True, check=True).stdout.split()[0]
        )
        return (
            os.pread(fd, 10, 5 * GIB + 5),
            os.pread(fd, 10, 4 * GIB - 4),
            status.st_size,
            status.st_blocks * 512 < 1 << 16,
            used < 64,
            os.pread(fd, 4, 3 * GIB),
        )

    assert tree.run(act) == (
        b"\0\0far",
        b"\0\0edge\0\0\0\0",
        5 * GIB + 10,
        True,
        True,
        bytes(4),
    )


def test_unlinked_open_files(tree: Tree) -> None:
    def act(path: Path) -> object:
        found: list[object] = []
        one = os.open(path / "one", os.O_RDWR | os.O_CREAT, 0o644)
        two = os.open(path / "two", os.O_RDWR | os.O_CREAT, 0o644)
        make(path / "target", b"replaced")
        three = os.open(path / "target", os.O_RDWR)
        os.write(one, b"first")
        os.unlink(path / "one")
        os.unlink(path / "two")
        make(path / "new", b"new")
        os.rename(path / "new", path / "target")
        make(path / "one", b"another")
        os.write(two, b"second")
        os.ftruncate(one, 3)
        os.fchmod(one, 0o600)
        os.fchown(two, 1000, 1000)
        os.utime(one, ns=(5, 7))
        os.setxattr(one, "user.name", b"value")
        for fd in (one, two, three):
            status = os.fstat(fd)
            found.append(
                (status.st_nlink, status.st_size, oct(status.st_mode), status.st_uid, os.pread(fd, 20, 0))
            )
        found.append((os.fstat(one).st_mtime_ns, os.getxattr(one, "user.name"), (path / "one").read_bytes()))
        again = os.open(f"/proc/self/fd/{one}", os.O_RDWR)
        os.pwrite(again, b"F", 0)
        found.append((os.pread(one, 9, 0), outcome(os.stat, path / "two")))
        os.fsync(one)
        return found

    assert tree.run(act) == [
        (0, 3, "0o100600", 0, b"fir"),
        (0, 6, "0o100644", 1000, b"second"),
        (0, 8, "0o100644", 0, b"replaced"),
        (7, b"value", b"another"),
        (b"Fir", Errno(errno.ENOENT)),
    ]


def test_unlinked_with_another_name_left(tree: Tree) -> None:
    def act(path: Path) -> object:
        fd = os.open(make(path / "one", b"content"), os.O_RDWR)
        os.link(path / "one", path / "two")
        os.unlink(path / "one")
        os.ftruncate(fd, 4)
        return (
            os.fstat(fd).st_nlink,
            (path / "two").read_bytes(),
            os.fstat(fd).st_ino == os.stat(path / "two").st_ino,
        )

    assert tree.run(act) == (1, b"cont", True)


@pytest.mark.parametrize(
    "times",
    [
        (1_000_000_001, 2_123_456_789),
        (-1_500_000_000, -86_400_000_000_001),
        (2_200_000_000_123_456_789, 5_000_000_000_987_654_321),
    ],
    ids=["1970", "before", "after-2038"],
)
def test_times(tree: Tree, times: tuple[int, int]) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        os.symlink("file", path / "link")
        os.utime(name, ns=times)
        os.utime(path / "link", ns=times, follow_symlinks=False)
        os.utime(path, ns=times)
        fd = os.open(name, os.O_RDONLY)
        found = [
            (s.st_atime_ns, s.st_mtime_ns) for s in (os.stat(name), os.lstat(path / "link"), os.fstat(fd))
        ]
        found.append((times[0], os.stat(path).st_mtime_ns))
        return found

    assert tree.run(act) == [times] * 4


def test_one_time_left_alone(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file")
        os.utime(name, ns=(1_000_000_000, 2_000_000_000))
        # touch(1) makes UTIME_OMIT and UTIME_NOW of it.
        subprocess.run(["touch", "-a", "-d", "@7.000000005", name], check=True)
        first = os.stat(name)
        subprocess.run(["touch", "-m", name], check=True)
        second = os.stat(name)
        return (
            first.st_atime_ns,
            first.st_mtime_ns,
            second.st_atime_ns,
            second.st_mtime_ns > 1_600_000_000_000_000_000,
        )

    assert tree.run(act) == (7_000_000_005, 2_000_000_000, 7_000_000_005, True)


def test_times_move_on(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", b"x")
        fd = os.open(name, os.O_RDONLY)
        moved = []
        changes: tuple[Callable[[], object], ...] = (
            lambda: os.chmod(name, 0o600),
            lambda: os.link(name, path / "link"),
            lambda: os.rename(name, path / "file2"),
            lambda: os.rename(path / "file2", name),
            lambda: os.unlink(path / "link"),
            lambda: os.setxattr(name, "user.x", b"y"),
        )
        for change in changes:
            before = os.fstat(fd)
            # The clock of file times ticks every 4 ms or so.
            while True:
                change_at = os.fstat(fd).st_ctime_ns
                probe = path / "probe"
                make(probe)
                ticked = os.stat(probe).st_ctime_ns > change_at
                os.unlink(probe)
                if ticked:
                    break
            change()
            after = os.fstat(fd)
            moved.append((after.st_ctime_ns > before.st_ctime_ns, after.st_mtime_ns == before.st_mtime_ns))
        return moved

    assert tree.run(act) == [(True, True)] * 6


def test_shared_mapping_writes(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", bytes(10000))
        fd = os.open(name, os.O_RDWR)
        mapping = outcome(mmap.mmap, fd, 10000)
        if not isinstance(mapping, mmap.mmap):
            os.unlink(name)
            return mapping
        with mapping:
            mapping[4090:4100] = b"0123456789"
            mapping.flush()
            seen = os.pread(fd, 10, 4090)
            os.pwrite(fd, b"file", 8000)
            back = mapping[8000:8004]
            os.ftruncate(fd, 12000)
            mapping[0:3] = b"end"
        found = seen, back, Path(name).read_bytes()[:3], os.stat(name).st_size
        os.unlink(name)
        return found

    if tree.is_exact and diverges("shared mappings (exact)", tree.engine):
        assert tree.run(act) == Errno(errno.ENODEV)
    else:
        assert tree.run(act) == (b"0123456789", b"file", b"end", 12000)


def test_private_mapping_and_a_file_closed_under_it(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", b"abc" * 5000)
        fd = os.open(name, os.O_RDONLY)
        mapping = mmap.mmap(fd, 15000, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        os.close(fd)
        os.unlink(name)
        mapping[0:3] = b"xyz"
        return mapping[0:6], mapping[14997:15000]

    assert tree.run(act) == (b"xyzabc", b"abc")


def test_locks(tree: Tree) -> None:
    def act(path: Path) -> object:
        name = make(path / "file", b"0123456789")
        one, two = os.open(name, os.O_RDWR), os.open(name, os.O_RDWR)
        found: list[object] = []
        fcntl.flock(one, fcntl.LOCK_EX)
        found.append(outcome(fcntl.flock, two, fcntl.LOCK_EX | fcntl.LOCK_NB))
        fcntl.flock(one, fcntl.LOCK_UN)
        found.append(outcome(fcntl.flock, two, fcntl.LOCK_SH | fcntl.LOCK_NB))
        fcntl.lockf(one, fcntl.LOCK_EX, 4, 2)
        child = os.fork()
        if child == 0:
            fd = os.open(name, os.O_RDWR)
            beside = outcome(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 8)
            inside = outcome(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 3)
            query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
            kind, _, start, length, holder = struct.unpack("hhqqi4x", fcntl.fcntl(fd, fcntl.F_GETLK, query))
            right = (
                beside is None,
                inside == Errno(errno.EAGAIN),
                (kind, start, length),
                holder == os.getppid(),
            )
            os._exit(0 if right == (True, True, (fcntl.F_WRLCK, 2, 4), True) else 1)
        found.append(os.waitpid(child, 0)[1])
        return found

    assert tree.run(act) == [Errno(errno.EAGAIN), None, 0]


def test_special_files(tree: Tree) -> None:
    def act(path: Path) -> object:
        os.mkfifo(path / "fifo", 0o640)
        os.mknod(path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        os.mknod(path / "block", stat.S_IFBLK | 0o600, os.makedev(259, 70000))
        os.mknod(path / "regular", stat.S_IFREG | 0o604)
        with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
            os.chdir(path)
            server.bind("socket")
            server.listen()
            client.connect("socket")
            client.send(b"through the socket")
            heard = server.accept()[0].recv(50)
        child = os.fork()
        if child == 0:
            with open(path / "fifo", "wb") as fifo:
                fifo.write(b"through the fifo")
            os._exit(0)
        piped = (path / "fifo").read_bytes()
        os.waitpid(child, 0)
        devices = [os.stat(path / name).st_rdev for name in ("null", "block")]
        return heard, piped, devices, outcome(os.open, path / "socket", os.O_RDONLY)

    assert tree.run(act) == (
        b"through the socket",
        b"through the fifo",
        [os.makedev(1, 3), os.makedev(259, 70000)],
        Errno(errno.ENXIO),
    )


def test_statfs(tree: Tree) -> None:
    shown, held = tree.run(os.statvfs), os.statvfs(tree.backing)
    for name in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(shown, name) == getattr(held, name), name
    assert abs(shown.f_bavail - held.f_bavail) < held.f_blocks / 100
