"""One stub, looked at closely: what its record promises at each moment, and what may be put where."""

import errno
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fusehsm.linux import syscalls
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.content import may_have_grown_to, write_without_growing
from fusehsm.tier.stubs.mark import StubMark
from fusehsm.tier.stubs.record import Flags
from fusehsm.tier.stubs.stub import InDoubt, StubFile
from fusehsm.tier.stubs.tree import Namespace, Tree
from tests.support import harness
from tests.support.requirements import require_root
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.root

BLOCK = 16384
PUNCH = 0x03
SIZE = 5 * BLOCK + 100
CONTENT = content_of(SIZE, 3)


class Stub:
    """A stub of CONTENT; again() is what a new fetch knows of it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_RDWR)
        self.file = self.again()

    def again(self, place: bytes | None = None) -> StubFile:
        tree = Tree.of(self.fd)
        if place is not None:
            tree = replace(tree, place=place)
        file = StubFile.recover(self.fd, "stub", tree, BLOCK)
        assert file is not None
        self.file = file
        return file

    def fill(self, *blocks: int) -> None:
        for block in blocks:
            data = CONTENT[block * BLOCK : min((block + 1) * BLOCK, self.file.limit)]
            self.file.fill(self.fd, block, block + 1, [(block * BLOCK, data)], lambda: True)

    def record(self) -> residency.Record:
        mark = stub_mark.read(self.fd, Namespace.at(self.fd))
        assert mark is not None
        record = residency.read(self.fd, mark, Namespace.at(self.fd))
        assert record is not None
        return record


@pytest.fixture
def stub(places: Callable[[str], Path]) -> Iterator[Stub]:
    require_root()
    store, target = places("store"), places("tree")
    (store / "stub").write_bytes(CONTENT)
    os.utime(store / "stub", ns=(1, 1_700_000_000_000_000_000))
    plant(store, target)
    stub = Stub(target / "stub")
    yield stub
    os.close(stub.fd)


def test_a_fill_does_not_undo_a_truncation(stub: Stub) -> None:
    """The size is what it was when the fill began."""
    os.ftruncate(stub.fd, 100)
    write_without_growing(stub.fd, memoryview(CONTENT)[5 * BLOCK :], 5 * BLOCK, SIZE, "")
    assert os.fstat(stub.fd).st_size == 100
    # All but the last page may make it longer, but not as long as it was.
    write_without_growing(stub.fd, memoryview(CONTENT)[4 * BLOCK : 5 * BLOCK], 4 * BLOCK, SIZE, "")
    assert may_have_grown_to(os.fstat(stub.fd).st_size, SIZE, 5 * BLOCK)
    write_without_growing(stub.fd, memoryview(CONTENT)[4 * BLOCK :], 4 * BLOCK, SIZE, "")
    assert may_have_grown_to(os.fstat(stub.fd).st_size, SIZE, SIZE)


def test_a_small_file_stays_empty(stub: Stub) -> None:
    os.ftruncate(stub.fd, 0)
    write_without_growing(stub.fd, memoryview(CONTENT)[:3000], 0, 3000, "")
    assert os.fstat(stub.fd).st_size == 0


def test_the_last_page_is_written(stub: Stub) -> None:
    stub.fill(*range(6))
    assert os.pread(stub.fd, SIZE, 0) == CONTENT
    assert stub.file.is_complete


def test_a_limit_is_recorded_before_the_file_may_grow(stub: Stub) -> None:
    stub.fill(0)
    os.ftruncate(stub.fd, BLOCK)
    stub.fill(0)  # takes note of it
    assert not stub.file.unrecorded
    assert stub.record().limit == BLOCK
    os.ftruncate(stub.fd, 100)
    # Killed here, and nobody has taken note.
    file = stub.again()
    assert file.unrecorded
    file.look(stub.fd)
    assert stub.record().limit == 100
    os.ftruncate(stub.fd, SIZE)
    assert stub.again().missing(0, SIZE) == []


def test_what_a_killed_fill_has_left_is_taken(stub: Stub) -> None:
    stub.fill(0)
    os.pwrite(stub.fd, CONTENT[BLOCK : BLOCK + 4096], BLOCK)
    stub.again()
    stub.fill(1)
    assert os.pread(stub.fd, 2 * BLOCK, 0) == CONTENT[: 2 * BLOCK]


def test_what_was_written_into_a_hole_is_in_doubt(stub: Stub) -> None:
    """The kernel lets a write go on when the listener dies; around it in its page are zeros that no program has written."""
    stub.fill(0)
    os.pwrite(stub.fd, b"mine", BLOCK + 100)
    stub.again()
    with pytest.raises(InDoubt, match="while no fetch served it"):
        stub.fill(1)
    assert stub.file.missing(0, SIZE) == [1, 2, 3, 4, 5]
    stub.fill(2)


def test_nor_is_it_read_when_nothing_was_known_of_the_file(stub: Stub) -> None:
    """Not even once it has been made shorter."""
    os.pwrite(stub.fd, b"m" * 20_000, 160)
    os.ftruncate(stub.fd, 12_288)
    stub.again()
    assert stub.file.unexplained
    assert stub.file.lacks(stub.fd, 0, 4096)
    assert not stub.file.lacks(stub.fd, 4096, 12_288)
    os.ftruncate(stub.fd, 50)
    stub.again()
    assert stub.file.lacks(stub.fd, 0, 50)


def test_only_the_part_that_is_read_is_looked_at(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may have a million holes."""
    for page in range(0, SIZE, 8192):
        os.pwrite(stub.fd, b"m", page)
    stub.again()
    assert stub.file.unexplained
    calls = 0
    seek = os.lseek

    def count(fd: int, offset: int, whence: int) -> int:
        nonlocal calls
        calls += 1
        return seek(fd, offset, whence)

    monkeypatch.setattr(os, "lseek", count)
    for offset in range(0, SIZE - 100, 4096):
        assert stub.file.lacks(stub.fd, offset, offset + 100)
    assert calls <= 10 * (SIZE // 4096)


def test_what_is_looked_at_ends_where_the_users_data_goes_on(stub: Stub) -> None:
    """A zero at the edge of the part that is read is the user's if their data goes on beyond it."""
    os.pwrite(stub.fd, b"m" * 8192 + bytes(8192) + b"m" * (BLOCK + 4096), 4096)
    stub.again()
    assert stub.file.unexplained
    for offset in range(4096, 2 * BLOCK, 4096):
        assert not stub.file.lacks(stub.fd, offset, offset + 4096)
    assert stub.file.doubt(stub.fd, 0, 4096) == (0, 4096)
    assert stub.file.doubt(stub.fd, 0, SIZE) == (0, 4096)


def test_whole_pages_that_were_written_into_a_hole_are_the_users(stub: Stub) -> None:
    stub.fill(0)
    os.pwrite(stub.fd, b"m" * 4096, BLOCK + 4096)
    stub.again()
    stub.fill(1)
    assert (
        os.pread(stub.fd, BLOCK, BLOCK)
        == CONTENT[BLOCK : BLOCK + 4096] + b"m" * 4096 + CONTENT[BLOCK + 8192 : 2 * BLOCK]
    )
    assert stub.file.modified


def test_what_was_appended_to_a_hole_does_not_hide_the_end(stub: Stub) -> None:
    """The kernel asks for an append at the file position, so the last block need not be here."""
    stub.fill(0)
    os.pwrite(stub.fd, b"appended", SIZE)
    stub.file.user_modified(stub.fd)
    stub.fill(5)
    assert os.pread(stub.fd, BLOCK, 5 * BLOCK) == CONTENT[5 * BLOCK :] + b"appended"


def test_zeros_that_were_only_read_are_holes(stub: Stub) -> None:
    """Space may be allocated and its data not written when the power is cut; pages of it that were read then look like data."""
    os.posix_fallocate(stub.fd, BLOCK, BLOCK)
    stub.fill(0)
    os.pread(stub.fd, BLOCK, BLOCK)
    stub.fill(1)
    assert os.pread(stub.fd, BLOCK, BLOCK) == CONTENT[BLOCK : 2 * BLOCK]


def test_a_modification_in_the_moment_of_a_fill_is_not_lost(stub: Stub) -> None:
    """The fill has put the old time back: the event tells of it."""
    before = os.fstat(stub.fd).st_mtime_ns
    stub.fill(0)
    assert os.fstat(stub.fd).st_mtime_ns == before
    stub.file.user_modified(stub.fd)
    assert os.fstat(stub.fd).st_mtime_ns > before
    assert stub.record().flags & Flags.MODIFIED
    assert stub.record().flags & Flags.SYNCED


def test_what_was_filled_when_killed_is_not_taken_away(stub: Stub) -> None:
    """Another process may have written at the same time."""
    stub.fill(0)
    file = stub.again()
    with pytest.raises(OSError) as raised:
        file.expect_evictable()
    assert raised.value.errno == errno.EBUSY
    assert not file.unexplained


def test_what_has_come_to_rest_can_be_taken_away(stub: Stub) -> None:
    stub.fill(0)
    os.close(stub.fd)
    stub.fd = os.open(stub.path, os.O_RDONLY)  # as Keeper has it
    stub.file.seal(stub.fd, stub.file.changes)
    stub.again().expect_evictable()


def test_after_a_power_cut_lost_blocks_come_again(stub: Stub) -> None:
    stub.fill(0, 1)
    record = stub.record()
    syscalls.fallocate(stub.fd, PUNCH, BLOCK, BLOCK)
    os.utime(stub.fd, ns=(1, record.mtime_ns))
    replace(record, recorded_ns=time.time_ns() - 5_000_000).write(stub.fd, Namespace.at(stub.fd))
    assert stub.again().missing(0, SIZE) == [2, 3, 4, 5]
    assert stub.again(b"elsewhe.").missing(0, SIZE) == [1, 2, 3, 4, 5]
    assert not stub.file.unexplained


@pytest.mark.parametrize("call", range(1, 6))
def test_killed_while_it_is_emptied(stub: Stub, call: int) -> None:
    stub.fill(*range(6))
    os.close(stub.fd)
    stub.fd = os.open(stub.path, os.O_RDONLY)
    stub.file.seal(stub.fd, stub.file.changes)
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.tier.emptied", str(stub.path), str(call)],
        cwd=harness.ROOT,
        env=harness.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, -9), done.stderr
    os.close(stub.fd)
    stub.fd = os.open(stub.path, os.O_RDWR)
    stub.again()
    stub.fill(*stub.file.missing(0, SIZE))
    assert os.pread(stub.fd, SIZE, 0) == CONTENT
    assert stub.file.is_complete


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 1},
        {"block_size": 1 << 63},
        {"limit": SIZE + 1},
        {"limit": (1 << 64) - 1},
        {"block_size": 1 << 62, "limit": (1 << 64) - 1},
        {"bits": b"\1" * 100},
    ],
    ids=str,
)
def test_a_record_that_tells_something_impossible_is_none(stub: Stub, change: dict[str, Any]) -> None:
    """Its owner may have written it."""
    stub.fill(1)
    replace(stub.record(), **change).write(stub.fd, Namespace.at(stub.fd))
    mark = stub_mark.read(stub.fd, Namespace.at(stub.fd))
    assert mark is not None
    assert residency.read(stub.fd, mark, Namespace.at(stub.fd)) is None
    assert stub.again().resident == 0


def test_a_byte_of_a_huge_file_takes_a_bounded_block() -> None:
    mib = 1 << 20
    assert residency.block_size_for(16 << 30, mib) == mib
    assert residency.block_size_for((16 << 30) + 1, mib) == 2 * mib
    for size in (1 << 40, 1 << 44):
        assert residency.block_size_for(size, mib) == 16 * mib
    assert residency.block_size_for(1 << 44, 64 * mib) == 64 * mib
    with pytest.raises(OSError, match="has more than") as failed:
        residency.block_size_for((1 << 44) + 1, mib)
    assert failed.value.errno == errno.EFBIG


def test_the_record_of_a_huge_file_is_compressed(places: Callable[[str], Path]) -> None:
    size, block_size = 1 << 43, 16 << 20
    blocks = residency.Blocks(size // block_size)
    for block in (0, 1, 2, 70_000, blocks.number - 1, *range(100_000, 300_000)):
        blocks.add(block)
    with open(places("stub") / "file", "w+b") as file:
        file.truncate(size)
        mark = StubMark.of(file.fileno(), "file", None)
        mark.write(file.fileno(), Namespace.USER)
        written = residency.Record(
            residency.digest_of(mark), bytes(8), Flags.OPEN, block_size, size, size, 0, 0, blocks.to_bytes()
        )
        written.write(file.fileno(), Namespace.USER)
        assert residency.read(file.fileno(), mark, Namespace.USER) == written
        # What its owner may put there: far more bits than there are blocks, and what is no stream.
        head = os.getxattr(file.fileno(), Namespace.USER.resident)[: residency._HEAD.size]
        for bits in (zlib.compress(bytes(1 << 21)), b"\xff" * 100):
            os.setxattr(file.fileno(), Namespace.USER.resident, head + bits)
            assert residency.read(file.fileno(), mark, Namespace.USER) is None


def test_missing_blocks_among_many() -> None:
    blocks = residency.Blocks(1 << 20, b"\xff" * (1 << 17))
    for block in (5, 77_777, 77_778, (1 << 20) - 1):
        blocks.discard(block)
    assert blocks.missing(0, 1 << 20) == [5, 77_777, 77_778, (1 << 20) - 1]
    assert blocks.missing(6, 77_778) == [77_777]
    assert blocks.missing(6, 1 << 21, 2) == [77_777, 77_778]
    assert residency.Blocks(1 << 20).missing(3, 1 << 20, 3) == [3, 4, 5]


def test_a_block_that_comes_in_parts_is_here_after_the_last(stub: Stub) -> None:
    parts = [(BLOCK + place, BLOCK + place + 4096) for place in range(0, BLOCK, 4096)]

    def put_in(file: StubFile, part: tuple[int, int]) -> None:
        assert file.fill(stub.fd, 1, 2, [(part[0], CONTENT[slice(*part)])], lambda: True, part) == 4096

    for part in parts[:2]:
        put_in(stub.file, part)
        assert stub.file.missing(BLOCK, 2 * BLOCK) == [1]
    # Killed here: what is there is the store's, and is taken.
    file = stub.again()
    assert file.missing(BLOCK, 2 * BLOCK) == [1]
    assert (
        file.fill(
            stub.fd, 1, 2, [(BLOCK, CONTENT[BLOCK : BLOCK + 8192])], lambda: True, (BLOCK, BLOCK + 8192)
        )
        == 0
    )
    for part in parts[2:]:
        assert file.missing(BLOCK, 2 * BLOCK) == [1]
        put_in(file, part)
    assert file.missing(BLOCK, 2 * BLOCK) == []
    assert os.pread(stub.fd, BLOCK, BLOCK) == CONTENT[BLOCK : 2 * BLOCK]
    assert stub.again().missing(BLOCK, 2 * BLOCK) == []


def test_a_part_with_the_users_data_is_in_doubt(stub: Stub) -> None:
    stub.fill(0)
    os.pwrite(stub.fd, b"mine", BLOCK + 5000)
    file = stub.again()
    first = BLOCK, BLOCK + 4096
    file.fill(stub.fd, 1, 2, [(BLOCK, CONTENT[slice(*first)])], lambda: True, first)
    second = BLOCK + 4096, 2 * BLOCK
    with pytest.raises(InDoubt):
        file.fill(stub.fd, 1, 2, [(second[0], CONTENT[slice(*second)])], lambda: True, second)
    assert file.missing(BLOCK, 2 * BLOCK) == [1]


def test_a_record_of_more_blocks_than_are_kept_is_none(places: Callable[[str], Path]) -> None:
    with open(places("stub") / "file", "w+b") as file:
        file.truncate(1 << 40)
        mark = StubMark.of(file.fileno(), "file", None)
        mark.write(file.fileno(), Namespace.USER)
        digest = residency.digest_of(mark)
        for block_size, is_record in ((1 << 20, True), (1 << 19, False)):
            record = residency.Record(digest, bytes(8), Flags.OPEN, block_size, 1 << 40, 1 << 40, 0, 0, b"")
            record.write(file.fileno(), Namespace.USER)
            assert (residency.read(file.fileno(), mark, Namespace.USER) is not None) == is_record
