"""Handlers that raise what ends programs, and servers that fail: the access is denied, and no accessor reads a stub's zeros."""

import errno
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from fusehsm.conform.accessor import Accessor
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import read_mounts
from tests.conftest import MakeMount
from tests.support.harness import PATIENCE, Mount, environment, fusehsm, is_dead, start
from tests.support.kernel_and_mount import World
from tests.support.requirements import require_root

pytestmark = pytest.mark.fuse

SIZE = 50_000
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)

HANDLERS = """
import asyncio, os, sys
import trio
import fusehsm.emulator.content, fusehsm.overlay.overlay

class Own(BaseException): pass

RAISED = {
    "SystemExit": lambda: SystemExit(3),
    "KeyboardInterrupt": KeyboardInterrupt,
    "CancelledError": asyncio.CancelledError,
    "GeneratorExit": GeneratorExit,
    "Own": Own,
    "Group": lambda: BaseExceptionGroup("several", [SystemExit(3), ValueError()]),
}

def ends(event):
    raise RAISED[os.path.basename(event.path)]()

async def at_once(event): ends(event)

async def later(event):
    await trio.lowlevel.checkpoint()
    ends(event)

async def in_a_nursery(event):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(later, event)

def in_a_thread(event): ends(event)

def afterwards(event): return later(event)

kept = []

async def keeps_a_cancellation(event):
    if not kept:
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.sleep_forever()
            except trio.Cancelled as cancelled:
                kept.append(cancelled)
                raise
    raise kept[0]

# Mistakes of the server's own, made here.

def exits(*arguments, **keywords): raise SystemExit

async def exits_later(*arguments, **keywords):
    await trio.lowlevel.checkpoint()
    raise SystemExit

async def spoils_requests(event):
    fusehsm.overlay.overlay.Overlay.readlink = exits
    fusehsm.emulator.content.Content.write = exits_later

async def spoils_forgetting(event):
    fusehsm.emulator.gate.Gate.forget = exits

async def ends_the_loop(event):
    trio.lowlevel.spawn_system_task(exits_later)

async def fills(event):
    os.pwrite(event.fd, b"x" * event.count, event.offset)
"""


RAISED = ("SystemExit", "KeyboardInterrupt", "CancelledError", "GeneratorExit", "Own", "Group")
ENDING = ("SystemExit", "KeyboardInterrupt", "Group")  # a listener, too


@pytest.fixture
def handled(make_mount: MakeMount, backing: Path, tmp_path: Path) -> Callable[..., Mount]:
    """handled(handler, *arguments) -> a directory mounted on itself, with that handler, and in it a stub for everything that may be raised."""
    (tmp_path / "ending.py").write_text(HANDLERS)
    for name in RAISED:
        (backing / name).touch()
        os.truncate(backing / name, SIZE)
    (backing / "link").symlink_to("Own")

    def make(handler: str, *arguments: str) -> Mount:
        words = ("--handler", f"ending:{handler}", *arguments)
        environment = {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
        return make_mount(*words, source=backing, path=backing, env=environment)

    return make


def error_of(call: Callable[[], Any]) -> int:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno is not None
    return caught.value.errno


def wait_for(mount: Mount, words: str) -> None:
    """Until the daemon has said so."""
    mount.log.wait_for(lambda line: words in line)


def refuses(mount: Mount, accessor: Accessor) -> None:
    """It goes on, and denies every access with EIO."""
    for name in RAISED:
        path = str(mount.path / name)
        assert error_of(partial(accessor.call, "pread_path", path, 10, 0)) == errno.EIO, name
        assert accessor.call("stat", path).st_size == SIZE
    assert mount.process.poll() is None


@pytest.mark.parametrize("handler", ["at_once", "later", "in_a_nursery", "in_a_thread", "afterwards"])
def test_what_a_handler_raises_denies(
    handled: Callable[..., Mount], accessor: Accessor, handler: str
) -> None:
    mount = handled(handler)
    for _ in range(2):
        refuses(mount, accessor)
    for name in RAISED:
        wait_for(mount, f"{name}: the handler failed, so the access is denied with EIO")


@pytest.mark.parametrize("events", ["exact", "first-access"])
def test_a_cancellation_that_a_handler_has_kept(
    handled: Callable[..., Mount], accessor: Accessor, events: str
) -> None:
    refuses(handled("keeps_a_cancellation", "--events", events), accessor)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_still_ends_it(
    handled: Callable[..., Mount], accessor: Accessor, number: signal.Signals
) -> None:
    mount = handled("at_once")
    refuses(mount, accessor)
    mount.process.send_signal(number)
    assert mount.process.wait(PATIENCE) == 0
    assert not is_mounted(mount)


# In a process of its own

LISTENER = """
import sys
import trio
import ending, fusehsm

async def main():
    async with fusehsm.open_group(sys.argv[1], ("PRE_ACCESS",), mark="inode") as group:
        print("ready", flush=True)
        await fusehsm.serve(group, getattr(ending, sys.argv[2]))

trio.run(main)
"""


@pytest.mark.parametrize(
    ("handler", "raised"), [*(("later", name) for name in RAISED), ("in_a_thread", "SystemExit")]
)
async def test_a_listener_denies_before_it_ends(
    world: World, accessor: Accessor, tmp_path: Path, handler: str, raised: str
) -> None:
    (tmp_path / "ending.py").write_text(HANDLERS)
    path = world.file(raised)
    command = [sys.executable, "-c", LISTENER, path, handler]
    with start(command, env=environment(PYTHONPATH=f"{tmp_path}:{os.getcwd()}")) as listener:
        try:
            assert listener.stdout is not None
            assert await trio.to_thread.run_sync(listener.stdout.readline) == "ready\n"
            with pytest.raises(OSError) as denied:
                await accessor.run("pread_path", path, 10, 0)
            assert denied.value.errno == errno.EIO
            if raised in ENDING:
                assert await trio.to_thread.run_sync(listener.wait, PATIENCE) != 0
            else:
                with pytest.raises(OSError):
                    await accessor.run("pread_path", path, 10, 0)
        finally:
            listener.kill()


# The server's own mistakes


def test_a_request_that_fails_in_the_server(handled: Callable[..., Mount], accessor: Accessor) -> None:
    mount = handled("spoils_requests")
    path = str(mount.path / "Own")
    assert accessor.call("pread_path", path, 1, 0) == b"\0", "this handler allows"
    assert error_of(lambda: accessor.call("readlink", str(mount.path / "link"))) == errno.EIO
    assert error_of(lambda: accessor.call("pwrite_path", path, b"new", 0)) == errno.EIO
    assert accessor.call("stat", path).st_size == SIZE
    wait_for(mount, "SystemExit")


def test_forgetting_fails_in_the_server(handled: Callable[..., Mount], accessor: Accessor) -> None:
    mount = handled("spoils_forgetting")
    path = str(mount.path / "Own")
    accessor.call("pread_path", path, 1, 0)
    accessor.call("unlink", str(mount.path / "link"))
    wait_for(mount, "SystemExit")
    assert accessor.call("stat", path).st_size == SIZE
    assert mount.stop() == 0, "it has gone on"


def test_a_server_that_fails_leaves_a_mount_that_refuses(
    handled: Callable[..., Mount], accessor: Accessor
) -> None:
    """It stays mounted: without it, all accessors would read the stubs beneath."""
    mount = handled("ends_the_loop")
    path = str(mount.path / "Own")
    call = accessor.start("pread_path", path, 1, 0)
    assert mount.process.wait(PATIENCE) == 1
    assert is_dead(mount.path)
    with suppress(OSError):  # it was allowed before the server failed, or the server did not come to say so
        call.result()
    assert error_of(lambda: accessor.call("pread_path", path, 1, 0)) in GONE
    wait_for(mount, "refuses all accesses")
    assert fusehsm("umount", mount.path).returncode == 0


def test_a_connection_that_is_ended_from_outside(handled: Callable[..., Mount], accessor: Accessor) -> None:
    mount = handled("fills")
    path = str(mount.path / "Own")
    assert accessor.call("pread_path", path, 1, 0) == b"x"
    abort(mount.device)
    mount.process.wait(PATIENCE)
    assert is_dead(mount.path)
    assert error_of(lambda: accessor.call("pread_path", path, 1, SIZE - 1)) in GONE
    assert fusehsm("umount", mount.path).returncode == 0


def abort(device: tuple[int, int]) -> None:
    """What umount(8) does with --force, and leaves at that if the mount is in use."""
    require_root()
    directory = tempfile.mkdtemp()
    syscalls.mount(b"fusectl", os.fsencode(directory), b"fusectl", 0)
    try:
        Path(directory, str(device[0] << 20 | device[1]), "abort").write_text("1")
    finally:
        syscalls.umount2(os.fsencode(directory), 0)
        os.rmdir(directory)


def is_mounted(mount: Mount) -> bool:
    return any(m.mount_point == str(mount.path) and m.is_fusehsm for m in read_mounts())
