"""The power is cut while fetch fills: afterwards every byte is right or refused, and what a user has brought to the disk is there."""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.requirements import require_root
from tests.support.tier.populated import plant
from tests.support.tier.power import Disk
from tests.support.tier.soak import Forks
from tests.support.tier.soak_model import Content, write
from tests.support.tier.soak_user import User

pytestmark = [pytest.mark.any_engine, pytest.mark.kernel]

BLOCK = 16384
SIZE = 20 * BLOCK + 77
FILES = 6


@pytest.fixture
def disk(session_directory: Path, numbers: Iterator[int], kernel_events: Path) -> Iterator[Disk]:
    require_root()
    place = session_directory / f"power-{next(numbers)}"
    place.mkdir()
    disk = Disk(place / "image", place / "root", 64)
    yield disk
    disk.close()


@pytest.fixture
def forks(session_directory: Path, numbers: Iterator[int]) -> Iterator[Forks]:
    place = session_directory / f"forks-{next(numbers)}"
    place.mkdir()
    forks = Forks(place)
    yield forks
    forks.close()


def read_at_random(target: Path, choose: random.Random) -> None:
    """Until the power is cut."""
    with suppress(OSError):
        for _ in range(500):
            fd = os.open(target / str(choose.randrange(3, FILES)), os.O_RDONLY)
            try:
                os.pread(fd, 100, choose.randrange(20) * BLOCK)
            finally:
                os.close(fd)
            time.sleep(0.001)


def read_all_of(path: Path) -> None:
    with open(path, "rb") as file:
        while file.read(BLOCK):
            pass


@pytest.mark.parametrize("way", ["cut", "copy"])
@pytest.mark.parametrize("seed", range(2))
def test_power_cut(places: Callable[[str], Path], disk: Disk, forks: Forks, seed: int, way: str) -> None:
    choose = random.Random(f"{seed} {way}")
    store = places("power-store")
    files = []
    for number in range(FILES):
        content = bytearray(choose.randbytes(SIZE))
        (store / str(number)).write_bytes(content)
        files.append(Content([content], [str(number)]))
    target = disk.root / "tree"
    target.mkdir()
    plant(store, target)
    os.sync()
    options: dict[str, object] = {
        "store": str(store),
        "destination": str(target),
        "backend": "kernel",
        "block_size": str(BLOCK),
        "read_ahead": choose.choice(("0", "1M")),
        "keep_interval": choose.choice((0.05, 5.0)),
    }
    fetch = forks.start(0, **options)
    read_all_of(target / "0")
    time.sleep(choose.choice((0, 0.3)))
    # 1: written to and brought to the disk, also where it was filled before.
    for number in (1, 2):
        with open(target / str(number), "r+b", buffering=0) as file:
            file.read(3 * BLOCK)
            for offset in (5, 7 * BLOCK + 4000, SIZE - 3):
                data = choose.randbytes(choose.choice((3, 5000)))
                file.seek(offset)
                file.write(data)
                write(offset, data)(files[number].versions[0])
            if number == 1:
                os.fsync(file.fileno())
            else:  # what was not brought there may be gone, all or in part
                files[2].versions.append(bytearray((store / "2").read_bytes()))
    reader = threading.Thread(target=read_at_random, args=(target, random.Random(seed)), daemon=True)
    reader.start()
    if choose.random() < 0.5:
        os.sync()
        read_all_of(target / "3")
    time.sleep(choose.uniform(0, 0.2))
    if way == "cut":
        disk.cut()
        fetch.kill()
        reader.join()
        disk.restart()
    else:
        disk.copy(disk.image.with_name("copy"))
        fetch.kill()
        reader.join()
        disk.replace(disk.image.with_name("copy"))
    fetch = forks.start(0, **options)
    try:
        user = User(target, [], 0, 1, lambda: False)
        refused = [user.check(content, choose) for content in files]
        # Of what was being filled in that moment something may be refused, if the journal has the time that the fill had not put back yet.
        assert refused[:2] == [0, 0], (refused, forks.log.read_text())
    finally:
        fetch.kill()
        disk.unmount()
