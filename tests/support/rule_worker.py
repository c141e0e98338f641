"""One of the processes of test_rule.py's stress: python -m tests.support.rule_worker SEED OPERATIONS PATH=SEED=SIZE...

Does that many things at random to those stubs, each in a child of its own (a denied page kills it), and ends with exit code 0 and the number
of things that succeeded, or with 1 and what was wrong.
"""

import mmap
import os
import random
import signal
import socket
import sys
from collections.abc import Callable

from tests.support.stub_pattern import content

WRONG = 3


def look(chance: random.Random, path: str, true: bytes) -> None:
    """One or several ways to see the file's content, through one descriptor."""
    size = len(true)
    descriptor = os.open(path, os.O_RDWR if chance.random() < 0.3 else os.O_RDONLY)
    for _ in range(chance.randint(1, 4)):
        offset = chance.randrange(size)
        count = chance.choice((1, 100, 4096, 10_000, 70_000))
        data = chance.choice(WAYS)(descriptor, offset, count, true)
        if data != true[offset : offset + len(data)]:
            os.write(2, f"{path} at {offset}+{count}: {data[:20]!r}\n".encode())
            os._exit(WRONG)


def by_pread(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    return os.pread(descriptor, count, offset)


def by_mapping(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    start = offset & -4096
    length = min(offset + count, len(true)) - start
    flags = mmap.MAP_PRIVATE | random.choice((0, 0x8000))  # MAP_POPULATE
    with mmap.mmap(descriptor, length, flags, mmap.PROT_READ, offset=start) as mapping:
        return mapping[offset - start :]


def by_shared_mapping(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    start = offset & -4096
    length = min(offset + count, len(true)) - start
    try:
        with mmap.mmap(descriptor, length, mmap.MAP_SHARED, mmap.PROT_READ, offset=start) as mapping:
            return mapping[offset - start :]
    except OSError:  # ENODEV in exact mode
        return b""


def by_sendfile(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = os.sendfile(ours.fileno(), descriptor, offset, min(count, 30_000))
        return theirs.recv(sent) if sent else b""


def by_splice(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    reader, writer = os.pipe()
    moved = os.splice(descriptor, writer, min(count, 60_000), offset_src=offset)
    data = os.read(reader, moved) if moved else b""
    os.close(reader)
    os.close(writer)
    return data


def by_advice(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_WILLNEED)
    return b""


def by_forgetting(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return by_mapping(descriptor, offset, count, true)


def by_writing(descriptor: int, offset: int, count: int, true: bytes) -> bytes:
    """Writes what must be there anyway, mostly parts of pages."""
    try:
        os.pwrite(descriptor, true[offset : offset + count], offset)
    except OSError:  # EBADF: opened for reading
        return b""
    return os.pread(descriptor, count + 5000, offset)


WAYS: tuple[Callable[[int, int, int, bytes], bytes], ...] = (
    by_pread,
    by_mapping,
    by_shared_mapping,
    by_sendfile,
    by_splice,
    by_advice,
    by_forgetting,
    by_writing,
)


def main() -> None:
    chance = random.Random(int(sys.argv[1]))
    files = []
    for argument in sys.argv[3:]:
        path, number, size = argument.rsplit("=", 2)
        files.append((path, content(int(number), int(size))))
    succeeded = 0
    for _ in range(int(sys.argv[2])):
        seed = chance.random()
        child = os.fork()
        if child == 0:
            own = random.Random(seed)
            try:
                look(own, *own.choice(files))
            except OSError:  # denied
                os._exit(2)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            if os.WTERMSIG(status) != signal.SIGBUS:
                sys.exit(f"killed by signal {os.WTERMSIG(status)}")
        elif os.WEXITSTATUS(status) == WRONG:
            sys.exit("a byte was wrong")
        succeeded += status == 0
    print(succeeded)


if __name__ == "__main__":
    main()
