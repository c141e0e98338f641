"""Servers that live as long as the session, and the stores that tests open."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tier import servers
from tests.tier.servers import Served


@pytest.fixture(scope="session")
def nginx(session_directory: Path) -> Iterator[Served]:
    """What nginx serves (tests/tier/servers.py)."""
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
