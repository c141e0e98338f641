"""The fixture `site`: a test that asks for it runs three times, once for each backend. A module has it with
`pytest_plugins = ["tests.handler_fixtures"]`."""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.handler_sites import InProcessSite, OpenGroupSite, Site
from tests.harness import Mount


@pytest.fixture(params=["kernel", "socket", "in-process"])
def place(
    request: pytest.FixtureRequest, places: Callable[[str], Path], mount_point: Path, numbers: Iterator[int]
) -> Site:
    """Where this test runs."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_events")
        directory = places("watched")
        return OpenGroupSite(directory, directory)
    if request.param == "socket":
        mount = request.getfixturevalue("exact_mount")
        name = f"watched-{next(numbers)}"
        (mount.source / name).mkdir()
        return OpenGroupSite(mount.path / name, mount.source / name)
    request.getfixturevalue("fuse")
    return InProcessSite(mount_point, places("backing"))


@pytest.fixture(scope="module")
def exact_mount(make_shared_mount: MakeMount) -> Mount:
    """The mount of the tests over the socket."""
    return make_shared_mount("--events", "exact", "--allow-other")


@pytest.fixture
async def site(place: Site) -> AsyncIterator[Site]:
    """The place, ready to be used."""
    async with place.running():
        yield place
