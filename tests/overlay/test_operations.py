"""Every operation, done natively and through an Overlay: the same results, the same errors, the same trees."""

import errno
import fcntl
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusehsm.fanotify.abi import O_LARGEFILE
from fusehsm.linux import syscalls
from fusehsm.overlay import overlay
from fusehsm.overlay.overlay import RENAME_EXCHANGE, RENAME_NOREPLACE, AttributeChanges, Overlay
from tests.support.overlay_actions import (
    NOBODY,
    Face,
    NativeFace,
    Outcome,
    OverlayFace,
    as_user,
    open_descriptors,
    outcome,
    own_caller,
    snapshot,
)

PAST = 1_234_567_890_123_456_789  # nanoseconds, in 2009
BEFORE_1970 = -1_500_000_001
ODD_NAME = b"\xff\xfe not utf-8 \n"
LONGEST_NAME = b"n" * 255


@pytest.fixture
def no_umask() -> Iterator[None]:
    """As the kernel hands over modes with the accessor's umask applied, compare with natively applying none."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(params=["openat2", "walk"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With openat2(2), and as on kernels before 5.6."""
    if request.param == "walk":
        monkeypatch.setattr(syscalls, "have_openat2", lambda: False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def tree(source: Path) -> Iterator[Overlay]:
    before = open_descriptors()
    made = Overlay(str(source), trust_seconds=0)
    yield made
    made.close()
    assert open_descriptors() == before


Step = Callable[[Face], object]


def run(face: Face, steps: list[Step]) -> list[Outcome]:
    return [outcome(partial(step, face)) for step in steps]


SCENARIOS: dict[str, list[Step]] = {
    "directories": [
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.mkdir(b"d/e", 0o1777),
        lambda f: f.mkdir(b"d/x" + b"y" * 254, 0o700),
        lambda f: f.mkdir(b"d/" + LONGEST_NAME, 0o700),
        lambda f: f.mkdir(b"missing/e", 0o755),
        lambda f: f.rmdir(b"d"),
        lambda f: f.create(b"d/file", 0o644, b""),
        lambda f: f.rmdir(b"d/file"),
        lambda f: f.unlink(b"d/e"),
        lambda f: f.rmdir(b"d/e"),
        lambda f: f.rmdir(b"d/e"),
        lambda f: f.list(b"d"),
        lambda f: f.list(b"d/file"),
        lambda f: f.kind(b"d"),
        lambda f: f.kind(b""),
    ],
    "names": [
        lambda f: f.create(ODD_NAME, 0o640, b"1"),
        lambda f: f.create(LONGEST_NAME, 0o604, b"22"),
        lambda f: f.create(LONGEST_NAME + b"n", 0o600, b"3"),
        lambda f: f.kind(LONGEST_NAME + b"n"),
        lambda f: f.symlink(ODD_NAME + b".link", ODD_NAME),
        lambda f: f.readlink(ODD_NAME + b".link"),
        lambda f: f.list(b""),
        lambda f: f.rename(ODD_NAME, b"plain", 0),
        lambda f: f.rename(b"plain", LONGEST_NAME + b"n", 0),
        lambda f: f.kind(b"plain"),
    ],
    "links": [
        lambda f: f.create(b"a", 0o644, b"content"),
        lambda f: f.link(b"a", b"b"),
        lambda f: f.link(b"a", b"b"),
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.link(b"d", b"d2"),
        lambda f: f.link(b"b", b"d/c"),
        lambda f: f.symlink(b"s", b"nowhere"),
        lambda f: f.link(b"s", b"s2"),
        lambda f: f.readlink(b"s2"),
        lambda f: f.readlink(b"a"),
        lambda f: f.kind(b"a"),
        lambda f: f.rename(b"a", b"b", 0),
        lambda f: f.kind(b"a"),
        lambda f: f.unlink(b"a"),
        lambda f: f.kind(b"d/c"),
        lambda f: f.unlink(b"a"),
        lambda f: f.symlink(b"s", b"again"),
        lambda f: f.symlink(b"empty", b""),
        lambda f: f.symlink(b"long", b"x" * 4095),
        lambda f: f.readlink(b"long"),
        lambda f: f.symlink(b"longer", b"x" * 4096),
    ],
    "rename": [
        lambda f: f.create(b"a", 0o644, b"a"),
        lambda f: f.create(b"b", 0o600, b"b"),
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.mkdir(b"d/sub", 0o755),
        lambda f: f.create(b"d/sub/deep", 0o644, b"deep"),
        lambda f: f.rename(b"a", b"b", RENAME_NOREPLACE),
        lambda f: f.rename(b"a", b"b", RENAME_EXCHANGE),
        lambda f: f.rename(b"a", b"missing", RENAME_EXCHANGE),
        lambda f: f.rename(b"a", b"d", RENAME_EXCHANGE),
        lambda f: f.kind(b"a/sub/deep"),
        lambda f: f.rename(b"a", b"d", RENAME_EXCHANGE),
        lambda f: f.rename(b"a", b"b", RENAME_EXCHANGE | RENAME_NOREPLACE),
        lambda f: f.rename(b"d", b"d/sub/inside", 0),
        lambda f: f.rename(b"d/sub", b"a", 0),
        lambda f: f.rename(b"a", b"d", 0),
        lambda f: f.mkdir(b"empty", 0o755),
        lambda f: f.rename(b"empty", b"d", 0),
        lambda f: f.rename(b"d/sub", b"empty", 0),
        lambda f: f.kind(b"empty/deep"),
        lambda f: f.rename(b"a", b"c", RENAME_NOREPLACE),
        lambda f: f.rename(b"c", b"c", 0),
        lambda f: f.rename(b"missing", b"c", 0),
        lambda f: f.rename(b"b", b"empty/b", 0),
        lambda f: f.list(b""),
    ],
    "special files": [
        lambda f: f.mknod(b"fifo", stat.S_IFIFO | 0o640, 0),
        lambda f: f.mknod(b"socket", stat.S_IFSOCK | 0o600, 0),
        lambda f: f.mknod(b"regular", stat.S_IFREG | 0o4751, 0),
        lambda f: f.mknod(b"fifo", stat.S_IFIFO | 0o640, 0),
        lambda f: f.chmod(b"fifo", 0o666),
        lambda f: f.set_times(b"fifo", PAST, PAST),
        lambda f: f.truncate(b"fifo", 0),
        lambda f: f.link(b"socket", b"socket2"),
        lambda f: f.rename(b"fifo", b"pipe", 0),
        lambda f: f.kind(b"pipe"),
    ],
    "attributes": [
        lambda f: f.create(b"a", 0o644, b"0123456789"),
        lambda f: f.chmod(b"a", 0o4751),
        lambda f: f.chmod(b"a", 0o2755),
        lambda f: f.chmod(b"a", 0o0),
        lambda f: f.set_times(b"a", PAST, PAST + 1),
        lambda f: f.set_times(b"a", None, BEFORE_1970),
        lambda f: f.set_times(b"a", PAST, None),
        lambda f: f.truncate(b"a", 3),
        lambda f: f.set_times(b"a", PAST, PAST),
        lambda f: f.truncate(b"a", 5),
        lambda f: f.set_times(b"a", PAST, PAST),
        lambda f: f.truncate(b"a", -1),
        lambda f: f.truncate(b"a", 1 << 60),
        lambda f: f.kind(b"a"),
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.truncate(b"d", 0),
        lambda f: f.chmod(b"d", 0o2711),
        lambda f: f.set_times(b"d", PAST, PAST),
        lambda f: f.symlink(b"s", b"a"),
        lambda f: f.chmod(b"s", 0o600),
        lambda f: f.set_times(b"s", PAST, PAST),
        lambda f: f.chmod(b"", 0o755),
        lambda f: f.set_times(b"", PAST, PAST),
        lambda f: f.write(b"a", 2, b"xyz"),
        lambda f: f.open_truncating(b"d"),
        lambda f: f.open_truncating(b"s"),
        lambda f: f.chmod(b"a", 0o600),
    ],
    "xattrs": [
        lambda f: f.create(b"a", 0o644, b""),
        lambda f: f.get_xattr(b"a", b"user.x"),
        lambda f: f.set_xattr(b"a", b"user.x", b"\0\xff", 0),
        lambda f: f.set_xattr(b"a", b"user.x", b"2", os.XATTR_CREATE),
        lambda f: f.set_xattr(b"a", b"user.y", b"2", os.XATTR_REPLACE),
        lambda f: f.set_xattr(b"a", b"user.y", b"", 0),
        lambda f: f.get_xattr(b"a", b"user.x"),
        lambda f: f.get_xattr(b"a", b"user.y"),
        lambda f: f.list_xattr(b"a"),
        lambda f: f.remove_xattr(b"a", b"user.y"),
        lambda f: f.remove_xattr(b"a", b"user.y"),
        lambda f: f.set_xattr(b"a", b"nonsense", b"", 0),
        lambda f: f.set_xattr(b"a", b"user." + b"n" * 251, b"", 0),
        lambda f: f.set_xattr(b"a", b"user.big", b"b" * 70000, 0),
        lambda f: f.symlink(b"s", b"a"),
        lambda f: f.set_xattr(b"s", b"user.x", b"1", 0),
        lambda f: f.list_xattr(b"s"),
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.set_xattr(b"d", b"user.d", b"1", 0),
        lambda f: f.list_xattr(b"d"),
        lambda f: f.list_xattr(b""),
    ],
}

ROOT_SCENARIOS: dict[str, list[Step]] = {
    "owners": [
        lambda f: f.create(b"a", 0o6755, b"x"),
        lambda f: f.chown(b"a", 12, 34),
        lambda f: f.chmod(b"a", 0o6755),
        lambda f: f.chown(b"a", -1, 56),
        lambda f: f.chmod(b"a", 0o6745),
        lambda f: f.chown(b"a", 78, -1),
        lambda f: f.mkdir(b"d", 0o755),
        lambda f: f.chmod(b"d", 0o6777),
        lambda f: f.chown(b"d", 12, 34),
        lambda f: f.create(b"d/inherits", 0o644, b""),
        lambda f: f.mkdir(b"d/too", 0o755),
        lambda f: f.symlink(b"d/link", b"x"),
        lambda f: f.chown(b"d/link", 5, 6),
        lambda f: f.set_xattr(b"a", b"trusted.t", b"1", 0),
        lambda f: f.set_xattr(b"d/link", b"trusted.t", b"1", 0),
        lambda f: f.list_xattr(b"d/link"),
        lambda f: f.set_xattr(
            b"a", b"security.capability", bytes.fromhex("0000000201000000000000000000000000000000"), 0
        ),
        lambda f: f.write(b"a", 0, b"y"),
        lambda f: f.list_xattr(b"a"),
    ],
    "devices": [
        lambda f: f.mknod(b"null", stat.S_IFCHR | 0o666, os.makedev(1, 3)),
        lambda f: f.mknod(b"disk", stat.S_IFBLK | 0o600, os.makedev(259, 70000)),
        lambda f: f.chown(b"null", 1, 2),
        lambda f: f.truncate(b"null", 5),
    ],
}


def compare(native: Path, source: Path, face: OverlayFace, steps: list[Step]) -> None:
    assert run(face, steps) == run(NativeFace(native), steps)
    assert snapshot(source) == snapshot(native)


@pytest.mark.usefixtures("no_umask", "any_kernel")
@pytest.mark.parametrize("keep", [False, True], ids=["forgotten", "known"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_same_as_native(tmp_path: Path, source: Path, tree: Overlay, scenario: str, keep: bool) -> None:
    native = tmp_path / "native"
    native.mkdir()
    compare(native, source, OverlayFace(tree, keep=keep), SCENARIOS[scenario])
    assert keep or tree.node_count == 1


@pytest.mark.root
@pytest.mark.usefixtures("no_umask")
@pytest.mark.parametrize("scenario", ROOT_SCENARIOS)
def test_same_as_native_for_root(tmp_path: Path, source: Path, tree: Overlay, scenario: str) -> None:
    native = tmp_path / "native"
    native.mkdir()
    compare(native, source, OverlayFace(tree), ROOT_SCENARIOS[scenario])


@pytest.mark.root
@pytest.mark.parametrize("scenario", SCENARIOS | ROOT_SCENARIOS)
def test_ordinary_server_same_as_native(session_directory: Path, scenario: str) -> None:
    """A server without privileges, on files of its own."""
    base = Path(tempfile.mkdtemp(dir=session_directory))
    base.chmod(0o755)
    native, source = base / "native", base / "source"
    for directory in (native, source):
        directory.mkdir()
        os.chown(directory, NOBODY, NOBODY)

    def everything() -> None:
        tree = Overlay(str(source), trust_seconds=0)
        compare(native, source, OverlayFace(tree), (SCENARIOS | ROOT_SCENARIOS)[scenario])
        tree.close()

    as_user(everything)


PATHS = st.sampled_from([b"a", b"b", b"d", b"e", b"d/a", b"d/b", b"d/e", b"e/a", b"d/e/a", b"e/d/a"])
STEPS = st.one_of(
    st.tuples(st.just("mkdir"), PATHS, st.sampled_from([0o755, 0o700, 0o2775])),
    st.tuples(st.just("create"), PATHS, st.sampled_from([0o644, 0o4755]), st.binary(max_size=3)),
    st.tuples(st.just("symlink"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("unlink"), PATHS),
    st.tuples(st.just("rmdir"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS, st.sampled_from([0, 0, RENAME_NOREPLACE, RENAME_EXCHANGE])),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from([0o600, 0o6777])),
    st.tuples(st.just("truncate"), PATHS, st.integers(0, 9)),
    st.tuples(st.just("write"), PATHS, st.integers(0, 9), st.binary(min_size=1, max_size=3)),
    st.tuples(st.just("open_truncating"), PATHS),
    st.tuples(st.just("set_times"), PATHS, st.none(), st.sampled_from([PAST, BEFORE_1970])),
    st.tuples(st.just("list"), PATHS),
    st.tuples(st.just("kind"), PATHS),
    st.tuples(st.just("readlink"), PATHS),
)


@pytest.mark.usefixtures("no_umask")
@pytest.mark.parametrize("keep", [False, True], ids=["forgotten", "known"])
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(STEPS, min_size=10, max_size=60))
def test_any_sequence_same_as_native(
    tmp_path_factory: pytest.TempPathFactory, keep: bool, steps: list[tuple[object, ...]]
) -> None:
    base = tmp_path_factory.mktemp("sequence")
    native, source = base / "native", base / "source"
    native.mkdir()
    source.mkdir()
    tree = Overlay(str(source))
    faces: tuple[Face, Face] = (OverlayFace(tree, keep=keep), NativeFace(native))
    for name, *arguments in steps:
        ours, theirs = (outcome(partial(getattr(face, str(name)), *arguments)) for face in faces)
        assert ours == theirs, (name, arguments)
    assert snapshot(source) == snapshot(native)
    if keep:
        # Every node that still has a name must be found where the overlay believes it to be.
        for node in tree.known_nodes():
            if node.linked:
                assert node.matches(os.lstat(os.path.join(os.fsencode(source), tree.relative_path(node))))
            assert tree.getattr(node).st_ino == node.inode
    else:
        assert tree.node_count == 1
    tree.close()


@pytest.mark.usefixtures("any_kernel")
@pytest.mark.parametrize("trust_seconds", [0.0, 1000.0])
def test_paths_deeper_than_path_max(source: Path, trust_seconds: float) -> None:
    tree = Overlay(str(source), trust_seconds=trust_seconds, directories=8)
    node = tree.root
    for depth in range(60):
        node, _ = tree.mkdir(node, b"%03d" % depth + b"\xe9" * 200, 0o755, own_caller())
    assert len(tree.relative_path(node)) > 2 * 4096
    file, _, fd = tree.create(node, b"bottom", os.O_RDWR, 0o600, own_caller())
    os.write(fd, b"deep")
    os.close(fd)
    # As after a long time: the directories are not kept open any more.
    other = Overlay(str(source), trust_seconds=trust_seconds, directories=8)
    same = other.root
    for depth in range(60):
        same, _ = other.lookup(same, b"%03d" % depth + b"\xe9" * 200)
    found, status = other.lookup(same, b"bottom")
    assert (found.id, status.st_size) == (file.id, 4)
    other.lookup(other.root, b"000" + b"\xe9" * 200)
    fd = other.open(found, os.O_RDONLY)
    assert os.read(fd, 10) == b"deep"
    os.close(fd)
    stream = other.opendir(same)
    assert [entry.name for entry in stream.entries(0)] == [b"bottom"]
    stream.close()
    other.setattr(found, AttributeChanges(mode=0o640))
    assert tree.getattr(file).st_mode == stat.S_IFREG | 0o640
    other.unlink(same, b"bottom")
    while same.parent is not None:
        other.rmdir(same.parent, same.name)
        same = same.parent
    assert os.listdir(source) == []
    tree.close()
    other.close()


def test_sparse_and_beyond_4_gib(source: Path, tree: Overlay) -> None:
    node, _, fd = tree.create(tree.root, b"sparse", os.O_RDWR, 0o600, own_caller())
    far = (1 << 32) * 3 + 17
    assert os.pwrite(fd, b"end", far) == 3
    status = tree.getattr(node)
    assert status == tree.getattr(node, fd)
    assert status.st_size == far + 3
    native = os.stat(source / "sparse")
    assert status.st_blocks == native.st_blocks
    assert 0 < status.st_blocks * 512 < 1 << 20
    assert os.pread(fd, 5, far - 2) == b"\0\0end"
    os.close(fd)
    _, status = tree.setattr(node, AttributeChanges(size=1 << 42))
    assert status.st_size == 1 << 42
    _, status = tree.setattr(node, AttributeChanges(size=0))
    assert (status.st_size, status.st_blocks) == (0, 0)


class TestOpen:
    """What of the accessor's flags reaches the backing."""

    @pytest.fixture
    def file(self, tree: Overlay) -> overlay.Node:
        node, _, fd = tree.create(tree.root, b"file", os.O_WRONLY, 0o600, own_caller())
        os.write(fd, b"content")
        os.close(fd)
        return node

    @pytest.mark.parametrize(
        ("asked", "given"),
        [
            (os.O_RDONLY, os.O_RDONLY),
            (os.O_WRONLY, os.O_WRONLY),
            (os.O_RDWR | os.O_APPEND, os.O_RDWR),
            (os.O_RDONLY | 0x20, os.O_RDONLY),
            (os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_NOCTTY, os.O_RDWR),
            (os.O_RDWR | os.O_DIRECT | os.O_NONBLOCK | os.O_ASYNC, os.O_RDWR),
            (os.O_RDWR | os.O_SYNC, os.O_RDWR | os.O_SYNC),
            (os.O_RDWR | os.O_DSYNC, os.O_RDWR | os.O_DSYNC),
            (os.O_RDONLY | os.O_NOATIME, os.O_RDONLY | os.O_NOATIME),
        ],
    )
    def test_flags(self, tree: Overlay, file: overlay.Node, asked: int, given: int) -> None:
        fd = tree.open(file, asked)
        # O_NONBLOCK: the server does not wait for the end of a lease.
        assert fcntl.fcntl(fd, fcntl.F_GETFL) & ~O_LARGEFILE == given | os.O_NONBLOCK
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        assert os.fstat(fd).st_size == 7
        os.close(fd)

    def test_appending_accessor_writes_at_the_kernels_offset(self, tree: Overlay, file: overlay.Node) -> None:
        fd = tree.open(file, os.O_RDWR | os.O_APPEND)
        os.pwrite(fd, b"X", 0)
        assert os.pread(fd, 20, 0) == b"Xontent"
        os.close(fd)

    def test_truncates(self, tree: Overlay, file: overlay.Node) -> None:
        os.close(tree.open(file, os.O_RDONLY | os.O_TRUNC))
        assert tree.getattr(file).st_size == 0

    def test_other_kinds_are_refused_at_once(self, source: Path, tree: Overlay) -> None:
        os.mkfifo(source / "fifo")
        os.symlink("file", source / "link")
        (source / "directory").mkdir()
        for name, code in ((b"fifo", errno.ENXIO), (b"link", errno.ELOOP), (b"directory", errno.EISDIR)):
            node, _ = tree.lookup(tree.root, name)
            with pytest.raises(OSError) as raised:
                tree.open(node, os.O_RDONLY)
            assert raised.value.errno == code

    @pytest.mark.parametrize(
        "flags", [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_NONBLOCK | os.O_DSYNC]
    )
    def test_for_events(self, tree: Overlay, file: overlay.Node, flags: int) -> None:
        fd = tree.open_for_event(file, flags | os.O_CLOEXEC)
        assert fcntl.fcntl(fd, fcntl.F_GETFL) == flags | O_LARGEFILE
        assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
        os.close(fd)

    def test_for_events_of_directories(self, source: Path, tree: Overlay) -> None:
        (source / "directory").mkdir()
        node, _ = tree.lookup(tree.root, b"directory")
        for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
            fd = tree.open_for_event(node, mode)  # for reading: open(2) opens no directory for writing
            assert os.listdir(fd) == []
            os.close(fd)

    def test_create_of_a_name_that_appeared(self, source: Path, tree: Overlay) -> None:
        """The accessor's rights to the file that is there now were not checked: the kernel must look again."""
        (source / "new").write_bytes(b"mine")
        os.symlink("/etc/passwd", source / "link")
        for name in (b"new", b"link"):
            for flags, code in ((0, errno.ESTALE), (os.O_EXCL, errno.EEXIST)):
                with pytest.raises(OSError) as raised:
                    tree.create(tree.root, name, os.O_RDWR | os.O_TRUNC | flags, 0o600, own_caller())
                assert raised.value.errno == code
        assert (source / "new").read_bytes() == b"mine"


def test_truncation_through_an_open_file_that_is_read_only(tree: Overlay) -> None:
    node, _, fd = tree.create(tree.root, b"file", os.O_RDWR, 0o600, own_caller())
    os.write(fd, b"content")
    reading = tree.open(node, os.O_RDONLY)
    assert tree.setattr(node, AttributeChanges(size=3), reading)[1].st_size == 3
    assert tree.setattr(node, AttributeChanges(size=5, mtime_ns=PAST), fd)[1].st_mtime_ns == PAST
    os.close(reading)
    os.close(fd)


def test_times_of_now(tree: Overlay) -> None:
    node, _, fd = tree.create(tree.root, b"file", os.O_RDWR, 0o600, own_caller())
    tree.setattr(node, AttributeChanges(atime_ns=PAST, mtime_ns=PAST))
    before = os.fstat(fd).st_ctime_ns
    _, status = tree.setattr(node, AttributeChanges(mtime_ns=overlay.TIME_NOW))
    assert status.st_atime_ns == PAST
    assert status.st_mtime_ns >= before
    os.close(fd)


def test_statfs_and_access(source: Path, tree: Overlay) -> None:
    node, _, fd = tree.create(tree.root, b"file", os.O_RDWR, 0o500, own_caller())
    os.close(fd)
    native = os.statvfs(source)
    for answer in (tree.statfs(), tree.statfs(node)):
        assert (answer.f_bsize, answer.f_blocks, answer.f_namemax) == (
            native.f_bsize,
            native.f_blocks,
            native.f_namemax,
        )
    assert tree.access(node, os.X_OK)
    assert tree.access(tree.root, os.R_OK)


def test_dot_names(tree: Overlay) -> None:
    directory, _ = tree.mkdir(tree.root, b"d", 0o755, own_caller())
    for parent, name, expected in (
        (directory, b".", directory),
        (directory, b"..", tree.root),
        (tree.root, b"..", tree.root),
    ):
        count = expected.lookups
        assert tree.lookup(parent, name)[0] is expected
        assert expected.lookups == count + 1


@pytest.mark.parametrize("name", [b"", b"a/b", b"/etc/passwd", b"../outside"])
def test_no_path_where_a_name_belongs(tree: Overlay, name: bytes) -> None:
    with pytest.raises(OSError) as raised:
        tree.lookup(tree.root, name)
    assert raised.value.errno == errno.EINVAL
    with pytest.raises(OSError) as raised:
        tree.unlink(tree.root, name)
    assert raised.value.errno == errno.EINVAL


def test_fsync(tree: Overlay) -> None:
    _, _, fd = tree.create(tree.root, b"file", os.O_RDWR, 0o600, own_caller())
    tree.fsync(fd)
    tree.fsync(fd, data_only=True)
    os.close(fd)
    with pytest.raises(OSError) as raised:
        tree.fsync(fd)
    assert raised.value.errno == errno.EBADF
    stream = tree.opendir(tree.root)
    stream.synchronise(False)
    stream.synchronise(True)
    stream.close()
