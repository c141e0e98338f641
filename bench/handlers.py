"""The handler of the benchmark, the same on every backend."""

import fusehsm


async def allow(event: fusehsm.Event) -> None:
    """Allow at once: what is left is the price of the event itself."""
