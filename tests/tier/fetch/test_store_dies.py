"""A store that dies, hangs, cuts connections or changes in the middle of a fill: an errno by the deadline, never zeros, never a mixture."""

import errno
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.tier import servers
from tests.support.tier.bad_line import BadLine
from tests.support.tier.fetching import Fetching, fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.servers import Served
from tests.support.tier.trees import content_of

pytestmark = [pytest.mark.any_engine, pytest.mark.kernel]

KIB = 1024
SIZE = 40 * 64 * KIB
OPTIONS = ("--backend", "kernel", "--block-size", "64K", "--read-ahead", "0")


@pytest.fixture
def line(nginx: Served, kernel_events: Path) -> Iterator[BadLine]:
    with BadLine(nginx.url) as line:
        yield line


@pytest.fixture
def store(nginx: Served, numbers: Iterator[int]) -> Served:
    place = nginx.place(f"dies-{next(numbers)}")
    (place.directory / "file").write_bytes(content_of(SIZE))
    return place


def read_at(path: Path, offset: int) -> bytes | int:
    """100 bytes, or the errno."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 100, offset)
    except OSError as error:
        return error.errno or 0
    finally:
        os.close(fd)


def expected(offset: int) -> bytes:
    return content_of(SIZE)[offset : offset + 100]


@pytest.mark.parametrize("trouble", ["refuse", "hang", "short"])
def test_an_errno_by_the_deadline(line: BadLine, store: Served, target: Path, trouble: str) -> None:
    url = line.through(store.url)
    plant(url, target)
    with fetching(url, target, *OPTIONS, "--deadline", "1s", "--on-error", "EAGAIN") as served:
        assert read_at(target / "file", 0) == expected(0)
        line.trouble = trouble
        started = time.monotonic()
        assert read_at(target / "file", 70_000) == errno.EAGAIN
        assert 0.5 < time.monotonic() - started < 5
        line.trouble = ""
        assert run("cmp", store.directory / "file", target / "file").stdout == ""
        _, complaints = served.end()
    assert trouble == "hang" or "trying again" in complaints


@pytest.mark.parametrize("trouble", ["refuse", "cut"])
def test_a_store_that_is_back_in_time(line: BadLine, store: Served, target: Path, trouble: str) -> None:
    url = line.through(store.url)
    plant(url, target)
    with fetching(url, target, *OPTIONS, "--deadline", "20s") as served:
        line.trouble = trouble
        threading.Timer(1, line.fix).start()
        assert read_at(target / "file", 70_000) == expected(70_000)
        summary, _ = served.end()
    assert "retries" in summary


def test_connections_that_are_cut_at_random(line: BadLine, store: Served, target: Path) -> None:
    url = line.through(store.url)
    plant(url, target)
    choose = random.Random(1)
    with fetching(url, target, *OPTIONS, "--deadline", "2s") as served:
        line.trouble = "random"
        for _ in range(12):
            offset = choose.randrange(SIZE - 100)
            assert read_at(target / "file", offset) in (expected(offset), errno.EIO)
        line.trouble = ""
        assert run("cmp", store.directory / "file", target / "file").stdout == ""
        served.end()


def test_the_server_is_killed(
    session_directory: Path, numbers: Iterator[int], kernel_events: Path, target: Path
) -> None:
    place = session_directory / f"nginx-{next(numbers)}"
    place.mkdir()
    with servers.nginx(place) as web:
        (web.directory / "file").write_bytes(content_of(SIZE))
        plant(web.url, target)
        with fetching(web.url, target, *OPTIONS, "--deadline", "1s") as served:
            assert read_at(target / "file", 0) == expected(0)
            os.kill(int((place / "nginx.pid").read_text()), signal.SIGKILL)
            _kill_workers(place)
            assert read_at(target / "file", 200_000) == errno.EIO
            assert read_at(target / "file", 0) == expected(0)
            served.end()


def _kill_workers(place: Path) -> None:
    """nginx's workers survive their master."""
    for number in filter(str.isdigit, os.listdir("/proc")):
        try:
            group = os.getpgid(int(number))
            if group == int((place / "nginx.pid").read_text()):
                os.kill(int(number), signal.SIGKILL)
        except OSError:
            continue


def test_many_wait_for_one_request(nginx: Served, store: Served, kernel_events: Path, target: Path) -> None:
    plant(store.url, target)
    log = nginx.directory.parent / "access.log"
    with fetching(store.url, target, *OPTIONS) as served:
        before = _gets(log, store)
        with ThreadPoolExecutor(24) as pool:
            offsets = [3 * 64 * KIB + number * 1000 for number in range(24)]
            found = list(pool.map(lambda offset: read_at(target / "file", offset), offsets))
        assert found == [expected(offset) for offset in offsets]
        served.end()
    assert _gets(log, store) - before == 1


def _gets(log: Path, store: Served) -> int:
    name = store.url.rpartition("/")[2]
    return sum(f"GET /{name}/file" in line for line in log.read_text().splitlines())


def test_a_file_that_is_replaced_is_not_mixed(store: Served, kernel_events: Path, target: Path) -> None:
    plant(store.url, target)
    with fetching(store.url, target, *OPTIONS) as served:
        assert read_at(target / "file", 0) == expected(0)
        (store.directory / "new").write_bytes(content_of(SIZE, 9))
        os.replace(store.directory / "new", store.directory / "file")
        assert read_at(target / "file", 100_000) == errno.EIO
        assert read_at(target / "file", 0) == expected(0)
        served.end()


def test_a_file_that_is_written_to_while_it_is_read_is_not_mixed(
    places: Callable[[str], Path], kernel_events: Path, target: Path
) -> None:
    store = places("store")
    old, new = b"o" * SIZE, b"n" * SIZE
    for number in range(20):
        (store / str(number)).write_bytes(old)
    plant(store, target)
    with fetching(store, target, *OPTIONS) as served:
        changed = _read_while_changing(served, store, target, old, new)
        _, complaints = served.end()
    assert changed
    assert "has changed in" in complaints


def _read_while_changing(served: Fetching, store: Path, target: Path, old: bytes, new: bytes) -> int:
    """How many reads were refused."""
    refused = 0
    for number in range(20):
        writer = threading.Thread(target=_overwrite, args=(store / str(number), new))
        fd = os.open(target / str(number), os.O_RDONLY)
        for offset in range(0, SIZE, 64 * KIB):
            if offset == 3 * 64 * KIB:
                writer.start()
            try:
                assert os.pread(fd, 64 * KIB, offset) == old[: 64 * KIB]
            except OSError as error:
                assert error.errno == errno.EIO
                refused += 1
        os.close(fd)
        writer.join()
    return refused


def _overwrite(path: Path, content: bytes) -> None:
    with open(path, "r+b", buffering=0) as file:
        for offset in range(0, SIZE, 4096):
            file.write(content[offset : offset + 4096])
