"""`fusehsm` with a fault in it: `python -m tests.tier.failing FAULT ARGUMENT...`

"end=EXCEPTION": what runs beside the serving of a fetch fails with that as soon as standard input can be read.
"""

import builtins
import sys

import trio

from fusehsm.cli import main
from fusehsm.tier.keeping import Keeper


def put_in(fault: str) -> None:
    kind, _, word = fault.partition("=")
    assert kind == "end", fault
    exception = getattr(builtins, word)

    async def keep(self: Keeper) -> None:
        await trio.lowlevel.wait_readable(0)
        raise exception("put in by the test")

    Keeper.keep = keep  # type: ignore[method-assign]


if __name__ == "__main__":
    put_in(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
