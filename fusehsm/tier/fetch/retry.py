"""Delays between requests to a store: back-off after a failure, and a limit of the rate."""

import random
import time
from dataclasses import dataclass
from typing import Final

_FIRST: Final = 0.1  # seconds
_LONGEST: Final = 5.0


@dataclass(slots=True)
class BackOff:
    """Waits that double up to 5 s. Each is shortened at random by up to half, so that many waiting fills do not try again at once."""

    # Seconds of the next wait, before it is shortened.
    _next: float = _FIRST

    def wait(self) -> float:
        """Seconds to wait before the next attempt."""
        seconds = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, _LONGEST)
        return seconds


class RateLimiter:
    """A token bucket: `rate` bytes a second, of which up to one second's may be saved. None: no limit."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._due = 0.0  # monotonic seconds when the rate has covered all bytes taken

    def take(self, count: int) -> float:
        """Take `count` bytes. Returns the seconds to wait before they are used."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        wait = max(self._due - now, 0.0)
        self._due = max(self._due, now - 1.0) + count / self._rate
        return wait
