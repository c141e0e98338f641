"""What accessors do on mounts with --events first-access, in the tests of the devfuse engine: act(path, "devfuse_cached.look", 3)."""

import mmap
import os
import signal

from tests.support.devfuse_acts import opened, shared


def look(directory: str, times: int) -> list[bytes]:
    """Everything that a resident tree is looked at by, so many times; the files' contents."""
    contents: list[bytes] = []
    for _ in range(times):
        contents = []
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            os.stat(path)
            os.access(path, os.R_OK)
            with opened(path, os.O_RDONLY) as descriptor:
                size = os.fstat(descriptor).st_size
                contents.append(os.read(descriptor, size + 1))
                with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
                    assert mapping[:] == contents[-1]
            assert not os.path.lexists(path + ".missing")
    return contents


def truncate_at_open(path: str, flags: int) -> tuple[int, bytes]:
    """open(2) with O_TRUNC and those flags, then a few bytes; the size right after opening, and what the file holds in the end."""
    with opened(path, os.O_TRUNC | flags) as descriptor:
        size = os.fstat(descriptor).st_size
        os.write(descriptor, b"new")
    with opened(path, os.O_RDONLY) as descriptor:
        return size, os.read(descriptor, 100)


def append(path: str, flags: int, pieces: list[bytes]) -> int:
    """Write each at the end, wherever the position is, and make it last; the size."""
    with opened(path, os.O_RDWR | os.O_APPEND | flags) as descriptor:
        for piece in pieces:
            os.lseek(descriptor, 0, os.SEEK_SET)
            assert os.write(descriptor, piece) == len(piece)
        os.fsync(descriptor)
        os.fdatasync(descriptor)
        return os.fstat(descriptor).st_size


def rename_open(path: str, count: int) -> tuple[bytes, bytes, bytes]:
    """A file that is renamed while open, another one put in its place: read and written through the descriptor and by the names."""
    with opened(path) as descriptor:
        os.rename(path, path + ".moved")
        with opened(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY) as new:
            os.write(new, b"another")
        os.pwrite(descriptor, b"written", 100)
        through = os.pread(descriptor, count, 0)
        with opened(path + ".moved", os.O_RDONLY) as moved, opened(path, os.O_RDONLY) as again:
            return through, os.pread(moved, count, 0), os.pread(again, count, 0)


def rename_over_open(path: str, other: str, count: int) -> tuple[bytes, bytes]:
    """A file that another one replaces while it is open: what the descriptor and the name give."""
    with opened(path) as descriptor:
        os.rename(os.path.join(os.path.dirname(path), other), path)
        os.pwrite(descriptor, b"written", 0)
        with opened(path, os.O_RDONLY) as again:
            return os.pread(descriptor, count, 0), os.pread(again, count, 0)


def use_unlinked(path: str, size: int) -> tuple[bytes, int, bytes, int, bytes]:
    """A file with no name any more, never read before: read, shown by a mapping, written, truncated, described."""
    with opened(path) as descriptor:
        os.unlink(path)
        before = os.pread(descriptor, size, 0)
        links = os.fstat(descriptor).st_nlink
        os.pwrite(descriptor, b"written", 5000)
        os.ftruncate(descriptor, 6000)
        os.fchmod(descriptor, 0o640)
        os.fsync(descriptor)
        with shared(descriptor, 0, 6000) as mapping:
            mapping[0:6] = b"mapped"
            mapping.flush()
        after = os.pread(descriptor, size, 0)
        status = os.fstat(descriptor)
        with opened(f"/proc/self/fd/{descriptor}", os.O_RDONLY) as again:
            return before, links, after, status.st_mode & 0o777, os.read(again, 6)


def _contents(index: int) -> bytes:
    return f"file {index} ".encode() * 500


def unlink_many(directory: str, number: int) -> int:
    """So many files, all open and all unlinked: each is read, written and read again; how many are right."""
    descriptors = []
    for index in range(number):
        path = os.path.join(directory, f"unlinked-{index}")
        descriptors.append(os.open(path, os.O_RDWR))
        os.unlink(path)
    right = 0
    for index, descriptor in enumerate(descriptors):
        content = _contents(index)
        right += os.pread(descriptor, len(content) + 1, 0) == content
        os.pwrite(descriptor, b"written", len(content))
    for index, descriptor in enumerate(descriptors):
        right += os.pread(descriptor, 100_000, 0) == _contents(index) + b"written"
        os.close(descriptor)
    return right


def open_many(directory: str, number: int) -> int:
    """So many files, all open at once and mapped: each is read, written and read again; how many are right."""
    files = []
    for index in range(number):
        descriptor = os.open(os.path.join(directory, f"open-{index}"), os.O_RDWR)
        files.append((descriptor, mmap.mmap(descriptor, 3000, prot=mmap.PROT_READ)))
    right = 0
    for index, (descriptor, mapping) in enumerate(files):
        content = _contents(index)
        right += os.pread(descriptor, len(content) + 1, 0) == content == mapping[:6] + content[6:]
        os.pwrite(descriptor, b"written", 0)
    for descriptor, mapping in files:
        right += os.pread(descriptor, 7, 0) == b"written" == mapping[:7]
        os.fsync(descriptor)
        mapping.close()
        os.close(descriptor)
    return right


def read_all(directory: str) -> set[bytes]:
    """The contents of all files."""
    contents = set()
    for name in os.listdir(directory):
        with opened(os.path.join(directory, name), os.O_RDONLY) as descriptor:
            contents.add(os.read(descriptor, 1 << 20))
    return contents


def make_many(directory: str, prefix: str, number: int) -> None:
    """The files of unlink_many() and open_many()."""
    for index in range(number):
        with open(os.path.join(directory, f"{prefix}-{index}"), "wb") as file:
            file.write(_contents(index))


def make_read_only(directory: str, number: int) -> list[bytes]:
    """Files of mode 0444 made with O_RDWR, as git makes its objects: written and read through their descriptors, and by name."""
    descriptors = [
        os.open(os.path.join(directory, f"object-{index}"), os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o444)
        for index in range(number)
    ]
    for index, descriptor in enumerate(descriptors):
        os.write(descriptor, _contents(index))
    for index, descriptor in enumerate(descriptors):
        os.write(descriptor, b"end")
        os.fsync(descriptor)
        assert os.pread(descriptor, 100_000, 0) == _contents(index) + b"end"
        os.close(descriptor)
    found = []
    for index in range(number):
        with opened(os.path.join(directory, f"object-{index}"), os.O_RDONLY) as descriptor:
            found.append(os.read(descriptor, 100_000))
    return found


def expected_read_only(number: int) -> list[bytes]:
    """What make_read_only() returns."""
    return [_contents(index) + b"end" for index in range(number)]


def write_through_mapping(path: str, place: int, data: bytes) -> bytes:
    """MAP_SHARED, msync(2); what read(2) then gives of that file there."""
    with opened(path) as descriptor, shared(descriptor) as mapping:
        mapping[place : place + len(data)] = data
        mapping.flush()
        return os.pread(descriptor, len(data), place)


def write_to_private_mapping(path: str, place: int, data: bytes) -> tuple[bytes, bytes]:
    """MAP_PRIVATE: what the mapping shows then, and what the file holds."""
    with opened(path, os.O_RDONLY) as descriptor:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        with mmap.mmap(descriptor, 8192, flags=mmap.MAP_PRIVATE, prot=protection) as mapping:
            mapping[place : place + len(data)] = data
            return mapping[place : place + len(data)], os.pread(descriptor, len(data), place)


def read_and_stat(path: str) -> tuple[bytes, tuple[int, int, int]]:
    """A whole file, and its size, blocks and modification time (ns) right after."""
    with opened(path, os.O_RDONLY) as descriptor:
        data = b""
        while piece := os.read(descriptor, 1 << 20):
            data += piece
        return data, described(path)


def described(path: str | os.PathLike[str]) -> tuple[int, int, int]:
    """A file's size, blocks and modification time (ns)."""
    status = os.stat(path)
    return status.st_size, status.st_blocks, status.st_mtime_ns


def touch(path: str, length: int, place: int) -> bytes:
    """A byte that a mapping shows; denied, it is the end of this process."""
    signal.signal(signal.SIGBUS, signal.SIG_DFL)
    with opened(path, os.O_RDONLY) as descriptor, shared(descriptor, 0, length, False) as mapping:
        return mapping[place : place + 1]
