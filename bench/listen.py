"""A listener process: python -m bench.listen PATH kernel|fuse. Prints "ready" once its marks stand; SIGTERM ends it."""

import signal
import sys

import trio

import fusehsm
from bench.handlers import allow


async def listen(path: str, backend: str) -> None:
    """Allow every pre-content event under `path` until SIGTERM."""
    async with fusehsm.open_group(path, backend=backend) as group:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(fusehsm.serve, group, allow)
                print("ready", flush=True)
                await anext(signals)
                nursery.cancel_scope.cancel()


if __name__ == "__main__":
    trio.run(listen, sys.argv[1], sys.argv[2])
