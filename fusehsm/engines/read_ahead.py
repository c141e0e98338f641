"""Switches the read-ahead of a mount, which decides how much of a file a page fault brings in (docs/facts.md, section 13)."""

from contextlib import suppress
from typing import Final

_KIB: Final = 128  # the kernel's default for FUSE, in KiB


class ReadAhead:
    """The read-ahead of the mount with that (major, minor). Only root may change it; otherwise switch() has no effect."""

    def __init__(self, device: tuple[int, int]) -> None:
        self._setting = f"/sys/class/bdi/{device[0]}:{device[1]}/read_ahead_kb"
        self._off = False

    def switch(self, *, off: bool) -> None:
        """Turn read-ahead off, so that a fault brings in one page, or on again."""
        if off is self._off:
            return
        self._off = off
        with suppress(OSError), open(self._setting, "w", encoding="ascii") as setting:
            setting.write("0" if off else str(_KIB))
