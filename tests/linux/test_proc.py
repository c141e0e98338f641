"""What /proc says of real processes that really wait."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from fusehsm.linux import proc

PROGRAM = """
import ctypes, mmap, os, sys, threading
reader = int(sys.argv[1])
what = sys.argv[2]
libc = ctypes.CDLL(None)
buffer = ctypes.create_string_buffer(70000)
if what == "read":
    os.read(reader, 70000)
elif what == "readv":
    os.readv(reader, [bytearray(100), bytearray(5000), bytearray(7)])
elif what == "splice":
    out = os.pipe()
    os.splice(reader, out[1], 12345)
elif what == "thread":
    thread = threading.Thread(target=os.read, args=(reader, 4321))
    thread.start()
    signal = __import__("signal"); signal.pause()
"""


def eventually(probe: Callable[[], object]) -> object:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        found = probe()
        if found:
            return found
        time.sleep(0.001)
    raise AssertionError("it never came about")


@contextmanager
def waiting(what: str) -> Iterator[tuple[int, int]]:
    """A child process that waits in a system call on a pipe: (its pid, its descriptor)."""
    reader, writer = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, str(reader), what], pass_fds=[reader])
    try:
        yield child.pid, reader
    finally:
        child.kill()
        child.wait()
        os.close(reader)
        os.close(writer)


def transfer_of(reader: proc.CallReader, tid: int) -> proc.Transfer | None:
    call = reader.read(tid)
    return None if call is None else proc.reading(call)


@pytest.mark.parametrize(
    ("what", "count", "paged"), [("read", 70000, False), ("readv", 5107, False), ("splice", 12345, True)]
)
def test_the_range_of_a_blocked_call(what: str, count: int, paged: bool) -> None:
    reader = proc.CallReader()
    with waiting(what) as (pid, descriptor):
        expected = proc.Transfer(descriptor, None, count, paged)
        assert eventually(lambda: (found := transfer_of(reader, pid)) == expected and found) == expected
        assert reader.read(pid) == reader.read(pid)
    reader.close()


def test_another_thread_of_the_process_is_found() -> None:
    reader = proc.CallReader()
    with waiting("thread") as (pid, descriptor):
        wanted = proc.Transfer(descriptor, None, 4321, False)
        tid = eventually(
            lambda: next((t for t in proc.threads_of(pid) if transfer_of(reader, t) == wanted), 0)
        )
        assert isinstance(tid, int)
        assert tid != pid
        assert proc.process_of(tid) == pid
    reader.close()


def test_a_dead_thread_is_none_even_when_its_file_was_kept_open() -> None:
    reader = proc.CallReader(limit=1)
    with waiting("read") as (pid, _):
        eventually(lambda: reader.read(pid))
    assert reader.read(pid) is None
    assert reader.read(pid) is None
    reader.close()


def test_kept_files_are_bounded() -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = proc.CallReader(limit=2)
    with waiting("read") as (one, _), waiting("read") as (two, _), waiting("read") as (three, _):
        for pid in (one, two, three, one):
            eventually(partial(reader.read, pid))
        assert len(reader._descriptors) == 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_descriptor_tells_position_flags_and_inode(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND)
    os.lseek(descriptor, 42, os.SEEK_SET)
    found = proc.descriptor_of(os.getpid(), descriptor)
    assert found is not None
    assert found.position == 42
    assert found.flags & os.O_APPEND
    assert found.inode == os.fstat(descriptor).st_ino
    os.close(descriptor)
    assert proc.descriptor_of(os.getpid(), descriptor) is None


def test_an_open_file_is_looked_at_once_for_a_call(tmp_path: Path) -> None:
    """What is found belongs to the one request for which the call was read; a call that goes on is the same whatever was looked at."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    descriptor = os.open(path, os.O_RDONLY)
    call, again = (proc.SystemCall(os.getpid(), 0, (descriptor,), 1, 2) for _ in range(2))
    first = call.opened(descriptor)
    os.lseek(descriptor, 42, os.SEEK_SET)
    assert first is not None
    assert first.position == 0
    assert call.opened(descriptor) is first
    assert call == again
    assert again.opened(descriptor) == proc.descriptor_of(os.getpid(), descriptor) != first
    os.close(descriptor)


def test_mappings_are_picked_by_device_and_inode(tmp_path: Path) -> None:
    import mmap

    path = tmp_path / "file"
    path.write_bytes(b"x" * 40960)
    with open(path, "r+b") as file:
        status = os.fstat(file.fileno())
        device = (os.major(status.st_dev), os.minor(status.st_dev))
        with (
            mmap.mmap(file.fileno(), 8192, offset=4096),
            mmap.mmap(file.fileno(), 100, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ),
        ):
            found = {
                (m.offset, m.length, m.writable, m.shared)
                for m in proc.mappings_of(os.getpid(), device, status.st_ino)
            }
            assert found == {(4096, 8192, True, True), (0, 4096, False, False)}
        assert proc.mappings_of(os.getpid(), device, status.st_ino) == []
        assert proc.mappings_of(os.getpid(), (0, 0), status.st_ino) == []


def test_a_pending_fatal_signal_is_seen_and_a_handled_one_is_not() -> None:
    # A child that blocks its signals keeps them pending, as one that waits for FUSE does.
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGUSR1, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGCHLD, signal.SIGTERM])
        os.write(writer, b"!")
        signal.pause()
        os._exit(0)
    try:
        os.read(reader, 1)
        assert not proc.is_being_killed(child)
        for harmless in (signal.SIGUSR1, signal.SIGCHLD):
            os.kill(child, harmless)
        assert not proc.is_being_killed(child)
        # Blocked: it will not die of it now.
        os.kill(child, signal.SIGTERM)
        assert not proc.is_being_killed(child)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert not proc.is_being_killed(child)


def test_who_has_ended() -> None:
    """Also before anybody has waited for it, and a thread of a process that goes on."""
    assert not proc.is_gone(os.getpid())
    assert not proc.is_gone(1)  # somebody else's, perhaps
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    assert proc.is_gone(child)
    os.waitpid(child, 0)
    assert proc.is_gone(child)
    go = threading.Event()
    thread = threading.Thread(target=go.wait)
    thread.start()
    assert thread.native_id is not None
    assert not proc.is_gone(thread.native_id)
    go.set()
    thread.join()
    while os.path.exists(f"/proc/self/task/{thread.native_id}"):  # it ends a moment after it has been joined
        pass
    assert proc.is_gone(thread.native_id)


def test_a_process_that_runs_has_no_call() -> None:
    reader = proc.CallReader()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert eventually(lambda: reader.read(child.pid) is None)
    finally:
        child.kill()
        child.wait()
    reader.close()
