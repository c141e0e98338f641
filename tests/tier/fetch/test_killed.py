"""fetch, killed at any moment and started again: a sample of what `make soak` does."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.control import socket as control_socket
from fusehsm.linux.mountinfo import id_at, read_mounts
from tests.support.harness import Mount
from tests.support.requirements import require_root
from tests.support.tier.fetching import expect_record_at_rest, fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.soak import Soak, soaking
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.any_engine

SEED = 1
POINTS = 8


@pytest.fixture
def soak(backend: str, ext4: Path, numbers: Iterator[int]) -> Iterator[Soak]:
    require_root()
    place = ext4 / f"soak-{next(numbers)}"
    place.mkdir()
    with soaking(place, backend, SEED) as soak:
        yield soak


def test_every_byte_is_right_after_kills(soak: Soak) -> None:
    while soak.points < POINTS:
        soak.episode()
    assert soak.checked


@pytest.mark.fuse
def test_a_mount_whose_daemon_was_killed_is_replaced(source: Path, target: Path) -> None:
    plant(source, target)
    with fetching(source, target, "--backend", "fuse") as served:
        (mount,) = [mount for mount in read_mounts() if mount.mount_point == str(target)]
        with control_socket.connect(mount) as connection:
            os.kill(control_socket.peer_of(connection).pid, signal.SIGKILL)
        served.kill()
        assert run("cat", target / "a file").returncode
        with fetching(source, target, "--backend", "fuse") as again:
            assert run("cmp", source / "a file", target / "a file").stdout == ""
            again.end()


@pytest.mark.fuse
def test_a_mount_that_has_come_instead_stays(source: Path, target: Path) -> None:
    """Another program has unmounted fetch's mount, and has mounted another one in its place."""
    plant(source, target)
    with fetching(source, target, "--backend", "fuse") as served:
        subprocess.run(["umount", "-l", target], check=True)
        with Mount(target, target):
            theirs = id_at(str(target))
            served.end()
            assert id_at(str(target)) == theirs


@pytest.mark.kernel
def test_a_renamed_file_comes_to_rest(source: Path, target: Path, kernel_events: Path) -> None:
    """A change that is made afterwards, while no fetch runs, is not taken for one that was made while fetch served."""
    (source / "big").write_bytes(content_of(3 << 20))
    plant(source, target)
    with fetching(source, target, "--backend", "kernel", "--read-ahead", "0") as served:
        assert run("head", "-c1", target / "big").returncode == 0
        os.rename(target / "big", target / "sub" / "bigger")
        served.end()
    expect_record_at_rest(target / "sub" / "bigger")
