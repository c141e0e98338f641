"""Servers that live as long as the session, and the stores that tests open."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.tier import s3_server, servers
from tests.support.tier.s3_server import S3
from tests.support.tier.servers import Served
from tests.support.tier.trees import make_small_tree


@pytest.fixture(scope="session")
def nginx(session_directory: Path) -> Iterator[Served]:
    """What nginx serves (tests/support/tier/servers.py)."""
    place = session_directory / "nginx"
    place.mkdir()
    with servers.nginx(place) as served:
        yield served


@pytest.fixture(scope="session")
def sshd_files(session_directory: Path) -> Iterator[Served]:
    """What sshd serves."""
    place = session_directory / "sshd"
    place.mkdir()
    with servers.sshd(place) as served:
        yield served


@pytest.fixture
def sshd(sshd_files: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
    """What sshd serves, for a user whose home directory has the keys."""
    monkeypatch.setenv("HOME", str(sshd_files.directory.parent / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    return sshd_files


@pytest.fixture(scope="session")
def object_store(places: Callable[[str], Path]) -> Iterator[S3]:
    """A running object store (tests/support/tier/s3_server.py), and a bucket "tests" in it."""
    with s3_server.swift(places("swift")) as s3:
        s3.make_bucket("tests")
        yield s3


@pytest.fixture
def s3(object_store: S3, monkeypatch: pytest.MonkeyPatch) -> S3:
    """The object store, which s3:// means here and in every process that the test starts."""
    object_store.set_environment(monkeypatch.setenv)
    return object_store


@pytest.fixture
def s3_prefix(numbers: Iterator[int]) -> str:
    """A prefix in the bucket "tests" that nothing has yet."""
    return f"prefix-{next(numbers)}"


@pytest.fixture
def source(places: Callable[[str], Path]) -> Path:
    """The small tree, and what only a local store tells: modes, owners, links, a hole, special files."""
    root = places("store")
    make_small_tree(root)
    os.link(root / "a file", root / "sub" / "another name")
    (root / "link").symlink_to("../out/of/here")
    (root / "sub" / "dangling").symlink_to("b#?%&.bin")
    (root / "a file").chmod(0o640)
    (root / "empty").chmod(0o4711)
    (root / "sparse").touch()
    os.truncate(root / "sparse", 1 << 40)
    if os.geteuid() == 0:
        os.chown(root / "sub" / "b#?%&.bin", 12, 34)
        os.chown(root / "link", 56, 78, follow_symlinks=False)
    (root / "sub" / "deep").chmod(0o555)
    os.utime(root / "link", ns=(5, 6), follow_symlinks=False)
    os.utime(root / "sub", ns=(7, 8))
    return root


@pytest.fixture(
    params=[pytest.param("kernel", marks=pytest.mark.kernel), pytest.param("fuse", marks=pytest.mark.fuse)]
)
def backend(request: pytest.FixtureRequest) -> str:
    """Where a fetch's events come from: each in turn."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_events")
    name: str = request.param
    return name


@pytest.fixture
def target(places: Callable[[str], Path]) -> Path:
    return places("populated")
