"""One expectation, two worlds: which events an accessor's call makes, on a real kernel and on the emulator."""

import pytest

from tests.accessor import Accessor
from tests.same_change_rows import CHANGE_ROWS
from tests.same_rows import ROWS
from tests.table import row_names
from tests.worlds import Row, World, outcome

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


@pytest.mark.parametrize("row", [*ROWS, *CHANGE_ROWS], ids=row_names)
async def test_a_call_and_its_events(world: World, accessor: Accessor, row: Row) -> None:
    path = world.file(size=row.size)
    world.file("other", size=row.size)
    result, events = row.expected(world)
    async with world.listener(world.everywhere()) as listener:
        returned = await outcome(lambda: accessor.run(row.act, path, *row.arguments))
        heard = listener.take()
    assert (world.heard(heard), returned) == (events, result)
    assert {event.pid for event in heard} <= {accessor.pid}
