"""read(2) of a group says EAGAIN only when no event is queued, however many there were and however long their paths are."""

import os
from collections.abc import Callable

import pytest

from fusehsm.backends.base import Group
from fusehsm.conform.accessor import Accessor
from fusehsm.control.protocol import CREDIT
from fusehsm.fanotify.abi import FAN_CLASS_NOTIF, FAN_CLOEXEC, FAN_MARK_ADD, FAN_OPEN, decode_events
from tests.support.kernel_and_mount import PAGE, PRE_ACCESS, World

pytest_plugins = ["tests.support.handler_fixtures"]

NOTIF_GROUP = FAN_CLASS_NOTIF | FAN_CLOEXEC
MANY = 5 * CREDIT + 7


def drain(take: Callable[[], list[int]]) -> int:
    """How many events there are until EAGAIN. `take` gives the descriptors of the next ones."""
    count = 0
    while True:
        try:
            descriptors = take()
        except BlockingIOError:
            return count
        for descriptor in descriptors:
            os.close(descriptor)
        count += len(descriptors)


def read_all(group: Group) -> int:
    """In large reads."""
    return drain(lambda: [event.fd for event in decode_events(group.dialect, group.read(1 << 16))])


def read_one_by_one(group: Group) -> int:
    """In reads of one event."""

    def take() -> list[int]:
        (event,) = decode_events(group.dialect, group.read(30))
        return [event.fd]

    return drain(take)


def take_all(group: Group) -> int:
    """As values."""
    return drain(lambda: [event.fd for event in group.take_events()])


def open_each(directory: str, number: int) -> None:
    """Open so many files."""
    for index in range(number):
        os.close(os.open(f"{directory}/{index}", os.O_RDONLY))


@pytest.mark.parametrize("count", [read_all, read_one_by_one, take_all])
@pytest.mark.parametrize("number", [0, 1, CREDIT - 1, CREDIT, CREDIT + 1, MANY])
async def test_all_that_is_queued(
    world: World, accessor: Accessor, number: int, count: Callable[[Group], int]
) -> None:
    place = world.inside("queued")
    for index in range(number):
        place.file(str(index), size=1)
    async with await world.open_group(NOTIF_GROUP) as group:
        for index in range(number):
            await group.mark(FAN_MARK_ADD, FAN_OPEN, path=str(place.path / str(index)))
        for _ in range(2):
            await accessor.run(open_each, str(place.path), number)
            assert count(group) == number


async def test_events_with_long_paths(world: World, accessor: Accessor) -> None:
    """Fewer of them fit into a socket."""
    directory = world.inside("deep")
    names = ["d" * 250] * 14
    for name in names:
        directory = directory.inside(name)
    for index in range(CREDIT):
        directory.file(str(index), size=1)
    async with await world.open_group(NOTIF_GROUP) as group:
        for index in range(CREDIT):
            await group.mark(FAN_MARK_ADD, FAN_OPEN, path=str(directory.path / str(index)))
        await accessor.run(open_each, str(directory.path), CREDIT)
        assert read_all(group) == CREDIT


async def test_a_drained_group_hears_what_comes_next(world: World, accessor: Accessor) -> None:
    """Also when the drain ended with all the credit used, and the group is waited for."""
    path = world.file(size=PAGE)
    async with await world.open_group() as group:
        await group.mark(FAN_MARK_ADD, PRE_ACCESS, path=path)
        for _ in range(2 * CREDIT + 1):
            call = accessor.start("pread_path", path, 1, 0)
            await group.wait_readable()
            (event,) = group.take_events()
            with pytest.raises(BlockingIOError):
                group.take_events()
            os.close(event.fd)
            group.answer(event, 0)
            assert len(await call.wait()) == 1
