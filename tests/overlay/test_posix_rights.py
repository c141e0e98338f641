"""Rights: what other users may and may not, set-id bits, sticky and set-gid directories: natively, and through mounts of root's."""

import ctypes
import errno
import os
import shutil
import signal
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.harness import NOBODY, Mount, fuse_device_for_everybody
from tests.support.posix_trees import Errno, Tree, in_child, outcome
from tests.support.requirements import require

pytestmark = pytest.mark.fuse

DENIED, REFUSED = Errno(errno.EACCES), Errno(errno.EPERM)
STRANGER = 12345


def make(path: Path, mode: int, uid: int = 0, gid: int = 0, content: bytes = b"content") -> None:
    path.write_bytes(content)
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def make_directory(path: Path, mode: int, uid: int = 0, gid: int = 0) -> None:
    path.mkdir()
    os.chown(path, uid, gid)
    os.chmod(path, mode)


def mode_of(path: Path) -> str:
    return oct(stat.S_IMODE(os.stat(path).st_mode))


def test_files_of_others(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make(path / "secret", 0o600)
        make(path / "group", 0o640, 0, 777)
        make(path / "mine", 0o400, NOBODY, NOBODY)
        make(path / "all", 0o666)
        make_directory(path / "closed", 0o700)
        make(path / "closed/file", 0o666)
        make_directory(path / "listed", 0o744)
        make(path / "listed/file", 0o666)
        make_directory(path / "passed", 0o711)
        make(path / "passed/file", 0o666)

    def act(path: Path) -> object:
        return [
            outcome(lambda: (path / "secret").read_bytes()),
            outcome(lambda: (path / "group").read_bytes()),
            outcome(lambda: (path / "mine").read_bytes()),
            outcome(os.open, path / "mine", os.O_WRONLY),
            outcome(lambda: (path / "all").read_bytes()),
            outcome(os.stat, path / "closed/file"),
            outcome(os.listdir, path / "closed"),
            outcome(os.listdir, path / "listed"),
            outcome(os.stat, path / "listed/file"),
            outcome(os.listdir, path / "passed"),
            outcome(lambda: (path / "passed/file").read_bytes()),
            outcome(os.unlink, path / "all"),
            outcome(os.mkdir, path / "new"),
            outcome(os.rename, path / "all", path / "other"),
            outcome(os.symlink, "x", path / "link"),
            outcome(os.mkfifo, path / "fifo"),
            outcome(os.open, path / "new", os.O_CREAT | os.O_WRONLY),
            outcome(os.truncate, path / "secret", 0),
        ]

    def expected(group: object) -> object:
        return [
            *(DENIED, group, b"content", DENIED, b"content"),
            *(DENIED, DENIED, ["file"], DENIED, DENIED, b"content"),
            *([DENIED] * 7),
        ]

    tree.run(prepare)
    assert tree.as_user(act) == expected(DENIED)
    assert tree.as_user(act, groups=(777,)) == expected(b"content")


def set_acl(path: Path, *entries: tuple[int, int, int]) -> None:
    """Set the access ACL: (tag, permissions, id) as in acl(5)'s attribute form (linux/posix_acl_xattr.h)."""
    packed = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    os.setxattr(path, "system.posix_acl_access", packed)


def test_access_control_lists(tree: Tree) -> None:
    """By mode bits alone a group would be let in that its ACL entry keeps out, and a named user would be kept out."""
    own, user, group, mask, other, nobody = 0x01, 0x02, 0x04, 0x10, 0x20, 0xFFFFFFFF

    def prepare(path: Path) -> None:
        make(path / "group kept out", 0o600, 0, 777)
        entries = (user, 4, STRANGER), (group, 0, nobody), (mask, 6, nobody), (other, 0, nobody)
        set_acl(path / "group kept out", (own, 6, nobody), *entries)
        make(path / "user let in", 0o600)
        entries = (user, 4, NOBODY), (group, 0, nobody), (mask, 4, nobody), (other, 0, nobody)
        set_acl(path / "user let in", (own, 6, nobody), *entries)

    def act(path: Path) -> object:
        return [
            mode_of(path / "group kept out"),
            outcome(lambda: (path / "group kept out").read_bytes()),
            outcome(lambda: (path / "user let in").read_bytes()),
            outcome(os.open, path / "user let in", os.O_WRONLY),
        ]

    tree.run(prepare)
    assert tree.as_user(act, groups=(777,)) == ["0o660", DENIED, b"content", DENIED]


def test_a_new_access_control_list_clears_set_group_id(tree: Tree) -> None:
    """Of files and directories, with and without execute permission, unless who sets it is in the group."""

    def prepare(path: Path) -> None:
        for mode in (0o2755, 0o2644, 0o6775):
            make(path / f"strange-{mode:o}", mode, NOBODY, STRANGER)
            make(path / f"own-{mode:o}", mode, NOBODY, 777)
        make_directory(path / "strange", 0o2775, NOBODY, STRANGER)

    def act(path: Path) -> object:
        nobody = 0xFFFFFFFF
        for name in sorted(os.listdir(path)):
            set_acl(
                path / name,
                (1, 6, nobody),
                (2, 4, STRANGER),
                (4, 5, nobody),
                (16, 5, nobody),
                (32, 0, nobody),
            )
        return {name: mode_of(path / name) for name in os.listdir(path)}

    tree.run(prepare)
    assert tree.as_user(act, groups=(777,)) == {
        "strange-2755": "0o650",
        "strange-2644": "0o650",
        "strange-6775": "0o4650",
        "own-2755": "0o2650",
        "own-2644": "0o2650",
        "own-6775": "0o6650",
        "strange": "0o650",
    }


def test_giving_a_file_to_its_owner_clears_set_ids(tree: Tree) -> None:
    """chown(2) with neither an owner nor a group does so too."""

    def prepare(path: Path) -> None:
        for mode in (0o6755, 0o4644, 0o2644):
            make(path / f"{mode:o}", mode, NOBODY, 777)

    def act(path: Path) -> object:
        for name in os.listdir(path):
            os.chown(path / name, -1, -1)
        return {name: mode_of(path / name) for name in os.listdir(path)}

    tree.run(prepare)
    assert tree.as_user(act, groups=(777,)) == {"6755": "0o755", "4644": "0o644", "2644": "0o2644"}


def test_changing_what_belongs_to_others(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make(path / "mine", 0o600, NOBODY, NOBODY)
        make(path / "root's", 0o666)

    def act(path: Path) -> object:
        mine, others = path / "mine", path / "root's"
        return [
            outcome(os.chmod, mine, 0o640),
            outcome(os.chmod, others, 0o640),
            outcome(os.chown, mine, -1, 777),
            outcome(os.chown, mine, -1, 778),
            outcome(os.chown, mine, 0, -1),
            outcome(os.chown, others, NOBODY, -1),
            outcome(os.utime, mine, ns=(1, 2)),
            outcome(os.utime, others, ns=(1, 2)),
            outcome(os.utime, others),
            outcome(os.setxattr, mine, "user.x", b"1"),
            outcome(os.setxattr, others, "user.x", b"1"),
            outcome(os.setxattr, mine, "trusted.x", b"1"),
            outcome(os.mknod, path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        ]

    tree.run(prepare)
    expected = [
        None,
        REFUSED,
        None,
        REFUSED,
        REFUSED,
        REFUSED,
        None,
        REFUSED,
        None,
        None,
        None,
        REFUSED,
        DENIED,
    ]
    assert tree.as_user(act, groups=(777,)) == expected


def test_new_files_belong_to_their_makers(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make_directory(path / "open", 0o777)
        make_directory(path / "set-gid", 0o2777, 0, 777)

    def act(path: Path) -> object:
        found = []
        for place in ("open", "set-gid"):
            makers: tuple[tuple[str, Callable[[Path], object]], ...] = (
                ("file", lambda new: os.close(os.open(new, os.O_CREAT | os.O_WRONLY, 0o666))),
                ("directory", lambda new: os.mkdir(new, 0o777)),
                ("fifo", lambda new: os.mkfifo(new, 0o666)),
                ("link", lambda new: os.symlink("target", new)),
                ("set-id", lambda new: os.close(os.open(new, os.O_CREAT | os.O_WRONLY, 0o6777))),
            )
            for name, create in makers:
                create(path / place / name)
                status = os.lstat(path / place / name)
                found.append((status.st_uid, status.st_gid, oct(status.st_mode)))
        return found

    tree.run(prepare)
    modes = ["0o100640", "0o40750", "0o10640", "0o120777", "0o106750"]
    expected = [(NOBODY, STRANGER, mode) for mode in modes]
    # In a set-gid directory of a group that is not his, the maker may not leave set-gid on a program.
    in_group = ["0o100640", "0o42750", "0o10640", "0o120777", "0o104750"]
    expected += [(NOBODY, 777, mode) for mode in in_group]
    assert tree.as_user(act, gid=STRANGER, umask=0o027) == expected


def test_umask(tree: Tree) -> None:
    def act(path: Path) -> object:
        found = []
        for umask in (0, 0o077, 0o777, 0o022):
            os.umask(umask)
            os.close(os.open(path / f"file {umask}", os.O_CREAT | os.O_WRONLY, 0o666))
            os.mkdir(path / f"directory {umask}", 0o1777)
            found += [mode_of(path / f"{kind} {umask}") for kind in ("file", "directory")]
        return found

    assert tree.run(act) == ["0o666", "0o1777", "0o600", "0o1700", "0o0", "0o1000", "0o644", "0o1755"]


def test_creating_without_the_right_to_write(tree: Tree) -> None:
    def act(path: Path) -> object:
        fd = os.open(path / "file", os.O_CREAT | os.O_RDWR, 0o444)
        written = os.write(fd, b"content")
        os.close(fd)
        return written, outcome(os.open, path / "file", os.O_WRONLY), (path / "file").read_bytes()

    tree.run(lambda path: os.chmod(path, 0o777))
    assert tree.as_user(act) == (7, DENIED, b"content")


@pytest.mark.parametrize("change", ["write", "truncate", "ftruncate", "O_TRUNC", "chown", "nothing"])
def test_set_id_bits_go(tree: Tree, change: str) -> None:
    modes = (0o4777, 0o2777, 0o6777, 0o2767, 0o6666)

    def prepare(path: Path) -> None:
        for mode in modes:
            make(path / oct(mode), mode, NOBODY, NOBODY)

    def act(path: Path) -> object:
        found = {}
        for mode in modes:
            file = path / oct(mode)
            if change == "truncate":
                os.truncate(file, 3)
            elif change == "chown":
                os.chown(file, NOBODY, NOBODY)
            elif change == "O_TRUNC":
                os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))
            elif change in ("write", "ftruncate"):
                fd = os.open(file, os.O_RDWR)
                if change == "write":
                    os.write(fd, b"x")
                else:
                    os.ftruncate(fd, 3)
                os.close(fd)
            found[oct(mode)] = mode_of(file)
        return found

    def left(mode: int) -> int:
        if change == "nothing":
            return mode
        return mode & ~(0o6000 if mode & stat.S_IXGRP else 0o4000)

    tree.run(prepare)
    assert tree.as_user(act) == {oct(mode): oct(left(mode)) for mode in modes}


def test_set_id_bits_stay_when_root_writes(tree: Tree) -> None:
    def act(path: Path) -> object:
        make(path / "file", 0o6777)
        fd = os.open(path / "file", os.O_RDWR)
        os.write(fd, b"x")
        os.ftruncate(fd, 3)
        return mode_of(path / "file")

    assert tree.run(act) == "0o6777"


def test_set_gid_by_a_stranger_to_the_group(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make(path / "file", 0o755, NOBODY, 777)
        make_directory(path / "directory", 0o755, NOBODY, 777)

    def act(path: Path) -> object:
        os.chmod(path / "file", 0o2755)
        os.chmod(path / "directory", 0o2755)
        return mode_of(path / "file"), mode_of(path / "directory")

    tree.run(prepare)
    assert tree.as_user(act) == ("0o755", "0o755")
    assert tree.as_user(act, groups=(777,)) == ("0o2755", "0o2755")


def test_sticky_directories(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make_directory(path / "sticky", 0o1777)
        for name, uid in (("mine", NOBODY), ("his", STRANGER), ("my other", NOBODY)):
            make(path / "sticky" / name, 0o666, uid, uid)

    def act(path: Path) -> object:
        here = path / "sticky"
        return [
            outcome(os.unlink, here / "his"),
            outcome(os.rename, here / "his", here / "new"),
            outcome(os.rename, here / "mine", here / "his"),
            outcome(os.rename, here / "mine", here / "renamed"),
            outcome(os.unlink, here / "renamed"),
        ]

    tree.run(prepare)
    assert tree.as_user(act) == [REFUSED, REFUSED, REFUSED, None, None]


def test_capabilities_of_files_go_with_a_write(tree: Tree) -> None:
    capability = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

    def act(path: Path) -> object:
        make(path / "file", 0o755)
        os.setxattr(path / "file", "security.capability", capability)
        before = os.getxattr(path / "file", "security.capability") == capability
        fd = os.open(path / "file", os.O_WRONLY)
        os.write(fd, b"x")
        return before, outcome(os.getxattr, path / "file", "security.capability")

    assert tree.run(act) == (True, Errno(errno.ENODATA))


@pytest.mark.parametrize("change", ["write", "truncate", "ftruncate", "O_TRUNC", "chown", "removexattr"])
def test_privileges_go_when_a_stranger_writes(tree: Tree, change: str) -> None:
    """Who may write takes them away without owning the file, and nobody else does."""
    capability = b"\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
    names = {f"{mode:o}": mode for mode in (0o6777, 0o2666, 0o4755)}
    if change == "chown":
        # FUSE servers cannot tell the request of chown(2) from that of a write. One who may write may take them away in both ways on a mount.
        del names["6777"], names["2666"]
    writes = change in ("write", "truncate", "ftruncate", "O_TRUNC")

    def prepare(path: Path) -> None:
        for name, mode in names.items():
            make(path / name, mode)
            os.setxattr(path / name, "security.capability", capability)

    def do(file: Path) -> None:
        if change == "truncate":
            os.truncate(file, 3)
        elif change == "chown":
            os.chown(file, -1, -1)
        elif change == "removexattr":
            os.removexattr(file, "security.capability")
        else:
            fd = os.open(file, os.O_WRONLY | (os.O_TRUNC if change == "O_TRUNC" else 0))
            if change == "write":
                os.write(fd, b"x")
            elif change == "ftruncate":
                os.ftruncate(fd, 3)
            os.close(fd)

    def act(path: Path) -> object:
        return {name: outcome(do, path / name) for name in names}

    def left(path: Path) -> object:
        return {
            name: (mode_of(path / name), "security.capability" in os.listxattr(path / name)) for name in names
        }

    tree.run(prepare)
    done = {name: writes and bool(mode & stat.S_IWOTH) for name, mode in names.items()}
    refusal = DENIED if writes else REFUSED
    assert tree.as_user(act) == {name: None if done[name] else refusal for name in names}
    assert tree.run(left) == {
        name: (oct(mode & 0o777 if done[name] else mode), not done[name]) for name, mode in names.items()
    }


def test_the_same_mode_again(tree: Tree) -> None:
    """It takes no bits away."""

    def act(path: Path) -> object:
        for _ in range(2):
            os.chmod(path / "file", 0o6755)
        return mode_of(path / "file")

    tree.run(lambda path: make(path / "file", 0o600, NOBODY, NOBODY))
    assert tree.as_user(act) == "0o6755"


def test_trusted_attributes_are_roots(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make(path / "file", 0o666)
        os.setxattr(path / "file", "trusted.x", b"1")
        os.setxattr(path / "file", "user.x", b"1")

    tree.run(prepare)
    assert tree.as_user(lambda path: os.listxattr(path / "file")) == ["user.x"]
    assert tree.as_user(lambda path: outcome(os.getxattr, path / "file", "trusted.x")) == Errno(errno.ENODATA)


# An ordinary user's own mount


@pytest.fixture(scope="module")
def own_mount(
    places: Callable[[str], Path],
    session_directory: Path,
    make_shared_mount: Callable[..., Mount],
    engine: str,
) -> Mount:
    source, point = places("own"), session_directory / f"own-mount-{engine}"
    point.mkdir()
    for place in (source, point):
        os.chown(place, NOBODY, NOBODY)
    with fuse_device_for_everybody():
        return make_shared_mount(source=source, path=point, uid=NOBODY)


def test_an_ordinary_users_own_mount(own_mount: Mount) -> None:
    def act() -> object:
        path = own_mount.path
        (path / "directory").mkdir()
        (path / "directory/file").write_bytes(b"content")
        os.chmod(path / "directory/file", 0o444)
        os.symlink("file", path / "directory/link")
        os.link(path / "directory/file", path / "hard")
        os.rename(path / "hard", path / "moved")
        os.utime(path / "moved", ns=(1, 2))
        os.mkfifo(path / "fifo")
        fd = os.open(path / "made read-only", os.O_CREAT | os.O_RDWR, 0o400)
        os.write(fd, b"written")
        os.unlink(path / "made read-only")
        os.ftruncate(fd, 3)
        return [
            os.pread(fd, 10, 0),
            (path / "directory/link").read_bytes(),
            outcome(os.open, path / "moved", os.O_WRONLY),
            outcome(os.chown, path / "moved", 0, 0),
            outcome(os.mknod, path / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
            sorted(os.listdir(path)),
        ]

    assert in_child(act, uid=NOBODY) == [
        b"wri",
        b"content",
        DENIED,
        REFUSED,
        REFUSED,
        ["directory", "fifo", "moved"],
    ]
    assert sorted(os.listdir(own_mount.source)) == ["directory", "fifo", "moved"]
    status = os.stat(own_mount.source / "moved")
    assert (status.st_uid, oct(status.st_mode), status.st_mtime_ns, status.st_nlink) == (
        NOBODY,
        "0o100444",
        2,
        2,
    )


def test_an_ordinary_users_mount_is_closed_to_others(own_mount: Mount) -> None:
    assert in_child(lambda: outcome(os.stat, own_mount.path)) == DENIED
    assert in_child(lambda: outcome(os.listdir, own_mount.path), uid=STRANGER) == DENIED


def test_a_program_that_somebody_else_has_written_to(make_mount: Callable[..., Mount]) -> None:
    """With --cache private the kernel believes a mode for ever, and would start the program with its owner's rights."""
    program = shutil.which("id")
    assert program
    mount = make_mount("--events", "first-access", "--cache", "private", "--allow-other", "-o", "suid")
    make(mount.source / "program", 0o4777, content=Path(program).read_bytes())

    def started() -> str:
        return subprocess.check_output([mount.path / "program", "-u"], text=True).strip()

    def act() -> object:
        before = started()
        with (mount.path / "program").open("ab") as file:
            file.write(b"\0")
        return before, started()

    assert in_child(act, uid=NOBODY) == ("0", str(NOBODY))
    assert mode_of(mount.source / "program") == "0o777"


def test_an_open_file_may_be_truncated_by_one_who_could_not_open_it(tree: Tree) -> None:
    def prepare(path: Path) -> None:
        make(path / "others", 0o666)
        os.chmod(path, 0o777)

    def act(path: Path) -> object:
        new = os.open(path / "new", os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o444)
        os.write(new, b"content")
        os.ftruncate(new, 3)
        # By its path it is open to nobody.
        denied = outcome(os.truncate, path / "new", 1)
        others = os.open(path / "others", os.O_RDWR)
        os.ftruncate(others, 4)
        os.truncate(path / "others", 2)
        return denied, os.fstat(new).st_size, os.fstat(others).st_size

    tree.run(prepare)
    assert tree.as_user(act) == (DENIED, 3, 2)


def as_root_of_a_container(first: int, function: Callable[[], object]) -> object:
    """What `function` gives as user 0 of a user namespace whose users 0 to 99 are `first` to `first` + 99 outside."""

    def run() -> object:
        libc = ctypes.CDLL(None, use_errno=True)
        asking, ask = os.pipe()
        mapped, tell = os.pipe()
        this = os.getpid()
        helper = os.fork()
        if helper == 0:
            try:
                os.read(asking, 1)
                for name in ("uid_map", "gid_map"):
                    Path(f"/proc/{this}/{name}").write_text(f"0 {first} 100")
                os.write(tell, b"x")
            finally:
                os._exit(0)
        if libc.unshare(0x10000000):  # CLONE_NEWUSER
            os.kill(helper, signal.SIGKILL)
            return Errno(ctypes.get_errno())
        os.write(ask, b"x")
        os.read(mapped, 1)
        os.waitpid(helper, 0)
        os.setgroups([])
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
        return function()

    return in_child(run)


def test_root_of_a_container(tree: Tree) -> None:
    """Its capabilities hold for files whose owner and group exist in the container. To change a mode, the owner is enough."""
    first = 200_000

    def prepare(path: Path) -> None:
        make(path / "root's", 0o644, first, first)
        make(path / "user's", 0o600, first + 33, first + 33)
        make(path / "others", 0o644, first + 33, 0)
        make(path / "outside", 0o644)
        os.chmod(path, 0o777)

    def act() -> object:
        path = tree.path
        found = []
        for name in ("root's", "user's", "others", "outside"):
            file = path / name
            found.append(
                [
                    outcome(os.chmod, file, 0o640),
                    outcome(os.truncate, file, 3),
                    outcome(os.setxattr, file, "user.x", b"1"),
                    outcome(os.removexattr, file, "user.x"),
                    outcome(os.setxattr, file, "trusted.x", b"1"),
                    outcome(lambda file=file: os.close(os.open(file, os.O_WRONLY | os.O_TRUNC))),
                    outcome(os.chown, file, 44, 45),
                ]
            )
        return found

    tree.run(prepare)
    may = [None, None, None, None, REFUSED, None, None]
    may_not = [REFUSED, DENIED, DENIED, DENIED, REFUSED, DENIED, REFUSED]
    found = as_root_of_a_container(first, act)
    require(found != REFUSED, "needs user namespaces")
    assert found == [may, may, [None, *may_not[1:]], may_not]
    assert os.stat(tree.backing / "user's").st_uid == first + 44
