"""What a mount remembers: changes behind it, several devices under it, inode numbers that come again."""

import errno
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.engines import diverges
from tests.support.harness import Mount
from tests.support.posix_trees import PATIENCE, Errno, in_child, outcome

pytestmark = pytest.mark.fuse


@pytest.fixture(scope="module")
def shared(make_shared_mount: Callable[..., Mount]) -> Mount:
    return make_shared_mount("--cache", "shared")


def comes(condition: Callable[[], bool]) -> bool:
    """Whether something that a cache's timeout delays becomes true."""
    deadline = time.monotonic() + PATIENCE / 2
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def test_changes_behind_a_shared_mount_are_seen(shared: Mount) -> None:
    for name in ("changed", "removed", "mode", "replaced"):
        (shared.source / name).write_bytes(b"old content")

    def look() -> object:
        return {
            name: outcome(lambda name=name: (shared.path / name).read_bytes())
            for name in ("changed", "removed", "mode", "replaced", "new")
        }

    before = in_child(look)
    assert before == {
        **dict.fromkeys(("changed", "removed", "mode", "replaced"), b"old content"),
        "new": Errno(errno.ENOENT),
    }
    (shared.source / "changed").write_bytes(b"new and longer content")
    (shared.source / "removed").unlink()
    (shared.source / "mode").chmod(0o4711)
    (shared.source / "other").write_bytes(b"another file")
    (shared.source / "other").rename(shared.source / "replaced")
    (shared.source / "new").write_bytes(b"fresh")
    expected = {
        "changed": b"new and longer content",
        "removed": Errno(errno.ENOENT),
        "mode": b"old content",
        "replaced": b"another file",
        "new": b"fresh",
    }
    assert in_child(lambda: comes(lambda: look() == expected)), in_child(look)
    assert in_child(lambda: comes(lambda: os.stat(shared.path / "mode").st_mode & 0o7777 == 0o4711))


def test_a_private_mount_sees_what_is_done_through_it_at_once(make_mount: Callable[..., Mount]) -> None:
    mount = make_mount("--cache", "private")

    def act() -> object:
        found = [outcome(os.stat, mount.path / "file")]
        (mount.path / "file").write_bytes(b"1")
        found.append((mount.path / "file").read_bytes())
        (mount.path / "file").write_bytes(b"22")
        found += [
            os.stat(mount.path / "file").st_size,
            outcome(os.link, mount.path / "file", mount.path / "link"),
        ]
        found.append(os.stat(mount.path / "file").st_nlink)
        os.unlink(mount.path / "file")
        return [*found, outcome(os.stat, mount.path / "file"), os.stat(mount.path / "link").st_nlink]

    missing = Errno(errno.ENOENT)
    assert in_child(act) == [missing, b"1", 2, None, 2, missing, 1]


def test_several_devices(make_mount: Callable[..., Mount], places: Callable[[str], Path]) -> None:
    source = places("devices")
    submounts = [source / "one", source / "two"]
    for submount in submounts:
        submount.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", submount], check=True)
    try:
        for place in (source, *submounts):
            (place / "file").write_bytes(os.fsencode(place.name))
        # Two fresh file systems number alike.
        assert os.stat(submounts[0] / "file").st_ino == os.stat(submounts[1] / "file").st_ino
        mount = make_mount(source=source)

        def act() -> object:
            paths = [mount.path / "file", mount.path / "one/file", mount.path / "two/file"]
            contents = [path.read_bytes() for path in paths]
            numbers = {os.stat(path).st_ino for path in [*paths, mount.path / "one", mount.path / "two"]}
            linked = outcome(os.link, paths[1], paths[2].with_name("link"))
            moved = outcome(os.rename, paths[1], mount.path / "moved")
            return contents, len(numbers), linked, moved

        crossing = Errno(errno.EXDEV)
        assert in_child(act) == ([os.fsencode(source.name), b"one", b"two"], 5, crossing, crossing)
        mount.close()
    finally:
        for submount in submounts:
            subprocess.run(["umount", "-l", submount], check=False)


def test_reused_inode_numbers(shared: Mount) -> None:
    def act() -> object:
        numbers, wrong = set(), 0
        for index in range(200):
            path = shared.path / "reused"
            path.write_bytes(b"%d" % index)
            number = os.stat(path).st_ino
            wrong += path.read_bytes() != b"%d" % index
            numbers.add(number)
            path.unlink()
        return len(numbers) < 200, wrong

    # ext4 gives a number again at once.
    assert in_child(act) == (True, 0)


def test_a_number_reused_while_the_old_file_is_open(shared: Mount) -> None:
    def act() -> object:
        old = os.open(shared.path / "held", os.O_CREAT | os.O_RDWR, 0o644)
        os.write(old, b"old")
        os.unlink(shared.path / "held")
        for index in range(50):
            (shared.path / f"next {index}").write_bytes(b"next")
            assert os.stat(shared.path / f"next {index}").st_ino != os.fstat(old).st_ino
        return os.pread(old, 10, 0)

    assert in_child(act) == b"old"


def test_unnamed_files(shared: Mount, engine: str) -> None:
    """Where there are none, tempfile's callers go on with a name."""

    def act() -> object:
        import tempfile

        with tempfile.TemporaryFile(dir=shared.path) as file:
            file.write(b"content")
            file.seek(0)
            unnamed = outcome(os.open, shared.path, os.O_TMPFILE | os.O_RDWR)
            return unnamed if isinstance(unnamed, Errno) else None, file.read()

    refused = Errno(errno.EOPNOTSUPP) if diverges("O_TMPFILE", engine) else None
    assert in_child(act) == (refused, b"content")
