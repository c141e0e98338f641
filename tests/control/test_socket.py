"""The control socket: clients that misbehave get an error or are disconnected, and stop no other client."""

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import hypothesis.strategies as st
import pytest
import trio
from hypothesis import given

from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.opening import open_group
from fusehsm.conform.accessor import Accessor
from fusehsm.control import protocol
from fusehsm.control import socket as control_socket
from fusehsm.control.client import request
from fusehsm.control.protocol import Hello, MarkRequest, Release, Request, Status
from fusehsm.daemon import control_server as server
from fusehsm.daemon.control_server import MOST_CONNECTIONS, MOST_GROUPS
from fusehsm.events import Event
from fusehsm.fanotify.abi import (
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_MARK_ADD,
    FAN_REPORT_FD_ERROR,
    LINUX_6_14,
    decode_events,
)
from fusehsm.handler import serve
from fusehsm.linux import mountinfo
from tests.conftest import MakeAccessor, MakeMount
from tests.support.harness import NOBODY, PATIENCE, Mount, environment

pytest_plugins = ["tests.support.handler_fixtures"]
pytestmark = pytest.mark.any_engine

PAGE = 4096
P = LINUX_6_14.pre_access
PRE = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC
HELLO = Hello(protocol.VERSION, PRE, os.O_RDWR | os.O_CLOEXEC, None)


class RawClient:
    """A client that says what it likes."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mountinfo.mount_of(mount.path)
        self.requests = control_socket.connect(self.mount)
        self.requests.settimeout(PATIENCE)
        self.events: socket.socket | None = None

    def send(self, message: bytes | Request) -> None:
        self.requests.send(message if isinstance(message, bytes) else protocol.encode_request(message))

    def reply(self) -> dict[str, Any]:
        parts: list[bytes] = []
        while not parts or not protocol.is_last_part(parts[-1]):
            part, descriptors, _, _ = socket.recv_fds(self.requests, 1 << 20, 4)
            assert part, "disconnected"
            parts.append(part)
            for descriptor in descriptors:
                self.events = socket.socket(fileno=descriptor)
                self.events.settimeout(PATIENCE)
        return protocol.decode_reply(parts)

    def ask(self, message: bytes | Request) -> dict[str, Any]:
        self.send(message)
        return self.reply()

    def watch(self, path: Path) -> None:
        """A group with an inode mark on that file."""
        self.ask(HELLO)
        inode = os.stat(path).st_ino
        self.ask(MarkRequest(FAN_MARK_ADD, P, *self.mount.device, inode))

    def event(self) -> tuple[int, str]:
        """The number and path of the next event; its descriptor is closed."""
        assert self.events is not None
        message, descriptors, _, _ = socket.recv_fds(self.events, 1 << 20, 4)
        assert message, "disconnected"
        for descriptor in descriptors:
            os.close(descriptor)
        split = protocol.event_message_split(message)
        return int.from_bytes(message[16:20], sys.byteorder), os.fsdecode(message[split:])

    def feedback(self, kind: int, number: int, value: int) -> None:
        assert self.events is not None
        self.events.send(protocol.encode_feedback(kind, number, value))

    def is_disconnected(self, connection: socket.socket | None) -> bool:
        """Wait for the server to hang up on one of the sockets."""
        assert connection is not None
        try:
            while connection.recv(1 << 20):
                pass
        except ConnectionResetError:
            pass
        return True

    def close(self) -> None:
        """Leave, and see to it that the server knows: the next test counts its groups."""
        for connection in (self.requests, self.events):
            if connection is not None and connection.fileno() >= 0:
                connection.setblocking(True)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_WR)
                self.is_disconnected(connection)
                connection.close()


@pytest.fixture
def clients(exact_mount: Mount) -> Iterator[list[RawClient]]:
    """Three clients, closed whatever happened."""
    made = [RawClient(exact_mount) for _ in range(3)]
    yield made
    for client in made:
        client.close()


@pytest.fixture
def client(clients: list[RawClient]) -> RawClient:
    return clients[0]


@pytest.fixture
def bystander(clients: list[RawClient]) -> RawClient:
    """A client that behaves well: it must be served, whatever the others do."""
    return clients[1]


@pytest.fixture
def stub(exact_mount: Mount, numbers: Iterator[int]) -> Path:
    """A stub on the mount."""
    name = f"stub-{next(numbers)}"
    with (exact_mount.source / name).open("wb") as file:
        file.truncate(100 * PAGE)
    return exact_mount.path / name


def groups_of(client: RawClient) -> int:
    return len(client.ask(Status())["groups"])


# Requests


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xfe rubbish",
        b"17",
        b"{}",
        b"[" * 10_000,
        json.dumps({"request": "format"}).encode(),
        json.dumps({"request": ["hello"]}).encode(),
        json.dumps({"request": "hello"}).encode(),
        json.dumps({"request": "status", "more": 1}).encode(),
        json.dumps({"request": "mark", "flags": 1, "mask": "1", "major": 0, "minor": 0, "inode": 1}).encode(),
        json.dumps({"request": "mark", "flags": 1, "mask": 1, "major": 0, "minor": 0, "inode": -1}).encode(),
        json.dumps(
            {"request": "mark", "flags": 1, "mask": 1, "major": 0, "minor": 0, "inode": 1 << 64}
        ).encode(),
        json.dumps(
            {"request": "mark", "flags": True, "mask": 1, "major": 0, "minor": 0, "inode": 1}
        ).encode(),
        b'{"request": "mark", "flags": 1e400, "mask": 1, "major": 0, "minor": 0, "inode": 1}',
    ],
)
def test_a_request_that_makes_no_sense_gets_an_error(client: RawClient, message: bytes) -> None:
    with pytest.raises(OSError) as refused:
        client.ask(message)
    assert refused.value.errno == errno.EPROTO
    assert refused.value.strerror
    assert "\n" not in refused.value.strerror
    assert client.ask(Status())["events"] == "exact"


@pytest.mark.parametrize(
    ("hello", "number"),
    [
        (Hello(99, PRE, os.O_RDWR, None), errno.EPROTO),
        (Hello(protocol.VERSION, PRE | 4, os.O_RDWR, None), errno.EINVAL),
        (Hello(protocol.VERSION, 1 << 60, os.O_RDWR, None), errno.EINVAL),
        (Hello(protocol.VERSION, PRE, os.O_CREAT, None), errno.EINVAL),
        (Hello(protocol.VERSION, PRE, os.O_RDWR, "klingon"), errno.EINVAL),
    ],
)
def test_a_wrong_hello_makes_no_group(client: RawClient, hello: Hello, number: int) -> None:
    before = groups_of(client)
    with pytest.raises(OSError) as refused:
        client.ask(hello)
    assert refused.value.errno == number
    assert groups_of(client) == before
    client.ask(HELLO)
    with pytest.raises(OSError) as refused:
        client.ask(HELLO)
    assert refused.value.errno == errno.EBUSY
    assert groups_of(client) == before + 1


def test_a_wrong_mark_is_refused(client: RawClient, stub: Path) -> None:
    device = client.mount.device
    inode = stub.stat().st_ino

    def refused(mark: MarkRequest) -> int | None:
        with pytest.raises(OSError) as failed:
            client.ask(mark)
        return failed.value.errno

    good = MarkRequest(FAN_MARK_ADD, P, *device, inode)
    assert refused(good) == errno.EBADF  # no group yet
    client.ask(HELLO)
    assert refused(MarkRequest(FAN_MARK_ADD, P, device[0], device[1] + 1, inode)) == errno.EXDEV
    assert refused(MarkRequest(FAN_MARK_ADD, P, *device, inode + 10_000)) == errno.ESTALE
    assert refused(MarkRequest(FAN_MARK_ADD, P, *device, None)) == errno.EINVAL
    assert refused(MarkRequest(FAN_MARK_ADD | 2, P, *device, inode)) == errno.EINVAL
    assert refused(MarkRequest(FAN_MARK_ADD, (1 << 64) - 1, *device, inode)) == errno.EINVAL
    client.ask(good)


@pytest.mark.parametrize("message", [b"x" * (protocol.LARGEST_REQUEST + 1), b""], ids=["oversize", "empty"])
def test_an_impossible_message_disconnects(client: RawClient, bystander: RawClient, message: bytes) -> None:
    client.ask(HELLO)
    before = groups_of(bystander)
    client.send(message)
    assert client.is_disconnected(client.requests)
    assert client.is_disconnected(client.events)
    assert groups_of(bystander) == before - 1


def test_descriptors_sent_to_the_server_do_not_stay_there(client: RawClient, exact_mount: Mount) -> None:
    def held() -> int:
        return len(os.listdir(f"/proc/{exact_mount.pid}/fd"))

    client.ask(Status())
    before = held()
    for _ in range(20):
        socket.send_fds(client.requests, [protocol.encode_request(Status())], [0] * 50)
        client.reply()
    assert held() == before


def test_requests_without_end_whose_replies_nobody_reads_stop_nobody(
    client: RawClient, bystander: RawClient
) -> None:
    client.requests.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            client.send(Status())
    for _ in range(20):
        assert bystander.ask(Status())["events"] == "exact"


# The event socket


@pytest.mark.parametrize(
    "message",
    [b"", b"x", b"x" * protocol.FEEDBACK_SIZE, b"x" * 100_000],
    ids=["empty", "short", "kind", "long"],
)
def test_rubbish_on_the_event_socket_costs_the_group(
    client: RawClient, bystander: RawClient, accessor: Accessor, stub: Path, message: bytes
) -> None:
    client.watch(stub)
    call = accessor.start("pread_path", str(stub), 1, 0)
    client.event()
    assert client.events is not None
    client.events.send(message)
    assert client.is_disconnected(client.requests)
    assert call.result() == b"\0"  # the kernel's way: what a dead listener owes is allowed
    assert bystander.ask(Status())["waiting"] == []


def test_answers_that_are_none_change_nothing(client: RawClient, accessor: Accessor, stub: Path) -> None:
    client.watch(stub)
    call = accessor.start("pread_path", str(stub), 1, 0)
    number, path = client.event()
    assert path == str(stub)
    client.feedback(protocol.ANSWER, number + 1, 0)
    client.feedback(protocol.ANSWER, -5, 0)
    client.feedback(protocol.ANSWER, number, errno.ENOENT)  # none of the seven
    client.feedback(protocol.MORE_CREDIT, 0, 0xFFFF_FFFF)
    assert len(client.ask(Status())["waiting"]) == 1
    client.feedback(protocol.ANSWER, number, errno.EBUSY)
    client.feedback(protocol.ANSWER, number, 0)  # too late
    with pytest.raises(OSError) as denied:
        call.result()
    assert denied.value.errno == errno.EBUSY


def test_a_client_asks_whether_it_has_everything(
    client: RawClient, make_accessor: MakeAccessor, exact_mount: Mount, stub: Path
) -> None:
    client.watch(stub)
    count = protocol.CREDIT + 2
    accessors = [make_accessor() for _ in range(count)]
    assert client.events is not None
    client.feedback(protocol.SYNC, 0, 0)
    assert client.events.recv(1 << 10) == protocol.caught_up(0)

    calls = [accessor.start("pread_path", str(stub), 1, 0) for accessor in accessors]
    while len(client.ask(Status())["waiting"]) < count:
        pass
    client.feedback(protocol.SYNC, 0, 0)  # there are events in the socket: no answer comes
    numbers = [client.event()[0] for _ in range(protocol.CREDIT)]
    client.feedback(protocol.SYNC, 0, protocol.CREDIT)  # without credit nothing else can be sent
    assert client.events.recv(1 << 10) == protocol.caught_up(protocol.CREDIT)
    client.feedback(protocol.MORE_CREDIT, 0, 2)
    client.feedback(protocol.SYNC, 0, protocol.CREDIT)
    numbers += [client.event()[0] for _ in range(2)]
    client.feedback(protocol.SYNC, 0, count)
    assert client.events.recv(1 << 10) == protocol.caught_up(count)

    for number in numbers:
        client.feedback(protocol.ANSWER, number, 0)
    for call in calls:
        assert call.result() == b"\0"


def test_a_flood_of_feedback_stops_nobody(
    clients: list[RawClient], bystander: RawClient, accessor: Accessor, stub: Path
) -> None:
    bystander.watch(stub)
    flooder = clients[0]
    flooder.ask(HELLO)
    assert flooder.events is not None
    flooder.events.setblocking(False)
    message = protocol.encode_feedback(protocol.ANSWER, 7, 0)
    for _ in range(50):
        with pytest.raises(BlockingIOError):
            while True:
                flooder.events.send(message)
        call = accessor.start("pread_path", str(stub), 1, 0)
        number, _path = bystander.event()
        bystander.feedback(protocol.ANSWER, number, 0)
        bystander.feedback(protocol.MORE_CREDIT, 0, 1)
        assert call.result() == b"\0"


@pytest.mark.parametrize("which", ["requests", "events"])
@pytest.mark.parametrize("how", ["close", "no more to write", "no more to read"])
def test_half_a_client_is_none(
    client: RawClient, bystander: RawClient, make_accessor: MakeAccessor, stub: Path, which: str, how: str
) -> None:
    client.watch(stub)
    first, second = make_accessor(), make_accessor()
    calls = [first.start("pread_path", str(stub), 1, 0)]
    client.event()
    end, other = (client.requests, client.events) if which == "requests" else (client.events, client.requests)
    assert end is not None
    if how == "close":
        end.close()
    elif how == "no more to write":
        end.shutdown(socket.SHUT_WR)
    else:
        end.shutdown(socket.SHUT_RD)
        # Which the other side learns when it has something to say.
        if which == "requests":
            client.send(Status())
        else:
            calls.append(second.start("pread_path", str(stub), 1, PAGE))
    assert client.is_disconnected(other)
    for call in calls:
        assert call.result() == b"\0"
    assert bystander.ask(Status())["waiting"] == []


@pytest.mark.parametrize("which", ["requests", "events"])
@pytest.mark.parametrize("how", ["close", "no more to write"])
def test_what_half_a_client_has_answered_counts(
    client: RawClient, accessor: Accessor, exact_mount: Mount, stub: Path, which: str, how: str
) -> None:
    client.watch(stub)
    call = accessor.start("pread_path", str(stub), 1, 0)
    number, _ = client.event()
    end = client.requests if which == "requests" else client.events
    assert end is not None
    assert client.events is not None
    client.events.setblocking(True)  # with a timeout it counts as full much earlier
    # The server finds all of it at once.
    os.kill(exact_mount.pid, signal.SIGSTOP)
    try:
        for _ in range(100):
            client.feedback(protocol.ANSWER, number + 1, 0)  # to nothing
        client.feedback(protocol.ANSWER, number, errno.EBUSY)
        if how == "close":
            end.close()
        else:
            end.shutdown(socket.SHUT_WR)
    finally:
        os.kill(exact_mount.pid, signal.SIGCONT)
    with pytest.raises(OSError) as denied:
        call.result()
    assert denied.value.errno == errno.EBUSY


def test_who_never_reads_keeps_only_his_own_accessors_waiting(
    client: RawClient, bystander: RawClient, make_accessor: MakeAccessor, exact_mount: Mount, stub: Path
) -> None:
    # A path so long that not even the credit's worth of events goes into a socket's buffer.
    deep = exact_mount.source
    while len(os.fspath(deep)) < 3500:
        deep /= "d" * 250
    deep.mkdir(parents=True)
    with (deep / "stub").open("wb") as file:
        file.truncate(100 * PAGE)
    watched = exact_mount.path / (deep / "stub").relative_to(exact_mount.source)
    client.watch(watched)
    bystander.watch(stub)
    count = protocol.CREDIT + 20
    calls = [make_accessor().start("pread_path", str(watched), 1, n * PAGE) for n in range(count)]

    status = client.ask(Status())
    while len(status["waiting"]) < count:
        status = client.ask(Status())  # a reply in many parts
    assert {entry["path"] for entry in status["waiting"]} == {str(watched)}
    other = make_accessor().start("pread_path", str(stub), 1, 0)
    number, _ = bystander.event()
    bystander.feedback(protocol.ANSWER, number, 0)
    assert other.result() == b"\0"
    assert not any(call.done for call in calls)

    numbers = set()
    for _ in range(count):
        number, path = client.event()
        assert path == str(watched)
        numbers.add(number)
        client.feedback(protocol.MORE_CREDIT, 0, 1)
    assert len(numbers) == count
    for number in numbers:
        client.feedback(protocol.ANSWER, number, 0)
    for call in calls:
        assert call.result() == b"\0"


# How many


def test_groups_are_limited_as_in_the_kernel(exact_mount: Mount, bystander: RawClient) -> None:
    standing = groups_of(bystander)
    made: list[RawClient] = []
    try:
        for _ in range(MOST_GROUPS - standing):
            made.append(RawClient(exact_mount))
            made[-1].ask(HELLO)
        with pytest.raises(OSError) as refused:
            bystander.ask(HELLO)
        assert refused.value.errno == errno.EMFILE
        leaver = made.pop()
        leaver.events.close()  # type: ignore[union-attr]
        assert leaver.is_disconnected(leaver.requests)
        leaver.close()
        bystander.ask(HELLO)
    finally:
        for client in made:
            client.close()


def test_connections_are_limited(exact_mount: Mount, bystander: RawClient) -> None:
    made: list[RawClient] = []
    try:
        with pytest.raises((AssertionError, ConnectionError)):
            for _ in range(MOST_CONNECTIONS + 1):
                made.append(RawClient(exact_mount))
                made[-1].ask(Status())
        assert MOST_CONNECTIONS - 10 < len(made) <= MOST_CONNECTIONS
        assert bystander.ask(Status())["events"] == "exact"
    finally:
        for client in made:
            client.close()


# Who


def test_other_users_cannot_reach_the_socket(exact_mount: Mount, make_accessor: MakeAccessor) -> None:
    stranger = make_accessor(uid=NOBODY, gid=NOBODY)
    with pytest.raises(PermissionError):
        stranger.call("listdir", "/run/fusehsm")


async def test_other_users_are_turned_away_even_if_they_reach_it(
    session_directory: Path, numbers: Iterator[int], make_accessor: MakeAccessor
) -> None:
    place = session_directory / f"run-{next(numbers)}"
    async with trio.open_nursery() as nursery:
        # Without a gate: nobody who says anything to it must be let in.
        start = partial(server.serve_control, cast(Any, None), (99, 1), places=[str(place)])
        await nursery.start(start)
        place.chmod(0o711)
        (place / "99:1").chmod(0o777)

        def knock(path: str) -> bytes:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            connection.connect(path)
            return connection.recv(100)

        stranger = make_accessor(uid=NOBODY, gid=NOBODY)
        assert await stranger.run(knock, str(place / "99:1")) == b""
        nursery.cancel_scope.cancel()


# The ends


HOLDER = """
import sys, trio
from fusehsm.backends.opening import open_group
async def main():
    async with open_group(sys.argv[1], mark="inode") as group:
        print("ready", flush=True)
        await group.wait_readable()
        group.take_events()
        print("held", flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def test_what_a_killed_listener_owes_is_allowed(
    stub: Path, accessor: Accessor, bystander: RawClient, exact_mount: Mount
) -> None:
    command = [sys.executable, "-c", HOLDER, str(stub)]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "ready\n"
            call = accessor.start("pread_path", str(stub), 1, 0)
            assert holder.stdout.readline() == "held\n"
            (waiting,) = bystander.ask(Status())["waiting"]
            assert waiting["path"] == str(stub)
            groups = bystander.ask(Status())["groups"]
            assert groups[waiting["group"]]["pid"] == holder.pid
            holder.send_signal(signal.SIGKILL)
            assert call.result() == b"\0"
        finally:
            holder.kill()


async def test_a_listener_learns_that_its_mount_is_gone(make_mount: MakeMount) -> None:
    mount = make_mount()

    async def allow(event: Event) -> None:
        pass

    async with open_group(mount.path) as group:
        mount.kill_daemon()
        with pytest.raises(OSError) as ended:
            await serve(group, allow)
        assert ended.value.errno == errno.ENOTCONN
        assert str(mount.path) in str(ended.value)
        with pytest.raises(OSError) as refused:
            await group.mark(FAN_MARK_ADD, P, path="/")
        assert refused.value.errno in (errno.EXDEV, errno.ENOTCONN)
    with pytest.raises(OSError) as refused:
        async with open_group(mount.path):
            pass
    assert refused.value.errno == errno.ENOTCONN


async def test_a_listener_without_room_for_descriptors(stub: Path, make_accessor: MakeAccessor) -> None:
    first, second = make_accessor(), make_accessor()
    mount = await trio.to_thread.run_sync(mountinfo.mount_of, stub)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def without_room(group: EmulatedGroup) -> bytes:
        await group.wait_readable()
        probe = os.dup(0)
        os.close(probe)
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe, hard))
        try:
            return group.read(4096)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    async with await EmulatedGroup.connect(mount, PRE, os.O_RDWR) as group:
        await group.mark(FAN_MARK_ADD, P, path=str(stub))
        call = first.start("pread_path", str(stub), 1, 0)
        with pytest.raises(OSError) as failed:
            await without_room(group)
        assert failed.value.errno == errno.EMFILE
        with pytest.raises(PermissionError):
            await call.wait()

    async with await EmulatedGroup.connect(mount, PRE | FAN_REPORT_FD_ERROR, os.O_RDWR) as group:
        await group.mark(FAN_MARK_ADD, P, path=str(stub))
        call = second.start("pread_path", str(stub), 1, PAGE)
        (event,) = decode_events(LINUX_6_14, await without_room(group))
        assert event.fd == -errno.EMFILE
        assert event.offset == PAGE
        with pytest.raises(PermissionError):
            await call.wait()


async def test_status_and_release_have_connections_of_their_own(exact_mount: Mount) -> None:
    mount = await trio.to_thread.run_sync(mountinfo.mount_of, exact_mount.path)
    status = await request(mount, Status())
    assert status["destination"] == str(exact_mount.path)
    assert await request(mount, Release()) == {"released": 0}


# Where it is


DEVICE = (99, 7)
THERE = mountinfo.Mount(1, DEVICE, "/", "/somewhere", "fuse.fusehsm", "x", os.getuid())


def test_a_socket_is_found_by_device_number_and_goes_with_its_server(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with control_socket.listening(DEVICE, [str(tmp_path / "missing" / "run"), str(place)]) as listener:
        assert place.stat().st_mode & 0o777 == 0o700
        assert os.listdir(place) == ["99:7"]
        connection = control_socket.connect(THERE, [str(tmp_path / "elsewhere"), str(place)])
        accepted, _ = listener.accept()
        assert control_socket.peer_of(accepted) == control_socket.Peer(os.getpid(), os.getuid(), os.getgid())
        connection.close()
        accepted.close()
    assert os.listdir(place) == []


def test_stale_sockets_are_removed(tmp_path: Path) -> None:
    place = tmp_path / "run"
    place.mkdir(0o700)
    for name in ("99:7", "99:8"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
            dead.bind(str(place / name))
    (place / "a file").touch()
    with pytest.raises(OSError, match="its daemon is gone; `fusehsm umount /somewhere` cleans up"):
        control_socket.connect(THERE, [str(place)])
    with (
        control_socket.listening((99, 9), [str(place)]),
        control_socket.listening(DEVICE, [str(place)]),
    ):
        assert sorted(os.listdir(place)) == ["99:7", "99:9", "a file"]
        control_socket.connect(THERE, [str(place)]).close()


def test_a_socket_that_has_been_replaced_is_left_alone(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with control_socket.listening(DEVICE, [str(place)]):
        (place / "99:7").unlink()
        (place / "99:7").touch()
    assert os.listdir(place) == ["99:7"]


@pytest.mark.parametrize("wrong", ["mode", "link", "file", "owner"])
def test_a_directory_that_others_may_write_to_is_not_trusted(tmp_path: Path, wrong: str) -> None:
    place = tmp_path / "run"
    if wrong == "link":
        (tmp_path / "real").mkdir(0o700)
        place.symlink_to("real")
    elif wrong == "file":
        place.touch(0o700)
    else:
        place.mkdir(0o700)
        if wrong == "owner":
            os.chown(place, NOBODY, NOBODY)
        else:
            place.chmod(0o770)
    with (
        pytest.raises(OSError, match="set XDG_RUNTIME_DIR to a directory of yours"),
        control_socket.listening(DEVICE, [str(place)]),
    ):
        pass
    with pytest.raises(OSError):
        control_socket.connect(THERE, [str(place)])


def test_users_have_directories_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    uid = os.getuid()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/my/own")
    own = control_socket.directories(uid)
    assert "/my/own/fusehsm" in own
    assert (own[0] == "/run/fusehsm") is (uid == 0)
    assert control_socket.directories(4711) == ["/run/user/4711/fusehsm", "/tmp/fusehsm-4711"]
    monkeypatch.setenv("XDG_RUNTIME_DIR", "relative")
    assert not [place for place in control_socket.directories(uid) if not place.startswith(("/run", "/tmp"))]


# The language


@given(
    st.one_of(
        st.builds(
            Hello,
            st.integers(0, 99),
            st.integers(0, (1 << 32) - 1),
            st.integers(0, (1 << 32) - 1),
            st.none() | st.text(max_size=20),
        ),
        st.builds(
            MarkRequest,
            st.integers(0, (1 << 32) - 1),
            st.integers(0, (1 << 64) - 1),
            st.integers(0, 4095),
            st.integers(0, 1 << 20),
            st.none() | st.integers(0, (1 << 64) - 1),
        ),
        st.builds(Status),
        st.builds(Release),
    )
)
def test_requests_survive_the_journey(message: Request) -> None:
    assert protocol.decode_request(protocol.encode_request(message)) == message


@given(st.binary(max_size=200))
def test_rubbish_is_no_request(data: bytes) -> None:
    with pytest.raises(ValueError):
        protocol.decode_request(data)


@given(
    st.sampled_from([protocol.ANSWER, protocol.MORE_CREDIT, protocol.SYNC]),
    st.integers(-(1 << 31), (1 << 31) - 1),
    st.integers(0, (1 << 32) - 1),
)
def test_feedback_survives_the_journey(kind: int, number: int, value: int) -> None:
    assert protocol.decode_feedback(protocol.encode_feedback(kind, number, value)) == (kind, number, value)


@given(st.text(max_size=300), st.integers(1, 1000))
def test_replies_survive_the_journey_in_parts(text: str, times: int) -> None:
    result = {"lines": [text] * times}
    parts = protocol.encode_result(result)
    assert [protocol.is_last_part(part) for part in parts] == [False] * (len(parts) - 1) + [True]
    assert all(len(part) <= protocol.LARGEST_REPLY_PART + 1 for part in parts)
    assert protocol.decode_reply(parts) == result
