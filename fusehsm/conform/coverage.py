"""What is compared with `--events first-access`: the bytes that are asked for, and the results of the calls.

There an event is for the pages that enter the page cache, so neither its range nor the number of events can be the kernel's (the divergence
"first-access events"). But a listener must be asked for every byte that the kernel asks for, and for nothing beyond the kernel's read-ahead.
"""

import difflib
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from fusehsm.conform.stream import Heard, Stream, results
from fusehsm.linux.ranges import RangeSet

_PAGE: Final = 4096
_DIFF_HEADS: Final = ("---", "+++", "@@")
#: Bytes before and after an access that the kernel may read as well: two windows of its default read-ahead (VM_READAHEAD_PAGES).
READ_AHEAD: Final = 2 * 128 * 1024


def faults(kernel: Stream, emulated: Stream, sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with the emulator's stream in first-access mode, a line each; empty if nothing is.

    `sizes`: the largest size in bytes that each file had, by its path in the stream. Nobody needs to be asked for bytes behind it.
    """
    wanted, asked = _asked(kernel), _asked(emulated)
    found = [
        f"bytes {start} to {end} of {path} were not asked for"
        for path, ranges in wanted.items()
        for first, last in ranges
        for start, end in asked[path].gaps(first, min(last, sizes.get(path, last)))
    ]
    for path, ranges in asked.items():
        near = RangeSet()
        for start, end in wanted[path]:
            near.add(start // _PAGE * _PAGE - READ_AHEAD, -(-end // _PAGE) * _PAGE + READ_AHEAD)
        for first, last in ranges:
            found += [
                f"bytes {start} to {end} of {path} were asked for" for start, end in near.gaps(first, last)
            ]
    changes = difflib.unified_diff(results(kernel), results(emulated), n=0, lineterm="")
    return found + [line for line in changes if not line.startswith(_DIFF_HEADS)]


def _asked(stream: Stream) -> dict[str, RangeSet]:
    found: dict[str, RangeSet] = defaultdict(RangeSet)
    for entry in stream:
        if isinstance(entry, Heard) and entry.offset is not None and entry.count is not None:
            found[entry.path].add(entry.offset, entry.offset + entry.count)
    return found
