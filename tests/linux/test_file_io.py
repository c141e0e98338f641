"""A descriptor that a task shares with a thread: the last user closes it, and it is closed once."""

import errno
import os
from collections.abc import Iterator

import pytest

from fusehsm.linux.file_io import SharedDescriptor


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
