"""One expectation, two worlds: which events an accessor's call makes, on a real kernel and on the emulator."""

import pytest

from fusehsm.conform.accessor import Accessor
from tests.same_change_rows import CHANGE_ROWS
from tests.same_rows import ROWS
from tests.table import row_names
from tests.worlds import Row, World, performed

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]


@pytest.mark.parametrize("row", [*ROWS, *CHANGE_ROWS], ids=row_names)
async def test_a_call_and_its_events(world: World, accessor: Accessor, row: Row) -> None:
    result, events = row.expected(world)
    heard, returned = await performed(world, accessor, row)
    assert (world.heard(heard), returned) == (events, result)
    assert {event.pid for event in heard} <= {accessor.pid}
