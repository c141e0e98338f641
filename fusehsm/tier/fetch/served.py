"""What fetch knows of one inode, and the fills of it that are under way."""

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import trio

from fusehsm.tier.fetch.catalog import Origin
from fusehsm.tier.fetch.readahead import Streams
from fusehsm.tier.stubs.mark import Key
from fusehsm.tier.stubs.stub import StubFile


class Fill:
    """Blocks [first, end) of a file that are being fetched, for an access that waits or as a prefetch."""

    __slots__ = ("_attempts", "_queue", "abandoned", "done", "end", "error", "filled", "first", "is_prefetch")

    def __init__(self, first: int, end: int, *, is_prefetch: bool) -> None:
        # Block numbers.
        self.first = first
        self.end = end
        # No access waits for it yet.
        self.is_prefetch = is_prefetch
        # Set when the fill has ended.
        self.done = trio.Event()
        # Bytes from its start that are in the file.
        self.filled = 0
        # The error to refuse accesses with, once `done`.
        self.error: OSError | None = None
        # The fill has ended: a store's late answer is thrown away.
        self.abandoned = False
        # Scopes of the wait for a turn, and of the attempts.
        self._queue: trio.CancelScope | None = None
        self._attempts: trio.CancelScope | None = None

    @contextlib.asynccontextmanager
    async def turn(self, prefetches: trio.CapacityLimiter) -> AsyncIterator[None]:
        """Wait for a prefetch's turn among the others. The wait ends at once when an access wants the fill."""
        has_turn = False
        with trio.CancelScope() as self._queue:
            if self.is_prefetch:
                await prefetches.acquire_on_behalf_of(self)
                has_turn = True
        self._queue = None
        try:
            yield
        finally:
            if has_turn:
                prefetches.release_on_behalf_of(self)

    def attempts(self, deadline: float) -> trio.CancelScope:
        """A scope that limits the attempts to `deadline` seconds."""
        self._attempts = trio.move_on_after(deadline)
        return self._attempts

    def demand(self, deadline: float) -> None:
        """Note that an access wants the fill, and waits at most `deadline` seconds from now."""
        if not self.is_prefetch:
            return
        self.is_prefetch = False
        if self._queue is not None:
            self._queue.cancel()
        if self._attempts is not None:
            self._attempts.deadline = trio.current_time() + deadline


@dataclass(slots=True)
class Served:
    """The fetcher's knowledge of one inode."""

    # Its key, and its owner when it was last seen.
    key: Key
    uid: int
    # None if the file is no stub but a user's own.
    file: StubFile | None
    # The readers' streams, for prefetching.
    streams: Streams | None = None
    # The store's file, once it is known.
    origin: Origin | None = None
    # The version of the store's file, once it is known.
    version: str | None = None
    # Fills under way, by block number.
    fills: dict[int, Fill] = field(default_factory=dict)
    # The events that an ignore mark holds back.
    ignored: int = 0
    # Number of accesses that are being answered.
    active: int = 0
    # Number of events of the complete file since it was last ignored.
    idle_events: int = 0
    # Set while the content is being evicted: accesses wait for this event.
    evicting: trio.Event | None = None
    # An error of the file has been logged.
    complained: bool = False
    # The file had no name left when it was last seen.
    is_removed: bool = False
    # A part of the file, (start, end) in bytes, whose right content is unknown, and the file's times of change when that was found (nanoseconds).
    doubt: tuple[int, int] | None = None
    doubt_times: tuple[int, int] = (0, 0)

    @property
    def may_be_forgotten(self) -> bool:
        """Whether another look at the file finds all that is known here: nothing is under way, and no record is to be closed."""
        if self.active or self.fills or self.evicting is not None:
            return False
        return self.file is None or self.is_removed or not (self.file.recorded or self.file.unrecorded)


def overlap(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two ranges (start, end) have a common byte."""
    return one[0] < other[1] and other[0] < one[1]
