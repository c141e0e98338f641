"""Populating within the tests' own process, which saves a process's start."""

import os
from pathlib import Path

from fusehsm.tier.populate.create import Outcome, Planter
from fusehsm.tier.stores.open import open_store


def plant(store: str | Path, target: Path, **more: bool) -> tuple[dict[str, Outcome], list[tuple[str, str]]]:
    """What became of each path, and the complaints."""
    complaints: list[tuple[str, str]] = []
    outcomes = {}
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    planter = Planter(fd, lambda path, why: complaints.append((path, why)), **more)
    try:
        with open_store(str(store)) as opened:
            for entry in opened.tree():
                outcomes[entry.path] = planter.plant(entry)
            planter.finish()
    finally:
        planter.close()
        os.close(fd)
    return outcomes, complaints
