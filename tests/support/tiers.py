"""The tiers of the tests: what each test needs of the machine, as marks that `pytest -m` selects by.

`fuse`: /dev/fuse. `root`: the rights of root. `kernel`: Linux 6.14 or later, and root. `pure`: none of these. A test has a mark for each thing it
needs, in one of its worlds at least; `kernel` brings `root`. Most marks follow from a test's fixtures, by the table below. The others stand at the
test or its module.
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

_ROOT_ASKED = pytest.StashKey[bool]()  # whether the mark `root` stands at the test itself or its module


def mark(items: list[pytest.Item]) -> None:
    """Add the marks of each test's needs, and `pure` where there is none."""
    for item in items:
        needs = {name for name in NEEDS if item.get_closest_marker(name)}
        item.stash[_ROOT_ASKED] = "root" in needs
        for fixture in getattr(item, "fixturenames", ()):
            needs.update(_OF_FIXTURES.get(fixture, ()))
        if "kernel" in needs:
            needs.add("root")
        for name in needs or {"pure"}:
            item.add_marker(name)


def enter(item: pytest.Item) -> None:
    """Before a test's fixtures are made: skip it, or in CI fail it, if it asks for root itself and this process is not root.

    The fixtures ask for everything else. A mark is not enough to ask: a module has the mark `kernel` for its tests on the real kernel, and its tests
    on a mount run under every kernel.
    """
    if item.stash[_ROOT_ASKED]:
        requirements.require_root()
