"""The two worlds in which a divergence is shown."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.async_listener import Listener, listening
from tests.support.engines import diverges

PAGE = 4096
SIZE = 1 << 20
READ_ONLY = os.O_RDONLY | os.O_CLOEXEC
PERMISSION_EVENTS = ("OPEN_PERM", "OPEN_EXEC_PERM", "ACCESS_PERM", "PRE_ACCESS")


@dataclass(slots=True)
class Side:
    """One of the two worlds: where its files are made, and where they are used and marked."""

    backing: Path
    path: Path
    mark: str
    engine: str = ""

    def diverges(self, name: str) -> bool:
        """Whether that entry's difference is to be seen here."""
        return diverges(name, self.engine)

    def file(self, name: str, size: int = SIZE) -> str:
        """A new file of zeros; its path for accessors."""
        with (self.backing / name).open("wb") as file:
            file.write(bytes(size))
        return str(self.path / name)

    @asynccontextmanager
    async def listening(self, *mask: str, **how: Any) -> AsyncIterator[Listener]:
        """A listener on all of this side."""
        how = {"mark": self.mark, "event_f_flags": READ_ONLY, **how}
        async with listening(self.path, mask or ("PRE_ACCESS",), **how) as listener:
            yield listener


def covers(events: list[tuple[str, int | None, int | None]], start: int, length: int) -> bool:
    """Whether one PRE_ACCESS event covers that range."""
    return any(
        name == "PRE_ACCESS"
        and offset is not None
        and count is not None
        and offset <= start
        and offset + count >= start + length
        for name, offset, count in events
    )
