"""How far a command is: a line that changes on a terminal, nothing elsewhere. And sizes for people."""

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from rich.live import Live

_INTERVAL: Final = 0.1  # seconds between two looks of the line


class Progress:
    """A context manager; tick() is to be called often. `line` gives what is shown, from the seconds since the beginning."""

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
        """Show what there is to show, if it is time."""
        if self._live is None or (now := time.monotonic()) < self._next:
            return
        self._next = now + _INTERVAL
        from rich.text import Text

        self._live.update(Text(self._line(now - self._started)), refresh=True)


def progress_line(entries: int, size: int, failures: int, seconds: float) -> str:
    """What a terminal shows. `size` in bytes."""
    rate = entries / max(seconds, 1e-3)
    line = f"{entries:,} entries ({rate:,.0f} a second), {size_text(size)}"
    return f"{line}, {failures:,} failed" if failures else line


def size_text(size: int) -> str:
    """Bytes as people read them, in powers of 1000."""
    number = float(size)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} PB"
