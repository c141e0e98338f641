"""A mirror with troubles, for `fusehsm mount --handler tests.support.tier.troubled_mirror:handler` or as a listener of its own:

    python -m tests.support.tier.troubled_mirror ORIGIN ROOT

It denies files whose names begin with "denied" with EIO, and answers never for those whose names begin with "hanging".
"""

import contextlib
import errno
import functools
import os
import sys

import trio

import fusehsm
from examples import mirror


class TroubledMirror(mirror.Mirror):
    async def __call__(self, event: fusehsm.Event) -> None:
        name = os.path.basename(event.path)
        if name.startswith("denied"):
            raise OSError(errno.EIO, "as the test wants it", event.path)
        if name.startswith("hanging"):
            await trio.sleep_forever()
        await super().__call__(event)


@functools.cache
def from_environment() -> TroubledMirror:
    return TroubledMirror(os.environ["MIRROR_ORIGIN"], os.environ["MIRROR_ROOT"])


async def handler(event: fusehsm.Event) -> None:
    await from_environment()(event)


async def listen(origin: str, root: str) -> None:
    async with fusehsm.open_group(root) as group:
        print("ready", file=sys.stderr, flush=True)
        await fusehsm.serve(group, TroubledMirror(origin, root))


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        trio.run(listen, sys.argv[1], sys.argv[2])
