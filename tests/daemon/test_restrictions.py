"""A mount allows nothing that the mounts below it forbid; in place, root's mount forbids no more than they do."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.linux.syscalls import MNT_DETACH, MS_BIND, MS_REMOUNT, mount, umount2
from tests.conftest import MakeMount
from tests.support.harness import NOBODY, fuse_device_for_everybody, fusehsm

pytestmark = [pytest.mark.fuse, pytest.mark.root]

# Option, flag of mount(2), flag of statvfs(3).
RESTRICTIONS = [
    ("ro", 0x1, os.ST_RDONLY),
    ("nosuid", 0x2, os.ST_NOSUID),
    ("nodev", 0x4, os.ST_NODEV),
    ("noexec", 0x8, os.ST_NOEXEC),
    ("nosymfollow", 0x100, 0x2000),
]
ALL = sum(flag for _, _, flag in RESTRICTIONS)
USUAL = os.ST_NOSUID | os.ST_NODEV
each = pytest.mark.parametrize(
    ("flag", "shown"), [row[1:] for row in RESTRICTIONS], ids=[row[0] for row in RESTRICTIONS]
)


Restrict = Callable[[Path, int], Path]


@pytest.fixture
def restrict() -> Iterator[Restrict]:
    """restrict(directory, flags) -> the directory, as a mount of its own with these flags. Comes before make_mount, whose mounts lie on it."""
    with ExitStack() as stack:

        def make(place: Path, flags: int) -> Path:
            mount(bytes(place), bytes(place), None, MS_BIND)
            stack.callback(umount2, bytes(place), MNT_DETACH)
            mount(bytes(place), bytes(place), None, MS_BIND | MS_REMOUNT | flags)
            return place

        yield make


def restrictions_of(place: Path) -> int:
    return os.statvfs(place).f_flag & ALL


@each
def test_in_place(
    restrict: Restrict, make_mount: MakeMount, places: Callable[[str], Path], flag: int, shown: int
) -> None:
    place = restrict(places("place"), flag)
    assert restrictions_of(make_mount(source=place, path=place).path) == shown


@each
def test_of_the_source(
    restrict: Restrict, make_mount: MakeMount, places: Callable[[str], Path], flag: int, shown: int
) -> None:
    assert restrictions_of(make_mount(source=restrict(places("source"), flag)).path) == USUAL | shown


@each
def test_of_the_destination(
    restrict: Restrict, make_mount: MakeMount, places: Callable[[str], Path], flag: int, shown: int
) -> None:
    assert restrictions_of(make_mount(path=restrict(places("destination"), flag)).path) == USUAL | shown


def test_none(make_mount: MakeMount, places: Callable[[str], Path]) -> None:
    place = places("place")
    assert restrictions_of(make_mount(source=place, path=place).path) == 0
    place = places("place")
    assert restrictions_of(make_mount("-o", "nosuid,nodev,noexec", source=place, path=place).path) == (
        USUAL | os.ST_NOEXEC
    )
    assert restrictions_of(make_mount().path) == USUAL
    assert restrictions_of(make_mount("-o", "suid,dev").path) == 0


@pytest.mark.any_engine
def test_an_option_that_lifts_one(
    restrict: Restrict, fuse: None, places: Callable[[str], Path], mount_point: Path
) -> None:
    done = fusehsm("mount", "-o", "exec", restrict(places("source"), 0x8), mount_point)
    assert done.returncode == 2
    assert done.stderr == "fusehsm: -o exec: SRC lies on a mount with noexec; leave it out\n"
    done = fusehsm("mount", "-o", "suid", places("source"), restrict(mount_point, 0x2))
    assert done.returncode == 2
    assert done.stderr == "fusehsm: -o suid: DST lies on a mount with nosuid; leave it out\n"


def test_of_an_ordinary_user(
    restrict: Restrict, make_mount: MakeMount, places: Callable[[str], Path], mount_point: Path
) -> None:
    """fusermount3 does not know nosymfollow, and always sets nosuid and nodev."""
    source = places("source")
    for place in (source, mount_point):
        os.chown(place, NOBODY, NOBODY)
    with fuse_device_for_everybody():
        made = make_mount(source=restrict(source, 0x8 | 0x100), path=mount_point, uid=NOBODY)
    # Root may not call statvfs(2) on another user's mount.
    (line,) = (
        line
        for line in Path("/proc/self/mountinfo").read_text().splitlines()
        if line.split()[4] == str(made.path)
    )
    assert {name for name, _, _ in RESTRICTIONS} & {*line.split()[5].split(",")} == {
        "nosuid",
        "nodev",
        "noexec",
    }


async def test_what_it_is_for(
    restrict: Restrict, make_mount: MakeMount, places: Callable[[str], Path], accessor: Accessor
) -> None:
    """A device node of a tree works on root's mount in place, and not on a mount of a tree that forbids devices."""
    place, other = places("place"), restrict(places("other"), 0x4)
    for tree in (place, other):
        os.mknod(tree / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        make_mount(source=tree, path=tree)
    assert await accessor.run("pwrite_path", str(place / "null"), b"x", 0) == 1
    with pytest.raises(PermissionError):
        await accessor.run("pwrite_path", str(other / "null"), b"x", 0)
