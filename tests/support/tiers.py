"""The tiers of the tests: what each test needs of the machine, as marks that `pytest -m` selects by.

`fuse`: /dev/fuse. `root`: the rights of root. `kernel`: Linux 6.14 or later, and root. `pure`: none of these. A test has a mark for each thing it
needs; `kernel` brings `root`. Most marks follow from a test's fixtures, by the table below. The others stand at the test or its module.
"""

import pytest

from tests.support import requirements

NEEDS = ("fuse", "root", "kernel")

# What a fixture needs, by its name, wherever it is defined.
_OF_FIXTURES: dict[str, tuple[str, ...]] = {
    "ext4": ("root",),
    "kernel_events": ("kernel",),
    "fuse": ("fuse",),
    "make_mount": ("fuse",),
    "make_shared_mount": ("fuse",),
    "make_engine_mount": ("fuse",),
    "small_disk": ("root",),
    "disk": ("root",),
    "mounts": ("root",),
    "open_device": ("root",),
    "users_mount_point": ("root",),
}


def mark(items: list[pytest.Item]) -> None:
    """Add the marks of each test's needs, and `pure` where there is none."""
    for item in items:
        needs = {name for name in NEEDS if item.get_closest_marker(name)}
        for fixture in getattr(item, "fixturenames", ()):
            needs.update(_OF_FIXTURES.get(fixture, ()))
        if "kernel" in needs:
            needs.add("root")
        for name in needs or {"pure"}:
            item.add_marker(name)


def enter(item: pytest.Item) -> None:
    """Before a test's fixtures are made: what it has marks for is there, or it is skipped; in CI it fails."""
    marks = {name for name in NEEDS if item.get_closest_marker(name)}
    if "kernel" in marks:
        requirements.require_pre_content_kernel()
    elif "root" in marks:
        requirements.require_root()
