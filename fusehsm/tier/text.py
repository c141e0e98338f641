"""Text that commands print and parse: a progress line, sizes and times."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.live import Live
import re

# Sizes and times as users write them.


_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGTP]?)(i?B?)")
_MOST: Final = float(1 << 62)
_UNITS: Final = "KMGTP"
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)?")
_SECONDS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(option: str, text: str) -> int:
    """Bytes: a number, with K, M, G, T or P (powers of 1024; kB, MB, ... are powers of 1000). Raises ValueError with `option` for other text."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{option} {text}: not a size; write something like 500M or 10G")
    number, unit, suffix = match.groups()
    base = 1000 if suffix == "B" and unit else 1024
    power = _UNITS.index(unit.upper()) + 1 if unit else 0
    return round(_within_reason(option, text, float(number) * float(base) ** power))


def parse_seconds(option: str, text: str) -> float:
    """Seconds: a number, with s, m, h, d or w. Raises ValueError with `option` for other text."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{option} {text}: not a time; write something like 90s, 12h or 30d")
    number, unit = match.groups()
    return _within_reason(option, text, float(number) * _SECONDS[unit or "s"])


def _within_reason(option: str, text: str, value: float) -> float:
    if value > _MOST:
        raise ValueError(f"{option} {text if len(text) < 40 else text[:40] + '...'}: too much")
    return value


_INTERVAL: Final = 0.1  # seconds between two updates of the line


class Progress:
    """A line on the terminal. A context manager; call tick() often. `line(seconds since the beginning)` gives the text."""

    def __init__(self, line: Callable[[float], str]) -> None:
        self._line = line
        self._started = time.monotonic()
        self._next = self._started
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def tick(self) -> None:
        """Update the line, if its interval has passed."""
        if self._live is None or (now := time.monotonic()) < self._next:
            return
        self._next = now + _INTERVAL
        from rich.text import Text

        self._live.update(Text(self._line(now - self._started)), refresh=True)


def progress_line(entries: int, size: int, failures: int, seconds: float) -> str:
    """The line on a terminal. `size` in bytes."""
    rate = entries / max(seconds, 1e-3)
    line = f"{entries:,} entries ({rate:,.0f} a second), {size_text(size)}"
    return f"{line}, {failures:,} failed" if failures else line


def size_text(size: int) -> str:
    """Bytes as text, in powers of 1000."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} PB"
