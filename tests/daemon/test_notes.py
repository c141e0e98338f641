"""What cannot be had here is said in one line at the start, by every command that mounts."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MakeMount
from tests.support.harness import fusehsm
from tests.support.tier.fetching import fetching

pytestmark = pytest.mark.fuse

# pyfuse3 cannot ask for it on any kernel.
CANNOT = ("--engine", "pyfuse3", "--events", "exact")
NOTE = "fusehsm: note: with --events exact, mmap(MAP_SHARED) of a watched file fails with ENODEV here; leave --events out to allow it"


@pytest.mark.any_engine
def test_of_fetch(fuse: None, places: Callable[[str], Path]) -> None:
    store, place = places("store"), places("noted")
    (store / "file").write_bytes(b"content")
    assert fusehsm("populate", store, place).returncode == 0
    with fetching(store, place, "--backend", "fuse", *CANNOT) as served:
        assert NOTE in served.said
        served.end()
    with fetching(store, place, "--backend", "fuse", "--engine", "pyfuse3") as served:
        assert not any("MAP_SHARED" in line for line in served.said)
        served.end()


@pytest.mark.any_engine
def test_of_a_mount(make_mount: MakeMount) -> None:
    assert NOTE in make_mount(*CANNOT).log.lines
    assert not any("MAP_SHARED" in line for line in make_mount("--engine", "pyfuse3").log.lines)


@pytest.mark.any_engine
def test_apart_from_an_error(fuse: None, places: Callable[[str], Path]) -> None:
    store, place = places("store"), places("apart")
    (store / "file").write_bytes(b"content")
    assert fusehsm("populate", store, place).returncode == 0

    done = fusehsm("fetch", store, place, "--backend", "fuse", *CANNOT, "-o", "no_such_option")
    assert done.returncode == 1
    note, complaint = done.stderr.splitlines()
    assert note == NOTE
    assert "cannot be mounted" in complaint
    assert "MAP_SHARED" not in complaint
