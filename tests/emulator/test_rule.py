"""The rule that must never break: no byte of a watched file goes to an accessor or into the page cache unless an allowed event covered it.

Stubs have a known content; the listener fills exactly what each event names. Whatever the order of things, nobody may see another byte.
"""

import errno
import os
import random
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from fusehsm.backends.opening import open_group
from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_MARK_ADD,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    LINUX_6_14,
)
from tests.conftest import MakeAccessor, MakeMount
from tests.support import read_methods as ways
from tests.support.async_listener import HOLD, Listener, listening
from tests.support.engines import diverges
from tests.support.harness import Mount, start
from tests.support.stub_pattern import PAGE, Filler, Stub, content, evict, make_stub

SIZE = 96 * 1024 + 123
PRE_ACCESS = LINUX_6_14.pre_access

pytestmark = pytest.mark.fuse


@dataclass(slots=True)
class Tree:
    """A mount, its backing, the stubs made there and who fills them."""

    mount: Mount
    backing: Path
    exact: bool
    engine: str
    filler: Filler = field(default_factory=Filler)
    made: int = 0

    def stub(self, name: str = "", size: int = SIZE, directory: str = "") -> Stub:
        self.made += 1
        made = make_stub(
            self.backing / directory,
            self.mount.path / directory,
            name or f"stub-{self.made}",
            self.made,
            size,
        )
        self.filler.knows(made)
        return made

    def directory(self) -> str:
        self.made += 1
        (self.backing / f"directory-{self.made}").mkdir()
        return f"directory-{self.made}"

    @asynccontextmanager
    async def filling(self, path: str = "", **how: Any) -> AsyncIterator[Listener]:
        """A listener on all of the mount that fills what it is asked for."""
        how = {"mask": ("PRE_ACCESS",), "answer": self.filler, **how}
        async with listening(path or self.mount.path, **how) as listener:
            yield listener


MOUNTS = {
    "exact-apart-shared": ("exact", "shared", False),
    "exact-in-place-private": ("exact", "private", True),
    "first-access-apart-private": ("first-access", "private", False),
    "first-access-in-place-shared": ("first-access", "shared", True),
}


@pytest.fixture(scope="module", params=list(MOUNTS.values()), ids=list(MOUNTS))
def shared_tree(
    request: pytest.FixtureRequest, make_shared_mount: MakeMount, places: Any, engine: str
) -> Iterator[Tree]:
    events, cache, in_place = request.param
    source = places("rule")
    descriptor = os.open(source, os.O_PATH | os.O_DIRECTORY)
    mount = make_shared_mount(
        "--events", events, "--cache", cache, source=source, path=source if in_place else None
    )
    try:
        yield Tree(mount, Path(f"/proc/self/fd/{descriptor}"), events == "exact", engine)
    finally:
        os.close(descriptor)


@pytest.fixture
def tree(shared_tree: Tree) -> Tree:
    """The mount, with a filler of its own for each test."""
    shared_tree.filler = Filler()
    return shared_tree


def check(stub: Stub, pieces: ways.Pieces, what: str = "") -> None:
    for offset, data in pieces.items():
        # Not asserted: to compare a megabyte in words takes pytest longer than any test may.
        if data != stub.content[offset : offset + len(data)]:
            pytest.fail(f"{what} at {offset}: {wrong(stub, offset, data)}")


def wrong(stub: Stub, offset: int, data: bytes) -> str:
    bad = [i for i, byte in enumerate(data) if stub.content[offset + i : offset + i + 1] != bytes([byte])]
    return f"{len(bad)} wrong bytes from {offset + bad[0]} to {offset + bad[-1]}, the first is {data[bad[0]]}"


async def see(accessor: Accessor, stub: Stub, descriptor: int) -> None:
    """What is in the page cache, and all else that can be had of it, is right."""
    for way in (ways.map_private, ways.pread_all, ways.send):
        check(stub, await accessor.run(way, descriptor, stub.size), way.__name__)


async def opened(accessor: Accessor, stub: Stub, flags: int = os.O_RDONLY) -> int:
    return int(await accessor.run("open", stub.path, flags))


def spoil(descriptor: int, size: int) -> tuple[int, int, int]:
    """Bring all of a file into the page cache, unasked, and keep a mapping that shows it; how many bytes were zero."""
    data = os.pread(descriptor, size, 0)
    mapping = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ)  # type: ignore[name-defined]  # noqa: F821
    zeros = mapping[:].count(0)
    mappings = sys.modules["__main__"]._MAPPINGS
    number = max(mappings, default=0) + 1
    mappings[number] = mapping
    return number, data.count(0), zeros


def write_and_look(descriptor: int, number: int, data: bytes, offset: int, size: int) -> bytes:
    """Write, and at once look through a mapping."""
    os.pwrite(descriptor, data, offset)
    shown = sys.modules["__main__"]._MAPPINGS[number][:size]
    assert isinstance(shown, bytes)
    return shown


# Each way alone: on a fresh stub, through an old descriptor, over pages that were cached before the mark


async def test_every_way_on_a_fresh_stub(tree: Tree, accessor: Accessor) -> None:
    async with tree.filling():
        for way in ways.WAYS:
            stub = tree.stub()
            descriptor = await opened(accessor, stub)
            pieces = await accessor.run(way, descriptor, stub.size)
            unmapped = tree.exact and diverges("shared mappings (exact)", tree.engine)
            assert bool(pieces) != (way is ways.map_shared and unmapped), way.__name__
            check(stub, pieces, way.__name__)
            await see(accessor, stub, descriptor)
            await accessor.run("close", descriptor)
    assert tree.filler.events >= len(ways.WAYS)


async def test_every_way_through_a_descriptor_opened_before_the_mark(tree: Tree, accessor: Accessor) -> None:
    stubs = [tree.stub() for _ in ways.WAYS]
    descriptors = [await opened(accessor, stub) for stub in stubs]
    async with tree.filling():
        for way, stub, descriptor in zip(ways.WAYS, stubs, descriptors, strict=True):
            check(stub, await accessor.run(way, descriptor, stub.size), way.__name__)
            await see(accessor, stub, await opened(accessor, stub))


async def test_every_way_over_pages_cached_before_the_mark(tree: Tree, make_accessor: MakeAccessor) -> None:
    old, new = make_accessor(), make_accessor()
    stubs = [tree.stub() for _ in ways.WAYS]
    spoilt = []
    for stub in stubs:
        descriptor = await opened(old, stub)
        number, read, mapped = await old.run(spoil, descriptor, stub.size)
        assert (read, mapped) == (stub.size, stub.size), "the stub has nothing yet, and nobody was asked"
        spoilt.append((descriptor, number))
    async with tree.filling():
        for turn, (way, stub, (descriptor, number)) in enumerate(zip(ways.WAYS, stubs, spoilt, strict=True)):
            if turn % 3 == 0:
                check(
                    stub, {0: await old.run("touch", number, 0, stub.size)}, f"old mapping ({way.__name__})"
                )
            if turn % 3 == 1:
                check(stub, await old.run(way, descriptor, stub.size), f"old descriptor, {way.__name__}")
            fresh = await opened(new, stub)
            check(stub, await new.run(way, fresh, stub.size), f"new descriptor, {way.__name__}")
            check(
                stub, {0: await old.run("touch", number, 0, stub.size)}, f"old mapping after {way.__name__}"
            )
            await see(old, stub, descriptor)


# Listeners and marks that come and go


async def test_a_listener_dies_with_an_event_and_another_comes(
    tree: Tree, make_accessor: MakeAccessor
) -> None:
    reader, mapper = make_accessor(), make_accessor()
    stub = tree.stub()
    async with open_group(tree.mount.path, ("PRE_ACCESS",)) as dying:
        descriptors = [await opened(accessor, stub) for accessor in (reader, mapper)]
        number = await mapper.run("map_file", descriptors[1], stub.size)
        calls = [reader.start(ways.send, descriptors[0], stub.size), mapper.start("touch", number, 0, 1)]
        await dying.wait_readable()
        for event in dying.take_events():
            os.close(event.fd)
    for call in calls:
        await call.wait()  # allowed by the death, as on a real kernel, and empty
    async with tree.filling():
        check(stub, {0: await mapper.run("touch", number, 0, stub.size)}, "the mapping")
        for accessor, descriptor in zip((reader, mapper), descriptors, strict=True):
            await see(accessor, stub, descriptor)


async def test_a_mark_goes_and_comes_back(tree: Tree, accessor: Accessor) -> None:
    stub = tree.stub()
    async with tree.filling() as listener:
        descriptor = await opened(accessor, stub)
        number = await accessor.run("map_file", descriptor, stub.size)
        check(stub, {0: await accessor.run("touch", number, 0, 10)})
        path = str(tree.mount.path)
        await listener.group.mark(FAN_MARK_REMOVE | FAN_MARK_MOUNT, PRE_ACCESS, path=path)
        evict(stub)
        unwatched = tree.stub()
        await accessor.run(ways.map_private, await opened(accessor, unwatched), unwatched.size)
        await accessor.run("touch", number, 0, stub.size)
        await listener.group.mark(FAN_MARK_ADD | FAN_MARK_MOUNT, PRE_ACCESS, path=path)
        check(stub, {PAGE: await accessor.run("touch", number, PAGE, stub.size - PAGE)}, "the mapping")
        await see(accessor, unwatched, await opened(accessor, unwatched))


@pytest.mark.parametrize("end", ["removed", "flushed", "written"])
async def test_an_ignore_mark_ends(tree: Tree, make_accessor: MakeAccessor, end: str) -> None:
    accessor, writer = make_accessor(), make_accessor()
    stub = tree.stub()
    armed = tree.stub()
    ignore = FAN_MARK_IGNORED_MASK | (FAN_MARK_IGNORED_SURV_MODIFY if end != "written" else 0)
    async with tree.filling() as listener:
        group = listener.group
        early = await opened(accessor, armed)
        mapped_early = await accessor.run("map_file", early, armed.size)
        for each in (stub, armed):
            await group.mark(FAN_MARK_ADD | ignore, PRE_ACCESS, path=each.path)
        listener.take()
        descriptor = await opened(accessor, stub)
        number, read, _ = await accessor.run(spoil, descriptor, stub.size)
        assert read == stub.size
        assert set(await accessor.run("touch", mapped_early, 0, PAGE)) == {0}
        assert listener.take() == []
        for each in (stub, armed):
            if end == "removed":
                await group.mark(FAN_MARK_REMOVE | ignore, PRE_ACCESS, path=each.path)
            elif end == "written":
                await writer.run("pwrite_path", each.path, each.content[:5], 0)
        if end == "flushed":
            await group.mark(FAN_MARK_FLUSH, 0, path=stub.path)
        check(stub, {PAGE: await accessor.run("touch", number, PAGE, stub.size - PAGE)}, "the mapping")
        check(armed, {PAGE: await accessor.run("touch", mapped_early, PAGE, PAGE)}, "the armed mapping")
        await see(accessor, stub, descriptor)
        await see(accessor, armed, early)


async def test_a_writer_looks_at_once(tree: Tree, accessor: Accessor) -> None:
    """When write(2) returns, no page is left that came in while an ignore mark stood which that write has ended."""
    async with tree.filling() as listener:
        for _ in range(10):
            stub = tree.stub()
            await listener.group.mark(FAN_MARK_ADD | FAN_MARK_IGNORED_MASK, PRE_ACCESS, path=stub.path)
            descriptor = await opened(accessor, stub, os.O_RDWR)
            number, read, _ = await accessor.run(spoil, descriptor, stub.size)
            assert read == stub.size
            last = stub.size - stub.size % PAGE or stub.size - PAGE
            data = stub.content[last : last + 5]
            check(stub, {0: await accessor.run(write_and_look, descriptor, number, data, last, last)})
            await accessor.run("unmap", number)
            await accessor.run("close", descriptor)


async def test_a_resident_file_is_evicted(tree: Tree, accessor: Accessor) -> None:
    """The listener ignores what it has filled; to evict, it takes the content away and then the ignore mark."""
    stub = tree.stub()
    ignore = FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY
    async with tree.filling() as listener:
        descriptor = await opened(accessor, stub)
        await see(accessor, stub, descriptor)
        await listener.group.mark(FAN_MARK_ADD | ignore, PRE_ACCESS, path=stub.path)
        listener.take()
        await see(accessor, stub, descriptor)
        number = await accessor.run("map_file", descriptor, stub.size)
        check(stub, {0: await accessor.run("touch", number, 0, stub.size)})
        evict(stub)
        await listener.group.mark(FAN_MARK_REMOVE | ignore, PRE_ACCESS, path=stub.path)
        check(stub, {0: await accessor.run("touch", number, 0, stub.size)}, "the mapping")
        await see(accessor, stub, descriptor)
        assert listener.take() != []


async def test_cached_pages_are_evicted(tree: Tree, accessor: Accessor) -> None:
    stub = tree.stub()
    async with tree.filling() as listener:
        for _ in range(3):
            descriptor = await opened(accessor, stub)
            for way in (ways.pread_pieces, ways.send, ways.splice):
                check(stub, await accessor.run(way, descriptor, stub.size), way.__name__)
                await accessor.run("posix_fadvise", descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                evict(stub)
                listener.take()
                check(stub, await accessor.run(way, descriptor, stub.size), f"{way.__name__} again")
                assert listener.take() != []
            await accessor.run("close", descriptor)
            await accessor.run("posix_fadvise", await opened(accessor, stub), 0, 0, os.POSIX_FADV_DONTNEED)
            evict(stub)


async def test_a_content_group_does_not_fill(tree: Tree, accessor: Accessor) -> None:
    """FAN_CLASS_CONTENT is asked after the content is there; what it allows may still be a stub."""
    if not tree.exact:
        with pytest.raises(OSError) as caught:
            async with tree.filling(flags=0x4, mask=("ACCESS_PERM",)):
                pass
        assert caught.value.errno == errno.EOPNOTSUPP
        return
    stub = tree.stub()
    async with tree.filling(flags=0x4, mask=("ACCESS_PERM",), answer=lambda event: 0):
        descriptor = await opened(accessor, stub)
        await accessor.run(ways.send, descriptor, stub.size)
        await accessor.run(ways.map_private, descriptor, stub.size)
        async with tree.filling():
            await see(accessor, stub, descriptor)


# Names


@pytest.mark.parametrize("how", ["rename", "link"])
async def test_a_file_comes_into_a_watched_directory(tree: Tree, accessor: Accessor, how: str) -> None:
    directory = tree.directory()
    stub = tree.stub(f"moving-{how}-{tree.made}")
    target = str(tree.mount.path / directory / "name")
    async with tree.filling(str(tree.mount.path / directory), mark="children"):
        descriptor = await opened(accessor, stub)
        number, read, _ = await accessor.run(spoil, descriptor, stub.size)
        assert read == stub.size
        await accessor.run(how, stub.path, target)
        check(stub, {0: await accessor.run("touch", number, 0, stub.size)}, "the mapping")
        await see(accessor, stub, descriptor)
        await see(accessor, stub, int(await accessor.run("open", target, os.O_RDONLY)))


async def test_hard_links_are_one_file(tree: Tree, accessor: Accessor) -> None:
    directory = tree.directory()
    stub = tree.stub(f"linked-{tree.made}")
    os.link(stub.backing, tree.backing / directory / "link")
    elsewhere = await opened(accessor, stub)
    await accessor.run(spoil, elsewhere, stub.size)
    linked = str(tree.mount.path / directory / "link")
    await accessor.run("stat", linked)  # the mount learns that they are one
    async with tree.filling(str(tree.mount.path / directory), mark="children"):
        await see(accessor, stub, int(await accessor.run("open", linked, os.O_RDONLY)))
        await see(accessor, stub, elsewhere)


async def test_a_name_changes_or_goes_during_a_fill(tree: Tree, make_accessor: MakeAccessor) -> None:
    reader, mover = make_accessor(), make_accessor()
    stub, doomed = tree.stub(), tree.stub()
    async with holding(tree) as held:
        for each, act in ((stub, "rename"), (doomed, "unlink")):
            descriptor = await opened(reader, each)
            call = reader.start(ways.pread_all, descriptor, each.size)
            await held.listener.wait_for(1)
            await mover.run(act, *((each.path, each.path + "-moved") if act == "rename" else (each.path,)))
            await held.fill_all(call)
            check(each, await call.wait(), act)
            looking = reader.start(ways.map_private, descriptor, each.size)
            await held.fill_all(looking)
            check(each, await looking.wait(), act)


@dataclass(slots=True)
class Holding:
    """A listener that fills and allows when told."""

    tree: Tree
    events: list[Event] = field(default_factory=list)
    listener: Listener = field(init=False)

    def __call__(self, event: Event) -> int:
        self.events.append(event)
        return HOLD

    def fill(self, error: int = 0) -> int:
        """Answer what is held, filling it first unless it is denied; how many that were."""
        for event in self.events:
            if not error:
                self.tree.filler.fill(event)
        self.events.clear()
        return self.listener.release(error)

    async def fill_all(self, *calls: Any) -> None:
        """Fill and allow whatever comes until the calls have ended."""
        with trio.fail_after(60):
            while not all(call.done for call in calls):
                if not self.fill():
                    await trio.sleep(0.001)
        self.listener.take()


@asynccontextmanager
async def holding(tree: Tree) -> AsyncIterator[Holding]:
    held = Holding(tree)
    async with tree.filling(answer=held) as listener:
        held.listener = listener
        yield held


# Denials, races


async def test_denied_then_allowed(tree: Tree, make_accessor: MakeAccessor) -> None:
    accessor = make_accessor()
    stub = tree.stub()
    async with tree.filling():
        descriptor = await opened(accessor, stub)
        tree.filler.error = errno.EIO
        for way in (ways.pread_all, ways.send, ways.splice, ways.vector):
            with pytest.raises(OSError) as caught:
                await accessor.run(way, descriptor, stub.size)
            assert caught.value.errno == errno.EIO
        await accessor.run("posix_fadvise", descriptor, 0, 0, os.POSIX_FADV_WILLNEED)
        victim = make_accessor()
        with pytest.raises(AccessorDied) as died:
            await victim.run(ways.map_private, await opened(victim, stub), stub.size)
        assert died.value.signal == signal.SIGBUS
        tree.filler.error = 0
        for way in (ways.pread_all, ways.send, ways.splice, ways.vector, ways.map_private):
            check(stub, await accessor.run(way, descriptor, stub.size), way.__name__)


@pytest.mark.parametrize("first", [ways.pread_all, ways.map_private, ways.send])
async def test_many_readers_of_the_same_pages(tree: Tree, make_accessor: MakeAccessor, first: Any) -> None:
    stub = tree.stub()
    accessors = [make_accessor() for _ in range(6)]
    async with holding(tree) as held:
        descriptors = [await opened(accessor, stub) for accessor in accessors]
        calls = [accessors[0].start(first, descriptors[0], stub.size)]
        await held.listener.wait_for(1)
        several = (ways.map_private, ways.pread_all, ways.splice, ways.advised, ways.map_populate)
        for accessor, descriptor, way in zip(accessors[1:], descriptors[1:], several, strict=True):
            calls.append(accessor.start(way, descriptor, stub.size))
        await held.fill_all(*calls)
        for call in calls:
            check(stub, await call.wait())


async def test_two_threads_one_reading_one_faulting(tree: Tree, accessor: Accessor) -> None:
    def both(descriptor: int, size: int) -> list[tuple[int, bytes]]:
        seen: list[tuple[int, bytes]] = []
        mapping = mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ)  # type: ignore[name-defined]  # noqa: F821

        def read(seen=seen, descriptor=descriptor) -> None:  # type: ignore[no-untyped-def]
            for offset in (4000, 12000, 40000, 4000):
                seen.append((offset, os.pread(descriptor, 5000, offset)))

        thread = threading.Thread(target=read)  # type: ignore[name-defined]  # noqa: F821
        thread.start()
        for offset in (8192, 4096, 16384, 45056, 0):
            seen.append((offset, mapping[offset : offset + 4096]))
        thread.join()
        return seen

    for dialect in ("linux-6.14", "patch-v2"):
        stub = tree.stub()
        async with tree.filling(dialect=dialect):
            for offset, data in await accessor.run(both, await opened(accessor, stub), stub.size):
                check(stub, {offset: data}, dialect)


async def test_truncation_and_fill_race(tree: Tree, make_accessor: MakeAccessor) -> None:
    reader, mapper, shortener = make_accessor(), make_accessor(), make_accessor()
    for length in (PAGE, 3 * PAGE + 17, 0):
        stub = tree.stub()
        async with holding(tree) as held:
            read, mapped = await opened(reader, stub), await opened(mapper, stub)
            number = await mapper.run("map_file", mapped, stub.size)
            calls = [
                reader.start("pread", read, stub.size, 0),
                mapper.start("touch", number, 0, min(length, PAGE) or 1),
            ]
            await held.listener.wait_for(1)
            shortening = shortener.start("truncate", stub.path, length)
            try:
                await held.fill_all(*calls, shortening)
                check(stub, {0: await calls[0].wait()}, "pread")
                touched = await calls[1].wait()
                # Of a file without any byte left, the kernel may show the rest of a page that was empty when it came: nothing of the file.
                if length or touched != b"\0":
                    check(stub, {0: touched}, "mapping")
            except AccessorDied as died:
                assert (length, died.signal) == (0, signal.SIGBUS)
            await shortening.wait()
            last = shortener.start("read_file", stub.path)
            await held.fill_all(last)
            assert await last.wait() == stub.content[:length]


async def test_writes_into_stubs(tree: Tree, accessor: Accessor) -> None:
    """Parts of pages are written, and what is around them is the stub's."""
    stub = tree.stub()
    true = bytearray(stub.content)
    async with tree.filling() as listener:
        old = await opened(accessor, stub)
        descriptor = await opened(accessor, stub, os.O_RDWR)
        for offset, data in (
            (100, b"part"),
            (PAGE, b"w" * PAGE),
            (2 * PAGE - 3, b"across"),
            (20000, b"z" * 9000),
        ):
            await accessor.run("pwrite", descriptor, data, offset)
            true[offset : offset + len(data)] = data
            # From now on this is the file's content: filling it again changes nothing.
            tree.filler.contents[stub.backing.stat().st_ino] = bytes(true)
        written = Stub(stub.path, stub.backing, bytes(true))
        assert listener.take() != []
        for each in (descriptor, old):
            check(written, await accessor.run(ways.map_private, each, stub.size), "mapping")
            check(written, await accessor.run(ways.pread_all, each, stub.size), "pread")
        appender = await opened(accessor, stub, os.O_WRONLY | os.O_APPEND)
        await accessor.run("write", appender, b"appended")
        longer = Stub(stub.path, stub.backing, bytes(true) + b"appended")
        tree.filler.knows(longer)
        for each in (descriptor, old):
            check(longer, await accessor.run(ways.map_private, each, longer.size), "mapping after append")
            check(longer, await accessor.run(ways.pread_all, each, longer.size), "pread after append")


async def test_shared_mappings_in_the_series_dialects(tree: Tree, accessor: Accessor) -> None:
    """In patch-v2 a writable fault asks PRE_MODIFY alone; a listener that hears PRE_ACCESS only must be asked all the same."""
    for dialect in ("patch-v2", "patch-v1"):
        stub = tree.stub()
        async with tree.filling(dialect=dialect):
            descriptor = await opened(accessor, stub, os.O_RDWR)
            if tree.exact and diverges("shared mappings (exact)", tree.engine):
                with pytest.raises(OSError) as caught:
                    await accessor.run("map_file", descriptor, stub.size, 0, True, True)
                assert caught.value.errno == errno.ENODEV
                continue
            number = await accessor.run("map_file", descriptor, stub.size, 0, True, True)
            await accessor.run("put", number, 10, stub.content[10:20])
            check(stub, {0: await accessor.run("touch", number, 0, stub.size)}, dialect)


@pytest.mark.parametrize("dialect", ["patch-v2", "patch-v1"])
async def test_unaligned_ranges_in_the_series_dialects(tree: Tree, accessor: Accessor, dialect: str) -> None:
    """Their ranges are exact bytes, and the page cache holds whole pages."""
    async with tree.filling(dialect=dialect):
        for way in ways.UNALIGNED:
            stub = tree.stub()
            descriptor = await opened(accessor, stub)
            check(stub, await accessor.run(way, descriptor, stub.size), way.__name__)
            await see(accessor, stub, descriptor)


# Programs


async def test_the_opener_is_gone(tree: Tree, accessor: Accessor) -> None:
    def handed_on(path: str, size: int) -> bytes:
        reader, writer = os.pipe()
        parent = os.fork()
        if parent == 0:
            descriptor = os.open(path, os.O_RDONLY)
            ready, go = os.pipe()
            if os.fork() == 0:
                os.close(go)
                os.read(ready, 1)  # until the opener has exited
                with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:  # type: ignore[name-defined]  # noqa: F821
                    os.write(writer, mapping[8192:12288] + os.pread(descriptor, 8192, 0))
            os._exit(0)
        os.waitpid(parent, 0)
        os.close(writer)
        data = b""
        while piece := os.read(reader, 65536):
            data += piece
        return data

    stub = tree.stub()
    async with tree.filling():
        data = await accessor.run(handed_on, stub.path, stub.size)
    check(stub, {8192: data[:4096], 0: data[4096:]})
    assert len(data) == 12288


@pytest.mark.parametrize("command", [
    "cp {0} {1}",
    "cp --sparse=always {0} {1}",
    "cp --reflink=auto {0} {1}",
    "cat {0} > {1}",
    "dd if={0} of={1} bs=7000 status=none",
    "tar -S -C $(dirname {0}) -cf - $(basename {0}) | tar -xOf - > {1}",
    "tar -C $(dirname {0}) -cf - $(basename {0}) | tar -xOf - > {1}",
])  # fmt: skip
async def test_copies_are_whole(tree: Tree, accessor: Accessor, command: str, tmp_path: Path) -> None:
    stub = tree.stub()
    target = tmp_path / "copy"
    async with tree.filling():
        status, _ = await accessor.run("execute", "/bin/sh", "-c", command.format(stub.path, target))
    assert status == 0
    assert target.read_bytes() == stub.content


async def test_a_stub_of_a_program_is_run(tree: Tree, accessor: Accessor) -> None:
    program = Path(shutil.which("env") or "/usr/bin/env").read_bytes()
    stub = tree.stub(size=len(program))
    whole = Stub(stub.path, stub.backing, program)
    tree.filler.knows(whole)
    stub.backing.chmod(0o755)
    with pytest.raises(OSError) as caught:
        await accessor.run("execute", stub.path)
    assert caught.value.errno == errno.ENOEXEC, "nobody watches: it is empty, and that is cached now"
    async with tree.filling():
        assert await accessor.run("execute", stub.path, "echo", "it runs") == (0, b"it runs\n")
        await see(accessor, whole, await opened(accessor, whole))


def test_the_content_has_no_zeros() -> None:
    assert 0 not in content(1, SIZE)
    assert content(1, SIZE) != content(2, SIZE)


# Everything at once


@pytest.mark.parametrize("seed", [1, 2])
async def test_many_processes_at_random(tree: Tree, seed: int) -> None:
    """Several processes do at random what can be done, while listeners deny, come and go. A byte may be missing, never wrong."""
    directory = tree.directory()
    stubs = [tree.stub(f"stub-{number}", 20_000 * number + 77, directory) for number in range(1, 5)]
    arguments = [f"{stub.path}={stub.seed}={stub.size}" for stub in stubs]
    chance = random.Random(seed)

    def answer(event: Event) -> int:
        if chance.random() < 0.05:
            return errno.EIO
        return tree.filler(event)

    async with tree.filling(answer=answer) as listener:
        workers = [
            start(
                [sys.executable, "-m", "tests.support.rule_worker", str(seed * 10 + number), "50", *arguments]
            )
            for number in range(4)
        ]
        try:
            while any(worker.poll() is None for worker in workers):
                await listener.group.mark(
                    FAN_MARK_ADD | FAN_MARK_MOUNT, PRE_ACCESS, path=str(tree.mount.path)
                )
                async with tree.filling():
                    await trio.sleep(chance.random() / 20)
        finally:
            for worker in workers:
                worker.kill()
        outputs = [await trio.to_thread.run_sync(worker.communicate) for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * len(workers), outputs
    done = [int(output.split()[0]) for output, _ in outputs]
    assert min(done) > 20, done
