"""A listener process: python -m bench.listen PATH kernel|fuse [ORIGIN COUNTS]

Allows everything or, with ORIGIN, fills stubs from there as examples/mirror.py does and writes to the file COUNTS, at its end, how many
events it had. Prints "ready" once its marks stand; SIGTERM ends it.
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
    """Hand every pre-content event under `path` to `handler` until SIGTERM."""
    async with fusehsm.open_group(path, backend=backend) as group:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fusehsm.serve, group, handler)
                print("ready", flush=True)
                await anext(signals)
                nursery.cancel_scope.cancel()


def main(path: str, backend: str, origin: str = "", counts: str = "") -> None:
    """Listen, and count where that is asked for."""
    if not origin:
        trio.run(listen, path, backend, allow)
        return
    mirror = Mirror(origin, path)
    trio.run(listen, path, backend, mirror)
    Path(counts).write_text(f"{mirror.events}\n", encoding="ascii")


if __name__ == "__main__":
    main(*sys.argv[1:])
