"""Reading directories: every name once, whatever comes and goes meanwhile."""

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.overlay.overlay import DirectoryEntry, DirectoryStream, Overlay
from tests.support.overlay_actions import NOBODY, as_user, mounted, open_descriptors, own_caller
from tests.support.requirements import require_root

pytestmark = pytest.mark.root

COUNT = 3000


@pytest.fixture(params=["ext4", "tmpfs"])
def source(request: pytest.FixtureRequest, places: Callable[[str], Path], tmp_path: Path) -> Iterator[Path]:
    require_root()
    if request.param == "ext4":
        yield places("readdir")
    else:
        with mounted("-t", "tmpfs", "tmpfs", at=tmp_path / "tmpfs") as at:
            yield at


@pytest.fixture
def tree(source: Path) -> Iterator[Overlay]:
    before = open_descriptors()
    made = Overlay(str(source))
    yield made
    made.close()
    assert open_descriptors() == before


@pytest.fixture
def stream(tree: Overlay) -> Iterator[DirectoryStream]:
    made = tree.opendir(tree.root)
    yield made
    made.close()


def take(
    tree: Overlay, stream: DirectoryStream, offset: int, count: int, *, remember: bool = False
) -> tuple[list[bytes], int]:
    """As an engine does: up to `count` entries fit, the next one does not."""
    names: list[bytes] = []
    for entry in stream.entries(offset):
        if len(names) == count:
            break
        if remember:
            tree.remember(entry.node)
        names.append(entry.name)
        offset = entry.next_offset
    return names, offset


def read_all(
    tree: Overlay, stream: DirectoryStream, count: int, between: Callable[[int], None] = lambda _: None
) -> list[bytes]:
    names: list[bytes] = []
    offset = 0
    while True:
        more, offset = take(tree, stream, offset, count)
        if not more:
            return names
        names += more
        between(len(names))


def fill(source: Path, prefix: str = "file", count: int = COUNT) -> set[bytes]:
    for number in range(count):
        (source / f"{prefix}-{number}").write_bytes(b"")
    return {b"%s-%d" % (os.fsencode(prefix), number) for number in range(count)}


def test_entries_with_attributes(source: Path, tree: Overlay, stream: DirectoryStream) -> None:
    (source / "file").write_bytes(b"content")
    (source / "directory").mkdir()
    (source / "link").symlink_to("nowhere")
    os.mkfifo(source / "fifo")
    os.link(source / "file", source / "hard link")
    (source / os.fsdecode(b"\xff" * 255)).write_bytes(b"")
    found: dict[bytes, DirectoryEntry] = {}
    for entry in stream.entries(0):
        tree.remember(entry.node)
        found[entry.name] = entry
    assert set(found) == {os.fsencode(name) for name in os.listdir(source)}
    for name, entry in found.items():
        assert entry.status == os.lstat(os.path.join(os.fsencode(source), name))
        assert tree.node(entry.node.id) is entry.node
        assert entry.node.matches(entry.status)
    assert found[b"file"].node is found[b"hard link"].node
    assert found[b"file"].node.lookups == 2
    assert {name for _, name in found[b"file"].node.links()} == {b"file", b"hard link"}
    for entry in found.values():
        tree.forget(entry.node, 1)
    assert tree.node_count == 1


def test_only_what_was_taken_is_remembered(source: Path, tree: Overlay, stream: DirectoryStream) -> None:
    fill(source, count=100)
    names, offset = take(tree, stream, 0, 10, remember=True)
    assert tree.node_count == 11
    more, _ = take(tree, stream, offset, 10)
    assert len(set(names + more)) == 20
    assert tree.node_count == 11
    # A node known from elsewhere stays, and an unremembered entry does not forget it.
    known, _ = tree.lookup(tree.root, b"file-50")
    read_all(tree, stream, 7)
    assert tree.node(known.id) is known
    assert known.lookups == 1 or (b"file-50" in names and known.lookups == 2)


@pytest.mark.parametrize("count", [1, 7, 250, COUNT + 1])
def test_every_name_once(source: Path, tree: Overlay, stream: DirectoryStream, count: int) -> None:
    expected = fill(source, count=500 if count == 1 else COUNT)
    names = read_all(tree, stream, count)
    assert len(names) == len(expected)
    assert set(names) == expected
    # Again from the start: rewinddir(3).
    (source / "later").write_bytes(b"")
    assert set(read_all(tree, stream, count)) == expected | {b"later"}


@pytest.mark.parametrize("count", [5, 100])
@pytest.mark.parametrize("seek", [False, True], ids=["one stream", "a new stream each time"])
def test_stable_while_names_come_and_go(source: Path, tree: Overlay, count: int, seek: bool) -> None:
    staying = fill(source, "stay")
    going = sorted(fill(source, "go"))
    streams = [tree.opendir(tree.root)]
    names: list[bytes] = []
    offset = 0
    created = 0
    while True:
        more, offset = take(tree, streams[-1], offset, count)
        if not more:
            break
        names += more
        # Some of what goes was read already, some was not.
        for _ in range(count // 2):
            if going:
                os.unlink(os.path.join(os.fsencode(source), going.pop(len(names) % len(going))))
        if created < 2000:
            (source / f"new-{created}").write_bytes(b"")
            (source / f"new-{created}").rename(source / f"renamed-{created}")
            created += 1
        if seek:
            streams.append(tree.opendir(tree.root))
            streams.pop(0).close()
    assert len(names) == len(set(names))
    assert staying <= set(names)
    streams[0].close()


def test_more_readers_than_descriptors(source: Path) -> None:
    """Each goes on where it was, also where another has taken its descriptor meanwhile; a directory that is removed has no more entries."""
    expected = fill(source, count=100)
    (source / "going").mkdir()
    tree = Overlay(str(source), directories=8)
    before = len(os.listdir("/proc/self/fd"))
    streams = [tree.opendir(tree.root) for _ in range(100)]
    going, _ = tree.lookup(tree.root, b"going")
    removed = tree.opendir(going)
    found: list[list[bytes]] = [[] for _ in streams]
    offsets = [0] * len(streams)
    for _ in range(102 // 17 + 1):
        for number, stream in enumerate(streams):
            more, offsets[number] = take(tree, stream, offsets[number], 17)
            found[number] += more
        assert len(os.listdir("/proc/self/fd")) <= before + 2 * 8
    assert all(sorted(names) == sorted(expected | {b"going"}) for names in found)
    tree.rmdir(tree.root, b"going")
    with pytest.raises(FileNotFoundError):
        list(removed.entries(0))
    for stream in (*streams, removed):
        stream.close()
    tree.close()


def test_seeking_anywhere(source: Path, tree: Overlay, stream: DirectoryStream) -> None:
    """telldir(3) and seekdir(3): an offset means the same place for good."""
    fill(source, count=1000)
    entries = []
    for entry in stream.entries(0):
        entries.append((entry.name, entry.next_offset))
    names = [name for name, _ in entries]
    for index in (999, 500, 0, 998, 3, 501, 4, 250):
        following, _ = take(tree, stream, entries[index][1], 5)
        assert following == names[index + 1 : index + 6]
        following, _ = take(tree, stream, entries[index][1], 5)
        assert following == names[index + 1 : index + 6]


def test_a_name_that_vanishes_between_reading_and_looking(
    source: Path, tree: Overlay, stream: DirectoryStream
) -> None:
    fill(source, count=10)
    iterator = stream.entries(0)
    first = next(iterator).name
    others = [name for name in os.listdir(os.fsencode(source)) if name != first]
    for name in others[:5]:
        os.unlink(os.path.join(os.fsencode(source), name))
    assert {entry.name for entry in iterator} == set(others[5:])


def test_directories_on_other_devices(source: Path, tree: Overlay, stream: DirectoryStream) -> None:
    with mounted("-t", "tmpfs", "tmpfs", at=source / "submount"):
        (entry,) = (entry for entry in stream.entries(0) if entry.name == b"submount")
        assert entry.status == os.stat(source / "submount")
        assert entry.node.id != entry.status.st_ino
        assert stat.S_ISDIR(entry.status.st_mode)


@pytest.mark.root
def test_entries_that_may_not_be_examined(session_directory: Path) -> None:
    """A directory that may be read but not searched: natively, names are listed and cannot be examined."""
    source = Path(tempfile.mkdtemp(dir=session_directory))
    source.chmod(0o755)
    (source / "directory").mkdir()
    (source / "directory/file").write_bytes(b"")
    (source / "directory").chmod(0o744)
    os.chown(source / "directory", NOBODY, NOBODY)
    (source / "directory").chmod(0o400)

    def look() -> tuple[list[bytes], list[tuple[bytes, int, bool]], int]:
        tree = Overlay(str(source))
        node, _ = tree.lookup(tree.root, b"directory")
        found = []
        for entry in tree.opendir(node).entries(0):
            tree.remember(entry.node)
            found.append((entry.name, entry.status.st_mode, tree._table.get(entry.node.id) is None))
        return os.listdir(os.fsencode(source / "directory")), found, tree.node_count

    assert as_user(look) == ([b"file"], [(b"file", 0, True)], 2)


def test_removed_while_open(source: Path, tree: Overlay) -> None:
    directory, _ = tree.mkdir(tree.root, b"d", 0o755, own_caller())
    stream = tree.opendir(directory)
    tree.rmdir(tree.root, b"d")
    with pytest.raises(FileNotFoundError):
        list(stream.entries(0))
    stream.close()
    stream.close()
