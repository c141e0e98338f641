"""A listener in a process of its own, for workloads that kill a listener. It answers no event.

`python -m fusehsm.conform.listener_process ENGINE PATH MASK NUMBER` makes a group of class PRE_CONTENT with the mask MASK on the file system of
PATH. The group is the emulator's with ENGINE, or the real kernel's if ENGINE is "". The process prints "ready", then "read" for each event that it
has read, up to NUMBER, and "more" when another event is queued. It ends when its stdin is closed.
"""

import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from fusehsm.conform.scene import DIALECT, PRE_GROUP, READ_ONLY
from fusehsm.conform.sides import Side
from fusehsm.fanotify.abi import FAN_MARK_ADD, FAN_MARK_FILESYSTEM, decode_events


async def main(engine: str, path: str, mask: int, number: int) -> None:
    """Listen until stdin is closed."""
    side = Side(Path(path), Path(path), engine)
    group = await side.open_group(PRE_GROUP, READ_ONLY)
    await group.mark(FAN_MARK_ADD | FAN_MARK_FILESYSTEM, mask, path=path)
    print("ready", flush=True)
    kept = []  # events with open descriptors, as in a listener that is still filling files
    for _ in range(number):
        await group.wait_readable()
        kept += decode_events(DIALECT, group.read(64))
        print("read", flush=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_tell_of_more, group.wait_readable)
        await trio.to_thread.run_sync(sys.stdin.read, abandon_on_cancel=True)
        nursery.cancel_scope.cancel()
    group.close()


async def _tell_of_more(wait_readable: Callable[[], Awaitable[None]]) -> None:
    await wait_readable()
    print("more", flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
