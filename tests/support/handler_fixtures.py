"""The fixture `site`: a test that asks for it runs once on the real kernel, and with each engine once over the socket and once in-process.
A module has it with `pytest_plugins = ["tests.support.handler_fixtures"]`."""

import functools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.support import engines
from tests.support.handler_sites import InProcessSite, OpenGroupSite, Site
from tests.support.harness import Mount


@pytest.fixture(params=engines.parameters("kernel", words=["socket", "in-process"]))
def place(
    request: pytest.FixtureRequest, places: Callable[[str], Path], mount_point: Path, numbers: Iterator[int]
) -> Site:
    """Where this test runs."""
    kind, engine = request.param
    if not engine:
        request.getfixturevalue("kernel_events")
        directory = places("watched")
        return OpenGroupSite(directory, directory)
    if kind == "socket":
        mount = request.getfixturevalue("exact_mounts")(engine)
        name = f"watched-{next(numbers)}"
        (mount.source / name).mkdir()
        return OpenGroupSite(mount.path / name, mount.source / name)
    request.getfixturevalue("fuse")
    return InProcessSite(mount_point, places("backing"), engine)


@pytest.fixture(scope="module")
def exact_mounts(make_engine_mount: MakeMount) -> Callable[[str], Mount]:
    """exact_mounts(engine) -> the mount of the tests over the socket, one for each engine."""
    return functools.cache(
        lambda engine: make_engine_mount("--engine", engine, "--events", "exact", "--allow-other")
    )


@pytest.fixture(scope="module")
def exact_mount(exact_mounts: Callable[[str], Mount], engine: str) -> Mount:
    """The mount of tests that use no site."""
    return exact_mounts(engine)


@pytest.fixture
async def site(place: Site) -> AsyncIterator[Site]:
    """The place, ready to be used."""
    async with place.running():
        yield place
