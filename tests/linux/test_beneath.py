"""Opening below a directory: with openat2(2) and without it, by paths of any length, and never through a link or out of the directory."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.linux.beneath import open_beneath, walk
from fusehsm.linux.syscalls import have_openat2
from tests.support.row_tests import error_of

WAYS = [
    pytest.param(True, id="openat2", marks=pytest.mark.skipif(not have_openat2(), reason="needs openat2(2)")),
    pytest.param(False, id="by name"),
]
LONG = [b"d" * 200] * 45  # 9,045 bytes: three pieces


def descriptors() -> int:
    """How many this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """A directory with some things in it, and beside it "secret"."""
    (tmp_path / "secret").touch()
    inside = tmp_path / "root"
    (inside / "directory").mkdir(parents=True)
    (inside / "directory" / "file").write_bytes(b"inside")
    (inside / "up").symlink_to("..")
    (inside / "here").symlink_to("directory")
    (inside / "directory" / "link").symlink_to("file")
    descriptor = os.open(inside, os.O_PATH | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("openat2", WAYS)
def test_a_file_is_opened_and_nothing_else_stays_open(root: int, openat2: bool) -> None:
    before = descriptors()
    descriptor = walk(root, [b"directory", b"file"], os.O_RDONLY | os.O_CLOEXEC, openat2=openat2)
    assert os.read(descriptor, 100) == b"inside"
    os.close(descriptor)
    assert descriptors() == before


@pytest.mark.parametrize("openat2", WAYS)
@pytest.mark.parametrize(
    "names",
    [[b"up", b"secret"], [b"here", b"file"], [b"directory", b"link"]],
    ids=["out", "on the way", "at the end"],
)
def test_no_link_is_followed(root: int, openat2: bool, names: list[bytes]) -> None:
    before = descriptors()
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    assert error_of(lambda: walk(root, names, flags, openat2=openat2)) in (errno.ELOOP, errno.ENOTDIR)
    assert descriptors() == before


@pytest.mark.parametrize("openat2", WAYS)
def test_a_path_longer_than_the_kernel_takes(root: int, openat2: bool) -> None:
    below = os.dup(root)
    for name in LONG:
        os.mkdir(name, dir_fd=below)
        following = os.open(name, os.O_PATH | os.O_DIRECTORY, dir_fd=below)
        os.close(below)
        below = following
    os.close(os.open(b"file", os.O_CREAT | os.O_WRONLY, dir_fd=below))
    os.close(below)
    before = descriptors()
    os.close(walk(root, [*LONG, b"file"], os.O_RDONLY | os.O_CLOEXEC, openat2=openat2))
    missing = [*LONG[:-1], b"missing", b"file"]
    assert error_of(lambda: walk(root, missing, os.O_RDONLY, openat2=openat2)) == errno.ENOENT
    assert descriptors() == before
    os.close(open_beneath(root, os.fsdecode(b"/".join([*LONG, b"file"])), os.O_RDONLY))


@pytest.mark.parametrize("openat2", WAYS)
def test_what_recovers_is_asked_until_it_gives_up(root: int, openat2: bool) -> None:
    """Without openat2(2) as well, where a directory in the middle may be the one that finds no room."""
    complaints: list[int] = []

    def recover(error: OSError, directory: int) -> None:
        assert error.errno == errno.ENOENT
        complaints.append(directory)
        if len(complaints) == 2:
            os.mkdir("late", dir_fd=root)
        if len(complaints) > 5:
            raise error

    os.close(walk(root, [b"late"], os.O_PATH, openat2=openat2, recover=recover))
    assert complaints == [root, root]
    assert error_of(lambda: walk(root, [b"late", b"never"], os.O_PATH, openat2=openat2, recover=recover)) == (
        errno.ENOENT
    )


def test_a_path_that_leads_out_is_refused(root: int) -> None:
    for path in ("../secret", "directory/../../secret", "/etc/passwd"):
        assert error_of(open_beneath, root, path, os.O_RDONLY) == errno.EXDEV
