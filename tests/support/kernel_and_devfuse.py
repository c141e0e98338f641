"""The worlds of the devfuse engine's tests: the real kernel, and mounts of that engine."""

from pathlib import Path

import pytest

from fusehsm.linux.syscalls import kernel_version
from tests.support.kernel_and_mount import World
from tests.support.requirements import require

ENGINE = "devfuse"


# Fixtures, for the modules that import them


@pytest.fixture(scope="module")
def engine() -> str:
    """That of every mount in the module."""
    return ENGINE


@pytest.fixture(scope="module", params=("kernel", pytest.param("emulator", marks=pytest.mark.engine(ENGINE))))
def whole_world(request: pytest.FixtureRequest) -> World:
    """The real kernel's events on ext4, or `fusehsm mount --events exact`."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_events")
        place: Path = request.getfixturevalue("places")("devfuse")
        return World("kernel", place, place)
    make_mount = request.getfixturevalue("make_shared_mount")
    mount = make_mount("--events", "exact", "--allow-other")
    return World("emulator", mount.source, mount.path, mount.pid)


def needs_shared_mappings(world: World) -> None:
    """Files opened with FOPEN_DIRECT_IO can be mapped shared from Linux 6.6 on."""
    require(world.is_kernel or kernel_version() >= (6, 6), "needs Linux 6.6")
