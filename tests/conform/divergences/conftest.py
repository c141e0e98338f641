"""The real kernel, and mounts of both kinds of events, as sides of a divergence."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conform.divergences.sides import Side
from tests.conftest import MakeMount


@pytest.fixture
def kernel(kernel_events: Path, places: Callable[[str], Path]) -> Side:
    place = places("kernel")
    return Side(place, place, "filesystem")


@pytest.fixture(scope="module")
def exact(make_shared_mount: MakeMount, engine: str) -> Side:
    mount = make_shared_mount("--events", "exact")
    return Side(mount.source, mount.path, "mount", engine)


@pytest.fixture(scope="module")
def first_access(make_shared_mount: MakeMount, engine: str) -> Side:
    mount = make_shared_mount("--events", "first-access")
    return Side(mount.source, mount.path, "mount", engine)


@pytest.fixture(scope="module")
def private(make_shared_mount: MakeMount, engine: str) -> Side:
    mount = make_shared_mount("--events", "first-access", "--cache", "private")
    return Side(mount.source, mount.path, "mount", engine)


@pytest.fixture(scope="module")
def per_file(make_shared_mount: MakeMount, engine: str) -> Side:
    mount = make_shared_mount("--events", "per-file")
    return Side(mount.source, mount.path, "mount", engine)
