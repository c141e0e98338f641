"""`fusehsm status PATH` for stubs: how much of each file is here."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any

from fusehsm.linux.mountinfo import mount_of
from fusehsm.text import shown
from fusehsm.tier.fetch.catalog import where
from fusehsm.tier.fetch.inventory import Item, items
from fusehsm.tier.fetch.protocol import List, find
from fusehsm.tier.stubs.tree import Tree
from fusehsm.tier.text import size_text


def file_status(path: str, *, as_json: bool) -> bool:
    """Print the status. Returns False, without output, if no fetch serves `path` and it has no stub. Raises OSError ENOENT if it does not exist."""
    found = _found(path)
    if found is None:
        return False
    if as_json:
        files = list(found)
        print(json.dumps({"files": [asdict(item) for item in files], "total": _total(files)}, indent=2))
        return True
    print(f"{'SIZE':>9} {'HERE':>9}       STATE              PATH")
    shown_items = []
    for item in found:
        shown_items.append(item)
        print(as_text(item))
    print(total_text(_total(shown_items)))
    return True


def _found(path: str) -> Iterable[Item] | None:
    fetch = find(path)
    if fetch is not None:
        return (Item(**line) for line in fetch.ask(List(fetch.path)) if line)
    if mount_of(path).is_fusehsm:
        return None
    local = list(_local(path))
    return local if any(item.stub for item in local) else None


def _local(path: str) -> Iterator[Item]:
    """The items of a tree that no fetch serves, from the records."""
    above, name = os.path.split(os.path.realpath(path)) if not os.path.isdir(path) else (path, "")
    root_fd = os.open(above, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with closing(items(root_fd, name, lambda key: None, _leave_out, Tree.to_look_at())) as found:  # type: ignore[type-var]
            yield from found
    finally:
        os.close(root_fd)


def _leave_out(error: OSError) -> None:
    print(f"fusehsm: {where(error)}; it is left out", file=sys.stderr, flush=True)


def as_text(item: Item) -> str:
    """One line of the list."""
    share = f"{100 * item.resident // item.size} %" if item.size else ""
    words = [word for word, holds in (("modified", item.modified), ("pinned", item.pinned)) if holds]
    state = "own" if not item.stub else ",".join(words) or "-"
    return (
        f"{size_text(item.size):>9} {size_text(item.resident):>9} {share:>5} {state:<18} {shown(item.path)}"
    )


def _total(files: list[Item]) -> dict[str, Any]:
    return {
        "files": len(files),
        "stubs": sum(item.stub for item in files),
        "size": sum(item.size for item in files),
        "resident": sum(item.resident for item in files),
        "disk": sum(item.disk for item in files),
        "modified": sum(item.modified for item in files),
        "pinned": sum(item.pinned for item in files),
    }


def total_text(total: dict[str, Any]) -> str:
    """The last line, with the totals."""
    share = f" ({100 * total['resident'] // total['size']} %)" if total["size"] else ""
    return (
        f"{total['files']:,} files of {size_text(total['size'])}, {size_text(total['resident'])} here{share}; "
        f"{total['stubs']:,} from the store, {total['modified']:,} modified, {total['pinned']:,} pinned"
    )
