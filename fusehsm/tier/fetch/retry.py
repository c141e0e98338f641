"""How long to go on asking a store that does not answer."""

import random
import time
from dataclasses import dataclass
from typing import Final

_FIRST: Final = 0.1  # seconds
_LONGEST: Final = 5.0


@dataclass(slots=True)
class BackOff:
    """Waits that double, each shortened at random by up to half, so that many who wait do not all come back at once."""

    _next: float = _FIRST

    def wait(self) -> float:
        """Seconds to wait before the next attempt."""
        seconds = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, _LONGEST)
        return seconds


class RateLimiter:
    """A rate: so many bytes a second, of which up to a second's may be saved up. `rate` None: without limit."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._due = 0.0  # when everything that has been taken will have been earned (monotonic seconds)

    def take(self, count: int) -> float:
        """Take that many bytes; the seconds to wait before using them."""
        if self._rate is None:
            return 0.0
        now = time.monotonic()
        wait = max(self._due - now, 0.0)
        self._due = max(self._due, now - 1.0) + count / self._rate
        return wait
