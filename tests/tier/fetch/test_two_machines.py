"""One store, several machines that read it: what they do to each other (nothing), and what each of them asks the store for."""

import hashlib
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import harness
from tests.support.tier.fetching import run
from tests.support.tier.machines import Node, node
from tests.support.tier.s3_server import S3
from tests.support.tier.trees import content_of

pytestmark = [pytest.mark.any_engine, pytest.mark.fuse]

MIB = 1 << 20
SMALL = [f"small/{number}" for number in range(12)]
BIG = ["big-1", "big-2"]
NAMES = [*SMALL, *BIG]

# Reads files from the beginning to the end, as far as it is let, and compares with what they are to be.
READER = """
import collections, errno, json, os, sys
expected, seen, *names = sys.argv[1:]
found = collections.Counter()
for name in names:
    with open(f"{expected}/{name}", "rb") as file:
        right = file.read()
    fd = os.open(f"{seen}/{name}", os.O_RDONLY)
    for offset in range(0, len(right), 65536):
        try:
            data = os.pread(fd, 65536, offset)
        except OSError as error:
            found[errno.errorcode[error.errno]] += 1
            break
        if data != right[offset:offset + 65536]:
            found["zeros" if not any(data) else "wrong"] += 1
    else:
        found["right"] += 1
    os.close(fd)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Store:
    """`url`: what nodes call it; `expected`: the same files in a directory."""

    s3: S3
    prefix: str
    expected: Path

    @property
    def url(self) -> str:
        return f"s3://tests/{self.prefix}"

    def put(self, name: str, content: bytes) -> None:
        """Make or replace an object."""
        (self.expected / name).parent.mkdir(exist_ok=True)
        (self.expected / name).write_bytes(content)
        self.s3.put("tests", f"{self.prefix}/{name}", content)


@pytest.fixture
def store(s3: S3, s3_prefix: str, places: Callable[[str], Path]) -> Store:
    """12 files of up to 30 KB and two of 6 MiB."""
    made = Store(s3, s3_prefix, places("expected"))
    for seed, name in enumerate(SMALL, 1):
        (made.expected / "small").mkdir(exist_ok=True)
        (made.expected / name).write_bytes(content_of(seed * 2500, seed))
    for seed, name in enumerate(BIG, 100):
        (made.expected / name).write_bytes(content_of(6 * MIB + 77, seed))
    s3.upload(made.expected, "tests", s3_prefix)
    return made


@pytest.fixture
def machines(s3: S3, places: Callable[[str], Path]) -> Iterator[Callable[[], Node]]:
    """Makes another machine, with an empty directory."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(node(s3, places("node")))


@pytest.fixture(params=["fuse", pytest.param("kernel", marks=pytest.mark.kernel)])
def backends(request: pytest.FixtureRequest) -> tuple[str, str]:
    """Of two nodes: both emulated, or one on the real kernel."""
    if request.param == "kernel":
        request.getfixturevalue("kernel_events")
    return request.param, "fuse"


class Reading:
    """READER at work, in a process of its own."""

    def __init__(self, store: Store, at: Node, names: list[str]) -> None:
        command = [sys.executable, "-c", READER, str(store.expected), str(at.path), *names]
        self._process = harness.start(command)

    def found(self) -> "Counter[str]":
        """How many files were right, and what else there was."""
        output, complaint = self._process.communicate(timeout=harness.PATIENCE)
        assert complaint == ""
        return Counter(json.loads(output))


def read(store: Store, at: Node, names: list[str] = NAMES) -> "Counter[str]":
    return Reading(store, at, names).found()


def validated(store: Store, at: Node) -> "subprocess.CompletedProcess[str]":
    return at.fusehsm("validate", store.url, at.path, "--reads", "1")


def test_what_a_node_asks_of_the_store(
    store: Store, machines: Callable[[], Node], backends: tuple[str, str]
) -> None:
    """These are the numbers of docs/fetch.md. Which ranges of a big file are asked for together depends on who is quicker, so there are limits."""
    at = machines()
    everything = sum((store.expected / name).stat().st_size for name in NAMES)

    def expect_nothing_asked() -> None:
        assert (at.asked(), at.line.received) == (Counter(), 0)

    at.populate(store.url)
    assert at.asked() == Counter(LIST=2)  # a directory each, up to 1,000 files
    at.populate(store.url)
    assert at.asked() == Counter(LIST=2)
    at.line.received = 0
    with at.fetching(store.url, "--backend", backends[0]) as served:
        expect_nothing_asked()
        assert read(store, at, SMALL) == Counter(right=len(SMALL))
        assert at.asked() == Counter(GET=len(SMALL))
        assert read(store, at, BIG) == Counter(right=2)
        asked = at.asked()
        assert set(asked) == {"GET"}
        assert 2 * 2 <= asked["GET"] <= 2 * 7  # a MiB each at most, 4 MiB at least
        assert everything < at.line.received < everything + 600 * (len(SMALL) + asked["GET"])
        at.line.received = 0
        assert read(store, at) == Counter(right=len(NAMES))
        served.end()
    with at.fetching(store.url, "--backend", backends[0]) as served:
        assert read(store, at) == Counter(right=len(NAMES))
        assert harness.fusehsm("evict", at.path).stdout.startswith(f"evicted {len(NAMES)} files")
        expect_nothing_asked()
        assert read(store, at, SMALL) == Counter(right=len(SMALL))
        assert at.asked() == Counter(GET=len(SMALL))
        served.end()


def test_both_read_at_the_same_time(
    store: Store, machines: Callable[[], Node], backends: tuple[str, str]
) -> None:
    """The same files and different ones, while one of them evicts what it has; and what one of them writes stays there."""
    one, other = machines(), machines()
    for at in (one, other):
        at.populate(store.url)
    with (
        one.fetching(store.url, "--backend", backends[0]),
        other.fetching(store.url, "--backend", backends[1]),
    ):
        readings = [Reading(store, at, names) for at in (one, other) for names in (NAMES, NAMES[::-1])]
        for reading in readings:
            assert reading.found() == Counter(right=len(NAMES))
        assert validated(store, one).returncode == 0
        reading = Reading(store, other, NAMES * 3)
        for _ in range(2):
            assert harness.fusehsm("evict", one.path).returncode == 0
            assert read(store, one) == Counter(right=len(NAMES))
        assert reading.found() == Counter(right=3 * len(NAMES))
        assert run("sh", "-c", f"printf mine | dd of={one.path}/big-1 bs=1 conv=notrunc").returncode == 0
        harness.fusehsm("evict", other.path)
        assert read(store, other) == Counter(right=len(NAMES))
        assert run("head", "-c4", one.path / "big-1").stdout == "mine"
        done = validated(store, other)
        assert (done.returncode, done.stderr) == (0, "")


def test_a_node_that_loses_its_network_serves_no_zeros(
    store: Store, machines: Callable[[], Node], backends: tuple[str, str]
) -> None:
    one, other = machines(), machines()
    for at in (one, other):
        at.populate(store.url)
    options = ("--deadline", "3s", "--on-error", "EAGAIN")
    with (
        one.fetching(store.url, "--backend", backends[0], *options) as served,
        other.fetching(store.url, "--backend", backends[1], *options),
    ):
        assert read(store, one, SMALL[:3]) == Counter(right=3)
        cut = threading.Event()

        def in_the_middle(so_far: int) -> None:
            if so_far > MIB // 2 and not cut.is_set():
                one.cut()
                cut.set()

        one.line.on_answer = in_the_middle
        started = time.monotonic()
        reading = Reading(store, one, BIG[:1])
        assert cut.wait(harness.PATIENCE)
        assert read(store, other) == Counter(right=len(NAMES))
        assert reading.found() == Counter(EAGAIN=1)
        assert read(store, one, SMALL[:4]) == Counter(right=3, EAGAIN=1)
        assert time.monotonic() - started < 15
        one.fix()
        deadline = time.monotonic() + 40
        while (found := read(store, one)) != Counter(right=len(NAMES)):
            assert set(found) <= {"right", "EAGAIN"}
            assert time.monotonic() < deadline
        _, complaints = served.end()
    assert "big-1: given up after 3 s: " in complaints


def test_an_object_that_is_replaced(store: Store, machines: Callable[[], Node]) -> None:
    """Who has it whole keeps it, who has a part of it gets no other part, who has nothing of it needs a new stub."""
    one, other, third = machines(), machines(), machines()
    name = "big-1"
    old, new = (store.expected / name).read_bytes(), content_of(5 * MIB + 3, 7)
    for at in (one, other, third):
        at.populate(store.url)
    without_ahead = ("--read-ahead", "0", "--deadline", "5s")
    with (
        one.fetching(store.url, "--backend", "fuse") as first,
        other.fetching(store.url, "--backend", "fuse", *without_ahead) as second,
    ):
        assert read(store, one, [name]) == Counter(right=1)
        assert run("cmp", "-n", str(2 * MIB), store.expected / name, other.path / name).stdout == ""
        store.put(name, new)
        for _ in range(2):
            assert (one.path / name).read_bytes() == old
            part = run("sh", "-c", f"head -c {2 * MIB} {other.path}/{name} | sha256sum").stdout
            assert part.split()[0] == hashlib.sha256(old[: 2 * MIB]).hexdigest()
            beyond = run("dd", f"if={other.path}/{name}", "bs=1M", "skip=2", "count=1", "of=/dev/null")
            assert "Input/output error" in beyond.stderr
        busy = one.fusehsm("populate", store.url, one.path)
        assert (busy.returncode, "lies on a mount of fusehsm" in busy.stderr) == (1, True)
        assert first.end()[1] == ""
        _, complaints = second.end()
        assert [line for line in complaints.splitlines() if name in line] == [
            f"fusehsm: {name}: has changed in {store.url} since its stub was made; populate again"
        ]
    for at in (one, other):
        done = at.fusehsm("populate", store.url, at.path)
        assert done.returncode == 1
        assert (
            f"{name}: holds content of another version than the store's; remove it and populate again"
            in done.stderr
        )
    third.populate(store.url)
    (other.path / name).unlink()
    other.populate(store.url)
    with (
        other.fetching(store.url, "--backend", "fuse"),
        third.fetching(store.url, "--backend", "fuse"),
    ):
        for at in (other, third):
            assert read(store, at, [name]) == Counter(right=1)
