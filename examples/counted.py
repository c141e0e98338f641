"""The mirror handler that also writes its counts to the file that COUNTERS names: [events, bytes fetched]."""

import os

import fusehsm
from examples.mirror import Mirror, from_environment


async def handler(event: fusehsm.Event) -> None:
    """Fill as the mirror does, then write the counts."""
    mirror = from_environment()
    try:
        await mirror(event)
    finally:
        write_down(mirror)


def write_down(mirror: Mirror) -> None:
    """Replace the file as a whole, so that a reader never sees a part of it."""
    with open(f"{os.environ['COUNTERS']}.new", "w", encoding="ascii") as file:
        file.write(f"[{mirror.events}, {mirror.fetched}]")
    os.replace(f"{os.environ['COUNTERS']}.new", os.environ["COUNTERS"])
