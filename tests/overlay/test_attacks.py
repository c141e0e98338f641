"""A process that may write to the backing tries to lead the overlay outside of it, or to another file."""

import errno
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.linux import syscalls
from fusehsm.overlay.overlay import AttributeChanges, Node, Overlay
from tests.support.overlay_actions import own_caller

SECRET = b"outside the backing"


class Trap:
    """source/d/e/f and, outside, a tree of the same names."""

    def __init__(self, base: Path, **options: float) -> None:
        self.source = base / "source"
        self.outside = base / "outside"
        for root, content in ((self.source, b"inside"), (self.outside, SECRET)):
            (root / "d/e/sub").mkdir(parents=True)
            (root / "d/e/f").write_bytes(content)
            (root / "d/e/l").symlink_to("target of " + root.name)
        self.tree = Overlay(str(self.source), **options)  # type: ignore[arg-type]
        self.d, _ = self.tree.lookup(self.tree.root, b"d")
        self.e, _ = self.tree.lookup(self.d, b"e")
        self.f, _ = self.tree.lookup(self.e, b"f")
        self.l, _ = self.tree.lookup(self.e, b"l")
        self.sub, _ = self.tree.lookup(self.e, b"sub")

    def replace(self, name: str, target: Path) -> None:
        """Move source/`name` away and put a symbolic link in its place."""
        os.rename(self.source / name, self.source / "aside")
        os.symlink(target, self.source / name)


@pytest.fixture(params=["openat2", "walk"])
def trap(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Trap]:
    if request.param == "walk":
        monkeypatch.setattr(syscalls, "have_openat2", lambda: False)
    made = Trap(tmp_path, trust_seconds=0)
    yield made
    made.tree.close()


def _digest(root: Path) -> list[tuple[str, int, int, bytes]]:
    found = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
        found.append((str(path), status.st_mode, status.st_mtime_ns, content))
    return found


OPERATIONS: dict[str, Callable[[Trap], object]] = {
    "getattr": lambda t: t.tree.getattr(t.f),
    "getattr of a directory": lambda t: t.tree.getattr(t.e),
    "lookup": lambda t: t.tree.lookup(t.e, b"f"),
    "open": lambda t: t.tree.open(t.f, os.O_RDONLY),
    "open truncating": lambda t: t.tree.open(t.f, os.O_WRONLY | os.O_TRUNC),
    "open for event": lambda t: t.tree.open_for_event(t.f, os.O_RDWR),
    "create": lambda t: t.tree.create(t.e, b"new", os.O_RDWR, 0o600, own_caller()),
    "mkdir": lambda t: t.tree.mkdir(t.e, b"new", 0o700, own_caller()),
    "mknod": lambda t: t.tree.mknod(t.e, b"new", 0o100600, 0, own_caller()),
    "symlink": lambda t: t.tree.symlink(t.e, b"new", b"x", own_caller()),
    "link from": lambda t: t.tree.link(t.f, t.tree.root, b"new"),
    "link to": lambda t: t.tree.link(t.l, t.e, b"new"),
    "unlink": lambda t: t.tree.unlink(t.e, b"f"),
    "rmdir": lambda t: t.tree.rmdir(t.e, b"sub"),
    "rename from": lambda t: t.tree.rename(t.e, b"f", t.tree.root, b"new"),
    "rename to": lambda t: t.tree.rename(t.tree.root, b"d", t.e, b"new"),
    "readlink": lambda t: t.tree.readlink(t.l),
    "chmod": lambda t: t.tree.setattr(t.f, AttributeChanges(mode=0o777)),
    "chmod of a directory": lambda t: t.tree.setattr(t.e, AttributeChanges(mode=0o777)),
    "truncate": lambda t: t.tree.setattr(t.f, AttributeChanges(size=0)),
    "times": lambda t: t.tree.setattr(t.f, AttributeChanges(mtime_ns=1)),
    "getxattr": lambda t: t.tree.getxattr(t.f, b"user.x"),
    "setxattr": lambda t: t.tree.setxattr(t.f, b"user.x", b"1"),
    "listxattr": lambda t: t.tree.listxattr(t.f),
    "removexattr": lambda t: t.tree.removexattr(t.f, b"user.x"),
    "opendir": lambda t: t.tree.opendir(t.e),
    "access": lambda t: t.tree.access(t.f, os.R_OK),
    "statfs": lambda t: t.tree.statfs(t.f),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("where", ["d", "d/e"])
@pytest.mark.parametrize("relative", [False, True])
def test_directory_replaced_by_a_link_outside(trap: Trap, operation: str, where: str, relative: bool) -> None:
    target = trap.outside / where
    if relative:
        target = Path(os.path.relpath(target, (trap.source / where).parent))
    trap.replace(where, target)
    before = _digest(trap.outside), _digest(trap.source)
    with pytest.raises(OSError) as raised:
        OPERATIONS[operation](trap)
    assert raised.value.errno == errno.ESTALE
    assert (_digest(trap.outside), _digest(trap.source)) == before


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("where", ["d", "d/e"])
def test_directory_replaced_by_another(trap: Trap, operation: str, where: str) -> None:
    """Another directory of the same name, even with the same files (hard links) in it, is not the one that was meant."""
    os.rename(trap.source / where, trap.source / "aside")
    (trap.source / where / ("e" if where == "d" else "")).mkdir(parents=True)
    kept = trap.source / ("aside/e" if where == "d" else "aside")
    for name in ("f", "l"):
        os.link(kept / name, trap.source / "d/e" / name, follow_symlinks=False)
    (trap.source / "d/e/sub").mkdir()
    before = _digest(trap.source)
    with pytest.raises(OSError) as raised:
        OPERATIONS[operation](trap)
    assert raised.value.errno == errno.ESTALE
    assert _digest(trap.source) == before


@pytest.mark.parametrize("where", ["d", "d/e"])
def test_link_that_stays_inside_is_not_followed_either(trap: Trap, where: str) -> None:
    trap.replace(where, trap.source / "aside")
    for operation in ("getattr", "open", "opendir", "create"):
        with pytest.raises(OSError) as raised:
            OPERATIONS[operation](trap)
        assert raised.value.errno == errno.ESTALE


ON_THE_FILE = [
    "getattr",
    "open",
    "open truncating",
    "open for event",
    "link from",
    "chmod",
    "truncate",
    "times",
    "getxattr",
    "setxattr",
    "listxattr",
    "access",
    "statfs",
]


@pytest.mark.parametrize("operation", ON_THE_FILE)
@pytest.mark.parametrize("bait", ["link", "file", "hard link", "directory", "fifo", "nothing"])
def test_file_replaced(trap: Trap, operation: str, bait: str) -> None:
    file = trap.source / "d/e/f"
    os.rename(file, trap.source / "aside")
    if bait == "link":
        os.symlink(trap.outside / "d/e/f", file)
    elif bait == "file":
        file.write_bytes(b"another")
    elif bait == "hard link":
        os.link(trap.outside / "d/e/f", file)
    elif bait == "directory":
        file.mkdir()
    elif bait == "fifo":
        os.mkfifo(file)
    before = _digest(trap.outside), _digest(trap.source)
    with pytest.raises(OSError) as raised:
        OPERATIONS[operation](trap)
    assert raised.value.errno == errno.ESTALE
    assert (_digest(trap.outside), _digest(trap.source)) == before
    if bait != "nothing":
        # Looked up anew it is what it is now, and nothing is followed.
        found, status = trap.tree.lookup(trap.e, b"f")
        assert found is not trap.f
        assert status == os.lstat(file)
    os.rename(trap.source / "aside", file) if bait == "nothing" else os.replace(
        trap.source / "aside", trap.source / "back"
    )
    if bait == "nothing":
        assert trap.tree.getattr(trap.f).st_size == 6


def test_source_itself_moved(trap: Trap) -> None:
    """The overlay holds on to the directory it was given, wherever that goes."""
    os.rename(trap.source, trap.source.with_name("moved"))
    os.symlink(trap.outside, trap.source)
    fd = trap.tree.open(trap.f, os.O_RDONLY)
    assert os.read(fd, 100) == b"inside"
    os.close(fd)


def test_directory_moved_outside(trap: Trap) -> None:
    os.rename(trap.source / "d", trap.outside / "stolen")
    for operation in ("getattr", "open", "opendir", "create", "lookup"):
        with pytest.raises(OSError) as raised:
            OPERATIONS[operation](trap)
        assert raised.value.errno == errno.ESTALE


@pytest.mark.parametrize("trust_seconds", [0.0, 1000.0])
def test_swapping_all_the_time(tmp_path: Path, trust_seconds: float) -> None:
    """Another process exchanges directory and link as fast as it can, while everything is looked up and read."""
    trap = Trap(tmp_path, trust_seconds=trust_seconds)
    os.symlink(trap.outside / "d", trap.source / "bait")
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(120)
            fd = os.open(trap.source, os.O_PATH)
            while True:
                syscalls.rename(fd, b"d", fd, b"bait", syscalls.RENAME_EXCHANGE)
        finally:
            os._exit(0)
    seen: dict[str, int] = {"inside": 0, "stale": 0}

    def look(node: Node) -> None:
        try:
            found, _ = (
                trap.tree.lookup(node, b"d") if node is trap.tree.root else trap.tree.lookup(node, b"f")
            )
            if found.is_dir:
                found, _ = trap.tree.lookup(trap.e, b"f")
            fd = trap.tree.open(found, os.O_RDONLY)
        except OSError as error:
            assert error.errno in (errno.ESTALE, errno.ELOOP, errno.ENOTDIR)
            seen["stale"] += 1
            return
        content = os.read(fd, 100)
        os.close(fd)
        assert content == b"inside"
        seen["inside"] += 1

    try:
        for _ in range(3000):
            look(trap.tree.root)
            look(trap.e)
            try:
                stream = trap.tree.opendir(trap.e)
                names = {entry.name for entry in stream.entries(0)}
                stream.close()
            except OSError as error:
                assert error.errno in (errno.ESTALE, errno.ENOTDIR)
            else:
                assert names == {b"f", b"l", b"sub"}
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        trap.tree.close()
    assert seen["inside"] > 100
    assert seen["stale"] > 100
    assert (trap.outside / "d/e/f").read_bytes() == SECRET
