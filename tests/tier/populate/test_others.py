"""populate by root in directories of other users, who put something else at a name at any moment: what is not theirs does not become theirs."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.tier.populate.create import Outcome, Planter
from fusehsm.tier.populate.lookup import UNFINISHED, Refusal, looked_up, replace
from fusehsm.tier.stores.base import Entry, Kind
from tests.support.harness import fusehsm
from tests.support.requirements import require_fuse, require_root
from tests.support.tier.others import ALICE, MALLORY, at_work, exchange, silent_mount
from tests.support.tier.populated import plant

pytestmark = pytest.mark.any_engine

_TRIES = 50_000
_ENOUGH = 500
_LINK = Entry("hers/l", Kind.SYMLINK, uid=MALLORY, gid=MALLORY, mtime_ns=2, target="nowhere")
_DIRECTORY = Entry("hers/d", Kind.DIRECTORY, mode=0o755, uid=MALLORY, gid=MALLORY, mtime_ns=2)


@pytest.fixture
def hers(target: Path) -> Path:
    """Mallory's directory, in which Alice has a private file and a private directory with a file."""
    require_root()
    hers = target / "hers"
    hers.mkdir()
    (hers / "d").mkdir(mode=0o755)
    (hers / "l").symlink_to("nowhere")
    for path in (hers / "d", hers / "l"):
        os.chown(path, MALLORY, MALLORY, follow_symlinks=False)
    (hers / "private").write_bytes(b"Alice's")
    (hers / "room").mkdir(mode=0o700)
    (hers / "room" / "letter").write_bytes(b"Alice's, too")
    for path in (hers / "private", hers / "room", hers / "room" / "letter"):
        os.chown(path, ALICE, ALICE)
    (hers / "private").chmod(0o600)
    os.chown(hers, MALLORY, MALLORY)
    return hers


@pytest.fixture
def planter(target: Path) -> Iterator[Planter]:
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    made = Planter(fd, lambda path, why: None)
    made.plant(Entry("hers", Kind.DIRECTORY, mode=0o755, uid=MALLORY, gid=MALLORY, mtime_ns=2))
    try:
        yield made
    finally:
        made.close()
        os.close(fd)


def _state(path: Path) -> tuple[int, int, int]:
    status = os.lstat(path)
    return status.st_uid, status.st_gid, status.st_mode


def _swap_link(hers: Path) -> None:
    exchange(hers / "l", hers / "private")
    exchange(hers / "l", hers / "private")
    os.utime(hers / "l", ns=(1, 1), follow_symlinks=False)  # populate has to set its time again


def _swap_new_link(hers: Path) -> None:
    exchange(hers / "l", hers / "private")
    exchange(hers / "l", hers / "private")
    if (hers / "l").is_symlink():
        (hers / "l").unlink()


def _swap_directory(hers: Path) -> None:
    exchange(hers / "d", hers / "room")
    exchange(hers / "d", hers / "room")


def _swap_new_directory(hers: Path) -> None:
    exchange(hers / "d", hers / "room")
    exchange(hers / "d", hers / "room")
    (hers / "d").rmdir()


RACES: dict[str, tuple[Entry, str, Callable[[Path], None], Outcome]] = {
    "a link that is there": (_LINK, "private", _swap_link, Outcome.UPDATED),
    "a new link": (_LINK, "private", _swap_new_link, Outcome.NEW),
    "a directory that is there": (_DIRECTORY, "room", _swap_directory, Outcome.RIGHT),
    "a new directory": (_DIRECTORY, "room", _swap_new_directory, Outcome.NEW),
}


@pytest.mark.parametrize("race", RACES)
def test_what_comes_in_its_place_stays_its_owners(hers: Path, planter: Planter, race: str) -> None:
    entry, name, act, wanted = RACES[race]
    theirs = os.open(hers / name, os.O_RDONLY)
    try:
        before = os.fstat(theirs)
        outcomes: Counter[Outcome] = Counter()
        with at_work(MALLORY, lambda: act(hers)):
            for _ in range(_TRIES):
                outcomes[planter.plant(entry)] += 1
                is_over = outcomes[Outcome.FAILED] > _ENOUGH and outcomes[wanted] > _ENOUGH
                if is_over or os.fstat(theirs).st_uid != ALICE:
                    break
        planter.finish()
        after = os.fstat(theirs)
    finally:
        os.close(theirs)
    assert (after.st_uid, after.st_gid, after.st_mode, after.st_mtime_ns) == (
        before.st_uid,
        before.st_gid,
        before.st_mode,
        before.st_mtime_ns,
    )
    assert outcomes[Outcome.FAILED], "the other user never came in between"
    assert outcomes[wanted]


@pytest.mark.parametrize("is_right", [True, False])
def test_a_directory_that_another_user_may_have_put_there_is_not_given_away(
    hers: Path, target: Path, places: Callable[[str], Path], is_right: bool
) -> None:
    store = places("store")
    (store / "hers" / "d").mkdir(parents=True)
    (store / "hers" / "d" / "new").write_bytes(b"new")
    for path in (store / "hers", store / "hers" / "d"):
        os.chown(path, MALLORY, MALLORY)
    if is_right:
        (hers / "d").chmod(0o700)  # her own directory is brought up to date
    else:
        (hers / "d").rmdir()
        (hers / "room").rename(hers / "d")
    before = _state(hers / "d")
    outcomes, complaints = plant(store, target)
    if is_right:
        assert complaints == []
        assert outcomes["hers/d"] is Outcome.UPDATED
        assert _state(hers / "d") == _state(store / "hers" / "d")
        assert (hers / "d" / "new").exists()
    else:
        assert [path for path, _ in complaints] == ["hers/d"]
        assert "could have put it here" in complaints[0][1]
        assert _state(hers / "d") == before
        assert os.listdir(hers / "d") == ["letter"]


def test_a_file_that_was_saved_in_a_stubs_place_meanwhile_is_kept(target: Path) -> None:
    (target / "stub").touch()
    (target / UNFINISHED).write_bytes(b"")
    directory = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with looked_up(directory, "stub") as found:
            assert found is not None
            (target / "saved").write_bytes(b"what its owner has just saved")
            (target / "saved").rename(target / "stub")
            with pytest.raises(Refusal):
                replace(directory, "stub", found)
    finally:
        os.close(directory)
    assert (target / "stub").read_bytes() == b"what its owner has just saved"
    assert os.listdir(target) == ["stub"]


def test_a_first_name_that_was_written_to_meanwhile_gets_no_second(target: Path) -> None:
    fd = os.open(target, os.O_RDONLY | os.O_DIRECTORY)
    complaints: list[tuple[str, str]] = []
    planter = Planter(fd, lambda path, why: complaints.append((path, why)))
    try:
        assert planter.plant(Entry("one", Kind.FILE, size=7, version="1", identity=1)) is Outcome.NEW
        (target / "one").write_bytes(b"a user's own")
        assert planter.plant(Entry("two", Kind.FILE, size=7, version="1", identity=1)) is Outcome.FAILED
    finally:
        planter.close()
        os.close(fd)
    assert complaints == [("two", "its first name one was replaced meanwhile; populate again")]
    assert os.listdir(target) == ["one"]


def test_a_filesystem_that_another_user_has_mounted_is_not_entered(source: Path, target: Path) -> None:
    require_root()
    require_fuse()
    plant(source, target)
    with silent_mount(MALLORY, target / "sub"):
        done = fusehsm("populate", source, target)
    assert done.returncode == 1
    assert done.stderr == f"fusehsm: {target}/sub: is a mount of user {MALLORY}, which is not entered\n"
    assert "; 5 right, 7 failed; " in done.stdout
