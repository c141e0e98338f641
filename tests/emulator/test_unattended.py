"""Accesses without an answer, or with a bad one: --unattended, --event-timeout, handlers and listeners that misbehave."""

import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.opening import DEFAULT_EVENT_F_FLAGS, DEFAULT_FLAGS, open_group
from fusehsm.conform.accessor import Accessor, PendingCall
from fusehsm.conform.sides import ext4_image
from fusehsm.control.socket import connect
from fusehsm.fanotify.abi import (
    FAN_MARK_ADD,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    LINUX_6_14,
    deny_errno,
    encode_response,
)
from fusehsm.linux.mountinfo import Mount as MountEntry
from fusehsm.linux.mountinfo import read_mounts
from tests.conftest import MakeAccessor, MakeMount
from tests.support import read_methods as ways
from tests.support.async_listener import HOLD, listening
from tests.support.harness import PATIENCE, Mount, fusehsm, is_dead, start
from tests.support.stub_pattern import Filler, Stub, content, make_stub

SIZE = 50_000
PRE_ACCESS = LINUX_6_14.pre_access

pytestmark = pytest.mark.fuse


def stub_in(mount: Mount, name: str, filler: Filler, size: int = SIZE) -> Stub:
    stub = make_stub(mount.source, mount.path, name, len(filler.contents) + 1, size)
    filler.knows(stub)
    return stub


def entry(mount: Mount) -> MountEntry:
    return next(m for m in read_mounts() if m.mount_point == str(mount.path))


def error_of(call: Callable[[], Any]) -> int:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno


async def error_in(call: PendingCall) -> int:
    with pytest.raises(OSError) as caught:
        await call.wait()
    assert caught.value.errno is not None
    return caught.value.errno


async def waiting(mount: Mount, number: int) -> list[dict[str, Any]]:
    """One event of each process that waits, once that many do; read-ahead may make one process wait for several."""
    import json

    with trio.fail_after(PATIENCE):
        while True:
            done = await trio.to_thread.run_sync(fusehsm, "status", "--json", str(mount.path))
            events: list[dict[str, Any]] = json.loads(done.stdout)[0]["waiting"]
            found = {event["pid"]: event for event in events}
            if len(found) == number:
                return list(found.values())


LISTENER = """
import os, sys, trio
from fusehsm.backends.opening import open_group

async def main():
    async with open_group(sys.argv[1], ("PRE_ACCESS",), mark=sys.argv[2]) as group:
        print("ready", flush=True)
        while True:
            await group.wait_readable()
            for event in group.take_events():
                print("holds", event.path, flush=True)

trio.run(main)
"""


@pytest.fixture
def holder() -> Iterator[Callable[..., "subprocess.Popen[str]"]]:
    """holder(path, mark) -> a listener process that takes every event and answers none."""
    made = []

    def make(path: str, mark: str = "mount") -> "subprocess.Popen[str]":
        process = start([sys.executable, "-c", LISTENER, path, mark])
        made.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield make
    for process in made:
        process.kill()
        process.communicate()


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def read_line(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline()


# Policies


@pytest.mark.parametrize(("policy", "number"), [("deny", errno.EIO), ("deny=ENOSPC", errno.ENOSPC)])
async def test_deny(make_mount: MakeMount, accessor: Accessor, holder: Any, policy: str, number: int) -> None:
    mount = make_mount("--unattended", policy, "--events", "exact")
    filler = Filler()
    stub = stub_in(mount, "stub", filler)
    path = (stub.path, 100, 0)

    def denied() -> int:
        return error_of(lambda: accessor.call("pread_path", *path))

    assert await trio.to_thread.run_sync(denied) == number
    group = await EmulatedGroup.connect(entry(mount), DEFAULT_FLAGS, DEFAULT_EVENT_F_FLAGS)
    async with group:
        # A listener that has not marked anything yet hears nothing: it must not let zeros through.
        assert await trio.to_thread.run_sync(denied) == number
    old = await accessor.run("open", stub.path, os.O_RDONLY)
    listener = await trio.to_thread.run_sync(holder, str(mount.path))
    call = accessor.start("pread_path", *path)
    assert "stub" in await trio.to_thread.run_sync(read_line, listener)
    kill(listener)
    assert await error_in(call) == number
    async with listening(mount.path, ("PRE_ACCESS",), answer=filler):
        assert await accessor.run("pread_path", *path) == stub.content[:100]
        assert await accessor.run("pread", old, 100, 200) == stub.content[200:300]
    assert await error_in(accessor.start("pread", old, 100, 200)) == number


async def test_allow_is_the_kernels_way(make_mount: MakeMount, accessor: Accessor, holder: Any) -> None:
    mount = make_mount()
    stub = stub_in(mount, "stub", Filler())
    assert await accessor.run("pread_path", stub.path, 10, 0) == bytes(10)
    listener = await trio.to_thread.run_sync(holder, str(mount.path))
    call = accessor.start("pread_path", stub.path, 10, 0)
    await trio.to_thread.run_sync(read_line, listener)
    kill(listener)
    assert await call.wait() == bytes(10)


@pytest.mark.parametrize("events", ["exact", "first-access"])
async def test_hold_loses_nothing(
    make_mount: MakeMount, make_accessor: MakeAccessor, holder: Any, events: str
) -> None:
    """Kill a listener that holds events and attach a new one: nothing is lost, nothing is read as zeros."""
    mount = make_mount("--unattended", "hold", "--events", events)
    filler = Filler()
    stubs = [stub_in(mount, f"stub-{number}", filler) for number in range(4)]
    some = (ways.pread_pieces, ways.map_private, ways.send, ways.pread_all)
    accessors = [make_accessor() for _ in stubs]
    listener = await trio.to_thread.run_sync(holder, str(mount.path))
    descriptors = [await a.run("open", s.path, os.O_RDONLY) for a, s in zip(accessors, stubs, strict=True)]
    calls = [
        accessors[turn].start(some[turn], descriptors[turn], SIZE) for turn in (0, 1)
    ]  # held by the listener when it dies
    for _ in calls:
        await trio.to_thread.run_sync(read_line, listener)
    kill(listener)
    calls += [
        accessors[turn].start(some[turn], descriptors[turn], SIZE) for turn in (2, 3)
    ]  # these come while nobody listens
    assert [waiter["group"] for waiter in await waiting(mount, 4)] == [None] * 4
    assert not any(call.done for call in calls)
    async with listening(mount.path, ("PRE_ACCESS",), answer=filler) as heir:
        for call, stub in zip(calls, stubs, strict=True):
            for offset, data in (await call.wait()).items():
                assert data == stub.content[offset : offset + len(data)]
        assert len(heir.take()) >= 4


async def test_hold_before_any_group(make_mount: MakeMount, make_accessor: MakeAccessor) -> None:
    mount = make_mount("--unattended", "hold")
    filler = Filler()
    first, second, other = make_accessor(), make_accessor(), make_accessor()
    stub, later, third = (stub_in(mount, name, filler) for name in ("stub", "later", "third"))
    calls = [
        first.start("read_file", stub.path),
        second.start("read_file", later.path),
    ]
    await waiting(mount, 2)
    async with listening(stub.path, ("PRE_ACCESS",), mark="inode", answer=filler) as listener:
        assert await calls[0].wait() == stub.content
        # A listener that marks its files one after the other: the second was parked when nobody stood, and stays so.
        assert [waiter["group"] for waiter in await waiting(mount, 1)] == [None]
        await listener.group.mark(FAN_MARK_ADD, PRE_ACCESS, path=later.path)
        assert await calls[1].wait() == later.content
        assert await other.run("read_file", third.path) == bytes(SIZE), (
            "no mark covers it, and a group stands"
        )
    # Now that one has died, its marks hold what they covered, and nothing else.
    assert await other.run("read_file", third.path) == bytes(SIZE)
    first.start("pread_path", stub.path, 10, 0)
    (waiter,) = await waiting(mount, 1)
    assert (waiter["group"], waiter["path"]) == (None, stub.path)


async def test_hold_and_a_listener_of_another_dialect(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--unattended", "hold")
    filler = Filler()
    for name, dialect in (("first", "patch-v2"), ("second", "linux-6.14"), ("third", "patch-v1")):
        stub = stub_in(mount, name, filler)
        call = accessor.start("read_file", stub.path)
        await waiting(mount, 1)
        async with listening(mount.path, ("PRE_ACCESS",), dialect=dialect, answer=filler):
            assert await call.wait() == stub.content


async def test_hold_keeps_events_of_a_group_without_marks(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--unattended", "hold")
    filler = Filler()
    stub = stub_in(mount, "stub", filler)
    async with open_group(stub.path, ("PRE_ACCESS",), mark="inode") as group:
        call = accessor.start("read_file", stub.path)
        await group.wait_readable()
        await group.mark(FAN_MARK_REMOVE, PRE_ACCESS, path=stub.path)
    assert [waiter["group"] for waiter in await waiting(mount, 1)] == [None]
    async with listening(mount.path, ("PRE_ACCESS",), answer=filler):
        assert await call.wait() == stub.content


async def test_release(make_mount: MakeMount, make_accessor: MakeAccessor) -> None:
    mount = make_mount("--unattended", "hold")
    filler = Filler()
    stubs = [stub_in(mount, f"stub-{number}", filler) for number in range(3)]
    calls = [make_accessor().start("pread_path", stub.path, 10, 0) for stub in stubs]
    await waiting(mount, 3)
    done = await trio.to_thread.run_sync(fusehsm, "status", "--release", str(mount.path))
    assert "released: " in done.stdout
    for call in calls:
        assert await call.wait() == bytes(10)
    async with listening(mount.path, ("PRE_ACCESS",), answer=filler):
        # What was let go came from the stub, and must not have stayed in the page cache.
        for stub in stubs:
            assert await make_accessor().run("read_file", stub.path) == stub.content


async def test_those_who_wait_can_be_killed(make_mount: MakeMount, make_accessor: MakeAccessor) -> None:
    mount = make_mount("--unattended", "hold", "--events", "exact")
    stub = stub_in(mount, "stub", Filler())
    parked = make_accessor()
    parked.start("pread_path", stub.path, 10, 0)
    await waiting(mount, 1)
    parked.kill()
    assert await trio.to_thread.run_sync(parked.wait_exit) == signal.SIGKILL
    assert await waiting(mount, 0) == []


# Time


async def test_event_timeout(make_mount: MakeMount, accessor: Accessor) -> None:
    mount = make_mount("--event-timeout", "0.2=EAGAIN", "--events", "first-access")
    filler = Filler()
    stub = stub_in(mount, "stub", filler)
    late = True

    def answer(event: Any) -> int:
        return HOLD if late else filler(event)

    async with listening(mount.path, ("PRE_ACCESS",), answer=answer) as listener:
        assert await error_in(accessor.start("pread_path", stub.path, 10, 0)) == errno.EAGAIN
        listener.release()  # late, and empty: it must change nothing
        late = False
        assert await accessor.run("read_file", stub.path) == stub.content


# Handlers in the mount's process

HANDLERS = """
import errno, os, sys, threading
DST, TARGET = os.environ["HANDLER_DST"], os.environ["HANDLER_DST"] + "/target"
asked = lambda event: not event.path.endswith("target")

def raises(event): raise ValueError("a mistake")
def no_space(event): raise OSError(errno.ENOSPC, "full")
def other_errno(event): raise OSError(errno.ENOENT, "not one of the seven")
def never(event): threading.Event().wait()

def reads_in_thread(event):
    if asked(event):
        with open(TARGET, "rb") as file: file.read()

async def opens(event):
    if asked(event): open(TARGET, "rb").read()

async def lists(event):
    if asked(event): os.listdir(DST)

async def stats(event):
    if asked(event): os.stat(TARGET)

async def fills(event):
    os.pwrite(event.fd, b"x" * event.count, event.offset)
"""


@pytest.fixture
def handled(make_mount: MakeMount, tmp_path: Path, mount_point: Path) -> Callable[..., Mount]:
    """handled(name, *arguments) -> a mount that runs that handler of HANDLERS."""
    (tmp_path / "handlers.py").write_text(textwrap.dedent(HANDLERS))

    def make(name: str, *arguments: str, **how: Any) -> Mount:
        environment = {"HANDLER_DST": str(mount_point), "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
        return make_mount(
            "--handler",
            f"handlers:{name}",
            *arguments,
            path=mount_point,
            cwd=tmp_path,
            env=environment,
            **how,
        )

    return make


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("raises", errno.EIO, "a mistake"),
        ("no_space", errno.ENOSPC, None),
        ("other_errno", errno.EIO, "not one of the seven"),
        ("reads_in_thread", errno.EIO, os.strerror(errno.EDEADLK)),
        ("opens", errno.EIO, "touches its own mount"),
        ("lists", errno.EIO, "touches its own mount"),
    ],
)
def test_handlers_that_fail(
    handled: Callable[..., Mount], accessor: Accessor, name: str, number: int, said: str | None
) -> None:
    mount = handled(name)
    filler = Filler()
    stub = stub_in(mount, "stub", filler)
    stub_in(mount, "target", filler)
    assert error_of(lambda: accessor.call("pread_path", stub.path, 10, 0)) == number
    assert accessor.call("stat", stub.path).st_size == SIZE, "the mount goes on"
    if said is not None:
        mount.log.wait_for(lambda line: said in line)


def test_a_handler_that_never_returns(handled: Callable[..., Mount], accessor: Accessor) -> None:
    mount = handled("never", "--event-timeout", "0.2=EBUSY")
    stub = stub_in(mount, "stub", Filler())
    assert error_of(lambda: accessor.call("pread_path", stub.path, 10, 0)) == errno.EBUSY
    assert accessor.call("stat", stub.path).st_size == SIZE


def test_a_handler_that_blocks_on_its_own_mount(handled: Callable[..., Mount], accessor: Accessor) -> None:
    """os.stat() cannot be refused beforehand: the server ends, the log names the line, and no process reads the files beneath the mount."""
    mount = handled("stats")
    stub = stub_in(mount, "stub", Filler())
    (mount.source / "target").touch()
    call = accessor.start("pread_path", stub.path, 10, 0)
    assert error_of(call.result) in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    mount.process.wait(PATIENCE)
    mount.log.wait_for(lambda line: "a deadlock, so the mount ends" in line)
    mount.log.wait_for(lambda line: "os.stat(TARGET)" in line)
    assert is_dead(mount.path)


@pytest.mark.root
async def test_the_disk_is_full_under_a_fill(
    session_directory: Path, make_mount: MakeMount, accessor: Accessor
) -> None:
    with ext4_image(session_directory / "small", 8) as small:
        mount = make_mount(source=small)
        stub = small / "stub"
        true = content(1, 4 << 20)
        with stub.open("xb") as file:
            file.truncate(len(true))
        filler = Filler({stub.stat().st_ino: true})
        hog = small / "hog"
        with hog.open("wb") as file:
            with pytest.raises(OSError) as caught:
                while True:
                    file.write(bytes(1 << 20))
            assert caught.value.errno == errno.ENOSPC

        def answer(event: Any) -> int:
            try:
                return filler(event)
            except OSError as error:
                return error.errno or errno.EIO

        path = str(mount.path / "stub")
        async with listening(mount.path, ("PRE_ACCESS",), answer=answer):
            assert await error_in(accessor.start("read_file", path)) == errno.ENOSPC
            hog.unlink()
            assert await accessor.run("read_file", path) == true
        mount.close()


# Listeners that misbehave


async def test_bad_answers(make_mount: MakeMount, accessor: Accessor) -> None:
    """Each is refused as the kernel refuses it, and the event goes on waiting for a good one."""
    mount = make_mount("--unattended", "deny=EBUSY")
    stub = stub_in(mount, "stub", Filler())
    async with open_group(mount.path, ("PRE_ACCESS",)) as group:
        call = accessor.start("pread_path", stub.path, 10, 0)
        await group.wait_readable()
        (event,) = group.take_events()
        for bad in (b"", b"rubbish", os.urandom(7), encode_response(event.fd, 77), encode_response(-1, 1)):
            assert error_of(lambda bad=bad: group.write(bad)) == errno.EINVAL  # type: ignore[misc]
        assert (
            error_of(lambda: group.write(encode_response(event.fd, deny_errno(errno.ENOENT)))) == errno.EINVAL
        )
        assert error_of(lambda: group.write(encode_response(event.fd + 500, 1))) == errno.ENOENT
        assert not call.done
        os.pwrite(event.fd, stub.content[:10], 0)
        assert group.write(encode_response(event.fd, 1)) == 8
        assert error_of(lambda: group.write(encode_response(event.fd, 1))) == errno.ENOENT, "twice"
        assert error_of(lambda: group.write(encode_response(event.fd, 2))) == errno.ENOENT, (
            "and changes its mind"
        )
        os.close(event.fd)
        assert await call.wait() == stub.content[:10]


async def test_rubbish_on_the_sockets(make_mount: MakeMount, accessor: Accessor) -> None:
    """A client that breaks the protocol loses its connection. Its accessors are treated as those of a dead listener."""
    mount = make_mount("--unattended", "deny=EBUSY")
    filler = Filler()
    stub = stub_in(mount, "stub", filler)
    rubbish = connect(entry(mount))
    for message in (b"{", b"[]", b"\xff" * 100, b'{"request": "launch"}', b"x" * 100_000):
        try:
            rubbish.send(message)
        except OSError:
            break
    silent = connect(entry(mount))  # and one that says nothing at all
    group = await EmulatedGroup.connect(entry(mount), DEFAULT_FLAGS, DEFAULT_EVENT_F_FLAGS)
    await group.mark(FAN_MARK_ADD | FAN_MARK_MOUNT, PRE_ACCESS, path=str(mount.path))
    call = accessor.start("pread_path", stub.path, 10, 0)
    await group.wait_readable()
    group._stream.socket.send(b"rubbish")
    assert await error_in(call) == errno.EBUSY
    group.close()
    half = await EmulatedGroup.connect(entry(mount), DEFAULT_FLAGS, DEFAULT_EVENT_F_FLAGS)
    await half.mark(FAN_MARK_ADD | FAN_MARK_MOUNT, PRE_ACCESS, path=str(mount.path))
    call = accessor.start("pread_path", stub.path, 10, 0)
    await half.wait_readable()
    half._stream.socket.shutdown(socket.SHUT_WR)  # half of it goes: no answer can come any more
    assert await error_in(call) == errno.EBUSY
    half.close()
    async with listening(mount.path, ("PRE_ACCESS",), answer=filler):
        assert await accessor.run("read_file", stub.path) == stub.content
    rubbish.close()
    silent.close()
