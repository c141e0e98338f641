"""Comparison of two trees: every path of either, with the entry of each."""

import errno
import os
import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from fusehsm.linux.beneath import components
from fusehsm.tier.stores.base import Entry, StoreError
from fusehsm.tier.stores.local import LocalStore

_AHEAD: Final = 1024  # entries that are listed ahead
_LOOK: Final = 0.1  # seconds between two checks whether the listing is still needed


@dataclass(frozen=True, slots=True)
class Pair:
    """The entries at one path. At most one of them is None."""

    # In the store; None: nothing is there.
    theirs: Entry | None
    # In the destination; None: nothing is there.
    ours: Entry | None


Complain = Callable[[str, StoreError], None]
Tree = Callable[[Callable[[StoreError], None]], Iterator[Entry]]  # Store.tree()


def pairs(store: Tree, destination: Tree, complain: Complain) -> Iterator[Pair]:
    """The entries of both trees in one order, without keeping a tree: both list in byte order of the names, directories before their content.

    If a directory of one tree cannot be listed, `complain` gets "store" or "destination" and the error. The other tree's entries there are left out,
    because it is unknown whether they are missing. Paths that no file can have are handled in the same way.
    """
    sides = (_Side(store, "store", complain), _Side(destination, "destination", complain))
    theirs, ours = sides
    while theirs.head is not None or ours.head is not None:
        if ours.head is None or (theirs.head is not None and theirs.key < ours.key):
            if not ours.is_unlisted(theirs.key):
                yield Pair(theirs.head, None)
            theirs.advance()
        elif theirs.head is None or ours.key < theirs.key:
            if not theirs.is_unlisted(ours.key):
                yield Pair(None, ours.head)
            ours.advance()
        else:
            yield Pair(theirs.head, ours.head)
            theirs.advance()
            ours.advance()


class _Side:
    """One tree: its next entry, and the directories that could not be listed."""

    def __init__(self, tree: Tree, name: str, complain: Complain) -> None:
        self._name = name
        self._complain = complain
        self._unlisted: set[tuple[bytes, ...]] = set()
        self._entries = tree(self._note)
        self.head: Entry | None = None
        self.key: tuple[bytes, ...] = ()
        self.advance()

    def advance(self) -> None:
        for entry in self._entries:
            try:
                names = components(entry.path)
            except ValueError as error:
                self._complain(
                    self._name, StoreError(None, f"a path that no file can have: {error}", entry.path)
                )
                continue
            self.head, self.key = entry, tuple(map(os.fsencode, names))
            return
        self.head = None

    def is_unlisted(self, key: tuple[bytes, ...]) -> bool:
        return bool(self._unlisted) and any(key[:depth] in self._unlisted for depth in range(1, len(key) + 1))

    def _note(self, error: StoreError) -> None:
        path = os.fsdecode(error.filename or "")
        self._unlisted.add(tuple(map(os.fsencode, path.split("/"))))
        self._complain(self._name, error)


@dataclass(frozen=True, slots=True)
class _Ended:
    """The end of a listing."""

    # The error, if it has failed.
    failure: BaseException | None = None


def listed_within(path: str, timeout: float, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
    """LocalStore(path).tree(on_error) in a thread of its own. Raises OSError ETIMEDOUT if no entry comes for `timeout` seconds.

    open(2) and getdents(2) of a directory can make events, too. A thread that waits for the answer to an event reacts only to SIGKILL. If the answer
    never comes, the thread is left behind."""
    found: queue.Queue[Entry | StoreError | _Ended] = queue.Queue(_AHEAD)
    stopped = threading.Event()

    def put(item: Entry | StoreError | _Ended) -> None:
        while not stopped.is_set():
            try:
                found.put(item, timeout=_LOOK)
                return
            except queue.Full:
                continue

    def walk() -> None:
        try:
            with LocalStore(path) as tree:
                for entry in tree.tree(put):
                    put(entry)
                    if stopped.is_set():
                        return
            put(_Ended())
        except BaseException as error:
            put(_Ended(error))

    threading.Thread(target=walk, daemon=True).start()
    try:
        while True:
            try:
                item = found.get(timeout=timeout)
            except queue.Empty:
                why = f"no answer within {timeout:g} s when its directories were listed; see fusehsm status"
                raise OSError(errno.ETIMEDOUT, why, path) from None
            if isinstance(item, _Ended):
                if item.failure is not None:
                    raise item.failure
                return
            if isinstance(item, StoreError):
                on_error(item)
            else:
                yield item
    finally:
        stopped.set()
