"""The system calls that real processes really wait in, as /proc tells them."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from fusehsm.linux import proc, system_call

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
elif what == "tagged":
    assert libc.prctl(55, 1, 0, 0, 0) == 0  # PR_SET_TAGGED_ADDR_CTRL
    vector = (ctypes.c_uint64 * 2)(0x34 << 56 | ctypes.addressof(buffer), 5107)
    libc.readv(reader, ctypes.c_void_p(0xB4 << 56 | ctypes.addressof(vector)), 1)
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


def transfer_of(reader: system_call.CallReader, tid: int) -> system_call.Transfer | None:
    call = reader.read(tid)
    return None if call is None else system_call.reading(call)


CALLS = [("read", 70000, False), ("readv", 5107, False), ("splice", 12345, True)]
if platform.machine() == "aarch64":
    CALLS.append(("tagged", 5107, False))  # only there pointers have tags


@pytest.mark.parametrize(("what", "count", "paged"), CALLS)
def test_the_range_of_a_blocked_call(what: str, count: int, paged: bool) -> None:
    reader = system_call.CallReader()
    with waiting(what) as (pid, descriptor):
        expected = system_call.Transfer(descriptor, None, count, paged)
        assert eventually(lambda: (found := transfer_of(reader, pid)) == expected and found) == expected
        assert reader.read(pid) == reader.read(pid)
    reader.close()


def test_another_thread_of_the_process_is_found() -> None:
    reader = system_call.CallReader()
    with waiting("thread") as (pid, descriptor):
        wanted = system_call.Transfer(descriptor, None, 4321, False)
        tid = eventually(
            lambda: next((t for t in proc.threads_of(pid) if transfer_of(reader, t) == wanted), 0)
        )
        assert isinstance(tid, int)
        assert tid != pid
        assert proc.process_of(tid) == pid
    reader.close()


def test_a_dead_thread_is_none_even_when_its_file_was_kept_open() -> None:
    reader = system_call.CallReader(limit=1)
    with waiting("read") as (pid, _):
        eventually(lambda: reader.read(pid))
    assert reader.read(pid) is None
    assert reader.read(pid) is None
    reader.close()


def test_kept_files_are_bounded() -> None:
    before = len(os.listdir("/proc/self/fd"))
    reader = system_call.CallReader(limit=2)
    with waiting("read") as (one, _), waiting("read") as (two, _), waiting("read") as (three, _):
        for pid in (one, two, three, one):
            eventually(partial(reader.read, pid))
        assert len(reader._descriptors) == 2
    reader.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_open_file_is_looked_at_once_for_a_call(tmp_path: Path) -> None:
    """What is found belongs to the one request for which the call was read; a call that goes on is the same whatever was looked at."""
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    descriptor = os.open(path, os.O_RDONLY)
    call, again = (system_call.SystemCall(os.getpid(), 0, (descriptor,), 1, 2) for _ in range(2))
    assert call.opened(descriptor) is None
    first = call.look_at(descriptor)
    os.lseek(descriptor, 42, os.SEEK_SET)
    assert first is not None
    assert first.position == 0
    assert call.look_at(descriptor) is call.opened(descriptor) is first
    assert call == again
    assert again.look_at(descriptor) == proc.descriptor_of(os.getpid(), descriptor) != first
    os.close(descriptor)


def test_a_process_that_runs_has_no_call() -> None:
    reader = system_call.CallReader()
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert eventually(lambda: reader.read(child.pid) is None)
    finally:
        child.kill()
        child.wait()
    reader.close()
