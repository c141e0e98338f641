"""`fusehsm` with a fault in it: `python -m tests.support.tier.failing FAULT ARGUMENT...`

"end=EXCEPTION": what runs beside the serving of a fetch fails with that as soon as standard input can be read, and nothing of ours catches it.
"syncfs", "inventory", "ahead", "share": bringing content to the disk, looking at what is here, fetching ahead, looking after those who wait fail each
time, in a way that nobody expects.
"""

import builtins
import sys

import trio

from fusehsm.cli import main
from fusehsm.linux import syscalls
from fusehsm.tier.fetch import access_list as touch_list
from fusehsm.tier.fetch import evict as evicting
from fusehsm.tier.fetch.durability import Keeper
from fusehsm.tier.fetch.turns import Turns

_OFTEN = 0.05  # seconds
_FAILING = {
    "syncfs": (syscalls, "syncfs"),
    "inventory": (evicting, "items"),
    "ahead": (touch_list, "_read"),
    "share": (Turns, "_end_surplus"),
}


def put_in(fault: str) -> None:
    kind, _, word = fault.partition("=")
    match kind:
        case "end":
            exception = getattr(builtins, word)

            async def keep(self: Keeper) -> None:
                await trio.lowlevel.wait_readable(0)
                raise exception("put in by the test")

            Keeper.keep = keep  # type: ignore[method-assign]
        case "syncfs":
            prepare = Keeper.__init__

            def prepare_to_look_often(self: Keeper, fetcher: object, root_fd: int, _: float) -> None:
                prepare(self, fetcher, root_fd, _OFTEN)  # type: ignore[arg-type]

            Keeper.__init__ = prepare_to_look_often  # type: ignore[method-assign, assignment]
    if kind in _FAILING:
        module, name = _FAILING[kind]
        setattr(module, name, _fail)


def _fail(*_: object) -> None:
    raise RuntimeError("put in by the test")


if __name__ == "__main__":
    put_in(sys.argv[1])
    sys.exit(main(sys.argv[2:]))
