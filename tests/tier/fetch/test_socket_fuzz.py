"""Fuzzing fetch's control socket: hostile clients do not end fetch, stop no other client and no accessor, and reach nothing outside DST."""

import errno
import json
import os
import random
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from fusehsm.conform.accessor import Accessor, AccessorTimeout
from fusehsm.control import socket as control_socket
from fusehsm.tier.fetch import protocol
from fusehsm.tier.fetch.protocol import LARGEST_REPLY, List, socket_name
from tests.conftest import MakeAccessor
from tests.support import fuzzing, harness
from tests.support.fuzzing import PATIENCE, Case, Plan
from tests.support.harness import LogReader
from tests.support.socket_fuzz import Attack, Client
from tests.support.tier.fetching import Fetching, fetching
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = [pytest.mark.any_engine, pytest.mark.fuzz]

CASES = 2000
CALM = 250  # cases between two moments when nobody attacks
MOST_MEMORY = 256 << 20  # bytes; it begins with some 55 MiB
KEPT = 32  # descriptors that fetch may hold beyond what it began with: of the store, of fills on their way
FILES = 12
SIZE = 20_000  # bytes of a file
#: Many lines in the answer to a list, so that a client that does not read it fills its socket.
CROWD = 600
LONG = "\u4e00" * 80  # six bytes each in JSON


class FetchServer:
    """A fetch, as a fuzzer of its socket sees it."""

    kinds: Mapping[str, type[Any]] = protocol._CODEC._kinds
    quick: Sequence[str] = ()

    def __init__(self, root: Path, outside: Path, patience: float) -> None:
        self._name = socket_name(str(root))
        self._patience = patience
        self.known: Mapping[str, Sequence[Any]] = {
            "path": (
                "",
                *(f"file-{number}" for number in range(FILES)),
                *(f"file-{number}" for number in range(FILES)),
                "crowd",
                f"crowd/1{LONG}",
                "link/file",
                "link",
                f"../{outside.name}/file",
                f"crowd/../../{outside.name}/file",
                str(outside / "file"),
                "fifo",
                "own",
                "file-1/below",
                "d" * 255,
            ),
            "older_than": (None, None, 0, 0.0, 3600),
            "free": (None, None, 0, 1, 4096, 1 << 30),
            "pinned": (True, False),
        }
        self._second = self.connect()

    def connect(self) -> socket.socket:
        connection = control_socket.connect_to(self._name, (os.getuid(),))
        assert connection is not None, "fetch takes no connection any more"
        connection.settimeout(self._patience)
        return connection

    def check_answer(self, packet: bytes, descriptors: Sequence[int]) -> bool:
        assert not descriptors
        assert len(packet) <= LARGEST_REPLY
        answer = json.loads(packet)
        if "lines" in answer:
            return False
        assert "result" in answer or 0 < answer["errno"] < 134, answer
        assert answer.get("errno") != errno.EIO, f"a bug: {answer}"
        return True

    def use_events(self, client: Client, choose: random.Random) -> None:
        raise AssertionError("fetch has no event sockets")

    def probe(self) -> None:
        # No stub: one that is just being evicted is in use (EAGAIN).
        try:
            self._second.send(protocol.encode_request(List("own")))
            answer: dict[str, Any] = {"lines": []}
            lines: list[Any] = []
            while "lines" in answer:
                lines += answer["lines"]
                packet = self._second.recv(LARGEST_REPLY)
                assert packet, "another client was disconnected"
                answer = json.loads(packet)
        except TimeoutError:
            raise AssertionError(f"another client has no answer within {self._patience:.0f} s") from None
        except ConnectionError as error:
            raise AssertionError(f"another client was disconnected: {error}") from None
        assert answer == {"result": {}}
        assert [line["path"] for line in lines] == ["own"]

    def close(self) -> None:
        self._second.close()


def prepare(store: Path, root: Path) -> Path:
    """A store and its stubs; returns a directory beside DST with a stub that has its content, which nobody may evict."""
    for number in range(FILES):
        (store / f"file-{number}").write_bytes(content_of(SIZE, number))
    (store / "crowd").mkdir()
    for number in range(CROWD):
        (store / "crowd" / f"{number}{LONG}").touch()
    outside = root.parent / f"outside-{root.name}"
    outside.mkdir()
    for target in (outside, root):
        plant(store, target)
    with fetching(store, outside) as filling:
        for number in range(FILES):
            reading = ("cat", str(outside / f"file-{number}"))
            harness.start(reading, stdout=-3).wait(PATIENCE)
        filling.end()
    (outside / "file-0").rename(outside / "file")
    (root / "link").symlink_to(outside)
    os.mkfifo(root / "fifo")
    (root / "own").write_bytes(b"no stub")
    return outside


def read_one(accessor: Accessor, root: Path, choose: random.Random, patience: float) -> None:
    """An accessor gets what the store has, whatever clients do meanwhile."""
    number, offset, size = choose.randrange(FILES), choose.randrange(SIZE), choose.choice((1, 4096, SIZE))
    try:
        got = accessor.call("pread_path", str(root / f"file-{number}"), size, offset, timeout=patience)
    except AccessorTimeout:
        raise AssertionError(f"an accessor has no answer within {patience:.0f} s") from None
    assert got == content_of(SIZE, number)[offset : offset + size], (
        f"other bytes than the store's in file-{number}"
    )


def attack(serving: Fetching, outside: Path, accessor: Accessor, plan: Plan, cases: int) -> None:
    """Try the cases, and see that fetch serves, keeps nothing, and touches nothing outside DST."""
    assert serving.process.stderr is not None
    log = LogReader(serving.process.stderr)
    pid = serving.process.pid
    server = FetchServer(serving.path, outside, plan.patience)
    attack = Attack(server, lambda: "\n".join(log.lines[-20:]), plan.patience)
    before, untouched = fuzzing.usage(pid).descriptors, fuzzing.described(outside)

    def calm() -> None:
        attack.hang_up()
        server.probe()
        assert fuzzing.described(outside) == untouched, "something outside DST has changed"
        assert fuzzing.usage(pid).peak < MOST_MEMORY
        # What they have asked for is done first.
        assert fuzzing.comes_down_to(pid, before + KEPT, PATIENCE), (
            "it keeps descriptors of clients that have gone"
        )
        odd = [line for line in log.lines if "Traceback" in line or "has failed" in line]
        assert not odd, "\n".join(log.lines[-40:])

    def attempt(case: Case) -> None:
        attack.act(case.random)
        if case.random.random() < 0.2:
            read_one(accessor, serving.path, case.random, plan.patience)
        if case.number % CALM == CALM - 1:
            calm()

    try:
        plan.run(cases, attempt)
        calm()
        assert serving.process.poll() is None, log.lines
    finally:
        attack.hang_up()
        server.close()


def test_hostile_clients(
    places: Callable[[str], Path], target: Path, make_accessor: MakeAccessor, backend: str, fuzz_plan: Plan
) -> None:
    store = places("store")
    outside = prepare(store, target)
    with fetching(store, target, "--backend", backend, "--block-size", "4K", "--read-ahead", "0") as serving:
        attack(serving, outside, make_accessor(), fuzz_plan, CASES)


FLAWS = {
    "outside": "something outside DST has changed",
    "blocking": "no answer within",
    "unexpected": "a bug",
    "grows": "peak",
}


@pytest.mark.root
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_fault_is_found(
    flaw: str, places: Callable[[str], Path], target: Path, make_accessor: MakeAccessor
) -> None:
    """A fault that is put into fetch on purpose (tests/support/flawed.py) is found within the fixed number of cases."""
    store = places("store")
    outside = prepare(store, target)
    flawed = (sys.executable, "-m", "tests.support.flawed", f"fetch-{flaw}")
    with (
        fetching(store, target, "--block-size", "4K", command=flawed) as serving,
        pytest.raises(AssertionError, match=FLAWS[flaw]),
    ):
        attack(serving, outside, make_accessor(), fuzzing.flaw_plan(), CASES)
