"""What /proc says of real processes."""

import ctypes
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.linux import proc


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


def test_memory_at_a_tagged_pointer() -> None:
    # As a program with the tagged address ABI of arm64 hands them to the kernel (hwasan, memory tagging).
    buffer = ctypes.create_string_buffer(b"content")
    for tag in (0, 0x34, 0xB4):
        address = tag << 56 | ctypes.addressof(buffer)
        assert proc.memory_at(os.getpid(), address, 7) == b"content", tag


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


# A long list of groups, before what the kernel tells of signals and capabilities

MANY = range(1_000_000_000, 1_000_060_000)  # the kernel allows 65536 (NGROUPS_MAX)
_CAP_SYS_ADMIN = 21


@pytest.fixture
def child_of_many_groups() -> Iterator[int]:
    """A process that SIGTERM kills when the kernel lets it: it has stopped itself."""
    child = os.fork()
    if child == 0:
        os.setgroups(list(MANY))
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(1)
    os.waitid(os.P_PID, child, os.WSTOPPED | os.WNOWAIT)
    yield child
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.root
def test_a_thread_of_many_groups(child_of_many_groups: int) -> None:
    assert proc.is_member(child_of_many_groups, MANY[-1])
    assert not proc.is_member(child_of_many_groups, MANY.stop)
    assert proc.has_capability(child_of_many_groups, _CAP_SYS_ADMIN)
    assert proc.rights(child_of_many_groups, 0)[0] == list(MANY)
    assert proc.voluntary_switches(child_of_many_groups) is not None
    assert not proc.is_being_killed(child_of_many_groups)
    os.kill(child_of_many_groups, signal.SIGTERM)
    assert proc.is_being_killed(child_of_many_groups)
