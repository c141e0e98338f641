"""Which inode a node is: numbers, devices, reuse, hard links, files without a name."""

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusehsm.linux import syscalls
from fusehsm.overlay import nodes
from fusehsm.overlay.overlay import RENAME_EXCHANGE, ROOT_ID, AttributeChanges, Node, Overlay
from tests.support.overlay_actions import ROOT_CALLER, mounted, open_descriptors, own_caller
from tests.support.requirements import require_root


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


@pytest.fixture
def mounts() -> Iterator[Callable[[Path], Path]]:
    """Mounts a tmpfs on a directory; all go with the test."""
    require_root()
    with ExitStack() as stack:
        yield lambda at: stack.enter_context(mounted("-t", "tmpfs", "-o", "size=8m", "tmpfs", at=at))


def make(tree: Overlay, parent: Node, name: bytes, content: bytes = b"") -> Node:
    node, _, fd = tree.create(parent, name, os.O_RDWR, 0o644, own_caller())
    os.write(fd, content)
    os.close(fd)
    return node


def read(tree: Overlay, node: Node) -> bytes:
    fd = tree.open(node, os.O_RDONLY)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def list_directory(tree: Overlay, node: Node) -> list[bytes]:
    stream = tree.opendir(node)
    try:
        return [entry.name for entry in stream.entries(0)]
    finally:
        stream.close()


def assert_stale(operation: Callable[[], object]) -> None:
    with pytest.raises(OSError) as raised:
        operation()
    assert raised.value.errno == errno.ESTALE


# Numbers


def test_the_roots_device_shows_its_own_numbers(source: Path, tree: Overlay) -> None:
    assert tree.root.id == ROOT_ID
    assert tree.node(ROOT_ID) is tree.root
    assert tree.getattr(tree.root) == os.stat(source)
    (source / "d").mkdir()
    (source / "d/f").write_bytes(b"")
    directory, status = tree.lookup(tree.root, b"d")
    file, file_status = tree.lookup(directory, b"f")
    assert (directory.id, file.id) == (status.st_ino, file_status.st_ino)
    assert (status, file_status) == (os.stat(source / "d"), os.stat(source / "d/f"))
    assert (directory.is_dir, directory.is_regular, file.is_dir, file.is_regular) == (
        True,
        False,
        False,
        True,
    )
    assert tree.lookup(directory, b"f")[0] is file
    assert file.lookups == 2
    assert {node.id for node in tree.known_nodes()} == {ROOT_ID, directory.id, file.id}
    assert file.parents() == (directory.id,)
    assert tree.relative_path(file) == b"d/f"
    assert tree.relative_path(tree.root) == b""


def test_forgetting(source: Path, tree: Overlay) -> None:
    (source / "d").mkdir()
    (source / "d/f").write_bytes(b"")
    directory, _ = tree.lookup(tree.root, b"d")
    file, _ = tree.lookup(directory, b"f")
    tree.remember(file)
    # The child needs its parent's name for as long as it is known.
    assert not tree.forget(directory, 1)
    assert tree.node(directory.id) is directory
    assert not tree.forget(file, 1)
    assert tree.forget(file, 1)
    assert tree.node_count == 1
    assert_stale(lambda: tree.node(file.id))
    assert_stale(lambda: tree.node(directory.id))
    assert not tree.forget(tree.root, 5)
    assert tree.lookup(tree.root, b"d")[0].id == directory.id


def test_several_devices_with_the_same_numbers(tmp_path: Path, mounts: Callable[[Path], Path]) -> None:
    """A tmpfs numbers its inodes from 1: three of them clash in every number."""
    source = mounts(tmp_path / "source")
    (source / "first").write_bytes(b"outermost")
    for name in ("one", "two"):
        (source / name).mkdir()
        mounts(source / name)
        for file in ("a", "b", "c"):
            (source / name / file).write_text(f"{name} {file}")
        (source / name / "d").mkdir()
    tree = Overlay(str(source))
    known: dict[int, tuple[Path, Node]] = {ROOT_ID: (source, tree.root)}

    def walk(path: Path, node: Node) -> None:
        for name in list_directory(tree, node):
            child, status = tree.lookup(node, name)
            child_path = path / os.fsdecode(name)
            assert status == os.lstat(child_path)
            assert child.id not in known
            known[child.id] = (child_path, child)
            if child.is_dir:
                walk(child_path, child)

    walk(source, tree.root)
    inodes = [os.lstat(path).st_ino for path, _ in known.values()]
    assert len(inodes) == 12
    assert len(set(inodes)) < 12
    for path, node in known.values():
        assert tree.getattr(node) == os.lstat(path)
        if node.is_regular:
            assert read(tree, node) == path.read_bytes()
    assert tree.statfs(known[next(i for i, (p, _) in known.items() if p.name == "a")][1]).f_blocks == 2048
    with pytest.raises(OSError) as raised:
        tree.rename(tree.root, b"first", next(n for p, n in known.values() if p == source / "one"), b"there")
    assert raised.value.errno == errno.EXDEV
    # The same numbers when they are looked up again, in another order.
    before = {path: node_id for node_id, (path, _) in known.items()}
    for node_id, (_, node) in list(known.items()):
        if node_id != ROOT_ID:
            tree.forget(node, 1)
    assert tree.node_count == 1
    for mount in ("two", "one"):
        directory, _ = tree.lookup(tree.root, os.fsencode(mount))
        assert directory.id == before[source / mount]
        found, _ = tree.lookup(directory, b"b")
        assert found.id == before[source / mount / "b"]
    tree.close()


def test_numbers_that_cannot_be_shown_as_they_are(source: Path) -> None:
    """Inode numbers 0 and 1, the root's own on another device, and numbers of 48 bits and more."""
    status = os.stat(source)

    def number(device: int, inode: int) -> os.stat_result:
        fields = (stat.S_IFREG | 0o600, inode, device, *status[3:])
        return os.stat_result(fields, {"st_ctime_ns": status.st_ctime_ns})

    removed: list[Node] = []
    table = nodes.NodeTable(status, removed.append)
    other = status.st_dev + 1
    fd = os.open(source, os.O_RDONLY)
    (source / "any").write_bytes(b"")
    cases = [(status.st_dev, inode) for inode in (0, 1, 2, 1 << 48, (1 << 62) - 1, 1 << 62, (1 << 64) - 1)]
    cases += [(other, inode) for inode in (0, 1, 2, status.st_ino, (1 << 48) - 1, 1 << 48, (1 << 64) - 1)]
    # A table only needs some name that exists to tell generations apart.
    made = {case: table.enter(number(*case), table.root, b"any", fd) for case in cases}
    ids = [node.id for node in made.values()]
    assert len(set(ids)) == len(ids)
    assert ROOT_ID not in ids
    assert all(0 < node_id < 1 << 63 for node_id in ids)
    assert made[status.st_dev, 2].id == 2
    for case, node in made.items():
        assert table.known(number(*case), fd, b"any") is node
        assert table.get(node.id) is node
        assert table.enter(number(*case), table.root, b"any", fd) is node
    for node in made.values():
        table.forget(node, 1)
    assert len(table) == 1
    assert set(removed) == set(made.values())
    os.close(fd)


# Reused numbers


def test_what_was_kept_for_a_reused_number_is_given_up(source: Path) -> None:
    removed: list[Node] = []
    table = nodes.NodeTable(os.stat(source), removed.append)
    fd = os.open(source, os.O_RDONLY)
    (source / "d").mkdir()
    (source / "d/f").write_bytes(b"")
    status, child_status = os.stat(source / "d"), os.stat(source / "d/f")
    old = table.enter(status, table.root, b"d", fd)
    child_fd = os.open(source / "d", os.O_RDONLY)
    child = table.enter(child_status, old, b"f", child_fd)
    child.lookups = 1
    # As if the filesystem had given the number to another directory.
    old.device.generation_of = lambda dir_fd, name: 12345
    new = table.enter(status, table.root, b"d", fd)
    assert new is not old
    assert (removed, old.linked, old.parents()) == ([old], False, (ROOT_ID,))
    assert table.known(status, fd, b"d") is new
    assert table.root.children == 1
    table.forget(child, 1)
    table.forget(new, 1)
    assert len(table) == 1
    assert table.root.children == 0
    os.close(child_fd)
    os.close(fd)


def _reuse(directory: Path, name: str) -> int:
    """Remove a file and make another of the same name and number (ext4 hands the number out again)."""
    number = (directory / name).stat().st_ino
    (directory / name).unlink()
    for attempt in range(1000):
        candidate = directory / f"candidate-{attempt}"
        candidate.write_bytes(b"new")
        if candidate.stat().st_ino == number:
            candidate.rename(directory / name)
            for other in directory.glob("candidate-*"):
                other.unlink()
            return number
    raise AssertionError("the number was not used again")


@pytest.mark.root
@pytest.mark.parametrize("again", ["lookup", "readdir", "create"])
def test_reused_number(places: Callable[[str], Path], again: str) -> None:
    source = places("reuse")
    tree = Overlay(str(source))
    gone: list[Node] = []
    tree.on_removed(gone.append)
    old = make(tree, tree.root, b"file", b"old")
    tree.remember(old)
    if again == "create":
        (source / "file").unlink()
        for attempt in range(1000):
            new = make(tree, tree.root, b"candidate-%d" % attempt, b"new")
            if new.inode == old.inode:
                break
    else:
        _reuse(source, "file")
        if again == "lookup":
            new, _ = tree.lookup(tree.root, b"file")
        else:
            stream = tree.opendir(tree.root)
            for entry in stream.entries(0):
                new = entry.node
                tree.remember(new)
            stream.close()
    assert new is not old
    assert (new.id, new.inode) == (old.id, old.inode)
    assert new.generation != old.generation
    assert gone == [old]
    assert tree.node(new.id) is new
    assert_stale(lambda: tree.open(old, os.O_RDONLY))
    assert_stale(lambda: tree.getattr(old))
    assert read(tree, new) == b"new"
    # Both incarnations' lookups are forgotten under the one id.
    assert new.lookups == 3
    assert not tree.forget(new, 2)
    assert tree.forget(new, 1)
    tree.close()


# What may be done to a file by a node whose name has led to it once.
BY_NODE: dict[str, Callable[[Overlay, Node], object]] = {
    "open": lambda t, n: t.open(n, os.O_RDONLY),
    "truncating open": lambda t, n: t.open(n, os.O_WRONLY | os.O_TRUNC),
    "event": lambda t, n: t.open_for_event(n, os.O_RDWR),
    "lease": lambda t, n: t.open_alone(n),
    "status": lambda t, n: t.getattr(n),
    "mode": lambda t, n: t.setattr(n, AttributeChanges(mode=0o4777)),
    "size": lambda t, n: t.setattr(n, AttributeChanges(size=0)),
    "attribute": lambda t, n: t.setxattr(n, b"user.x", b"1"),
    "link": lambda t, n: t.link(n, t.root, b"linked"),
    "birth time": lambda t, n: t.birth_time(n),
}


@pytest.mark.root
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("way", BY_NODE)
def test_a_file_with_a_reused_number_is_not_the_remembered_one(
    places: Callable[[str], Path], way: str, settled: bool
) -> None:
    """Nobody has looked the name up again, so only the backing knows that the number belongs to another file."""
    source = places("reused")
    (source / "file").write_bytes(b"old")
    if settled:
        time.sleep(0.2)  # longer than the clock of files may be late
    tree = Overlay(str(source))
    node, _ = tree.lookup(tree.root, b"file")
    assert (node.settled >= 0) is settled
    BY_NODE["status"](tree, node)
    number = _reuse(source, "file")
    before = os.stat(source / "file")
    assert_stale(lambda: BY_NODE[way](tree, node))
    assert os.stat(source / "file") == before
    assert os.listdir(source) == ["file"]
    assert tree.node_of_backing(os.major(before.st_dev), os.minor(before.st_dev), number) is None
    tree.close()


@pytest.mark.root
def test_a_removed_file_with_a_reused_number_is_not_shown_for_the_remembered_one(
    places: Callable[[str], Path],
) -> None:
    source = places("reused")
    tree = Overlay(str(source))
    node = make(tree, tree.root, b"file", b"old")
    _reuse(source, "file")
    tree.unlink(tree.root, b"file")
    assert_stale(lambda: tree.open(node, os.O_RDONLY))
    tree.close()


@pytest.mark.root
def test_a_moved_file_with_a_reused_number_is_not_the_remembered_one(places: Callable[[str], Path]) -> None:
    source = places("reused")
    tree = Overlay(str(source))
    node = make(tree, tree.root, b"file", b"old")
    _reuse(source, "file")
    tree.rename(tree.root, b"file", tree.root, b"moved")
    assert tree.relative_path(node) == b"file"
    assert tree.lookup(tree.root, b"moved")[0] is not node
    tree.close()


@pytest.mark.root
def test_a_directory_with_a_reused_number_is_not_the_remembered_one(places: Callable[[str], Path]) -> None:
    source = places("reused")
    (source / "d").mkdir()
    (source / "d/f").write_bytes(b"old")
    tree = Overlay(str(source), trust_seconds=0, directories=4)
    directory, _ = tree.lookup(tree.root, b"d")
    number = directory.inode
    shutil.rmtree(source / "d")
    for attempt in range(1000):
        made = source / f"candidate-{attempt}"
        made.mkdir()
        if made.stat().st_ino == number:
            made.rename(source / "d")
            break
    assert os.stat(source / "d").st_ino == number
    (source / "d/f").write_bytes(b"new")
    assert_stale(lambda: tree.lookup(directory, b"f"))
    assert_stale(lambda: tree.mkdir(directory, b"new", 0o755, own_caller()))
    tree.close()


def test_a_settled_file_is_compared_by_its_status_alone(source: Path) -> None:
    """So warm opens cost what they did."""
    (source / "file").write_bytes(b"")
    os.utime(source / "file")
    time.sleep(0.2)
    tree = Overlay(str(source))
    node, _ = tree.lookup(tree.root, b"file")
    asked = []
    generation_of = node.device.generation_of
    assert generation_of is not None

    def noted(dir_fd: int, name: bytes) -> int:
        asked.append(name)
        return generation_of(dir_fd, name)

    node.device.generation_of = noted
    tree.getattr(node)
    os.close(tree.open(node, os.O_RDONLY))
    tree.lookup(tree.root, b"file")
    assert asked == []
    os.chmod(source / "file", 0o600)
    tree.getattr(node)
    assert asked == [b"file"]
    tree.close()


def test_same_file_keeps_its_generation(source: Path, tree: Overlay) -> None:
    node = make(tree, tree.root, b"file")
    generation = node.generation
    tree.setattr(node, AttributeChanges(mode=0o600, size=10, mtime_ns=0))
    os.rename(source / "file", source / "moved")
    os.link(source / "moved", source / "linked")
    assert tree.lookup(tree.root, b"moved")[0] is node
    assert tree.lookup(tree.root, b"linked")[0] is node
    other = Overlay(str(source))
    assert other.lookup(other.root, b"moved")[0].generation == generation == node.generation
    other.close()


def test_generation_from_the_birth_time(source: Path) -> None:
    """Where a filesystem has no file handles."""
    fd = os.open(source, os.O_RDONLY)
    (source / "a").write_bytes(b"")
    first = nodes._birth_generation(fd, b"a")
    assert nodes._birth_generation(fd, b"a") == first
    os.chmod(source / "a", 0o600)
    assert nodes._birth_generation(fd, b"a") == first
    generations = {first}
    for _ in range(3):
        (source / "a").unlink()
        before = os.stat(source).st_mtime_ns
        while os.stat(source).st_mtime_ns == before:  # until the filesystem's clock has ticked
            (source / "a").write_bytes(b"")
            (source / "a").unlink()
        (source / "a").write_bytes(b"")
        generations.add(nodes._birth_generation(fd, b"a"))
    assert len(generations) == 4
    os.close(fd)


@pytest.mark.parametrize("exported", [False, True], ids=["no handles", "nfs_export"])
def test_copy_up_is_no_reuse(tmp_path: Path, mounts: Callable[[Path], Path], exported: bool) -> None:
    """On overlayfs, birth times change when a file is first written to; the file is the same."""
    base = mounts(tmp_path / "layers")
    for name in ("lower", "upper", "work"):
        (base / name).mkdir()
    (base / "lower/file").write_bytes(b"lower")
    options = f"lowerdir={base}/lower,upperdir={base}/upper,workdir={base}/work"
    options += ",index=on,nfs_export=on" if exported else ""
    with mounted("-t", "overlay", "-o", options, "overlay", at=tmp_path / "source") as source:
        tree = Overlay(str(source))
        node, _ = tree.lookup(tree.root, b"file")
        with (source / "file").open("ab") as file:
            file.write(b" and upper")
        assert (base / "upper/file").exists()
        assert tree.lookup(tree.root, b"file")[0] is node
        assert read(tree, node) == b"lower and upper"
        tree.close()


# Hard links


def test_hard_links(source: Path, tree: Overlay) -> None:
    first, _ = tree.mkdir(tree.root, b"first", 0o755, own_caller())
    second, _ = tree.mkdir(tree.root, b"second", 0o755, own_caller())
    node = make(tree, first, b"a", b"content")
    tree.link(node, second, b"b")
    tree.link(node, first, b"c")
    assert set(node.links()) == {(first, b"a"), (second, b"b"), (first, b"c")}
    assert set(node.parents()) == {first.id, second.id}
    assert tree.getattr(node).st_nlink == 3
    tree.rename(first, b"a", second, b"a")
    assert set(node.links()) == {(second, b"a"), (second, b"b"), (first, b"c")}
    tree.unlink(first, b"c")
    assert node.parents() == (second.id,)
    # Behind the mount: one name moves away, another is taken by something else.
    os.rename(source / "second/a", source / "second/moved")
    os.rename(source / "second/b", source / "kept")
    (source / "second/b").write_bytes(b"other")
    assert_stale(lambda: read(tree, node))
    assert tree.lookup(tree.root, b"kept")[0] is node
    assert read(tree, node) == b"content"
    assert tree.lookup(second, b"b")[0] is not node
    assert tree.lookup(second, b"moved")[0] is node
    os.unlink(source / "second/moved")
    assert read(tree, node) == b"content"
    # A name that failed is forgotten; one that was never tried again may stay.
    assert node.links() == ((tree.root, b"kept"), (second, b"b"))


def test_rename_over_another_name_of_the_same_file(source: Path, tree: Overlay) -> None:
    node = make(tree, tree.root, b"a", b"content")
    tree.link(node, tree.root, b"b")
    tree.rename(tree.root, b"a", tree.root, b"b")
    assert sorted(os.listdir(source)) == ["a", "b"]
    assert set(node.links()) == {(tree.root, b"a"), (tree.root, b"b")}
    tree.rename(tree.root, b"a", tree.root, b"b", RENAME_EXCHANGE)
    assert set(node.links()) == {(tree.root, b"a"), (tree.root, b"b")}
    tree.unlink(tree.root, b"a")
    assert read(tree, node) == b"content"


def test_exchange(tree: Overlay) -> None:
    directory, _ = tree.mkdir(tree.root, b"d", 0o755, own_caller())
    inner = make(tree, directory, b"inner", b"inner")
    file = make(tree, tree.root, b"f", b"file")
    tree.rename(tree.root, b"d", tree.root, b"f", RENAME_EXCHANGE)
    assert (directory.links(), file.links()) == (((tree.root, b"f"),), ((tree.root, b"d"),))
    assert tree.relative_path(inner) == b"f/inner"
    assert (read(tree, inner), read(tree, file)) == (b"inner", b"file")
    tree.rename(tree.root, b"d", directory, b"inner", RENAME_EXCHANGE)
    assert (inner.parents(), file.parents()) == ((ROOT_ID,), (directory.id,))
    assert (read(tree, inner), read(tree, file)) == (b"inner", b"file")


def test_no_whiteouts(source: Path, tree: Overlay) -> None:
    """RENAME_WHITEOUT would leave a device node of the server's behind."""
    make(tree, tree.root, b"a")
    with pytest.raises(OSError) as raised:
        tree.rename(tree.root, b"a", tree.root, b"b", 4)
    assert raised.value.errno == errno.EINVAL
    assert os.listdir(source) == ["a"]


def test_moved_directory_takes_its_children_along(source: Path, tree: Overlay) -> None:
    outer, _ = tree.mkdir(tree.root, b"outer", 0o755, own_caller())
    inner, _ = tree.mkdir(outer, b"inner", 0o755, own_caller())
    file = make(tree, inner, b"file", b"content")
    tree.rename(tree.root, b"outer", tree.root, b"renamed")
    assert tree.relative_path(file) == b"renamed/inner/file"
    assert read(tree, file) == b"content"
    # Behind the mount it is lost until it is looked up under its new name.
    os.rename(source / "renamed", source / "elsewhere")
    assert_stale(lambda: read(tree, file))
    assert_stale(lambda: tree.lookup(inner, b"file"))
    assert_stale(lambda: list_directory(tree, inner))
    assert tree.lookup(tree.root, b"elsewhere")[0] is outer
    assert read(tree, file) == b"content"


def test_directories_turned_inside_out_behind_the_mount(source: Path) -> None:
    """What was above is below now: no walk upwards may go round for ever."""
    tree = Overlay(str(source), trust_seconds=1000)
    above, _ = tree.mkdir(tree.root, b"above", 0o755, own_caller())
    middle, _ = tree.mkdir(above, b"middle", 0o755, own_caller())
    below, _ = tree.mkdir(middle, b"below", 0o755, own_caller())
    file = make(tree, below, b"file", b"content")
    os.rename(source / "above/middle/below", source / "below")
    os.rename(source / "above/middle", source / "middle")
    os.rename(source / "above", source / "below/above")
    os.rename(source / "middle", source / "below/above/middle")
    # `below` is trusted to be where it was, so this finds `above` in its own grandchild.
    assert tree.lookup(below, b"above")[0] is above
    assert b"above" in tree.relative_path(above).split()[0].split(b"/")
    tree.close()
    tree = Overlay(str(source), trust_seconds=0)
    again, _ = tree.lookup(tree.root, b"below")
    found, _ = tree.lookup(again, b"file")
    assert read(tree, found) == b"content"
    assert found.id == file.id
    tree.close()


def test_lost_directory_is_found_again(source: Path) -> None:
    tree = Overlay(str(source), trust_seconds=1000)
    above, _ = tree.mkdir(tree.root, b"above", 0o755, own_caller())
    below, _ = tree.mkdir(above, b"below", 0o755, own_caller())
    file = make(tree, below, b"file", b"content")
    os.rename(source / "above/below", source / "below")
    os.rename(source / "above", source / "below/above")
    assert tree.lookup(below, b"above")[0] is above
    assert tree.lookup(tree.root, b"below")[0] is below
    assert tree.relative_path(above) == b"below/above"
    assert tree.relative_path(file) == b"below/file"
    for node in (file, above, below):
        tree.forget(node, node.lookups)
    assert tree.node_count == 1
    tree.close()


NAMES = st.sampled_from(["a", "b", "d", "e", "d/a", "d/e", "e/d", "e/a", "d/e/a", "e/d/a"])
CHANGES = st.one_of(
    st.tuples(st.just("mkdir"), NAMES, NAMES),
    st.tuples(st.just("touch"), NAMES, NAMES),
    st.tuples(st.just("link"), NAMES, NAMES),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("remove"), NAMES, NAMES),
    st.tuples(st.just("symlink"), NAMES, NAMES),
)
LOOKS = st.tuples(st.sampled_from(["look", "look", "forget", "our rename", "our unlink"]), NAMES, NAMES)


@pytest.mark.parametrize("trust_seconds", [0.0, 1000.0])
@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(steps=st.lists(st.one_of(CHANGES, LOOKS), min_size=20, max_size=80))
def test_any_change_behind_the_mount(
    tmp_path_factory: pytest.TempPathFactory, trust_seconds: float, steps: list[tuple[str, str, str]]
) -> None:
    """Whatever happens to the backing, a node is its own inode or ESTALE, and forgetting everything leaves nothing."""
    source, elsewhere = tmp_path_factory.mktemp("changing"), tmp_path_factory.mktemp("elsewhere")
    tree = Overlay(str(source), trust_seconds=trust_seconds)
    held: list[Node] = []

    def walk(path: str) -> Node:
        node = tree.root
        for name in path.split("/"):
            node, status = tree.lookup(node, os.fsencode(name))
            held.append(node)
            assert node.matches(status)
        return node

    def parent_of(path: str) -> Node:
        return walk(os.path.dirname(path)) if "/" in path else tree.root

    actions: dict[str, Callable[[str, str], object]] = {
        "mkdir": lambda path, _: (source / path).mkdir(),
        "touch": lambda path, _: (source / path).write_bytes(b"x"),
        "link": lambda path, new: os.link(source / path, source / new),
        "rename": lambda path, new: os.rename(source / path, source / new),
        "remove": lambda path, _: (
            os.rmdir(source / path) if (source / path).is_dir() else os.unlink(source / path)
        ),
        "symlink": lambda path, new: os.symlink(elsewhere, source / path),
        "look": lambda path, _: walk(path),
        "forget": lambda path, _: held and tree.forget(tree.node(held.pop().id), 1),
        "our unlink": lambda path, _: tree.unlink(parent_of(path), os.fsencode(os.path.basename(path))),
        "our rename": lambda path, new: tree.rename(
            parent_of(path),
            os.fsencode(os.path.basename(path)),
            parent_of(new),
            os.fsencode(os.path.basename(new)),
        ),
    }
    for action, path, new in steps:
        with suppress(OSError):
            actions[action](path, new)
        for node in tree.known_nodes():
            tree.relative_path(node)
            try:
                assert node.matches(tree.getattr(node))
            except OSError as error:
                assert error.errno == errno.ESTALE
    for node in held:
        # A reused number: the kernel forgets by id.
        with suppress(OSError):
            tree.forget(tree.node(node.id), 1)
    assert tree.known_nodes() == [tree.root]
    tree.close()


# Files without a name


def test_unlinked_but_known(source: Path, tree: Overlay) -> None:
    directory, _ = tree.mkdir(tree.root, b"d", 0o755, own_caller())
    node = make(tree, directory, b"file", b"content")
    before = open_descriptors()
    tree.unlink(directory, b"file")
    assert not node.linked
    assert node.parents() == (directory.id,)
    assert tree.relative_path(node) == b"d/file (deleted)"
    assert tree.getattr(node).st_nlink == 0
    assert read(tree, node) == b"content"
    _, status = tree.setattr(node, AttributeChanges(size=3, mode=0o600, mtime_ns=5))
    assert (status.st_size, oct(status.st_mode), status.st_mtime_ns) == (3, "0o100600", 5)
    tree.setxattr(node, b"user.x", b"1")
    assert tree.listxattr(node) == [b"user.x"]
    fd = tree.open_for_event(node, os.O_RDWR)
    os.pwrite(fd, b"CON", 0)
    os.close(fd)
    assert read(tree, node) == b"CON"
    with pytest.raises(FileNotFoundError):
        tree.link(node, tree.root, b"back")
    # The name is free for another file, which is another node.
    assert make(tree, directory, b"file").id != node.id
    assert tree.forget(node, 1)
    assert open_descriptors() == before


def test_replaced_by_rename(tree: Overlay) -> None:
    victim = make(tree, tree.root, b"victim", b"victim")
    winner = make(tree, tree.root, b"winner", b"winner")
    tree.rename(tree.root, b"winner", tree.root, b"victim")
    assert (read(tree, victim), read(tree, winner)) == (b"victim", b"winner")
    assert not victim.linked
    assert tree.relative_path(winner) == b"victim"


def test_removed_directory(tree: Overlay) -> None:
    """As for a process whose working directory was removed."""
    node, _ = tree.mkdir(tree.root, b"d", 0o755, own_caller())
    tree.rmdir(tree.root, b"d")
    assert stat.S_ISDIR(tree.getattr(node).st_mode)
    for operation in (
        lambda: tree.lookup(node, b"x"),
        lambda: tree.create(node, b"x", os.O_RDWR, 0o600, own_caller()),
        lambda: tree.mkdir(node, b"x", 0o700, own_caller()),
        lambda: tree.unlink(node, b"x"),
        lambda: list_directory(tree, node),
    ):
        with pytest.raises(FileNotFoundError):
            operation()


def test_linked_again_under_a_name_unknown_so_far(source: Path, tree: Overlay) -> None:
    node = make(tree, tree.root, b"known", b"content")
    os.link(source / "known", source / "unknown")
    before = open_descriptors()
    tree.unlink(tree.root, b"known")
    assert (tree.getattr(node).st_nlink, read(tree, node)) == (1, b"content")
    assert open_descriptors() == before + 1
    assert tree.lookup(tree.root, b"unknown")[0] is node
    assert node.linked
    assert tree.relative_path(node) == b"unknown"
    tree.link(node, tree.root, b"third")
    assert open_descriptors() == before
    assert node.lookups == 3


@pytest.mark.root
@pytest.mark.parametrize("may_map", [False, True], ids=["descriptors-only", "mappings"])
def test_pins_are_bounded(source: Path, monkeypatch: pytest.MonkeyPatch, may_map: bool) -> None:
    """Beyond their number files are kept by mappings, where these lead back to them, else given up."""
    if may_map:
        require_root()
    else:
        monkeypatch.setattr("fusehsm.overlay.reach._mapped", lambda descriptor: 0)
    before = open_descriptors()
    tree = Overlay(str(source), pins=3)
    made = [make(tree, tree.root, b"%d" % number, b"%d" % number) for number in range(10)]
    opened = {made[0]: tree.open(made[0], os.O_RDONLY), made[5]: os.open(source / "6", os.O_RDONLY)}
    for number in range(10):
        tree.unlink(tree.root, b"%d" % number)
    assert open_descriptors() <= before + 6  # the root's, three pins, two opened here
    if may_map:
        for _ in range(2):
            assert [read(tree, node) for node in made] == [b"%d" % number for number in range(10)]
        assert open_descriptors() <= before + 6
        for fd in opened.values():
            os.close(fd)
        tree.close()
        assert open_descriptors() == before
        return
    for node in made[:7]:
        assert_stale(lambda node=node: tree.getattr(node))  # type: ignore[misc]
    assert [read(tree, node) for node in made[7:]] == [b"7", b"8", b"9"]
    # A descriptor of a node's file can be lent; that of another file is not taken.
    tree.open_files_from(opened.get)
    assert read(tree, made[0]) == b"0"
    assert tree.getattr(made[0]).st_nlink == 0
    assert tree.setattr(made[0], AttributeChanges(size=0))[1].st_size == 0
    assert_stale(lambda: tree.getattr(made[5]))
    for fd in opened.values():
        os.close(fd)
    tree.close()
    assert open_descriptors() == before


def test_few_directory_descriptors(source: Path) -> None:
    before = open_descriptors()
    tree = Overlay(str(source), directories=4, trust_seconds=1000)
    made = []
    for number in range(50):
        directory, _ = tree.mkdir(
            tree.root, b"d%d" % number, 0o755, ROOT_CALLER if os.geteuid() == 0 else own_caller()
        )
        made.append((directory, make(tree, directory, b"f", b"%d" % number)))
    assert open_descriptors() <= before + 5
    for number, (directory, file) in enumerate(made):
        assert read(tree, file) == b"%d" % number
        tree.rename(directory, b"f", made[number - 25][0], b"g")
        assert read(tree, file) == b"%d" % number
    assert open_descriptors() <= before + 5
    tree.close()
    assert open_descriptors() == before


@pytest.mark.parametrize("trust_seconds", [1000, 0])
@pytest.mark.parametrize("openat2", [True, False], ids=["openat2", "walk"])
def test_out_of_descriptors(
    source: Path, trust_seconds: float, openat2: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kept directories are given back when descriptors run out, also where names are walked again."""
    import resource

    if not openat2:
        monkeypatch.setattr(syscalls, "have_openat2", lambda: False)
    tree = Overlay(str(source), trust_seconds=trust_seconds)
    node = tree.root
    for number in range(20):
        tree.mkdir(tree.root, b"d%d" % number, 0o755, own_caller())
    for number in range(20):
        node, _ = tree.lookup(tree.root, b"d%d" % number)
        make(tree, node, b"f")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_descriptors() + 10, limits[1]))
        with pytest.raises(OSError) as raised:
            while True:
                taken.append(os.open("/", os.O_PATH))
        assert raised.value.errno == errno.EMFILE
        fresh, _ = tree.lookup(tree.root, b"d0")
        fresh, _ = tree.lookup(fresh, b"f")
        assert tree.getattr(fresh).st_size == 0
        for number in range(20):
            directory, _ = tree.lookup(tree.root, b"d%d" % number)
            file, _ = tree.lookup(directory, b"f")
            assert read(tree, file) == b""
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for fd in taken:
            os.close(fd)
    tree.close()
