"""The handlers of the benchmark, the same on every backend."""

import trio

import fusehsm

SLOWNESS = 0.02  # seconds


async def allow(event: fusehsm.Event) -> None:
    """Allow at once, so that only the cost of the event itself is measured."""


async def slow(event: fusehsm.Event) -> None:
    """Allow after SLOWNESS, like a handler that fetches from another machine."""
    await trio.sleep(SLOWNESS)
