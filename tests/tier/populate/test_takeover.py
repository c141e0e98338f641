"""Root takes over the marks that an ordinary user or an older fusehsm has written in user.*, and no forged ones."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fusehsm.tier.fetch.inventory import Item, items
from fusehsm.tier.populate.create import Outcome
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.tree import Namespace, Tree
from tests.support.harness import fusehsm
from tests.support.requirements import require_root
from tests.support.tier.fetching import fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of, files_of

pytestmark = pytest.mark.any_engine

SIZE = 3 << 20
SOMEBODY, ANOTHER = 54321, 54322  # users without accounts


@pytest.fixture
def store(places: Callable[[str], Path]) -> Path:
    """What becomes filled, filled in part, pinned, modified and not filled; a user's file, and one with two names."""
    require_root()
    root = places("store")
    for number, name in enumerate(("modified", "nothing", "part", "pinned", "users", "whole")):
        (root / name).write_bytes(content_of(SIZE, number))
    os.chown(root / "users", SOMEBODY, SOMEBODY)
    os.link(root / "nothing", root / "nothing too")
    (root / "empty").touch()
    return root


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


def make_old(path: Path) -> None:
    """The mark of the first format, in user.*, instead of root's; also the record and the pin."""
    with opened(path) as fd:
        mark = stub_mark.read(fd, Namespace.TRUSTED)
        if mark is None:
            return  # another name of a file that is old already
        record = residency.read(fd, mark, Namespace.TRUSTED)
        mark.write(fd, Namespace.USER)
        os.setxattr(fd, Namespace.USER.stub, b"\1" + os.getxattr(fd, Namespace.USER.stub)[1:])
        if Namespace.TRUSTED.pinned in os.listxattr(fd):
            os.setxattr(fd, Namespace.USER.pinned, b"")
        for name in os.listxattr(fd):
            if name.startswith(Namespace.TRUSTED.value):
                os.removexattr(fd, name)
        if record is not None:
            replace(record, recorded_ns=time.time_ns() - 10_000_000).write(fd, Namespace.USER)


def inventory(target: Path, *, tree: Tree | None = None) -> dict[str, Item]:
    """The items below, without the time of their use."""
    with opened(target) as fd:
        found = items(fd, "", lambda key: None, lambda error: None, tree or Tree.of(fd))
        return {item.path: replace(item, used_ns=0, disk=0) for item in found}


def fill(store: Path, target: Path) -> None:
    """Let fetch fill what is to be filled, and use it."""
    with fetching(store, target, "--read-ahead", "0") as served:
        for name in ("modified", "pinned", "users", "whole"):
            assert run("cmp", target / name, store / name).returncode == 0
        assert run("dd", f"if={target}/part", "of=/dev/null", "bs=1M", "count=1").returncode == 0
        assert run("sh", "-c", f"echo mine | dd of={target}/modified conv=notrunc").returncode == 0
        assert fusehsm("pin", target / "pinned").returncode == 0
        assert served.end()[1] == ""


def test_a_tree_of_an_older_one(store: Path, target: Path, backend: str) -> None:
    """It is refused until populate has taken it over, without fetching; then everything is as it was."""
    plant(store, target)
    fill(store, target)
    before = inventory(target)
    assert [before[name].resident for name in ("nothing", "part", "whole")] == [0, 1 << 20, SIZE]
    for path in target.iterdir():
        make_old(path)
    assert inventory(target, tree=Tree.to_look_at()) == before
    with fetching(store, target, "--backend", backend, "--on-error", "EAGAIN") as served:
        (line, *_) = served.said
        assert f"run `fusehsm populate {store} {target}` as root, which takes right marks over" in line
        for name in ("nothing", "whole"):
            assert "temporarily unavailable" in run("cat", target / name).stderr
        _, complaints = served.end()
    assert len(complaints.splitlines()) == 1
    plan = fusehsm("populate", "--dry-run", store, target)
    assert "; 6 updated, 1 right, 1 failed; " in plan.stdout
    done = fusehsm("populate", store, target)
    assert (
        done.stderr
        == f"fusehsm: {target}/modified: was a stub and has been changed since; remove or rename it\n"
    )
    assert "; 6 updated, 1 right, 1 failed; " in done.stdout
    assert inventory(target) == before
    with fetching(store, target, "--backend", backend) as served:
        found = files_of_served(target)
        assert found.pop("modified") == b"mine\n" + content_of(SIZE, 0)[5:]
        assert found == {name: content for name, content in files_of(store).items() if name != "modified"}
        assert fusehsm("evict", target / "whole").returncode == 0
        assert fusehsm("evict", target / "pinned").returncode == 1
        assert served.end()[1] == ""


def files_of_served(target: Path) -> dict[str, bytes]:
    """Read by another process, which cannot hang the test."""
    found = {}
    for name in sorted(os.listdir(target)):
        done = run("od", "-An", "-v", "-tx1", target / name)
        assert done.returncode == 0, done.stderr
        found[name] = bytes.fromhex(done.stdout)
    return found


FORGERIES = {
    "of another file": lambda path, store: _renamed(path, store),
    "of another version": lambda path, store: os.utime(store / "nothing", ns=(1, 1)),
    "of another size": lambda path, store: os.truncate(store / "nothing", SIZE + 1),
    "of another owner": lambda path, store: os.chown(path, ANOTHER, ANOTHER),
}


def _renamed(path: Path, store: Path) -> None:
    """The stub of "whole" under the name of "nothing"."""
    os.rename(path.parent / "whole", path)


@pytest.mark.parametrize("how", FORGERIES)
def test_a_forged_mark_stays_what_it_is(store: Path, target: Path, how: str) -> None:
    plant(store, target)
    path = target / "nothing"
    for each in target.iterdir():
        make_old(each)
    (target / "nothing too").unlink()
    FORGERIES[how](path, store)
    before = {name: os.getxattr(path, name) for name in os.listxattr(path)}
    outcomes, complaints = plant(store, target)
    ((_, why),) = [complaint for complaint in complaints if complaint[0] == "nothing"]
    assert why.startswith("has a mark of an ordinary user or an older fusehsm, which ")
    assert why.endswith("; save what you need of it, remove it, and populate again")
    assert outcomes["nothing"] is Outcome.FAILED
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == before
    with opened(path) as fd:
        assert stub_mark.is_all_hole(fd)


def test_killed_while_it_takes_over(
    store: Path, target: Path, places: Callable[[str], Path], killed: Callable[[Path, Path, int, bool], bool]
) -> None:
    """At every call: the next run goes on, and no file counts as less, or as more, than it was."""
    for name in ("modified", "nothing", "nothing too", "users"):
        (store / name).unlink()
    plant(store, target)
    with fetching(store, target, "--read-ahead", "0") as served:
        assert run("cmp", target / "whole", store / "whole").returncode == 0
        assert run("dd", f"if={target}/part", "of=/dev/null", "bs=1M", "count=1").returncode == 0
        assert run("cmp", target / "pinned", store / "pinned").returncode == 0
        assert fusehsm("pin", target / "pinned").returncode == 0
        served.end()
    before = inventory(target)
    call = 0
    while True:
        for path in target.iterdir():
            make_old(path)
        call += 1
        has_died = killed(store, target, call, True)
        _, complaints = plant(store, target)
        assert complaints == []
        # A change time that the killed run has caused may make a file count as modified: it then stays.
        assert {path: replace(item, modified=False) for path, item in inventory(target).items()} == before
        for path in target.iterdir():
            assert not [name for name in os.listxattr(path) if name.startswith(Namespace.USER.value)]
        if not has_died:
            break
        for name in ("whole", "part", "pinned"):
            _unmodify(target / name)
    assert call > 20


def _unmodify(path: Path) -> None:
    """Its record without the mark of a killed run."""
    with opened(path) as fd:
        mark = stub_mark.read(fd, Namespace.TRUSTED)
        assert mark is not None
        record = residency.read(fd, mark, Namespace.TRUSTED)
        assert record is not None
        replace(record, recorded_ns=time.time_ns() - 10_000_000).write(fd, Namespace.TRUSTED)
