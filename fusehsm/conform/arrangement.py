"""An order for what has none: where the real kernel's own is arbitrary, streams of two runs are to be equal all the same."""

import itertools
from collections.abc import Sequence

from fusehsm.conform.stream import Entry, Heard, Stream


def arranged(stream: Stream, interchangeable: Sequence[str], *, at_once: bool) -> Stream:
    """The stream with the events of each stretch between results sorted (`at_once`), and where several `interchangeable` groups hear the same
    event one after the other, those in the order of their names. Everything else stays where it is."""
    found: Stream = []
    for is_heard, entries in itertools.groupby(stream, key=lambda entry: isinstance(entry, Heard)):
        stretch = list(entries)
        if is_heard and at_once:
            stretch.sort(key=Heard.line)  # type: ignore[arg-type]
        found += stretch
    if interchangeable:
        found = [
            entry
            for _, entries in itertools.groupby(found, key=_subject)
            for entry in _by_name(list(entries), interchangeable)
        ]
    return found


def _subject(entry: Entry) -> object:
    """What an event says, whoever hears it."""
    if not isinstance(entry, Heard):
        return entry
    return entry.names, entry.by, entry.path, entry.record


def _by_name(entries: Stream, interchangeable: Sequence[str]) -> Stream:
    """Those of the interchangeable groups change places among themselves; the others keep theirs."""
    moving = iter(sorted((e for e in entries if _group(e) in interchangeable), key=_group))
    return [next(moving) if _group(entry) in interchangeable else entry for entry in entries]


def _group(entry: Entry) -> str:
    return entry.group if isinstance(entry, Heard) else ""
