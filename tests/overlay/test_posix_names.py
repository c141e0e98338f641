"""Names and directories: one expectation, held against a plain ext4 directory and against mounts over others."""

import ctypes
import errno
import os
import stat
import subprocess
from pathlib import Path

import pytest

from fusehsm.linux import syscalls
from fusehsm.linux.syscalls import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from tests.support.posix_trees import Errno, Tree, outcome

pytestmark = pytest.mark.fuse
ENTRIES = 20_000


def rename(old: Path | str, new: Path | str, flags: int) -> None:
    syscalls.rename(-100, os.fsencode(old), -100, os.fsencode(new), flags)


def raw_entries(path: Path) -> list[tuple[str, int, int]]:
    """(name, kind, inode number) as getdents64(2) gives them, dots included."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    buffer = ctypes.create_string_buffer(32768)
    found: list[tuple[str, int, int]] = []
    while entries := syscalls.directory_entries(fd, buffer):
        found += [(os.fsdecode(name), kind, inode) for name, kind, inode, _ in entries]
    os.close(fd)
    return found


def names_of(path: Path) -> list[str]:
    return sorted(name for name, _, _ in raw_entries(path))


def fill(path: Path, *names: str) -> None:
    for name in names:
        if name.endswith("/"):
            (path / name).mkdir()
        else:
            (path / name).write_bytes(name.encode())


def test_rename(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "a", "b", "empty/", "full/", "full/x", "other/", "c")
        return [
            outcome(rename, f"{path}/{old}", f"{path}/{new}", flags)
            for old, new, flags in (
                ("a", "b", 0),
                ("missing", "b", 0),
                ("b", "c", RENAME_NOREPLACE),
                ("b", "d", RENAME_NOREPLACE),
                ("d", "empty", 0),
                ("other", "d", 0),
                ("other", "full", 0),
                ("other", "empty", 0),
                ("full", "full/below", 0),
                ("full", "empty/full", 0),
                ("c", "d", RENAME_EXCHANGE),
                ("c", "empty", RENAME_EXCHANGE),
                ("c", "missing", RENAME_EXCHANGE),
                ("d", "d", 0),
                ("d", "missing/d", 0),
                ("d", "d/", 0),
                ("c", "d", RENAME_NOREPLACE | RENAME_EXCHANGE),
            )
        ] + [(path / "d").read_bytes(), names_of(path / "c" / "full"), (path / "empty").read_bytes()]

    assert tree.run(act) == [
        None,
        Errno(errno.ENOENT),
        Errno(errno.EEXIST),
        None,
        Errno(errno.EISDIR),
        Errno(errno.ENOTDIR),
        Errno(errno.ENOTEMPTY),
        None,
        Errno(errno.EINVAL),
        None,
        None,
        None,
        Errno(errno.ENOENT),
        None,
        Errno(errno.ENOENT),
        Errno(errno.ENOTDIR),
        Errno(errno.EINVAL),
        b"c",
        [".", "..", "x"],
        b"a",
    ]


def test_whiteouts_are_refused(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "a")
        return outcome(rename, path / "a", path / "b", RENAME_WHITEOUT)

    # A plain ext4 makes a device for overlayfs; a mount is a file system that has none. All end with the file alone.
    result = tree.run(act)
    if tree.is_native:
        os.rename(tree.path / "b", tree.path / "a")
    else:
        assert result == Errno(errno.EINVAL)


def test_files_in_renamed_directories(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "one/", "two/", "one/sub/", "one/sub/file")
        fd = os.open(path / "one/sub/file", os.O_RDWR)
        here = os.open(path / "one/sub", os.O_RDONLY | os.O_DIRECTORY)
        os.rename(path / "one/sub", path / "two/moved")
        os.pwrite(fd, b"written", 0)
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o600, dir_fd=here))
        os.rename(path / "two", path / "one/two")
        os.chmod("file", 0o640, dir_fd=here)
        up = os.stat("..", dir_fd=here).st_ino == os.stat(path / "one/two").st_ino
        return (path / "one/two/moved/file").read_bytes(), sorted(os.listdir(here)), up

    assert tree.run(act) == (b"written/file", ["file", "new"], True)


def test_removal(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "file", "empty/", "full/", "full/x")
        here = os.open(path / "empty", os.O_RDONLY | os.O_DIRECTORY)
        found = [
            outcome(os.unlink, path / "empty"),
            outcome(os.rmdir, path / "file"),
            outcome(os.rmdir, path / "full"),
            outcome(os.rmdir, path / "missing"),
            outcome(os.unlink, path / "missing"),
            outcome(os.rmdir, f"{path}/full/."),
            outcome(os.rmdir, path / "empty"),
            outcome(os.open, "new", os.O_CREAT | os.O_WRONLY, dir_fd=here),
            os.listdir(here),
            os.fstat(here).st_nlink,
            outcome(os.mkdir, path / "file"),
            outcome(os.mkdir, path / "full"),
        ]
        os.mkdir(path / "empty")
        return found, os.listdir(path / "empty")

    assert tree.run(act) == (
        [
            Errno(errno.EISDIR),
            Errno(errno.ENOTDIR),
            Errno(errno.ENOTEMPTY),
            Errno(errno.ENOENT),
            Errno(errno.ENOENT),
            Errno(errno.EINVAL),
            None,
            Errno(errno.ENOENT),
            [],
            0,
            Errno(errno.EEXIST),
            Errno(errno.EEXIST),
        ],
        [],
    )


def test_links(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "file", "directory/")
        os.symlink("file", path / "soft")
        os.symlink("x" * 4000, path / "long")
        os.symlink(b"\xff\xfe", os.fsencode(path) + b"/\xfd")
        os.link(path / "file", path / "directory/hard")
        os.link(path / "soft", path / "hard of soft", follow_symlinks=False)
        fd = os.open(path / "file", os.O_RDWR)
        here = os.open(path, os.O_PATH)
        # Without a directory's descriptor, os.link() does not follow.
        os.link(f"/proc/self/fd/{fd}", "by descriptor", dst_dir_fd=here, follow_symlinks=True)
        found = [
            outcome(os.link, path / "directory", path / "no"),
            outcome(os.link, path / "file", path / "soft"),
            outcome(os.symlink, "x", path / "file"),
            outcome(os.readlink, path / "file"),
            os.readlink(path / "hard of soft"),
            len(os.readlink(path / "long")),
            os.readlink(os.fsencode(path) + b"/\xfd"),
            os.lstat(path / "long").st_size,
        ]
        numbers = {
            os.stat(path / name).st_ino for name in ("file", "soft", "directory/hard", "by descriptor")
        }
        os.chmod(path / "directory/hard", 0o600)
        (path / "file").unlink()
        found += [len(numbers), os.fstat(fd).st_nlink, oct(os.stat(path / "by descriptor").st_mode)]
        return found

    assert tree.run(act) == [
        Errno(errno.EPERM),
        Errno(errno.EEXIST),
        Errno(errno.EEXIST),
        Errno(errno.EINVAL),
        "file",
        4000,
        b"\xff\xfe",
        4000,
        1,
        2,
        "0o100600",
    ]


def test_names_of_all_kinds(tree: Tree) -> None:
    names = [b"\xff\xfe\x80", b"new\nline", b" ", b"...", b"\\", b"-", b"\x01", "ü".encode(), b"n" * 255]

    def act(path: Path) -> object:
        base = os.fsencode(path)
        for name in names:
            os.close(os.open(base + b"/" + name, os.O_CREAT | os.O_WRONLY, 0o644))
        tries = (b"n" * 256, b"m" * 255 + b"/x", b"m" * 256 + b"/x")
        wrong = [outcome(os.stat, base + b"/" + name) for name in tries]
        wrong.append(outcome(os.open, base + b"/" + b"n" * 256, os.O_CREAT | os.O_WRONLY))
        wrong.append(outcome(os.mkdir, base + b"/" + b"n" * 256))
        wrong.append(outcome(os.rename, base + b"/-", base + b"/" + b"n" * 256))
        wrong.append(outcome(os.symlink, b"x" * 4096, base + b"/link"))
        return sorted(os.listdir(base)), wrong

    too_long = Errno(errno.ENAMETOOLONG)
    wrong = [too_long, Errno(errno.ENOENT), too_long, too_long, too_long, too_long, too_long]
    assert tree.run(act) == (sorted(names), wrong)


def test_paths_deeper_than_path_max(tree: Tree) -> None:
    def act(path: Path) -> object:
        os.chdir(path)
        for level in range(24):
            os.mkdir("d" * 250)
            os.chdir("d" * 250)
            if level % 8 == 0:
                Path("file").write_bytes(b"%d" % level)
        Path("file").write_bytes(b"at the bottom")
        os.rename("file", "moved")
        os.mkdir("sub")
        found = [
            Path("moved").read_bytes(),
            sorted(os.listdir(".")),
            outcome(os.stat, f"{path}/" + ("d" * 250 + "/") * 24),
        ]
        for _ in range(24):
            os.chdir("..")
        return [*found, os.stat(".").st_ino == os.stat(path).st_ino]

    assert tree.run(act) == [b"at the bottom", ["moved", "sub"], Errno(errno.ENAMETOOLONG), True]


def test_dots_are_listed(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "sub/", "sub/file")
        os.symlink("file", path / "sub/link")
        shown = subprocess.run(["ls", "-la", path / "sub"], check=True, capture_output=True, text=True).stdout
        entries = {name: (kind, inode) for name, kind, inode in raw_entries(path / "sub")}
        assert entries["."] == (stat.S_IFDIR, os.stat(path / "sub").st_ino)
        assert entries[".."] == (stat.S_IFDIR, os.stat(path).st_ino)
        assert entries["file"] == (stat.S_IFREG, os.stat(path / "sub/file").st_ino)
        return sorted(entries), sorted(line.split()[8] for line in shown.splitlines()[1:])

    names = [".", "..", "file", "link"]
    assert tree.run(act) == (names, names)


def test_dots_of_the_root(posix_world: Tree) -> None:
    def act(path: Path) -> object:
        entries = {name: inode for name, _, inode in raw_entries(path)}
        return "." in entries, ".." in entries, entries["."] == os.stat(path).st_ino

    assert posix_world.run(act) == (True, True, True)


def test_a_large_directory(tree: Tree) -> None:
    def act(path: Path) -> object:
        directory = path / "large"
        directory.mkdir()
        here = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        wanted = {f"entry number {number:05}" for number in range(ENTRIES)}
        for name in wanted:
            os.mknod(name, stat.S_IFREG | 0o600, dir_fd=here)
        first = [entry.name for entry in os.scandir(directory)]
        assert len(first) == ENTRIES
        assert set(first) == wanted
        # Deleted while being read: what stays is given once.
        seen = []
        for number, entry in enumerate(os.scandir(directory)):
            seen.append(entry.name)
            if number % 2:
                os.unlink(entry.path)
        assert len(seen) == len(set(seen)) == ENTRIES
        left = os.listdir(directory)
        assert len(left) == ENTRIES // 2
        subprocess.run(["rm", "-rf", directory], check=True)
        return True

    if tree.world in ("exact", "first-access"):
        return  # directories make no events: nothing more to see
    assert tree.run(act)


def test_seeking_in_a_directory(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, *(f"entry {number}" for number in range(1000)))
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        buffer = ctypes.create_string_buffer(4096)
        all_: list[tuple[bytes, int]] = []
        while entries := syscalls.directory_entries(fd, buffer):
            all_ += [(name, offset) for name, _, _, offset in entries]
        for index in (0, 5, 500, 998):
            os.lseek(fd, all_[index][1], os.SEEK_SET)
            following = syscalls.directory_entries(fd, buffer)
            assert following[0][0] == all_[index + 1][0]
        # Names that go or come elsewhere do not move anybody.
        os.lseek(fd, all_[500][1], os.SEEK_SET)
        for name, _ in all_[:400]:
            if name not in (b".", b".."):
                os.unlink(os.fsencode(path) + b"/" + name)
        rest: list[bytes] = []
        while entries := syscalls.directory_entries(fd, buffer):
            rest += [name for name, *_ in entries]
        assert rest == [name for name, _ in all_[501:]]
        os.lseek(fd, 0, os.SEEK_SET)
        again = syscalls.directory_entries(fd, ctypes.create_string_buffer(1 << 17))
        subprocess.run(f"rm -f {path}/entry*", shell=True, check=True)
        return len(all_), len({name for name, *_ in again} - {b".", b".."}) > 500

    assert tree.run(act) == (1002, True)


def test_synchronising_a_directory(tree: Tree) -> None:
    def act(path: Path) -> object:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        fill(path, "file")
        return (
            outcome(os.fsync, fd),
            outcome(os.fdatasync, fd),
            outcome(os.read, fd, 1),
            outcome(os.ftruncate, fd, 0),
        )

    assert tree.run(act) == (None, None, Errno(errno.EISDIR), Errno(errno.EINVAL))


def test_modes(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "file", "directory/")
        found: list[list[object]] = []
        for mode in (0o7777, 0o4755, 0o2755, 0o1644, 0):
            os.chmod(path / "file", mode)
            os.chmod(path / "directory", mode)
            found.append([oct(os.stat(path / name).st_mode & 0o7777) for name in ("file", "directory")])
        os.chown(path / "file", 12, 34)
        os.chown(path / "file", -1, 56)
        os.symlink("file", path / "link")
        os.chown(path / "link", 78, 90, follow_symlinks=False)
        found.append(
            [os.stat(path / "file").st_uid, os.stat(path / "file").st_gid, os.lstat(path / "link").st_uid]
        )
        os.chmod(path / "directory", 0o755)
        return found

    assert tree.run(act) == [*([oct(mode)] * 2 for mode in (0o7777, 0o4755, 0o2755, 0o1644, 0)), [12, 56, 78]]


def test_access(tree: Tree) -> None:
    def act(path: Path) -> object:
        fill(path, "file")
        os.chmod(path / "file", 0o600)
        return [os.access(path / "file", mode) for mode in (os.F_OK, os.R_OK, os.W_OK, os.X_OK)]

    assert tree.run(act) == [True, True, True, False]
    assert tree.as_user(lambda path: [os.access(path / "file", mode) for mode in (os.F_OK, os.R_OK)]) == [
        True,
        False,
    ]
