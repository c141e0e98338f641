"""What accessors do to files in the tests of the devfuse engine: a module that the worker of accessor.py imports.

It imports only what accessor_worker.py has loaded: an accessor that is another user may not reach this Python's library.

    accessor.run(act, path, "fallocate", 0, 5000, 100)      fallocate(path, 0, 5000, 100), in the accessor

Unlike functions that travel, these may call one another.
"""

import contextlib
import ctypes
import errno
import marshal
import mmap
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

KEEP_SIZE, PUNCH_HOLE, COLLAPSE_RANGE, ZERO_RANGE, INSERT_RANGE = 1, 2, 8, 0x10, 0x20  # linux/falloc.h
MAPPED = 8192  # bytes that the mappings here cover


def act(subject: object, name: str, *arguments: object) -> object:
    """Travels to an accessor, and does there to `subject` (a path, a descriptor) what this module has by that name.

    `name` may be `module.function`, of another module of the tests.
    """
    root = os.path.dirname(os.path.dirname(os.path.dirname(sys.argv[0])))
    if root not in sys.path:
        sys.path.append(root)
    module, _, function = name.rpartition(".")
    found = __import__(f"tests.support.{module or 'devfuse_acts'}", None, None, [function])
    return getattr(found, function)(subject, *arguments)


def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return libc


@contextlib.contextmanager
def opened(path: str, flags: int = os.O_RDWR) -> Iterator[int]:
    """An open file, closed at the end."""
    descriptor = os.open(path, flags, 0o600)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


# Space


def fallocate_open(descriptor: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2)."""
    if _libc().fallocate(descriptor, mode, offset, length):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def fallocate(path: str, mode: int, offset: int, length: int, flags: int = os.O_RDWR) -> int:
    """fallocate(2); the file's size then, in bytes."""
    with opened(path, flags) as descriptor:
        fallocate_open(descriptor, mode, offset, length)
        return os.fstat(descriptor).st_size


def punch_under_mapping(path: str, offset: int, length: int) -> tuple[bytes, bytes, bytes]:
    """A hole where a mapping shows content: what the mapping shows before and after, and what read(2) gives."""
    with opened(path) as descriptor:
        mapping = mmap.mmap(descriptor, MAPPED, mmap.MAP_PRIVATE, mmap.PROT_READ)
        before = mapping[offset : offset + length]
        fallocate_open(descriptor, PUNCH_HOLE | KEEP_SIZE, offset, length)
        return before, mapping[offset : offset + length], os.pread(descriptor, length, offset)


# Copies within the kernel


def copy(
    path: str,
    target: str,
    count: int,
    source_offset: int | None,
    target_offset: int | None,
    flags: int = os.O_RDWR,
) -> tuple[int, int]:
    """One copy_file_range(2) to the file of that name; how much it copied, and the target's size. None: at position 1000."""
    with opened(path) as source, opened(os.path.join(os.path.dirname(path), target), flags) as destination:
        for descriptor, offset in ((source, source_offset), (destination, target_offset)):
            if offset is None:
                os.lseek(descriptor, 1000, os.SEEK_SET)
        copied = os.copy_file_range(source, destination, count, source_offset, target_offset)
        for descriptor, offset in ((source, source_offset), (destination, target_offset)):
            assert os.lseek(descriptor, 0, os.SEEK_CUR) == (1000 + copied if offset is None else 0)
        return copied, os.fstat(destination).st_size


def send_again(path: str, times: int) -> bytes:
    """sendfile(2) of the same range."""
    ours, theirs = socket.socketpair()
    with opened(path, os.O_RDONLY) as descriptor, ours, theirs:
        data = b""
        for _ in range(times):
            os.sendfile(theirs.fileno(), descriptor, 5000, 100)
            data += ours.recv(100, socket.MSG_WAITALL)
        return data


def send_on(path: str, start: int, count: int, times: int) -> bytes:
    """sendfile(2) at the file position, which goes on."""
    ours, theirs = socket.socketpair()
    with opened(path, os.O_RDONLY) as descriptor, ours, theirs:
        os.lseek(descriptor, start, os.SEEK_SET)
        data = b""
        for _ in range(times):
            sent = os.sendfile(theirs.fileno(), descriptor, None, count)
            data += ours.recv(sent, socket.MSG_WAITALL)
        return data


def send_much_again(path: str, count: int, times: int) -> list[bytes]:
    """sendfile(2) of the same range to a file."""
    target = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    with opened(path, os.O_RDONLY) as descriptor:
        copies = []
        for _ in range(times):
            os.lseek(target, 0, os.SEEK_SET)
            sent = os.sendfile(target, descriptor, 5000, count)
            copies.append(os.pread(target, sent, 0))
        os.close(target)
        return copies


def splice_again(path: str, times: int) -> bytes:
    """splice(2) of the same range to a pipe."""
    reading, writing = os.pipe()
    with opened(path, os.O_RDONLY) as descriptor:
        return b"".join(
            os.read(reading, os.splice(descriptor, writing, 100, offset_src=5000)) for _ in range(times)
        )


# Seeking


def layout(path: str) -> list[tuple[str, int]]:
    """Where SEEK_DATA and SEEK_HOLE say that data and holes begin, to the end of the file."""
    with opened(path, os.O_RDONLY) as descriptor:
        return layout_open(descriptor)


def layout_open(descriptor: int) -> list[tuple[str, int]]:
    """layout(), of an open file."""
    found: list[tuple[str, int]] = []
    place, size = 0, os.fstat(descriptor).st_size
    while place < size:
        try:
            place = os.lseek(descriptor, place, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO, error
            break
        found.append(("data", place))
        place = os.lseek(descriptor, place, os.SEEK_HOLE)
        found.append(("hole", place))
    return found


def seek_wrongly(path: str) -> list[int]:
    """The errnos of SEEK_DATA and SEEK_HOLE at and past the end, and at a negative place; then where the others lead."""
    with opened(path, os.O_RDONLY) as descriptor:
        size = os.fstat(descriptor).st_size
        answers = []
        for whence in (os.SEEK_DATA, os.SEEK_HOLE):
            for place in (size, size + 5000, -1):
                try:
                    answers.append(-os.lseek(descriptor, place, whence))
                except OSError as error:
                    answers.append(error.errno or 0)
        answers.append(os.lseek(descriptor, -100, os.SEEK_END))
        answers.append(os.lseek(descriptor, 10, os.SEEK_CUR))
        return answers


# Shared mappings


def shared(descriptor: int, offset: int = 0, length: int = MAPPED, writable: bool = True) -> mmap.mmap:
    """mmap(2) with MAP_SHARED."""
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    return mmap.mmap(descriptor, length, flags=mmap.MAP_SHARED, prot=protection, offset=offset)


def share_reading(path: str, offset: int, length: int, touched: list[int]) -> list[bytes]:
    with opened(path, os.O_RDONLY) as descriptor, shared(descriptor, offset, length, False) as mapping:
        return [mapping[at : at + 1] for at in touched]


def share_writing(path: str, offset: int, data: bytes) -> bytes:
    """Write into a mapping of the second and third page, msync(2); what the mapping shows there and right behind."""
    with opened(path) as descriptor, shared(descriptor, 4096) as mapping:
        mapping[offset : offset + len(data)] = data
        mapping.flush()
        return mapping[offset : offset + len(data) + 2]


def share_writing_blindly(path: str, data: bytes) -> None:
    """Write into a mapping, and leave it to munmap(2) and fsync(2)."""
    with opened(path) as descriptor:
        with shared(descriptor) as mapping:
            mapping[100 : 100 + len(data)] = data
        os.fsync(descriptor)


def share_and_call(path: str) -> tuple[bytes, bytes]:
    """read(2) sees what a mapping wrote, and the mapping what write(2) wrote."""
    with opened(path) as descriptor, shared(descriptor) as mapping:
        mapping[5000:5003] = b"map"
        seen = os.pread(descriptor, 3, 5000)
        os.pwrite(descriptor, b"call", 6000)
        return seen, mapping[6000:6004]


def share_with_child(path: str) -> bytes:
    """A child, with a mapping of its own, sees what this process writes into its, and answers there."""
    with opened(path) as descriptor, shared(descriptor) as mapping:
        mapping[0:5] = b"hello"

        def answer() -> None:
            with opened(path) as again, shared(again) as own:
                own[10:15] = own[0:5].upper()

        _wait_for(_forked(answer))
        return mapping[10:15]


_KEPT: dict[str, mmap.mmap] = {}


def share_and_dirty(path: str) -> None:
    """A mapping that stays, with a page to be written back."""
    with opened(path) as descriptor:
        _KEPT[path] = shared(descriptor)
        _KEPT[path][0:5] = b"dirty"


def write_back(path: str) -> None:
    """msync(2) of what share_and_dirty() has left."""
    _KEPT.pop(path).flush()


# Unnamed files


def unnamed(directory: str, data: bytes) -> tuple[bytes, int]:
    """O_TMPFILE: written, read back, and mapped; its link count."""
    with opened(directory, os.O_TMPFILE | os.O_RDWR) as descriptor:
        os.pwrite(descriptor, data, 0)
        return os.pread(descriptor, len(data), 0), os.fstat(descriptor).st_nlink


def unnamed_then_named(directory: str, name: str, data: bytes) -> int:
    """O_TMPFILE, and a name by linkat(2); its link count."""
    with opened(directory, os.O_TMPFILE | os.O_WRONLY) as descriptor:
        os.write(descriptor, data)
        with opened("/proc/self/fd", os.O_PATH) as descriptors:
            # Python follows symbolic links only where a directory's descriptor is given.
            os.link(
                str(descriptor), os.path.join(directory, name), src_dir_fd=descriptors, follow_symlinks=True
            )
        return os.fstat(descriptor).st_nlink


# Who does it: operations on a descriptor that is open for both, and ways for another to come by it


def _map_private(descriptor: int) -> None:
    with mmap.mmap(descriptor, MAPPED, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=4096) as mapping:
        assert mapping[0:1]


def _map_shared(descriptor: int) -> None:
    with shared(descriptor, 4096) as mapping:
        mapping[0:1] = b"x"


def _send(descriptor: int) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        assert os.sendfile(theirs.fileno(), descriptor, 5000, 100) == 100


def _splice_from(descriptor: int) -> None:
    reading, writing = os.pipe()
    assert os.splice(descriptor, writing, 100, offset_src=5000) == 100
    os.close(reading)
    os.close(writing)


def _splice_to(descriptor: int) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"w" * 100)
    assert os.splice(reading, descriptor, 100, offset_dst=5000) == 100
    os.close(reading)
    os.close(writing)


OPERATIONS: dict[str, Callable[[int], object]] = {
    "read": lambda descriptor: os.read(descriptor, 100),
    "pread": lambda descriptor: os.pread(descriptor, 100, 5000),
    "readv": lambda descriptor: os.readv(descriptor, [bytearray(60), bytearray(40)]),
    "large pread": lambda descriptor: os.pread(descriptor, 3 << 20, 5000),
    "write": lambda descriptor: os.write(descriptor, b"w" * 100),
    "pwrite": lambda descriptor: os.pwrite(descriptor, b"w" * 100, 5000),
    "large pwrite": lambda descriptor: os.pwrite(descriptor, b"w" * (3 << 20), 5000),
    "ftruncate": lambda descriptor: os.ftruncate(descriptor, 5000),
    "fallocate": lambda descriptor: fallocate_open(descriptor, 0, 5000, 100),
    "sendfile": _send,
    "splice from": _splice_from,
    "splice to": _splice_to,
    "copy_file_range": lambda descriptor: os.copy_file_range(descriptor, descriptor, 100, 9000, 100),
    "private mapping": _map_private,
    "shared mapping": _map_shared,
}

Doer = tuple[int, int]  # process, thread


def _me() -> Doer:
    return os.getpid(), threading.get_native_id()


def _in_thread(operation: Callable[[], object]) -> Doer:
    doers: list[Doer] = []

    def work() -> None:
        operation()
        doers.append(_me())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return doers[0]


def _forked(operation: Callable[[], Any], *, told: int = -1) -> int:
    """A child that does that, exits with 0 if it went well, and writes who did it (if it says so) to `told`."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        doer = operation()
        if told >= 0:
            os.write(told, marshal.dumps(doer))
        code = 0
    except BaseException as error:
        os.write(2, f"a child of an accessor: {error!r}\n".encode())
    finally:
        os._exit(code)


def _wait_for(child: int) -> int:
    """The signal that killed a child, or 0; it must not fail otherwise."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return os.WTERMSIG(status)
    assert os.WEXITSTATUS(status) == 0, "the child has failed"
    return 0


def _receive(connection: socket.socket) -> int:
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    return descriptors[0]


def do(path: str, way: str, name: str) -> tuple[Doer, Doer]:
    """Open a file for both at position 5000, and let an operation be done on it in that way; (who opened, who did)."""
    operation = OPERATIONS[name]
    ours, theirs = socket.socketpair()
    reading, writing = os.pipe()

    def once_passed(done_by: Callable[[Callable[[], object]], Doer]) -> Doer:
        descriptor = _receive(theirs)
        return done_by(lambda: operation(descriptor))

    def alone(work: Callable[[], object]) -> Doer:
        work()
        return _me()

    passed = {"passed": alone, "passed to a thread": _in_thread}.get(way)
    # Who is passed the descriptor is there before it is opened, so that it cannot have inherited it.
    child = 0 if passed is None else _forked(lambda: once_passed(passed), told=writing)
    with opened(path) as descriptor:
        os.lseek(descriptor, 5000, os.SEEK_SET)
        if passed is not None:
            socket.send_fds(ours, [b"x"], [descriptor])
        elif way == "itself":
            return _me(), alone(lambda: operation(descriptor))
        elif way == "thread":
            return _me(), _in_thread(lambda: operation(descriptor))
        elif way == "inherited":
            child = _forked(lambda: alone(lambda: operation(descriptor)), told=writing)
        elif way == "inherited by a thread":
            child = _forked(lambda: _in_thread(lambda: operation(descriptor)), told=writing)
    # It does it with the opener's own descriptor closed already, or not: both must be right.
    assert _wait_for(child) == 0
    return _me(), marshal.loads(os.read(reading, 100))


def read_as_program(path: str) -> tuple[int, bytes]:
    """A program reads, as its standard input, what this process has opened; its process."""
    with opened(path, os.O_RDONLY) as descriptor:
        process = subprocess.Popen(
            ["/bin/dd", "bs=100", "count=1", "status=none"], stdin=descriptor, stdout=subprocess.PIPE
        )
        data, _ = process.communicate()
        return process.pid, data


def touch_inherited_mapping(path: str) -> int:
    """A child touches a mapping that its parent has made and never touched; the child."""
    with opened(path, os.O_RDONLY) as descriptor, shared(descriptor, 4096, MAPPED, False) as mapping:
        child = _forked(lambda: bytes(mapping[0:1]))
        _wait_for(child)
        return child


def two_calls_at_once(path: str) -> dict[int, str]:
    """Two threads in different calls on one open file, at the same time: {thread: call}."""
    with opened(path) as descriptor:
        doers: dict[int, str] = {}

        def work(name: str) -> None:
            OPERATIONS[name](descriptor)
            doers[threading.get_native_id()] = name

        threads = [
            threading.Thread(target=work, args=(name,))
            for name in ("pread", "large pread", "copy_file_range")
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return doers


# Waiting


def operate(path: str, name: str) -> None:
    """Open a file for both, and do one operation on it, at position 5000."""
    with opened(path) as descriptor:
        os.lseek(descriptor, 5000, os.SEEK_SET)
        OPERATIONS[name](descriptor)


def operate_with_passed_descriptor(path: str, name: str) -> int:
    """A process gets a descriptor and does an operation on it. Returns the signal that kills it there, or 0."""
    ours, theirs = socket.socketpair()
    child = _forked(lambda: OPERATIONS[name](_receive(theirs)))
    with opened(path) as descriptor:
        socket.send_fds(ours, [b"x"], [descriptor])
        return _wait_for(child)


def operate_despite_signals(path: str, name: str) -> list[int]:
    """operate(), with handlers for SIGUSR1 and SIGINT; which of them came."""
    seen: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, lambda number, frame: seen.append(number))
    operate(path, name)
    return sorted(seen)


def many_reads(path: str, first: int, number: int) -> bytes:
    """A byte at each of so many places, by as many threads at once."""
    data = bytearray(number)
    with opened(path, os.O_RDONLY) as descriptor:

        def read(index: int) -> None:
            data[index : index + 1] = os.pread(descriptor, 1, first + index)

        threading.stack_size(128 * 1024)
        threads = [threading.Thread(target=read, args=(index,)) for index in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return bytes(data)


def write_in_threads(path: str, places: list[int]) -> list[int]:
    """1 MiB and 50 bytes written by a thread at each of those places, all at once; how much each wrote."""
    written = [0] * len(places)
    with opened(path) as descriptor:

        def write(index: int, place: int) -> None:
            written[index] = os.pwrite(descriptor, b"%d" % index * ((1 << 20) + 50), place)

        threads = [threading.Thread(target=write, args=pair) for pair in enumerate(places)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return written
