"""The lists of a tree's directories, asked for before their turn comes: where each takes a round trip, a walk would spend its time waiting."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from typing import Final, Generic, TypeVar

_Listed = TypeVar("_Listed")

AHEAD: Final = (
    8  # directories of each level of the tree that are listed at a time, or have been and wait for their turn
)


class ListsAhead(Generic[_Listed]):
    """For one walk, depth first. `ask(directory)` lists one; it runs in `loop`, which must be another thread's."""

    def __init__(self, loop: asyncio.AbstractEventLoop, ask: Callable[[str], Awaitable[_Listed]]) -> None:
        self._loop = loop
        self._ask = ask
        self._asked: dict[str, Future[_Listed]] = {}
        # Directories that have not been asked for yet, by the one before whose turn they are not.
        self._siblings: dict[str, deque[str]] = {}

    def take(self, directory: str) -> _Listed:
        """The directory's list. Raises what asking for it raised."""
        siblings = self._siblings.pop(directory, None)
        asked = self._asked.pop(directory, None) or self._start(directory)
        if siblings:
            following = siblings.popleft()
            self._asked[following] = self._start(following)
            self._siblings[following] = siblings
        return asked.result()

    def expect(self, directories: Iterable[str]) -> None:
        """These will be taken in this order, each with all below it before the next."""
        coming = deque(directories)
        first = [coming.popleft() for _ in range(min(AHEAD, len(coming)))]
        for directory in first:
            self._asked[directory] = self._start(directory)
            # Each that is taken makes room for one more.
            self._siblings[directory] = coming

    def close(self) -> None:
        """Give up what was asked for and not taken."""
        for asked in self._asked.values():
            asked.cancel()
        self._asked.clear()

    def _start(self, directory: str) -> "Future[_Listed]":
        async def ask() -> _Listed:
            return await self._ask(directory)

        return asyncio.run_coroutine_threadsafe(ask(), self._loop)
