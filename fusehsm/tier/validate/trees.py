"""Two trees side by side: every path of either, with what each has there."""

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

_AHEAD: Final = 1024  # entries that are listed before they are wanted
_LOOK: Final = 0.1  # seconds between two looks whether anybody still wants them


@dataclass(frozen=True, slots=True)
class Pair:
    """What the store and the destination have at one path; None: nothing. One of them has something."""

    theirs: Entry | None
    ours: Entry | None


Complain = Callable[[str, StoreError], None]
Tree = Callable[[Callable[[StoreError], None]], Iterator[Entry]]  # Store.tree()


def pairs(store: Tree, destination: Tree, complain: Complain) -> Iterator[Pair]:
    """Both trees' entries in one order, without keeping either: stores list in the order of the names' bytes, directories before what they hold.

    What cannot be listed in one tree is handed to `complain` ("store" or "destination", and why), and what the other has there left out:
    nobody knows whether it is missing. So are paths in the store that no file can have.
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
    """One tree: the entry that is next in it, and which parts could not be listed."""

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
    """A listing's end, or why it has failed."""

    failure: BaseException | None = None


def listed_within(path: str, timeout: float, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
    """LocalStore(path).tree(on_error), but in a thread of its own, which is left behind when a directory is never answered for: opening and reading
    directories can make events, too, and who waits for the answer to one hears nothing but SIGKILL. Raises OSError ETIMEDOUT then."""
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
