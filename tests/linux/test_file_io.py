"""A descriptor that a task shares with a thread: the last user closes it, and it is closed once. Which bytes of a file have their space."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.linux.file_io import SharedDescriptor, is_allocated
from fusehsm.linux.syscalls import FALLOC_FL_KEEP_SIZE, fallocate


@pytest.fixture
def other_end() -> Iterator[list[int]]:
    """For the ends of pipes that a test keeps."""
    kept: list[int] = []
    yield kept
    for descriptor in kept:
        os.close(descriptor)


@pytest.fixture
def shared(other_end: list[int]) -> SharedDescriptor:
    """The writing end of a pipe: the reading end tells whether it is open."""
    reading, writing = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    other_end.append(reading)
    return SharedDescriptor(writing)


def is_closed(other_end: list[int]) -> bool:
    try:
        return os.read(other_end[0], 1) == b""
    except BlockingIOError:
        return False


def test_the_last_holder_closes(shared: SharedDescriptor, other_end: list[int]) -> None:
    assert shared.hold()
    shared.release()
    assert not is_closed(other_end)
    shared.release()
    assert is_closed(other_end)


def test_a_thread_that_begins_too_late_gets_no_hold(shared: SharedDescriptor, other_end: list[int]) -> None:
    shared.release()
    assert is_closed(other_end)
    assert not shared.hold()


def test_what_the_thread_has_closed_is_not_closed_again(
    shared: SharedDescriptor, other_end: list[int]
) -> None:
    assert shared.hold()
    shared.close()
    assert is_closed(other_end)
    # The number is another file's by now.
    reused = os.dup(other_end[0])
    assert reused == shared.number
    other_end.append(reused)
    shared.release()
    shared.close()
    os.fstat(reused)


def test_what_closing_says_is_told(shared: SharedDescriptor) -> None:
    os.close(shared.number)
    with pytest.raises(OSError) as failed:
        shared.release()
    assert failed.value.errno == errno.EBADF


PAGE = 4096


@pytest.mark.parametrize(
    ("offset", "size", "allocated"),
    [
        (0, 8 * PAGE, True),
        (5, 10, True),
        (7 * PAGE, PAGE + 1, False),
        (8 * PAGE, PAGE, False),
        (11 * PAGE, 2 * PAGE, False),
        (12 * PAGE, PAGE, True),
        (16 * PAGE, 4 * PAGE, True),
        (15 * PAGE, 2 * PAGE, False),
        (19 * PAGE, 2 * PAGE, False),
        (100 * PAGE, PAGE, False),
    ],
)
@pytest.mark.parametrize("synchronised", [False, True])
def test_what_has_its_space(ext4: Path, synchronised: bool, offset: int, size: int, allocated: bool) -> None:
    """Pages 0 to 7 and 12 are written, and 16 to 19 are allocated, of which the last two lie beyond the end."""
    descriptor = os.open(ext4, os.O_TMPFILE | os.O_RDWR)
    try:
        os.pwrite(descriptor, b"x" * 8 * PAGE, 0)
        os.pwrite(descriptor, b"x" * PAGE, 12 * PAGE)
        os.posix_fallocate(descriptor, 16 * PAGE, 2 * PAGE)
        fallocate(descriptor, FALLOC_FL_KEEP_SIZE, 18 * PAGE, 2 * PAGE)
        if synchronised:
            os.fsync(descriptor)
        assert is_allocated(descriptor, offset, size) is allocated
    finally:
        os.close(descriptor)


def test_where_nobody_knows_what_has_its_space() -> None:
    descriptor = os.memfd_create("file")
    os.pwrite(descriptor, b"x" * PAGE, 0)
    assert not is_allocated(descriptor, 0, PAGE)
    os.close(descriptor)
