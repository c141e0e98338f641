"""Walks of trees: everything is seen, whatever the depth, with few descriptors, and whatever is moved meanwhile."""

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from fusehsm.linux import syscalls
from fusehsm.linux.beneath import (
    LONGEST_PATH,
    MOST_OPEN,
    Descent,
    directories,
    identity_of,
    open_entry,
    reopened,
)
from fusehsm.tier.fetch.inventory import items
from fusehsm.tier.stores.base import StoreError
from fusehsm.tier.stores.local import LocalStore
from fusehsm.tier.stubs.tree import Tree
from tests.support.requirements import require_fuse, require_root
from tests.support.tier.deep import LEVELS, nested
from tests.support.tier.others import MALLORY, silent_mount
from tests.support.tier.trees import make_small_tree

pytestmark = pytest.mark.any_engine


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_directory_with_what_is_in_it(places: Callable[[str], Path]) -> None:
    root = places("tree")
    make_small_tree(root)
    (root / "link").symlink_to("sub")
    expected = {os.stat(place).st_ino: sorted(files) for place, _, files in os.walk(root)}
    expected[os.stat(root).st_ino] = sorted([*expected[os.stat(root).st_ino], "link"])
    complaints: list[OSError] = []
    with opened(root) as fd:
        found = {os.fstat(inner).st_ino: sorted(names) for inner, names in directories(fd, complaints.append)}
    assert (found, complaints) == (expected, [])


def test_a_deep_tree_takes_few_descriptors(places: Callable[[str], Path]) -> None:
    root = places("tree")
    (root / "z").touch()
    complaints: list[OSError] = []
    with nested(root) as bottom, opened(root) as fd:
        os.close(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=bottom))
        before = descriptors()
        levels = 0
        for _ in directories(fd, complaints.append):
            levels += 1
            assert descriptors() <= before + MOST_OPEN + 5
        assert levels == LEVELS + 1
        assert descriptors() == before
        found = [item.path for item in items(fd, "", lambda key: None, complaints.append, Tree.of(fd))]
        with LocalStore(str(root)) as store:
            paths = [entry.path for entry in store.tree()]
    deep = "d/" * LEVELS
    assert found == [f"{deep}file", "z"]
    assert (paths[0], paths[-2:], len(paths)) == ("d", [f"{deep}file", "z"], LEVELS + 2)
    assert complaints == []


def test_what_lies_too_deep_is_left_out_and_told(places: Callable[[str], Path]) -> None:
    root = places("tree")
    (root / "z").touch()
    complaints: list[OSError] = []
    unlisted: list[StoreError] = []
    levels = LONGEST_PATH // 200
    with nested(root, levels + 10, "d" * 199), opened(root) as fd:
        assert len(list(directories(fd, complaints.append))) == levels + 1
        assert [item.path for item in items(fd, "", lambda key: None, complaints.append, Tree.of(fd))] == [
            "z"
        ]
        with LocalStore(str(root)) as store:
            # The first that lies too deep is still told of, as it can be seen.
            assert len(list(store.tree(unlisted.append))) == levels + 2
    assert [error.errno for error in [*complaints, *unlisted]] == [errno.ENAMETOOLONG] * 3


def test_what_has_been_moved_meanwhile_is_left_out_and_the_rest_is_seen(
    places: Callable[[str], Path],
) -> None:
    """On the way back from far below no other directory is taken for the one that was there."""
    root, elsewhere = places("tree"), places("elsewhere")
    lost: list[OSError] = []
    far, gone, kept = (root.joinpath(*["d"] * depth) for depth in (21, 20, 19))
    with nested(root, 20 + 2 * MOST_OPEN), opened(root) as fd:
        for place in (root, kept, gone):
            (place / "z").touch()
        with closing(Descent(fd, lost.append)) as descent:
            while (level := descent.here) is not None and level.names[-1:] == ["d"]:
                descent.enter(level.names.pop())
            far.rename(elsewhere / "far")
            gone.rename(elsewhere / "gone")
            gone.mkdir()
            (gone / "not seen").touch()
            seen = []
            while (level := descent.here) is not None:
                if not level.names:
                    descent.leave()
                else:
                    seen.append(level.path_of(level.names.pop()))
    assert seen == [str((kept / "z").relative_to(root)), "z"]
    assert [(error.errno, error.filename) for error in lost] == [(errno.ESTALE, str(gone.relative_to(root)))]


def test_a_directory_is_not_taken_for_a_new_one_with_its_inode_number(
    ext4: Path, places: Callable[[str], Path]
) -> None:
    root = places("reused")
    assert root.is_relative_to(ext4)
    with opened(root) as root_fd:
        for number in range(100):
            (root / f"{number}").mkdir()
            with opened(root / f"{number}") as fd:
                gone, status = identity_of(fd), os.fstat(fd)
            (root / f"{number}").rmdir()
            (root / "new").mkdir()
            if os.stat(root / "new").st_ino == status.st_ino:
                break
            (root / "new").rmdir()
        else:
            pytest.fail("no inode number was given again")
        with pytest.raises(OSError) as raised:
            reopened(root_fd, "new", gone, None)
        assert raised.value.errno == errno.ESTALE


@pytest.mark.any_engine
def test_only_mounts_of_other_users_are_not_entered(places: Callable[[str], Path]) -> None:
    require_root()
    require_fuse()
    root = places("entries")
    (root / "point").mkdir()
    with opened(root) as root_fd:
        with silent_mount(MALLORY, root / "point"), pytest.raises(OSError) as raised:
            open_entry(root_fd, "point", os.O_PATH)
        assert raised.value.errno == errno.EXDEV
        syscalls.mount(b"tmpfs", bytes(root / "point"), b"tmpfs", 0)
        try:
            (root / "point" / "inside").touch()
            fd = open_entry(root_fd, "point", os.O_RDONLY | os.O_DIRECTORY)
            try:
                assert os.listdir(fd) == ["inside"]
            finally:
                os.close(fd)
        finally:
            syscalls.umount2(bytes(root / "point"), 0)
