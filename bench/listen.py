"""A listener process: python -m bench.listen PATH kernel|fuse [ORIGIN COUNTS]

It allows everything. With ORIGIN, it fills stubs from that directory as examples/mirror.py does, and at its end writes the number of its events to
the file COUNTS. It prints "ready" when its marks are set. SIGTERM ends it.
"""

import signal
import sys
from pathlib import Path

import trio

import fusehsm
from bench.handlers import allow
from examples.mirror import Mirror
from fusehsm.handler import Handler


async def listen(path: str, backend: str, handler: Handler) -> None:
    """Pass every pre-content event under `path` to `handler` until SIGTERM."""
    async with fusehsm.open_group(path, backend=backend) as group:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fusehsm.serve, group, handler)
                print("ready", flush=True)
                await anext(signals)
                nursery.cancel_scope.cancel()


def main(path: str, backend: str, origin: str = "", counts: str = "") -> None:
    """Listen, and count events if `counts` is given."""
    if not origin:
        trio.run(listen, path, backend, allow)
        return
    mirror = Mirror(origin, path)
    trio.run(listen, path, backend, mirror)
    Path(counts).write_text(f"{mirror.events}\n", encoding="ascii")


if __name__ == "__main__":
    main(*sys.argv[1:])
