"""One expectation, two worlds: what a denied call fails with, what it leaves behind, and that nobody remembers it."""

import errno
import mmap
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from fusehsm.abi import FAN_CLASS_CONTENT, FAN_CLOEXEC, LINUX_6_14
from fusehsm.conform.accessor import Accessor, AccessorDied
from fusehsm.events import Event
from tests.conftest import MakeAccessor
from tests.table import row_names
from tests.test_same_programs import program, run_program
from tests.worlds import (
    CONTENT,
    EVERYTHING,
    MIB,
    PAGE,
    PLAIN_DENY,
    PRE_ACCESS,
    SIZE,
    A,
    Expected,
    Failed,
    O,
    P,
    World,
    X,
    outcome,
)

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

# What a listener may say, and what the accessor gets.
ANSWERS = {PLAIN_DENY: errno.EPERM} | {number: number for number in sorted(LINUX_6_14.deny_errnos) if number}
SEVEN = {
    *(errno.EPERM, errno.EIO, errno.EAGAIN, errno.EBUSY, errno.ETXTBSY, errno.ENOSPC, errno.EDQUOT),
}


def test_all_seven_errnos_are_tried() -> None:
    assert set(ANSWERS) == {PLAIN_DENY, *SEVEN}
    assert set(ANSWERS.values()) == SEVEN


class Denier:
    """An answer that denies the event of that name, the `number`th since reset(), as it is told."""

    def __init__(self, world: World, name: str) -> None:
        self._place = f"{world.path}/"
        self._name = name
        self.answer = 0
        self.skip = 0

    def __call__(self, event: Event) -> int:
        if not self.answer or self._name not in event.names or not event.path.startswith(self._place):
            return 0
        if self.skip:
            self.skip -= 1
            return 0
        return self.answer


# The calls: each on a path, opening it first where it needs to.


def open_for_reading(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def open_for_both(path: str) -> None:
    os.close(os.open(path, os.O_RDWR))


def open_and_truncate(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def pread(path: str, count: int = 100) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, count, 5000)
    finally:
        os.close(descriptor)


def read(path: str) -> bytes:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, 100)
    finally:
        assert os.lseek(descriptor, 0, os.SEEK_CUR) in (0, 100)
        os.close(descriptor)


def readv(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.readv(descriptor, [bytearray(100), bytearray(50)])
    finally:
        os.close(descriptor)


def pwrite(path: str, count: int = 100, flags: int = 0) -> int:
    descriptor = os.open(path, os.O_WRONLY | flags)
    try:
        return os.pwrite(descriptor, bytes(count), 5000)
    finally:
        os.close(descriptor)


def truncate(path: str) -> None:
    os.truncate(path, 5000)


def ftruncate(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.ftruncate(descriptor, 5000)
    finally:
        os.close(descriptor)


def send(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    ours, theirs = socket.socketpair()
    try:
        return os.sendfile(theirs.fileno(), descriptor, 5000, 100)
    finally:
        os.close(descriptor)
        ours.close()


def splice_from(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY)
    reading, writing = os.pipe()
    try:
        return os.splice(descriptor, writing, 100, offset_src=5000)
    finally:
        for used in (descriptor, reading, writing):
            os.close(used)


def splice_to(path: str) -> int:
    reading, writing = os.pipe()
    os.write(writing, bytes(100))
    descriptor = os.open(path, os.O_WRONLY)
    try:
        return os.splice(reading, descriptor, 100, offset_dst=5000)
    finally:
        for used in (descriptor, reading, writing):
            os.close(used)


def copy_range(path: str) -> int:
    source = os.open(path, os.O_RDONLY)
    target = os.open(path, os.O_WRONLY)
    try:
        return os.copy_file_range(source, target, 100, 5000, 0)
    finally:
        os.close(source)
        os.close(target)


def execute(path: str) -> None:
    child = os.fork()
    if child == 0:
        try:
            os.execve(path, [path], {})
        except OSError as error:
            os._exit(error.errno or 0)
    failed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if failed:
        raise OSError(failed, os.strerror(failed))


@dataclass(frozen=True, slots=True)
class Denial:
    """A call, the event that is denied, and what is heard until then."""

    call: Callable[..., object]
    denied: str
    events: Sequence[Expected]
    arguments: tuple[object, ...] = ()
    skip: int = 0

    @property
    def name(self) -> str:
        words = "_".join([self.call.__name__, *map(str, self.arguments)])
        return f"{words} {self.denied} {self.skip or ''}".strip()


READ = (P(PAGE, PAGE), A)
LARGE = (P(PAGE, 3 * MIB + PAGE), A)
FIRST = (P(0, PAGE), A)
OPEN, EXEC, ACCESS, PRE = "OPEN_PERM", "OPEN_EXEC_PERM", "ACCESS_PERM", "PRE_ACCESS"
DENIALS = [
    Denial(open_for_reading, OPEN, [O]),
    Denial(open_for_both, OPEN, [O]),
    Denial(open_and_truncate, OPEN, [O]),
    Denial(pread, PRE, [O, READ[0]]),
    Denial(pread, ACCESS, [O, *READ]),
    Denial(pread, PRE, [O, LARGE[0]], (3 * MIB,)),
    Denial(pread, ACCESS, [O, *LARGE], (3 * MIB,)),
    Denial(read, PRE, [O, FIRST[0]]),
    Denial(read, ACCESS, [O, *FIRST]),
    Denial(readv, PRE, [O, FIRST[0]]),
    Denial(pwrite, PRE, [O, P(PAGE, PAGE)]),
    Denial(pwrite, PRE, [O, P(PAGE, 3 * MIB + PAGE)], (3 * MIB,)),
    Denial(pwrite, PRE, [O, P(PAGE, PAGE)], (100, os.O_APPEND)),
    Denial(truncate, PRE, [P(PAGE, PAGE)]),
    Denial(ftruncate, PRE, [O, P(PAGE, PAGE)]),
    Denial(send, PRE, [O, READ[0]]),
    Denial(send, ACCESS, [O, *READ]),
    Denial(splice_from, PRE, [O, READ[0]]),
    Denial(splice_from, ACCESS, [O, *READ]),
    Denial(splice_to, PRE, [O, P(PAGE, PAGE)]),
    Denial(copy_range, PRE, [O, O, READ[0]]),
    Denial(copy_range, ACCESS, [O, O, *READ]),
    Denial(copy_range, PRE, [O, O, *READ, P(0, PAGE)], (), 1),
]


@pytest.mark.parametrize("row", DENIALS, ids=row_names)
async def test_every_errno_reaches_the_accessor(world: World, accessor: Accessor, row: Denial) -> None:
    """Each answer twice: a denial is not remembered, so the second call is asked again; and the file stays as it was."""
    path = world.file(size=MIB)
    denier = Denier(world, row.denied)
    async with world.listener(world.everywhere(), answer=denier) as listener:
        for answer, error in ANSWERS.items():
            for _ in range(2):
                denier.answer, denier.skip = answer, row.skip
                failed = await outcome(lambda: accessor.run(row.call, path, *row.arguments))
                assert (failed, world.heard(listener.take())) == (Failed(error), list(row.events))
    assert world.content() == CONTENT[:MIB]
    # The same call, allowed at last.
    async with world.listener(world.everywhere()) as listener:
        await accessor.run(row.call, path, *row.arguments)
        assert world.heard(listener.take())[: len(row.events)] == list(row.events)


EXEC_DENIALS = [
    Denial(execute, EXEC, [X]),
    Denial(execute, OPEN, [X, O]),
    Denial(execute, PRE, [X, O, FIRST[0]]),
    Denial(execute, ACCESS, [X, O, *FIRST]),
]


@pytest.mark.parametrize("row", EXEC_DENIALS, ids=row_names)
async def test_every_errno_reaches_execve(world: World, accessor: Accessor, row: Denial) -> None:
    path = program(world)
    denier = Denier(world, row.denied)
    async with world.listener(world.everywhere(), answer=denier) as listener:
        for denier.answer, error in ANSWERS.items():
            failed = await outcome(lambda: accessor.run(row.call, path))
            assert (failed, world.heard(listener.take())) == (Failed(error), list(row.events))
        denier.answer = 0
        await accessor.run(row.call, path)


@pytest.mark.parametrize("row", EXEC_DENIALS, ids=row_names)
async def test_every_errno_reaches_execve_of_a_script(world: World, accessor: Accessor, row: Denial) -> None:
    (world.backing / "file").write_text("#!/bin/sh\nexit 0\n")
    (world.backing / "file").chmod(0o755)
    denier = Denier(world, row.denied)
    async with world.listener(world.everywhere(), answer=denier) as listener:
        for denier.answer, error in ANSWERS.items():
            failed = await outcome(lambda: accessor.run(row.call, str(world.path / "file")))
            assert (failed, world.heard(listener.take())) == (Failed(error), list(row.events))


@pytest.mark.parametrize("name", ["PRE_ACCESS", "ACCESS_PERM"])
async def test_a_denial_of_the_second_read_of_execve(world: World, accessor: Accessor, name: str) -> None:
    """The loader of programs hides its errno: ENOEXEC."""
    path = program(world)
    denier = Denier(world, name)
    async with world.listener(world.everywhere(), answer=denier):
        denier.answer, denier.skip = errno.EBUSY, 1
        _, status = await accessor.run(run_program, path)
        assert status == 200 + errno.ENOEXEC


@pytest.mark.parametrize("flags", [os.O_CREAT | os.O_EXCL, os.O_CREAT | os.O_TRUNC])
async def test_a_new_file_stays_when_its_open_is_denied(world: World, accessor: Accessor, flags: int) -> None:
    denier = Denier(world, OPEN)
    denier.answer = errno.ENOSPC
    async with world.listener(world.everywhere(), answer=denier) as listener:
        path = str(world.path / "file")
        opened = await outcome(lambda: accessor.run("open", path, flags | os.O_RDWR, 0o600))
        assert (opened, world.heard(listener.take())) == (Failed(errno.ENOSPC), [O])
        assert (await accessor.run("stat", path)).st_size == 0
        assert await accessor.run("listdir", str(world.path)) == ["file"]
    assert world.content() == b""


@pytest.mark.parametrize("flags", [0, os.O_CREAT])
async def test_a_file_keeps_its_size_when_truncating_it_open_is_denied(
    world: World, accessor: Accessor, flags: int
) -> None:
    path = world.file()
    denier = Denier(world, OPEN)
    denier.answer = PLAIN_DENY
    async with world.listener(world.everywhere(), answer=denier) as listener:
        opened = await outcome(lambda: accessor.run("open", path, flags | os.O_TRUNC | os.O_RDWR))
        assert (opened, world.heard(listener.take())) == (Failed(errno.EPERM), [O])
        assert (await accessor.run("stat", path)).st_size == SIZE
    assert world.content() == CONTENT[:SIZE]


async def test_class_content_denies_with_eperm(world: World, accessor: Accessor) -> None:
    path = world.file()
    for name in (OPEN, ACCESS):
        denier = Denier(world, name)
        denier.answer = PLAIN_DENY
        group = FAN_CLASS_CONTENT | FAN_CLOEXEC
        async with world.listener(world.everywhere(EVERYTHING & ~PRE_ACCESS), flags=group, answer=denier):
            assert await outcome(lambda: accessor.run(pread, path)) == Failed(errno.EPERM)


async def test_directories(world: World, accessor: Accessor) -> None:
    (world.backing / "sub").mkdir()
    directory = str(world.path / "sub")
    for name in (OPEN, ACCESS):
        denier = Denier(world, name)
        async with world.listener(
            world.everywhere(EVERYTHING & ~PRE_ACCESS | 0x40000000), answer=denier
        ) as listener:
            for denier.answer, error in ANSWERS.items():
                failed = await outcome(lambda: accessor.run("listdir", directory))
                events = [O.of("sub")] if name == OPEN else [O.of("sub"), A.of("sub")]
                assert (failed, world.heard(listener.take())) == (Failed(error), events)


# Mappings: known divergence "mappings ask when touched"


def map_and_touch(path: str, kind: int) -> bytes:
    descriptor = os.open(path, os.O_RDWR)
    mapping = mmap.mmap(descriptor, 8192, flags=kind, prot=mmap.PROT_READ, offset=4096)
    return mapping[5000:5001]


@pytest.mark.parametrize("answer", ANSWERS)
async def test_mappings(world: World, make_accessor: MakeAccessor, answer: int) -> None:
    path = world.file()
    denier = Denier(world, PRE)
    async with world.listener(world.everywhere(), answer=denier) as listener:
        for _ in range(2):
            denier.answer = answer
            call = make_accessor().start(map_and_touch, path, mmap.MAP_PRIVATE)
            if world.is_kernel:
                assert await outcome(call.wait) == Failed(ANSWERS[answer])
            else:
                with pytest.raises(AccessorDied) as died:
                    await call.wait()
                assert died.value.signal == signal.SIGBUS
            # The kernel tries a page again that FUSE refused; nobody is asked again.
            assert world.heard(listener.take()) == [O, P(PAGE, 2 * PAGE)]
        denier.answer = 0
        allowed = await make_accessor().run(map_and_touch, path, mmap.MAP_PRIVATE)
        assert allowed == CONTENT[9096:9097]
        assert world.heard(listener.take()) == [O, P(PAGE, 2 * PAGE)]


def read_twice(path: str, count: int) -> list[object]:
    descriptor = os.open(path, os.O_RDONLY)
    results: list[object] = []
    for _ in range(3):
        try:
            results.append(os.pread(descriptor, count, 5000))
        except OSError as error:
            results.append(error.errno)
    return results


@pytest.mark.parametrize("count", [100, 4096, 2 * MIB])
async def test_a_denial_is_not_remembered(world: World, accessor: Accessor, count: int) -> None:
    """Through one descriptor: denied, denied with something else, allowed."""
    path = world.file(size=3 * MIB)
    answers = iter([errno.EIO, errno.EAGAIN, 0])

    def answer(event: Event) -> int:
        return next(answers) if event.names == [PRE] else 0

    async with world.listener(world.everywhere(), answer=answer) as listener:
        results = await accessor.run(read_twice, path, count)
        assert results == [errno.EIO, errno.EAGAIN, CONTENT[5000 : 5000 + count]]
        asked = P(PAGE, -(-(5000 + count) // PAGE) * PAGE - PAGE)
        assert world.heard(listener.take()) == [O, asked, asked, asked, A]
