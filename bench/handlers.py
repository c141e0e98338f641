"""The handlers of the benchmark, the same on every backend."""

import trio

import fusehsm

SLOWNESS = 0.02  # seconds


async def allow(event: fusehsm.Event) -> None:
    """Allow at once: what is left is the price of the event itself."""


async def slow(event: fusehsm.Event) -> None:
    """Allow after a while, as something that fetches from elsewhere does."""
    await trio.sleep(SLOWNESS)
