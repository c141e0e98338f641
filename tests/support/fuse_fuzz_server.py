"""A DevFuse engine over a directory that takes its requests from an inherited socket instead of /dev/fuse: the process that fuzzing attacks.

`python -m tests.support.fuse_fuzz_server SOURCE DESCRIPTOR WORLD` serves until the socket's other end says END. Its log goes to stderr.
"""

import logging
import os
import resource
import sys
from pathlib import Path

import trio

from fusehsm.daemon.handler_group import serve_in_process
from fusehsm.emulator.gate import Gate
from fusehsm.engines.devfuse import DevFuse
from fusehsm.events import Event
from fusehsm.fanotify.abi import DIALECTS
from fusehsm.fanotify.policy import Unattended, UnattendedPolicy
from fusehsm.overlay.overlay import Overlay

# name: (exact, private, whether a listener allows everything)
WORLDS = {
    "first-access": (False, True, False),
    "exact-watched": (True, False, True),
}
OPEN_FILES = 32  # backing files of handles; few, so that they are closed and opened again
DIRECTORIES = 8  # kept directory descriptors
PINS = 16
LARGEST_FILE = 128 << 10  # bytes: an answer must fit into the socket, and the machine's disk must not fill
MEMORY = 1 << 30  # bytes of address space beyond what the process has when it begins to serve
NO_DEVICE = (0, 0xFFFFF)  # nobody's, so there is no read-ahead to be set


async def _allow(event: Event) -> None:
    """The listener."""


async def _serve(engine: DevFuse, gate: Gate, *, watched: bool) -> None:
    async with trio.open_nursery() as nursery:
        if watched:
            await nursery.start(serve_in_process, gate, _allow)
        await engine.serve()
        nursery.cancel_scope.cancel()


def main(source: str, descriptor: int, world: str) -> None:
    """Serve."""
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    exact, private, watched = WORLDS[world]
    overlay = Overlay(source, directories=DIRECTORIES, pins=PINS)
    gate = Gate(
        overlay,
        destination="/mount",
        events="exact" if exact else "first-access",
        dialect=DIALECTS["linux-6.14"],
        unattended=UnattendedPolicy(Unattended.ALLOW),
        event_timeout=None,
        page_size=resource.getpagesize(),
        open_limit=OPEN_FILES,
    )
    engine = DevFuse(gate, private=private)
    engine.attach(descriptor)
    gate.mounted(NO_DEVICE, engine.caches(NO_DEVICE))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    # Threads have stacks of 8 MiB and arenas of 64 MiB of address space; neither is memory.
    allowed = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    os.umask(0)
    try:
        trio.run(lambda: _serve(engine, gate, watched=watched))
    finally:
        gate.close()
        engine.close()
        overlay.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
