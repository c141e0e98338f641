"""Fuzzing the mount's control socket: hostile clients do not end the mount, stop no other client, and get at nothing outside SRC."""

import errno
import json
import os
import random
import socket
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fusehsm.conform.accessor import Accessor, PendingCall
from fusehsm.control import protocol
from fusehsm.control import socket as control_socket
from fusehsm.control.protocol import Hello, Status
from fusehsm.daemon.control_server import MOST_CONNECTIONS
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_CLASS_CONTENT,
    FAN_CLASS_NOTIF,
    FAN_CLASS_PRE_CONTENT,
    FAN_MARK_ADD,
    FAN_MARK_FLUSH,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    FAN_OPEN_PERM,
    LINUX_6_14,
)
from fusehsm.linux import mountinfo
from tests.conftest import MakeAccessor, MakeMount
from tests.support import fuzzing
from tests.support.fuzzing import PATIENCE, Case, Plan
from tests.support.harness import Mount
from tests.support.socket_fuzz import Attack, Client

pytestmark = [pytest.mark.any_engine, pytest.mark.fuzz]

CASES = 4000
CALM = 250  # cases between two moments when nobody attacks
MOST_MEMORY = 256 << 20  # bytes; it begins with some 45 MiB
#: Descriptors that the daemon may hold beyond what it began with: files of the tree, kept for their next use.
KEPT = 32
CONTENT = b"the content of a file " * 1000
_NUMBER = struct.Struct("=i")
_NUMBER_AT = 16  # in a struct fanotify_event_metadata, bytes
_MASKS = (FAN_OPEN_PERM, FAN_ACCESS_PERM, LINUX_6_14.pre_access, 0x2 | 0x20, 0xFFFF_FFFF)


class MountServer:
    """The mount, as a fuzzer of its socket sees it."""

    kinds: Mapping[str, type[Any]] = protocol._CODEC._kinds
    quick: Sequence[str] = ("hello", "status", "release", "reader", "backing", "lease-status")

    def __init__(self, mount: Mount, patience: float = PATIENCE) -> None:
        self._patience = patience
        self._source = str(mount.source)
        self._mount = mountinfo.mount_of(mount.path)
        major, minor = self._mount.device
        paths = [mount.path, *mount.path.iterdir()]
        backing = mount.source.stat().st_dev
        self.known: Mapping[str, Sequence[Any]] = {
            "version": (protocol.VERSION,) * 8,
            "flags": (
                0,
                FAN_CLASS_PRE_CONTENT,
                FAN_CLASS_CONTENT,
                FAN_CLASS_NOTIF,
                FAN_MARK_ADD,
                FAN_MARK_REMOVE,
                FAN_MARK_FLUSH,
            )
            + (FAN_MARK_ADD | FAN_MARK_MOUNT,) * 2,
            "event_f_flags": (os.O_RDWR, os.O_RDONLY, os.O_RDWR | os.O_CLOEXEC),
            "dialect": (None, None, None, "linux-6.14", "patch-v1", "patch-v2", "none"),
            "mask": _MASKS,
            "major": (major, major, os.major(backing)),
            "minor": (minor, minor, os.minor(backing)),
            "inode": [path.stat().st_ino for path in paths]
            + [path.stat().st_ino for path in mount.source.iterdir()],
            "path": (
                "file-0",
                "directory",
                "directory/below",
                "../outside/file",
                "/etc/passwd",
                "link/file",
                None,
            ),
            "pid": (os.getpid(), 1, mount.pid),
            "tid": (os.getpid(), 1, mount.pid, 0),
            "mount": (None, None, 1),
            "unique_mount": (None, None, 1),
        }
        self._second = self.connect()

    def connect(self) -> socket.socket:
        connection = control_socket.connect(self._mount)
        connection.settimeout(self._patience)
        return connection

    def check_answer(self, packet: bytes, descriptors: Sequence[int]) -> bool:
        for descriptor in descriptors:
            self._expect_ours(descriptor)
        if protocol.is_last_part(packet):
            answer = json.loads(packet[1:])  # no answer to these has two parts, but a status
            assert "result" in answer or 0 < answer["errno"] < 134, answer
            return True
        return False

    def _expect_ours(self, descriptor: int) -> None:
        """A descriptor that has come is of SRC, or the event socket."""
        leads_to = os.readlink(f"/proc/self/fd/{descriptor}")
        inside = leads_to == self._source or leads_to.startswith(self._source + "/")
        assert inside or leads_to.startswith(("socket:", "anon_inode:[pidfd]", "pidfd:")), leads_to

    def use_events(self, client: Client, choose: random.Random) -> None:
        assert client.events is not None
        for _ in range(choose.randrange(1, 6)):
            with suppress(BlockingIOError, ConnectionError):
                message, descriptors, _, _ = socket.recv_fds(client.events, protocol.LARGEST_EVENT_MESSAGE, 4)
                for descriptor in descriptors:
                    self._expect_ours(descriptor)
                    os.close(descriptor)
                if len(message) > protocol.CAUGHT_UP_SIZE:
                    client.numbers.append(*_NUMBER.unpack_from(message, _NUMBER_AT))
            with suppress(BlockingIOError, ConnectionError):
                client.events.send(self._feedback(client, choose))

    @staticmethod
    def _feedback(client: Client, choose: random.Random) -> bytes:
        draw = choose.random()
        if draw < 0.6 and client.numbers:
            number = client.numbers.popleft()
            return protocol.encode_feedback(
                protocol.ANSWER, number, choose.choice((0, 0, errno.EPERM, errno.EIO, errno.ENOENT))
            )
        if draw < 0.96:
            kind = choose.choice((protocol.ANSWER, protocol.MORE_CREDIT, protocol.SYNC))
            number = choose.choice((0, 1, -1, 7, -(1 << 31), (1 << 31) - 1))
            return protocol.encode_feedback(kind, number, choose.choice((0, 1, 64, 1 << 31, (1 << 32) - 1)))
        return choose.randbytes(
            choose.choice((1, protocol.FEEDBACK_SIZE - 1, protocol.FEEDBACK_SIZE, 13, 4000))
        )

    def probe(self) -> None:
        try:
            self._second.send(protocol.encode_request(Status()))
            parts = [b""]
            while not protocol.is_last_part(parts[-1] or b"+"):
                parts.append(self._second.recv(1 << 20))
                assert parts[-1], "another client was disconnected"
        except TimeoutError:
            raise AssertionError(f"another client has no answer within {self._patience:.0f} s") from None
        except ConnectionError as error:
            raise AssertionError(f"another client was disconnected: {error}") from None
        assert "groups" in protocol.decode_reply(parts[1:])

    def close(self) -> None:
        self._second.close()


class Users:
    """Processes that use the mount meanwhile."""

    def __init__(self, mount: Mount, accessors: Sequence[Accessor]) -> None:
        self._path = mount.path
        self._idle = list(accessors)
        self._waiting: list[tuple[Accessor, PendingCall, bytes]] = []

    def act(self, choose: random.Random) -> None:
        """One of them that does not wait makes an access."""
        for entry in [entry for entry in self._waiting if entry[1].done]:
            self._expect(entry)
        if not self._idle:
            return
        accessor = self._idle.pop()
        path = str(self._path / f"file-{choose.randrange(4)}")
        if choose.random() < 0.8:
            offset, size = choose.randrange(len(CONTENT)), choose.choice((1, 4096, 30000))
            call = accessor.start("pread_path", path, size, offset)
            self._waiting.append((accessor, call, CONTENT[offset : offset + size]))
        else:
            self._waiting.append((accessor, accessor.start("listdir", str(self._path)), b""))

    def settle(self) -> None:
        """All of them come back: nobody listens any more."""
        while self._waiting:
            self._expect(self._waiting[0])

    def _expect(self, entry: tuple[Accessor, PendingCall, bytes]) -> None:
        accessor, call, content = entry
        self._waiting.remove(entry)
        self._idle.append(accessor)
        try:
            result = call.result(PATIENCE)
        except OSError as error:
            assert error.errno in (errno.EPERM, errno.EIO)
        else:
            assert not isinstance(result, bytes) or result == content


def prepare(source: Path) -> Path:
    """Fill SRC; returns the directory beside it that nobody may touch."""
    for number in range(4):
        (source / f"file-{number}").write_bytes(CONTENT)
    (source / "directory").mkdir()
    (source / "directory/below").write_bytes(CONTENT)
    outside = source.parent / f"outside-{source.name}"
    outside.mkdir()
    (outside / "file").write_bytes(b"not yours")
    (source / "link").symlink_to(outside)
    return outside


def attack(mount: Mount, accessors: Sequence[Accessor], plan: Plan, cases: int) -> None:
    """Try the cases, and see that the mount serves, keeps nothing and complains of nothing that is its own fault."""
    server = MountServer(mount, plan.patience)
    users = Users(mount, accessors)
    attack = Attack(server, lambda: "\n".join(mount.log.lines[-20:]), plan.patience)
    before = fuzzing.usage(mount.pid).descriptors

    def calm() -> None:
        attack.hang_up()
        server.probe()
        users.settle()
        assert fuzzing.comes_down_to(mount.pid, before + KEPT, plan.patience), (
            "it keeps descriptors of clients that have gone"
        )
        assert fuzzing.usage(mount.pid).peak < MOST_MEMORY
        expect_no_trouble(mount)

    def attempt(case: Case) -> None:
        attack.act(case.random)
        if case.random.random() < 0.2:
            users.act(case.random)
        if case.number % CALM == CALM - 1:
            calm()
        assert mount.process.poll() is None, mount.log.lines

    try:
        plan.run(cases, attempt)
        calm()
    finally:
        attack.hang_up()
        server.close()


def expect_no_trouble(mount: Mount) -> None:
    """No line of a bug in the log."""
    lines = mount.log.lines
    odd = [line for line in lines if "Traceback" in line or "the session of process" in line]
    assert not odd, "\n".join(lines[-40:])


def test_hostile_clients(
    make_mount: MakeMount, make_accessor: MakeAccessor, backing: Path, fuzz_plan: Plan
) -> None:
    outside = prepare(backing)
    before = fuzzing.described(outside), fuzzing.described(backing)
    mount = make_mount("--events", "exact", source=backing)
    attack(mount, [make_accessor() for _ in range(4)], fuzz_plan, CASES)
    assert (fuzzing.described(outside), fuzzing.described(backing)) == before


def test_more_clients_than_there_is_room_for(make_mount: MakeMount, backing: Path) -> None:
    """All that come beyond the limit are turned away; those who are there are answered."""
    prepare(backing)
    mount = make_mount(source=backing)
    server = MountServer(mount)
    crowd = [server.connect() for _ in range(MOST_CONNECTIONS + 20)]
    for connection in crowd:
        with suppress(BrokenPipeError):
            connection.send(protocol.encode_request(Hello(protocol.VERSION, 0, os.O_RDONLY, None)))
    server.probe()
    for connection in crowd:
        connection.close()
    server.probe()
    server.close()


FLAWS = {
    "numbers": "the session of process",
    "descriptors": "keeps descriptors",
    "blocking": "no answer within",
    "dies": "was disconnected",
}


@pytest.mark.parametrize("flaw", FLAWS)
def test_a_fault_is_found(
    flaw: str, make_mount: MakeMount, make_accessor: MakeAccessor, backing: Path
) -> None:
    """A fault that is put into the daemon on purpose (tests/support/flawed.py) is found within the fixed number of cases."""
    prepare(backing)
    mount = make_mount(
        "--events",
        "exact",
        source=backing,
        program=(sys.executable, "-m", "tests.support.flawed", f"mount-{flaw}"),
    )
    with pytest.raises(AssertionError) as found:
        attack(mount, [make_accessor() for _ in range(4)], fuzzing.flaw_plan(), CASES)
    assert FLAWS[flaw] in str(found.value) + "".join(found.value.__notes__)
