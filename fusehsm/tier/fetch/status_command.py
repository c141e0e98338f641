"""`fusehsm status PATH` for stubs: how much of each file is here."""

import errno
import json
import os
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Any, Final

from fusehsm.linux.beneath import LIST, follow
from fusehsm.linux.mountinfo import mount_of_descriptor
from fusehsm.text import shown
from fusehsm.tier.fetch.catalog import where
from fusehsm.tier.fetch.inventory import Item
from fusehsm.tier.fetch.inventory import items as items_of
from fusehsm.tier.fetch.protocol import List, find
from fusehsm.tier.stubs.tree import Tree
from fusehsm.tier.text import size_text


def file_status(path: str, *, as_json: bool, user: int | None = None) -> bool:
    """Print the status, as the fetch of `user` tells it (None: of this user or root).

    Returns False, without output, if no fetch serves `path` and it has no stub. Raises OSError ENOENT if it does not exist.
    """
    found = _found(path, user)
    if found is None:
        return False
    items, served = found
    if as_json:
        files = list(items)
        told = {"served": served, "files": [asdict(item) for item in files], "total": _total(files)}
        print(json.dumps(told, indent=2))
        return True
    print(f"{'SIZE':>9} {'HERE':>9}       STATE              PATH")
    total = _total(_printed(items))
    print(total_text(total))
    if not served and total["resident"] < total["size"]:
        print("nobody serves them: what is not here reads as zeros until `fusehsm fetch STORE DST` runs")
    return True


def _printed(found: Iterable[Item]) -> Iterator[Item]:
    for item in found:
        print(as_text(item))
        yield item


def _found(path: str, user: int | None) -> tuple[Iterable[Item], bool] | None:
    """The items, and whether a fetch serves them."""
    try:
        fetch = find(path, user)
        if fetch is not None:
            return fetch.ask(List(fetch.path), Item), True
        fd, way = follow(path)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return None  # on another user's mount, whose server is not asked for files
    try:
        if user is not None or mount_of_descriptor(fd).is_fusehsm:
            return None
    finally:
        os.close(fd)
    local = list(_local(*way[-1]))
    return (local, False) if any(item.stub for item in local) else None


def _local(path: str, status: os.stat_result) -> Iterator[Item]:
    """The items of a tree that no fetch serves, from the records. `path` is real, `status` its own."""
    above, name = (path, "") if stat.S_ISDIR(status.st_mode) else os.path.split(path)
    fd, _ = follow(above)
    try:
        root_fd = os.open(".", LIST, dir_fd=fd)
    finally:
        os.close(fd)
    try:
        with closing(items_of(root_fd, name, lambda key: None, _leave_out, Tree.to_look_at())) as found:  # type: ignore[type-var]
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


def _total(files: Iterable[Item]) -> dict[str, int]:
    total = dict.fromkeys(("files", *_COUNTED), 0)
    for item in files:
        total["files"] += 1
        for name, field in _COUNTED.items():
            total[name] += getattr(item, field)
    return total


# The field of Item that a total counts.
_COUNTED: Final = {
    "stubs": "stub",
    "size": "size",
    "resident": "resident",
    "disk": "disk",
    "modified": "modified",
    "pinned": "pinned",
}


def total_text(total: dict[str, Any]) -> str:
    """The last line, with the totals."""
    share = f" ({100 * total['resident'] // total['size']} %)" if total["size"] else ""
    return (
        f"{total['files']:,} files of {size_text(total['size'])}, {size_text(total['resident'])} here{share}; "
        f"{total['stubs']:,} from the store, {total['modified']:,} modified, {total['pinned']:,} pinned"
    )
