"""One expectation, two worlds: several groups, who is asked first, and what one's denial keeps from the others."""

import errno
import os
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest

from fusehsm.abi import (
    FAN_ALLOW,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_OPEN,
    FAN_REPORT_TID,
    encode_response,
)
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from tests.conftest import MakeAccessor
from tests.listening import HOLD
from tests.table import row_names
from tests.worlds import (
    ACCESS_PERM,
    CONTENT,
    EVERYTHING,
    OPEN_PERM,
    PAGE,
    PRE_ACCESS,
    PRE_GROUP,
    A,
    Failed,
    Mark,
    O,
    P,
    World,
    WorldListener,
    outcome,
)

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

CONTENT_GROUP = FAN_CLASS_CONTENT | FAN_CLOEXEC
NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC
PERMISSION = EVERYTHING & ~PRE_ACCESS  # what a group of class CONTENT may watch
LETTERS = {"OPEN_PERM": "O", "OPEN_EXEC_PERM": "X", "ACCESS_PERM": "A", "PRE_ACCESS": "P"}


@dataclass(frozen=True, slots=True)
class Member:
    """A group: its class's letter (R for PRE_CONTENT, C for CONTENT), a digit; the letter of the event it denies; its mark's mask."""

    name: str
    denies: str = ""
    mask: int = 0


@asynccontextmanager
async def groups(
    world: World, members: Sequence[Member], log: list[str]
) -> AsyncIterator[dict[str, WorldListener]]:
    """Groups for all of the world, made in that order; `log` gets e.g. "R1:P" for each event, in the order of asking."""
    async with AsyncExitStack() as stack:
        listeners = {}
        for member in members:
            pre = member.name[0] == "R"

            def answer(event: Event, member: Member = member) -> int:
                if not event.path.startswith(str(world.path)):
                    return 0
                letter = LETTERS[event.names[0]]
                log.append(f"{member.name}:{letter}")
                return errno.EBUSY if letter in member.denies else 0

            mark = world.everywhere(member.mask or (EVERYTHING if pre else PERMISSION))
            listeners[member.name] = await stack.enter_async_context(
                world.listener(mark, flags=PRE_GROUP if pre else CONTENT_GROUP, answer=answer)
            )
        yield listeners


@dataclass(frozen=True, slots=True)
class GroupsRow:
    """Groups in the order of their making, and who is asked what, in order, when a file is opened and read."""

    name: str
    members: Sequence[Member]
    asked: str
    result: object = CONTENT[5000:5100]


R, C = Member("R1"), Member("C1")
GROUP_ROWS = [
    GroupsRow("one of PRE_CONTENT", [R], "R1:O R1:P R1:A"),
    GroupsRow("one of CONTENT", [C], "C1:O C1:A"),
    GroupsRow("PRE_CONTENT made first", [R, C], "R1:O C1:O R1:P R1:A C1:A"),
    GroupsRow("CONTENT made first", [C, R], "R1:O C1:O R1:P R1:A C1:A"),
    GroupsRow("different masks", [C, Member("R1", mask=PRE_ACCESS)], "C1:O R1:P C1:A"),
    GroupsRow(
        "different masks of PRE_CONTENT",
        [Member("R1", mask=PRE_ACCESS), Member("R2", mask=ACCESS_PERM | OPEN_PERM)],
        "R2:O R1:P R2:A",
    ),
    GroupsRow("the first denies open", [C, Member("R1", "O")], "R1:O", Failed(errno.EBUSY)),
    GroupsRow("the second denies open", [Member("C1", "O"), R], "R1:O C1:O", Failed(errno.EPERM)),
    GroupsRow("the first denies P", [C, Member("R1", "P")], "R1:O C1:O R1:P", Failed(errno.EBUSY)),
    GroupsRow("the first denies A", [C, Member("R1", "A")], "R1:O C1:O R1:P R1:A", Failed(errno.EBUSY)),
    GroupsRow("the second denies A", [Member("C1", "A"), R], "R1:O C1:O R1:P R1:A C1:A", Failed(errno.EPERM)),
    GroupsRow(
        "both deny P and A", [Member("C1", "A"), Member("R1", "P")], "R1:O C1:O R1:P", Failed(errno.EBUSY)
    ),
]


@pytest.mark.parametrize("row", GROUP_ROWS, ids=row_names)
async def test_the_order_of_groups(world: World, accessor: Accessor, row: GroupsRow) -> None:
    path = world.file()
    log: list[str] = []
    async with groups(world, row.members, log):
        assert await outcome(lambda: accessor.run("pread_path", path, 100, 5000)) == row.result
        assert " ".join(log) == row.asked


async def test_two_groups_of_one_class(world: World, accessor: Accessor) -> None:
    """Which of them is asked first is arbitrary, and stays as it is; the third, of a lower class, comes last."""
    path = world.file()
    log: list[str] = []
    async with groups(world, [Member("R1"), Member("C1"), Member("R2")], log):
        await accessor.run("pread_path", path, 100, 5000)
    first, second = log[0][:2], log[1][:2]
    assert {first, second} == {"R1", "R2"}
    wanted = f"{first}:O {second}:O C1:O {first}:P {second}:P {first}:A {second}:A C1:A"
    assert " ".join(log) == wanted


async def test_a_denial_among_two_of_one_class(world: World, accessor: Accessor) -> None:
    """The accessor is refused whoever is asked first; who denies is asked, the other perhaps."""
    path = world.file()
    log: list[str] = []
    async with groups(world, [Member("R1", mask=PRE_ACCESS), Member("R2", "P", mask=PRE_ACCESS)], log):
        assert await outcome(lambda: accessor.run("pread_path", path, 100, 5000)) == Failed(errno.EBUSY)
    assert set(log) in ({"R1:P", "R2:P"}, {"R2:P"})
    assert len(log) == len(set(log))


async def test_the_second_is_asked_after_the_first_has_allowed(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with (
        world.listener(world.everywhere(PERMISSION), flags=CONTENT_GROUP) as second,
        world.listener(world.everywhere(OPEN_PERM), answer=lambda event: HOLD) as first,
    ):
        call = accessor.start("pread_path", path, 100, 5000)
        await first.wait_for(1)
        assert second.take() == []
        assert not call.done
        first.release()
        assert await call.wait() == CONTENT[5000:5100]
        assert world.heard(second.take()) == [O, A]


async def test_an_ignore_mark_is_its_own_groups(world: World, accessor: Accessor) -> None:
    path = world.file()
    ignoring = Mark(PRE_ACCESS, path, FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY)
    async with world.listener(world.everywhere(), ignoring) as one, world.listener(world.everywhere()) as two:
        await accessor.run("pread_path", path, 100, 5000)
        assert world.heard(one.take()) == [O, A]
        assert world.heard(two.take()) == [O, P(PAGE, PAGE), A]


async def test_what_a_closed_group_owed_goes_to_the_next(world: World, accessor: Accessor) -> None:
    """A group that closes allows what it holds; groups that come after it are asked all the same."""
    path = world.file()
    async with world.listener(world.everywhere(PERMISSION), flags=CONTENT_GROUP) as second:
        group = await world.open_group()
        await group.mark(FAN_MARK_ADD | world.everywhere().flags, OPEN_PERM, path=str(world.path))
        call = accessor.start("pread_path", path, 100, 5000)
        await group.wait_readable()
        assert second.take() == []
        group.close()
        assert await call.wait() == CONTENT[5000:5100]
        assert world.heard(second.take()) == [O, A]


@pytest.mark.parametrize("taken", [False, True], ids=["queued", "read"])
@pytest.mark.parametrize("mask", [OPEN_PERM, ACCESS_PERM, PRE_ACCESS], ids=["O", "A", "P"])
async def test_closing_allows(world: World, accessor: Accessor, mask: int, taken: bool) -> None:
    path = world.file()
    group = await world.open_group()
    await group.mark(FAN_MARK_ADD | world.everywhere().flags, mask, path=str(world.path))
    call = accessor.start("pread_path", path, 100, 5000)
    await group.wait_readable()
    if taken:
        (event,) = group.take_events()
        os.close(event.fd)
    assert not call.done
    group.close()
    assert await call.wait() == CONTENT[5000:5100]
    assert await accessor.run("pread_path", path, 100, 0) == CONTENT[:100]


async def test_a_notifications_group_does_not_disturb(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with (
        world.listener(world.everywhere(FAN_OPEN), flags=NOTIF_GROUP),
        world.listener(world.everywhere()) as listener,
    ):
        await accessor.run("pread_path", path, 100, 5000)
        assert world.heard(listener.take()) == [O, P(PAGE, PAGE), A]


# Several events of one group at once


async def test_events_are_queued_in_order_and_answered_in_any(
    world: World, make_accessor: MakeAccessor
) -> None:
    paths = [world.file(f"file-{number}") for number in range(5)]
    accessors = [make_accessor() for _ in paths]
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        calls = []
        for number, (accessor, path) in enumerate(zip(accessors, paths, strict=True)):
            calls.append(accessor.start("pread_path", path, 100, number * PAGE))
            await listener.wait_for(number + 1)
        assert world.heard(listener.take()) == [P(n * PAGE, PAGE, f"file-{n}") for n in range(5)]
        held = listener.take_held()
        assert [event.pid for event in held] == [accessor.pid for accessor in accessors]
        for number in (3, 0, 4, 2, 1):
            listener.group.write(encode_response(held[number].fd, FAN_ALLOW))
            os.close(held[number].fd)
            assert await calls[number].wait() == CONTENT[number * PAGE :][:100]
            assert [call.done for call in calls] == [
                n in (3, 0, 4, 2, 1)[: (3, 0, 4, 2, 1).index(number) + 1] for n in range(5)
            ]


async def test_accessors_of_one_file_do_not_wait_for_each_other(
    world: World, make_accessor: MakeAccessor
) -> None:
    """Each has its event at once, and the later ones may finish first (writers among themselves: divergence "writers of one file")."""
    path = world.file()
    readers, writer = [make_accessor(), make_accessor()], make_accessor()
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        calls = [readers[0].start("pread_path", path, 100, 0)]
        await listener.wait_for(1)
        calls.append(writer.start("pwrite_path", path, b"new", 0))
        await listener.wait_for(2)
        calls.append(readers[1].start("pread_path", path, 100, 5000))
        await listener.wait_for(3)
        assert world.heard(listener.take()) == [P(0, PAGE), P(0, PAGE), P(PAGE, PAGE)]
        results = []
        for number, event in reversed(list(enumerate(listener.take_held()))):
            listener.group.answer(event, 0)
            os.close(event.fd)
            results.append(await calls[number].wait())
    assert results == [CONTENT[5000:5100], 3, b"new" + CONTENT[3:100]]


def two_threads_read(path: str) -> list[bytes]:
    descriptor = os.open(path, os.O_RDONLY)
    data: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: data.append(os.pread(descriptor, 100, 5000))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return data


async def test_two_threads_that_read_the_same_are_asked_for_both(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        call = accessor.start(two_threads_read, path)
        await listener.wait_for(2)
        assert world.heard(listener.take()) == [P(PAGE, PAGE), P(PAGE, PAGE)]
        assert listener.release() == 2
        assert await call.wait() == [CONTENT[5000:5100]] * 2


def read_in_thread_and_tell(path: str) -> tuple[int, int]:
    descriptor = os.open(path, os.O_RDONLY)
    found = []

    def read() -> None:
        found.append(threading.get_native_id())
        os.pread(descriptor, 100, 5000)

    thread = threading.Thread(target=read)
    thread.start()
    thread.join()
    return threading.get_native_id(), found[0]


async def test_thread_ids_with_report_tid(world: World, accessor: Accessor) -> None:
    path = world.file()
    async with world.listener(world.everywhere(), flags=PRE_GROUP | FAN_REPORT_TID) as listener:
        opener, reader = await accessor.run(read_in_thread_and_tell, path)
        heard = listener.take()
    assert world.heard(heard) == [O, P(PAGE, PAGE), A]
    assert [event.pid for event in heard] == [opener, reader, reader]
