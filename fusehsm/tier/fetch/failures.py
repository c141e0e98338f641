"""Failures: an unexpected error is one line and does not end the serving, and a request to a store is made again after a delay."""

import logging
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fusehsm.tier.fetch.catalog import where

_FIRST: Final = 0.1  # seconds
_LONGEST: Final = 5.0


def in_a_line(error: BaseException) -> str:
    """An error in one line. If it is no OSError, the line also names the place in the code, for a bug report."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError):
        text = where(error)
    else:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        place = "" if trace is None else f" ({_place(trace.tb_frame.f_code.co_filename, trace.tb_lineno)})"
        text = f"{type(error).__name__}: {error}{place}"
    return " ".join(text.split())


def _place(filename: str, line: int) -> str:
    return f"{os.path.basename(filename)}:{line}"


@contextmanager
def passed_over(what: str, log: logging.Logger) -> Iterator[None]:
    """Log an error of the body in one line that begins with `what`, and go on. For tasks beside the serving, which they must never end."""
    try:
        yield
    except Exception as error:
        log.error("%s: %s", what, in_a_line(error))


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
