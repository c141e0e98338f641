"""`fusehsm evict`, `fusehsm pin` and `fusehsm unpin`: the user's requests to a running fetch."""

import os
import sys
from collections import Counter
from collections.abc import Sequence

from fusehsm.text import shown
from fusehsm.tier.fetch.client import found
from fusehsm.tier.fetch.evict import Kept
from fusehsm.tier.fetch.protocol import Evict, Pin
from fusehsm.tier.text import parse_seconds, parse_size, size_text


def evict(paths: Sequence[str], *, older_than: str | None, free: str | None) -> int:
    """Evict the files at or below the paths, and print a summary. `older_than`, `free`: texts of the options.

    Returns the exit code: 1 if a named file stays, if less became free than `free`, or after an error. Raises ValueError for bad usage, OSError
    ENOENT if a path does not exist, ENOTCONN if no fetch serves it.
    """
    seconds = None if older_than is None else parse_seconds("--older-than", older_than)
    wanted = None if free is None else parse_size("--free", free)
    counts: Counter[str] = Counter()
    failed = False
    for path in paths:
        left = None if wanted is None else max(wanted - counts["freed"], 0)
        fetch = found(path)
        where, root = fetch.path, fetch.root
        *lines, result = fetch.ask(Evict(where, seconds, left))
        for line in lines:
            _complain(os.path.join(root, str(line["path"])), str(line["why"]))
        counts.update({name: int(count) for name, count in result.items()})
        failed |= bool(lines)
        if os.path.isfile(path) and (why := _why(result)):
            _complain(path, why)
            failed = True
    kept = ", ".join(f"{counts[k.name.lower()]:,} {k.value}" for k in Kept if counts[k.name.lower()])
    print(
        f"evicted {counts['evicted']:,} files, {size_text(counts['freed'])} freed"
        + (f"; stay: {kept}" if kept else "")
    )
    if wanted is not None and counts["freed"] < wanted:
        _complain("--free", f"no more than {size_text(counts['freed'])} could be freed")
        failed = True
    return int(failed)


def pin(paths: Sequence[str], *, pinned: bool) -> int:
    """Pin or unpin the files at or below the paths, and print a summary. Raises OSError as evict(). Returns 0."""
    changed = 0
    for path in paths:
        fetch = found(path)
        *_, result = fetch.ask(Pin(fetch.path, pinned))
        changed += int(result["changed"])
    print(f"{'pinned' if pinned else 'unpinned'} {changed:,} files")
    return 0


def _why(result: dict[str, int]) -> str:
    for reason, why in _REASONS.items():
        if result[reason.name.lower()]:
            return why
    return ""


def _complain(path: str, why: str) -> None:
    print(f"fusehsm: {shown(path)}: {why}", file=sys.stderr, flush=True)


_REASONS = {
    Kept.MODIFIED: "is modified: its content is nowhere else",
    Kept.PINNED: "is pinned; `fusehsm unpin` it first",
    Kept.IN_USE: "is in use; close it first (fuser shows by whom)",
}
