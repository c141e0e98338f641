"""Whose is what the overlay makes, and which set-id bits survive: as if the accessor had done it himself."""

import ctypes
import errno
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fusehsm.overlay.overlay import TIME_NOW, AttributeChanges, Caller, Overlay
from tests.support.overlay_actions import NOBODY, Face, NativeFace, OverlayFace, as_user, process_of, snapshot
from tests.support.requirements import require_root

pytestmark = pytest.mark.root

OTHER_GROUP = 4242  # the accessor is a member
FOREIGN_GROUP = 4343  # he is not
CAPABILITY = bytes.fromhex("0000000201000000000000000000000000000000")  # cap_chown, as setcap(8) writes it


@dataclass(frozen=True, slots=True)
class Places:
    native: Path
    source: Path


@pytest.fixture
def places(session_directory: Path) -> Places:
    """Two equal trees that the accessor may write to."""
    require_root()
    base = Path(tempfile.mkdtemp(dir=session_directory))
    base.chmod(0o755)
    made = Places(base / "native", base / "source")
    for root in (made.native, made.source):
        root.mkdir()
        root.chmod(0o777)
        for name, mode, gid in (
            ("plain", 0o777, 0),
            ("member", 0o2777, OTHER_GROUP),
            ("foreign", 0o2777, FOREIGN_GROUP),
            ("sticky", 0o1777, 0),
        ):
            directory = root / name
            directory.mkdir()
            os.chown(directory, 0, gid)
            directory.chmod(mode)
    return made


@pytest.fixture
def tree(places: Places) -> Iterator[Overlay]:
    before = os.umask(0)
    made = Overlay(str(places.source))
    yield made
    made.close()
    os.umask(before)


@pytest.fixture
def accessor() -> Iterator[Caller]:
    """An ordinary accessor that lives, so that his groups can be read."""
    require_root()
    with process_of(NOBODY, NOBODY, (OTHER_GROUP,)) as pid:
        yield Caller(NOBODY, NOBODY, pid)


def natively(step: Callable[[Face], object], places: Places) -> None:
    def do() -> None:
        step(NativeFace(places.native))

    as_user(do, groups=(OTHER_GROUP,))


CREATIONS: list[Callable[[Face, bytes], object]] = [
    lambda f, d: f.create(d + b"/file", 0o644, b""),
    lambda f, d: f.create(d + b"/suid", 0o4755, b""),
    lambda f, d: f.create(d + b"/sgid", 0o2755, b""),
    lambda f, d: f.create(d + b"/sgid-no-x", 0o2644, b""),
    lambda f, d: f.create(d + b"/both", 0o6711, b""),
    lambda f, d: f.create(d + b"/written", 0o6777, b"content"),
    lambda f, d: f.create(d + b"/none", 0, b""),
    lambda f, d: f.mkdir(d + b"/directory", 0o755),
    lambda f, d: f.mkdir(d + b"/group-directory", 0o3777),
    lambda f, d: f.mknod(d + b"/fifo", stat.S_IFIFO | 0o622, 0),
    lambda f, d: f.mknod(d + b"/node", stat.S_IFREG | 0o2755, 0),
    lambda f, d: f.mknod(d + b"/socket", stat.S_IFSOCK | 0o600, 0),
    lambda f, d: f.symlink(d + b"/link", b"target"),
]


@pytest.mark.parametrize("directory", [b"plain", b"member", b"foreign", b"sticky"])
def test_new_objects_as_if_the_accessor_had_made_them(
    places: Places, tree: Overlay, accessor: Caller, directory: bytes
) -> None:
    face = OverlayFace(tree, accessor)
    for creation in CREATIONS:
        creation(face, directory)
        natively(lambda f, creation=creation: creation(f, directory), places)  # type: ignore[misc]
    assert snapshot(places.source) == snapshot(places.native)
    assert (places.source / os.fsdecode(directory) / "suid").stat().st_uid == NOBODY


def _identity() -> list[str]:
    wanted = ("CapEff", "CapPrm", "Uid", "Gid", "Groups")
    return [
        line for line in Path("/proc/thread-self/status").read_text().splitlines() if line.startswith(wanted)
    ]


def test_the_server_keeps_its_own_identity(places: Places, tree: Overlay, accessor: Caller) -> None:
    before = _identity()
    face = OverlayFace(tree, accessor)
    face.create(b"plain/his", 0o644, b"")
    with pytest.raises(FileExistsError):
        face.mkdir(b"plain/his", 0o755)
    assert _identity() == before
    (places.source / "mine").write_bytes(b"")
    assert (places.source / "mine").stat().st_uid == 0


def test_capabilities_that_were_not_effective_stay_so(places: Places) -> None:
    def serve() -> tuple[list[str], list[str]]:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)
        sets = (ctypes.c_uint32 * 6)()
        libc = ctypes.CDLL(None)
        assert libc.capget(header, sets) == 0
        sets[0] &= ~(1 << 2)  # CAP_DAC_READ_SEARCH, which setfsuid(2) back to 0 would raise
        assert libc.capset(header, sets) == 0
        before = _identity()
        OverlayFace(Overlay(str(places.source)), Caller(NOBODY, NOBODY, 0)).mkdir(b"plain/his", 0o755)
        return before, _identity()

    before, after = as_user(serve, 0, 0)
    assert before == after
    assert (places.source / "plain/his").stat().st_uid == NOBODY


def test_a_group_member_without_write_permission_of_his_own(
    places: Places, tree: Overlay, accessor: Caller
) -> None:
    """The kernel let him in by a supplementary group; the backing must not ask again."""
    directory = places.source / "by-group"
    directory.mkdir()
    os.chown(directory, 0, OTHER_GROUP)
    directory.chmod(0o770)
    OverlayFace(tree, accessor).create(b"by-group/file", 0o640, b"x")
    status = (directory / "file").stat()
    assert (status.st_uid, status.st_gid, oct(status.st_mode)) == (NOBODY, NOBODY, oct(stat.S_IFREG | 0o640))


@pytest.mark.parametrize("server_umask", [0, 0o077, 0o777])
def test_the_servers_umask_does_not_matter(
    places: Places, tree: Overlay, accessor: Caller, server_umask: int
) -> None:
    before = os.umask(server_umask)
    try:
        face = OverlayFace(tree, accessor)
        for creation in CREATIONS:
            creation(face, b"member")
    finally:
        os.umask(before)
    for creation in CREATIONS:
        natively(lambda f, creation=creation: creation(f, b"member"), places)  # type: ignore[misc]
    assert snapshot(places.source) == snapshot(places.native)


def test_default_acl_takes_the_umasks_place(places: Places, tree: Overlay, accessor: Caller) -> None:
    entry = "{:02x}00{:02x}00ffffffff"
    # user::rwx group::r-x other::---
    acl = bytes.fromhex("02000000" + entry.format(1, 7) + entry.format(4, 5) + entry.format(0x20, 0))
    for root in (places.native, places.source):
        os.setxattr(root / "plain", "system.posix_acl_default", acl)
    before = os.umask(0o022)
    try:
        face = OverlayFace(tree, accessor)
        face.create(b"plain/file", 0o666, b"")
        face.mkdir(b"plain/directory", 0o777)
    finally:
        os.umask(before)
    natively(lambda f: f.create(b"plain/file", 0o666, b""), places)
    natively(lambda f: f.mkdir(b"plain/directory", 0o777), places)
    assert snapshot(places.source) == snapshot(places.native)
    assert oct((places.source / "plain/file").stat().st_mode) == oct(stat.S_IFREG | 0o640)


# Changes by an ordinary accessor to a file that he may write to

CHANGES: dict[str, Callable[[Face], object]] = {
    "write": lambda f: f.write(b"plain/file", 0, b"new"),
    "truncate": lambda f: f.truncate(b"plain/file", 1),
    "open with O_TRUNC": lambda f: f.open_truncating(b"plain/file"),
    "nothing": lambda f: f.kind(b"plain/file"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("mode", [0o6777, 0o4666, 0o2777, 0o2666, 0o6767, 0o777], ids=oct)
@pytest.mark.parametrize("owner", [0, NOBODY])
@pytest.mark.parametrize("gid", [OTHER_GROUP, FOREIGN_GROUP])
def test_set_id_bits_go_with_an_ordinary_users_change(
    places: Places, tree: Overlay, accessor: Caller, change: str, mode: int, owner: int, gid: int
) -> None:
    for root in (places.native, places.source):
        file = root / "plain/file"
        file.write_bytes(b"content")
        os.chown(file, owner, gid)
        os.setxattr(file, "security.capability", CAPABILITY)
        file.chmod(mode)
    CHANGES[change](OverlayFace(tree, accessor))
    natively(CHANGES[change], places)
    assert snapshot(places.source) == snapshot(places.native)


@pytest.mark.parametrize("change", CHANGES)
def test_roots_changes_leave_them(places: Places, tree: Overlay, change: str) -> None:
    for root in (places.native, places.source):
        file = root / "plain/file"
        file.write_bytes(b"content")
        os.setxattr(file, "security.capability", CAPABILITY)
        file.chmod(0o6777)
    CHANGES[change](OverlayFace(tree, Caller(0, 0, os.getpid())))
    CHANGES[change](NativeFace(places.native))
    assert snapshot(places.source) == snapshot(places.native)
    assert (places.source / "plain/file").stat().st_mode & 0o6000 == 0o6000


@pytest.mark.parametrize("mode", [0o6777, 0o6767, 0o2644, 0o4755], ids=oct)
@pytest.mark.parametrize("gid", [OTHER_GROUP, FOREIGN_GROUP])
def test_set_id_bits_go_with_chown(
    places: Places, tree: Overlay, accessor: Caller, mode: int, gid: int
) -> None:
    for root in (places.native, places.source):
        file = root / "plain/file"
        file.write_bytes(b"content")
        os.chown(file, NOBODY, gid)
        file.chmod(mode)
    OverlayFace(tree, accessor).chown(b"plain/file", -1, OTHER_GROUP)
    natively(lambda f: f.chown(b"plain/file", -1, OTHER_GROUP), places)
    assert snapshot(places.source) == snapshot(places.native)


@pytest.mark.parametrize("name", [b"plain/file", b"plain/directory"])
@pytest.mark.parametrize("gid", [OTHER_GROUP, FOREIGN_GROUP])
def test_set_gid_by_one_who_is_no_member(
    places: Places, tree: Overlay, accessor: Caller, name: bytes, gid: int
) -> None:
    for root in (places.native, places.source):
        (root / "plain/file").write_bytes(b"")
        (root / "plain/directory").mkdir()
        os.chown(root / os.fsdecode(name), NOBODY, gid)
    OverlayFace(tree, accessor).chmod(name, 0o2755)
    natively(lambda f: f.chmod(name, 0o2755), places)
    assert snapshot(places.source) == snapshot(places.native)


def test_an_acl_set_by_one_who_is_no_member(places: Places, tree: Overlay, accessor: Caller) -> None:
    acl = bytes.fromhex("02000000" + "01000700ffffffff" + "04000400ffffffff" + "20000000ffffffff")
    for root in (places.native, places.source):
        file = root / "plain/file"
        file.write_bytes(b"")
        os.chown(file, NOBODY, FOREIGN_GROUP)
        file.chmod(0o2755)
    OverlayFace(tree, accessor).set_xattr(b"plain/file", b"system.posix_acl_access", acl, 0)
    natively(lambda f: f.set_xattr(b"plain/file", b"system.posix_acl_access", acl, 0), places)
    assert snapshot(places.source) == snapshot(places.native)


NAME_CHANGES: dict[str, Callable[[Face, bytes], object]] = {
    "unlink": lambda f, d: f.unlink(d + b"/file"),
    "unlink of one's own": lambda f, d: f.unlink(d + b"/own"),
    "rmdir": lambda f, d: f.rmdir(d + b"/directory"),
    "rename": lambda f, d: f.rename(d + b"/file", d + b"/new", 0),
    "rename away": lambda f, d: f.rename(d + b"/own", b"plain/new", 0),
    "rename of a directory": lambda f, d: f.rename(d + b"/directory", b"plain/new", 0),
    "rename over another": lambda f, d: f.rename(d + b"/own", d + b"/file", 0),
    "exchange": lambda f, d: f.rename(d + b"/own", d + b"/file", 2),
    "link": lambda f, d: f.link(d + b"/own", d + b"/new"),
    "link of another's": lambda f, d: f.link(d + b"/file", d + b"/new"),
    "create": lambda f, d: f.create(d + b"/new", 0o644, b""),
    "mkdir": lambda f, d: f.mkdir(d + b"/new", 0o755),
    "mknod": lambda f, d: f.mknod(d + b"/new", stat.S_IFIFO | 0o622, 0),
    "symlink": lambda f, d: f.symlink(d + b"/new", b"target"),
}


@pytest.mark.parametrize("change", NAME_CHANGES)
@pytest.mark.parametrize(
    ("mode", "gid"),
    [
        (0o777, 0),
        (0o755, 0),
        (0o1777, 0),
        (0o775, OTHER_GROUP),
        (0o1775, OTHER_GROUP),
        (0o775, FOREIGN_GROUP),
    ],
)
def test_names_change_with_the_accessors_rights(
    places: Places, tree: Overlay, accessor: Caller, change: str, mode: int, gid: int
) -> None:
    """Also where no kernel has checked them: a directory may have got another owner or mode since it did."""
    for root in (places.native, places.source):
        directory = root / "changed"
        directory.mkdir()
        (directory / "directory").mkdir()
        for name, owner in (("file", 0), ("own", NOBODY)):
            (directory / name).write_bytes(b"")
            os.chown(directory / name, owner, owner)
        os.chown(directory, 0, gid)
        directory.chmod(mode)
    outcomes = []

    def do(face: Face) -> None:
        try:
            NAME_CHANGES[change](face, b"changed")
        except OSError as error:
            (places.native / "outcome").write_text(errno.errorcode[error.errno or 0])

    (places.native / "outcome").touch()
    (places.native / "outcome").chmod(0o666)
    for is_native in (False, True):
        if is_native:
            natively(do, places)
        else:
            do(OverlayFace(tree, accessor))
        outcomes.append((places.native / "outcome").read_text())
        (places.native / "outcome").write_text("")
    (places.native / "outcome").unlink()
    assert outcomes[0] == outcomes[1]
    assert snapshot(places.source) == snapshot(places.native)


def test_an_accessor_that_has_gone_has_no_groups(places: Places, tree: Overlay) -> None:
    with process_of(NOBODY, NOBODY, (OTHER_GROUP,)) as pid:
        caller = Caller(NOBODY, NOBODY, pid)
        os.chown(places.source / "member", 0, OTHER_GROUP)
        (places.source / "member").chmod(0o770)
        OverlayFace(tree, caller).mkdir(b"member/first", 0o755)
    # The last: the number is another user's thread by now, which has all capabilities.
    for gone in (caller, Caller(NOBODY, NOBODY, 0), Caller(NOBODY, NOBODY, os.getpid())):
        with pytest.raises(PermissionError):
            OverlayFace(tree, gone).mkdir(b"member/second", 0o755)


def test_trusted_attributes_are_shown_to_root_only(places: Places, tree: Overlay, accessor: Caller) -> None:
    file = places.source / "plain/file"
    file.write_bytes(b"")
    os.setxattr(file, "trusted.secret", b"1")
    os.setxattr(file, "user.open", b"1")
    assert OverlayFace(tree, accessor).list_xattr(b"plain/file") == [b"user.open"]
    assert OverlayFace(tree, Caller(0, 0, 1)).list_xattr(b"plain/file") == [b"trusted.secret", b"user.open"]


def test_an_ordinary_server_gives_nobody_its_own_set_id_bits(places: Places) -> None:
    """Someone else's set-user-id file would be the server's user's, with the other's content."""

    def serve() -> list[str]:
        tree = Overlay(str(places.source))
        modes = []
        for caller in (Caller(NOBODY, NOBODY, os.getpid()), Caller(1234, 1234, 0)):
            name = b"plain/by-%d" % caller.uid
            OverlayFace(tree, caller).create(name, 0o6755, b"")
            OverlayFace(tree, caller).mknod(name + b"-node", stat.S_IFREG | 0o6755, 0)
            modes += [
                oct(os.stat(places.source / os.fsdecode(n)).st_mode & 0o7777) for n in (name, name + b"-node")
            ]
        return modes

    assert as_user(serve) == ["0o6755", "0o6755", "0o755", "0o755"]


def test_touching_someone_elses_writable_file(places: Places) -> None:
    """utimensat(2) with "now" needs write permission only; pyfuse3 hands "now" on as a time."""
    file = places.source / "plain/file"
    file.write_bytes(b"")
    file.chmod(0o666)
    os.utime(file, ns=(0, 0))

    def serve() -> list[object]:
        tree = Overlay(str(places.source))
        directory, _ = tree.lookup(tree.root, b"plain")
        node, _ = tree.lookup(directory, b"file")
        results: list[object] = []
        moment = time.time_ns()
        for changes in (
            AttributeChanges(atime_ns=moment, mtime_ns=moment),
            AttributeChanges(atime_ns=TIME_NOW, mtime_ns=TIME_NOW),
        ):
            results.append(abs(tree.setattr(node, changes)[1].st_mtime_ns - moment) < 60_000_000_000)
        for changes in (
            AttributeChanges(atime_ns=1, mtime_ns=1),
            AttributeChanges(mtime_ns=moment),
            AttributeChanges(mode=0o600),
        ):
            try:
                tree.setattr(node, changes)
            except OSError as error:
                results.append(error.errno)
        return results

    assert as_user(serve) == [True, True, errno.EPERM, errno.EPERM, errno.EPERM]


def test_in_group(accessor: Caller) -> None:
    assert [accessor.in_group(gid) for gid in (NOBODY, OTHER_GROUP, FOREIGN_GROUP, 0)] == [
        True,
        True,
        False,
        False,
    ]
    gone = Caller(accessor.uid, accessor.gid, 0)
    assert [gone.in_group(gid) for gid in (NOBODY, OTHER_GROUP)] == [True, False]


# Changes of attributes and content that no kernel has checked

INODE_CHANGES: dict[str, Callable[[Face], object]] = {
    "chmod": lambda f: f.chmod(b"changed", 0o640),
    "chown": lambda f: f.chown(b"changed", NOBODY, -1),
    "chgrp": lambda f: f.chown(b"changed", -1, OTHER_GROUP),
    "chgrp to another": lambda f: f.chown(b"changed", -1, FOREIGN_GROUP),
    "truncate": lambda f: f.truncate(b"changed", 1),
    "open with O_TRUNC": lambda f: f.open_truncating(b"changed"),
    "times": lambda f: f.set_times(b"changed", 5, 7),
    "attribute": lambda f: f.set_xattr(b"changed", b"user.new", b"1", 0),
    "attribute of the trusted": lambda f: f.set_xattr(b"changed", b"trusted.new", b"1", 0),
    "capability": lambda f: f.set_xattr(b"changed", b"security.capability", CAPABILITY, 0),
    "removal of an attribute": lambda f: f.remove_xattr(b"changed", b"user.old"),
    "removal of one of the trusted": lambda f: f.remove_xattr(b"changed", b"trusted.old"),
}


@pytest.mark.parametrize("change", INODE_CHANGES)
@pytest.mark.parametrize(
    ("mode", "uid", "gid"),
    [
        (0o644, 0, 0),
        (0o666, 0, 0),
        (0o664, 0, OTHER_GROUP),
        (0o664, 0, FOREIGN_GROUP),
        (0o600, NOBODY, NOBODY),
        (0o400, NOBODY, NOBODY),
        (0o2660, NOBODY, FOREIGN_GROUP),
    ],
)
def test_inodes_change_with_the_accessors_rights(
    places: Places, tree: Overlay, accessor: Caller, change: str, mode: int, uid: int, gid: int
) -> None:
    """Also where no kernel has checked them: a file may have got another owner or mode since it did."""
    for root in (places.native, places.source):
        file = root / "changed"
        file.write_bytes(b"content")
        os.setxattr(file, "user.old", b"1")
        os.setxattr(file, "trusted.old", b"1")
        os.chown(file, uid, gid)
        file.chmod(mode)

    def do(face: Face) -> str:
        try:
            INODE_CHANGES[change](face)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "done"

    through = do(OverlayFace(tree, accessor))
    assert through == as_user(lambda: do(NativeFace(places.native)), groups=(OTHER_GROUP,))
    assert snapshot(places.source) == snapshot(places.native)


def test_an_empty_file_opens_for_truncation_whatever_its_mode(
    places: Places, tree: Overlay, accessor: Caller
) -> None:
    """open(2) with O_CREAT and O_TRUNC may arrive as MKNOD and OPEN, and a new file may have any mode."""
    file = places.source / "new"
    file.touch(0o400)
    OverlayFace(tree, accessor).open_truncating(b"new")
    file.write_bytes(b"content")
    with pytest.raises(PermissionError):
        OverlayFace(tree, accessor).open_truncating(b"new")
    assert file.read_bytes() == b"content"


def test_set_id_bits_may_be_dropped_by_one_who_is_not_the_owner(
    places: Places, tree: Overlay, accessor: Caller
) -> None:
    """The kernel asks for that in the name of a user who writes (ATTR_KILL_SUID)."""
    file = places.source / "plain/file"
    file.touch()
    file.chmod(0o6775)
    face = OverlayFace(tree, accessor)
    face.chmod(b"plain/file", 0o775)
    assert oct(file.stat().st_mode) == oct(stat.S_IFREG | 0o775)
    for mode in (0o6775, 0o4775, 0o774, 0o4774, 0):
        with pytest.raises(PermissionError):
            face.chmod(b"plain/file", mode)
