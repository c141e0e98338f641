"""A user who forges a stub's mark gets no file of the store that is not theirs: root's fetch asks the store with root's rights."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusehsm.tier.fetch.catalog import Origin, suspicion
from fusehsm.tier.stores.base import Kind, Rights
from fusehsm.tier.stores.open import open_store
from fusehsm.tier.stubs.mark import StubMark
from fusehsm.tier.stubs.tree import Namespace
from tests.support import harness
from tests.support.harness import NOBODY
from tests.support.requirements import require_root
from tests.support.tier.fetching import fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.servers import Served
from tests.tier.stores.test_stores import MakeStore, as_git, as_tar, as_zip

pytestmark = pytest.mark.any_engine

EVIL, VICTIM = 54321, 54322  # users without accounts
SECRET, OWN = b"the private file", b"a file of theirs"
AS_EVIL = ("setpriv", f"--reuid={EVIL}", f"--regid={EVIL}", "--clear-groups")


@pytest.fixture(autouse=True)
def _as_root() -> None:
    require_root()


@pytest.fixture
def store(places: Callable[[str], Path]) -> Path:
    """A private file of root's and one of another user's, and what EVIL may use: a file of their own, one that all may write to, a directory."""
    root = places("store")
    for name, content, uid, mode in (
        ("private", SECRET, 0, 0o600),
        ("victims", SECRET, VICTIM, 0o600),
        ("theirs", OWN, EVIL, 0o600),
        ("public", OWN, 0, 0o666),
    ):
        put(root / name, content, uid, mode)
    (root / "open").mkdir()
    (root / "open").chmod(0o1777)
    return root


def put(path: Path, content: bytes, uid: int, mode: int) -> None:
    path.write_bytes(content)
    os.chown(path, uid, uid)
    path.chmod(mode)


@contextmanager
def acting_as_evil() -> Iterator[None]:
    os.setegid(EVIL)
    os.seteuid(EVIL)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def forge(path: Path, store: str | Path, name: str) -> None:
    """Let EVIL mark a file (made, if it is not there) as the stub of that file of the store."""
    with open_store(str(store)) as opened:
        version = opened.version(name)
    with acting_as_evil():
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            if os.fstat(fd).st_size != len(SECRET):
                os.ftruncate(fd, len(SECRET))
            StubMark.of(fd, name, version).write(fd, Namespace.USER)
        finally:
            os.close(fd)


def served_by(backend: str) -> tuple[str, ...]:
    return ("--backend", backend, *(("--allow-other",) if backend == "fuse" else ()))


def read(path: Path, *who: str) -> str:
    done = run(*who, "cat", path)
    return done.stdout or done.stderr.rsplit(": ")[-1].strip()


def test_of_a_store_that_names_owners(store: Path, target: Path, backend: str) -> None:
    """A forged mark alone is refused. Beside root's mark it is worth nothing: the file is what root has made."""
    plant(store, target)
    alone = [target / "open" / "made\n\x1b", target / "open" / "made too"]
    beside = [target / "theirs", target / "public"]
    for path, name in zip(alone + beside, ("private", "victims", "private", "victims"), strict=True):
        forge(path, store, name)
    with fetching(store, target, *served_by(backend), "--on-error", "EAGAIN") as served:
        for _ in range(2):
            for path in alone:
                assert read(path, *AS_EVIL) == "Resource temporarily unavailable"
        for path in beside:
            assert read(path, *AS_EVIL) == OWN.decode()
        assert read(target / "private", *AS_EVIL) == "Permission denied"
        assert read(target / "private") == SECRET.decode()
        _, complaints = served.end()
    (line,) = complaints.splitlines()
    assert line.startswith("fusehsm: open/made\\n\\x1b: its mark was written by an ordinary user")
    assert all(path.stat().st_blocks == 0 for path in alone)


def test_of_a_store_that_names_none(nginx: Served, target: Path, backend: str) -> None:
    """A file that root gave away is still a stub of its own file, whatever its owner writes into its attributes."""
    place = nginx.place(f"forged-{backend}")
    for name, content in (("private", SECRET), ("theirs", OWN), ("public", OWN)):
        put(place.directory / name, content, 0, 0o644)
    plant(place.url, target)
    (target / "private").chmod(0o600)
    (target / "public").chmod(0o666)
    os.chown(target / "theirs", EVIL, EVIL)
    for name in ("theirs", "public"):
        forge(target / name, place.url, "private")
    with fetching(place.url, target, *served_by(backend)) as served:
        for name in ("theirs", "public"):
            assert read(target / name, *AS_EVIL) == OWN.decode()
        assert read(target / "private") == SECRET.decode()
        _, complaints = served.end()
    assert complaints == ""


@pytest.mark.parametrize("attribute", ["stub", "resident", "pinned"])
def test_nobody_but_root_writes_what_root_believes(store: Path, target: Path, attribute: str) -> None:
    plant(store, target)
    with acting_as_evil(), pytest.raises(PermissionError):
        os.setxattr(target / "theirs", getattr(Namespace.TRUSTED, attribute), b"x")


@pytest.mark.parametrize(
    ("owner", "mode", "rights", "is_renamed", "is_believed"),
    [
        (0, 0o600, None, False, True),
        (0, 0o622, None, False, True),
        (0, 0o622, None, True, False),
        (0, 0o622, Rights(0, 0, 0o622), True, True),
        (0, 0o620, Rights(0, 0, 0o620), True, True),
        (0, 0o620, Rights(0, VICTIM, 0o620), True, False),
        (EVIL, 0o600, None, False, False),
        (EVIL, 0o600, Rights(0, 0, 0o666), False, False),
        (EVIL, 0o600, Rights(EVIL, 0, 0o600), True, True),
    ],
)
def test_marks_where_root_has_no_other_attributes(
    tmp_path: Path, owner: int, mode: int, rights: Rights | None, is_renamed: bool, is_believed: bool
) -> None:
    """On a file system without trusted.*, root believes a mark if its writer must be root or have a right to that file of the store."""
    path = tmp_path / "file"
    path.touch()
    os.chown(path, owner, 0)
    path.chmod(mode)
    why = suspicion(path.stat(), Origin("file", rights, is_renamed))
    assert (why is None) == is_believed


def test_what_populate_made_is_filled(store: Path, target: Path, backend: str) -> None:
    """With any owner and mode, under new names, and when root has given it to itself."""
    put(store / "shared", OWN, VICTIM, 0o664)
    put(store / "given", OWN, VICTIM, 0o600)
    (store / "place").mkdir()
    put(store / "place" / "opened up", OWN, 0, 0o600)
    plant(store, target)
    (target / "public").rename(target / "renamed")
    (target / "shared").rename(target / "shared too")
    os.link(target / "theirs", target / "linked")
    os.chown(target / "given", 0, 0)
    (target / "place" / "opened up").chmod(0o666)
    with fetching(store, target, *served_by(backend)) as served:
        for name in ("renamed", "shared too", "linked", "given", "place/opened up"):
            assert read(target / name) == OWN.decode()
        assert read(target / "theirs", *AS_EVIL) == OWN.decode()
        assert read(target / "victims", "setpriv", f"--reuid={VICTIM}", "--clear-groups") == SECRET.decode()
        _, complaints = served.end()
    assert complaints == ""


def test_what_is_given_away_is_filled(store: Path, target: Path, backend: str) -> None:
    """Root has made the stub, and has given it to that user: they get its content."""
    plant(store, target)
    os.chown(target / "private", EVIL, EVIL)
    with fetching(store, target, *served_by(backend)) as served:
        assert read(target / "private", *AS_EVIL) == SECRET.decode()
        assert served.end()[1] == ""


def test_who_is_not_root_asks_with_their_own_rights(
    store: Path, target: Path, places: Callable[[str], Path]
) -> None:
    """So all of it is theirs, whatever the store says."""
    for path in (store, target, *store.iterdir()):
        path.chmod(0o755)
    os.chown(target, NOBODY, NOBODY)
    with harness.fuse_device_for_everybody():
        assert harness.fusehsm("populate", store, target, uid=NOBODY).returncode == 0
        command, more, who = harness.command_of(NOBODY)
        with fetching(
            store,
            target,
            "--backend",
            "fuse",
            command=command,
            **{"env": harness.environment(**more), "cwd": "/", **who},  # type: ignore[arg-type]
        ) as served:
            as_nobody = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
            assert read(target / "private", *as_nobody) == SECRET.decode()
            assert served.end()[1] == ""


def test_of_a_tree_that_root_has_populated(store: Path, target: Path) -> None:
    """An ordinary user does not see root's marks, so each stub would look like a file of zeros."""
    for path in (store, target, *store.iterdir()):
        path.chmod(0o755)
    plant(store, target)
    assert harness.fusehsm("populate", store, target).returncode == 0
    os.chown(target, NOBODY, NOBODY)
    with harness.fuse_device_for_everybody():
        for command in (("fetch", "--backend", "fuse"), ("populate",)):
            done = harness.fusehsm(*command, store, target, uid=NOBODY)
            assert done.returncode == 1
            assert f"{target}: was populated by root, and only root can tell its stubs" in done.stderr


@pytest.mark.parametrize("kind", ["local", "tar", "sftp", "zip", "git", "http"])
def test_what_stores_say_of_a_file(request: pytest.FixtureRequest, store: Path, kind: str) -> None:
    """The same as in their lists, by which populate goes."""
    if kind in ("http", "sftp"):
        place: Served = request.getfixturevalue("nginx" if kind == "http" else "sshd").place(store.name)
        put(place.directory / "victims", SECRET, VICTIM, 0o640)
        name = place.url
    else:
        (store / "victims").chmod(0o640)
        made: dict[str, MakeStore] = {"local": str, "tar": as_tar, "zip": as_zip, "git": as_git}
        name = made[kind](store)
    expected = Rights(VICTIM, VICTIM, 0o640) if kind in ("local", "tar", "sftp") else None
    with open_store(name) as opened:
        (entry,) = [entry for entry in opened.tree() if entry.path == "victims"]
        assert (entry.kind, entry.uid) == (Kind.FILE, expected and expected.uid)
        assert opened.rights("victims") == expected
        if expected is not None:
            assert (entry.gid, entry.mode) == (expected.gid, expected.mode)
            with pytest.raises(FileNotFoundError):
                opened.rights("nothing")
