"""populate, killed at any moment and run again: everything is right, nothing is left over, what was right has not been touched."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.tier.populate.create import Outcome
from fusehsm.tier.populate.lookup import UNFINISHED
from tests.support import harness
from tests.support.tier.populated import plant
from tests.support.tier.trees import changes_since, describe, expect_stubs

pytestmark = pytest.mark.any_engine

SEEDS = range(20)


def make_tree(root: Path, choose: random.Random, files: int) -> None:
    """Files with all that a stub must have: sizes, modes, owners, links, in directories of any mode."""
    directories = [root]
    for number in range(files):
        where = choose.choice(directories)
        path = where / f"n{number}"
        match choose.randrange(8):
            case 0:
                path.mkdir()
                directories.append(path)
                continue
            case 1:
                path.symlink_to(f"../somewhere/{number}")
                os.utime(path, ns=(1, choose.randrange(1 << 60)), follow_symlinks=False)
                continue
            case 2 if number:
                others = [other for other in root.rglob("*") if other.is_file() and not other.is_symlink()]
                if others:
                    os.link(choose.choice(others), path)
                    continue
        path.touch()
        os.truncate(path, choose.choice((0, 1, 4096, 100_000)))
        change(path, choose)
    for directory in directories[1:]:
        directory.chmod(choose.choice((0o700, 0o755, 0o2775, 0o555)))
        os.utime(directory, ns=(1, choose.randrange(1 << 60)))


def change(path: Path, choose: random.Random) -> None:
    os.truncate(path, choose.randrange(1 << 20))
    if os.geteuid() == 0:
        os.chown(path, choose.choice((0, 1000)), choose.choice((0, 1000)))
    path.chmod(choose.choice((0o644, 0o400, 0o4755, 0o000)))
    os.utime(path, ns=(1, choose.randrange(1 << 60)))


@pytest.mark.parametrize("seed", SEEDS)
def test_killed_and_run_again(
    places: Callable[[str], Path], killed: Callable[[Path, Path, int, bool], bool], seed: int
) -> None:
    choose = random.Random(seed)
    unnamed = seed % 4 != 3  # else as where files cannot be made without a name
    store, target = places("killed-store"), places("killed")
    make_tree(store, choose, 60)
    # Half of them die while they bring older stubs up to date.
    if seed % 2:
        plant(store, target)
        for path in sorted(store.rglob("*")):
            if path.is_file() and not path.is_symlink() and choose.random() < 0.7:
                change(path, choose)
    # How often the way ends earlier says how many calls there are: less than 20 for each entry.
    deaths = 0
    for _ in range(3):
        deaths += killed(store, target, choose.randrange(1, 250), unnamed)
    assert deaths
    outcomes, complaints = plant(store, target, unnamed=unnamed)
    assert complaints == []
    assert describe(target) == describe(store)
    expect_stubs(target)
    assert not list(target.rglob(UNFINISHED))
    before = changes_since(target)
    assert plant(store, target) == (dict.fromkeys(outcomes, Outcome.RIGHT), [])
    assert changes_since(target) == before


@pytest.mark.parametrize("seed", range(2))
def test_the_command_killed_at_some_time(places: Callable[[str], Path], seed: int) -> None:
    choose = random.Random(seed)
    store, target = places("killed-store"), places("killed")
    for directory in range(20):
        (store / str(directory)).mkdir()
        for number in range(200):
            path = store / str(directory) / str(number)
            path.touch()
            os.truncate(path, choose.randrange(10_000))
    process = harness.start([*harness.COMMAND, "populate", str(store), str(target)])
    while not any(target.iterdir()):
        time.sleep(0.001)
    time.sleep(choose.random() / 10)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=harness.PATIENCE)
    assert process.returncode == -signal.SIGKILL
    assert 0 < sum(1 for _ in target.rglob("*")) < 4020
    assert plant(store, target)[1] == []
    assert describe(target) == describe(store)
    expect_stubs(target)
