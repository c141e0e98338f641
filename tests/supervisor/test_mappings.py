"""mmap(2) under `fusehsm run --accessor` asks when it is called, as the real kernel does: one expectation for both."""

import errno
import mmap
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from functools import partial

import pytest
import trio

from fusehsm.conform.scene import CONTENT
from fusehsm.fanotify.abi import FAN_MARK_ADD, FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY
from tests.support import harness
from tests.support.async_listener import HOLD
from tests.support.kernel_and_mount import Expected, World

pytestmark = [pytest.mark.fuse]

PROGRAM = str(harness.ROOT / "tests" / "support" / "mapping_program.py")
RUN = (*harness.COMMAND, "run", "--accessor", "--")
PAGE = 4096
PRE_ACCESS = 0x00100000
SIZE = 10 * PAGE
STEP = harness.PATIENCE / 2  # seconds
MAP_SHARED_VALIDATE = 3


@dataclass(frozen=True, slots=True)
class Mapping:
    """One open, mmap, look and close; `result` is what the program prints, `asked` the range of the event, None without one."""

    name: str
    result: str
    asked: tuple[int, int] | None
    access: int = os.O_RDONLY
    length: int = 2 * PAGE
    protection: int = mmap.PROT_READ
    flags: int = mmap.MAP_PRIVATE
    offset: int = 0
    touch: int = -1

    def argument(self, path: str) -> str:
        numbers = (self.access, self.length, self.protection, self.flags, self.offset, self.touch)
        return ":".join([path, *map(str, numbers)])


RW = os.O_RDWR
BOTH = mmap.PROT_READ | mmap.PROT_WRITE
MAPPINGS = (
    Mapping("private", "ok", (0, 2 * PAGE)),
    Mapping("looked-at", f"ok {CONTENT[PAGE]}", (0, 2 * PAGE), touch=1),
    Mapping("part", f"ok {CONTENT[3 * PAGE]}", (2 * PAGE, 2 * PAGE), offset=2 * PAGE, touch=1),
    Mapping("odd-length", "ok", (0, 2 * PAGE), length=PAGE + 1),
    Mapping("past-the-end", "ok", (64 * PAGE, PAGE), offset=64 * PAGE, length=100),
    Mapping("nothing-may-be-done", "ok", (0, 2 * PAGE), protection=0),
    Mapping("to-execute", "ok", (0, 2 * PAGE), protection=mmap.PROT_READ | mmap.PROT_EXEC),
    Mapping("private-writable", f"ok {CONTENT[0]}", (0, 2 * PAGE), protection=BOTH, touch=0),
    Mapping("shared", f"ok {CONTENT[0]}", (0, 2 * PAGE), flags=mmap.MAP_SHARED, touch=0),
    Mapping(
        "shared-writable",
        f"ok {CONTENT[0]}",
        (0, 2 * PAGE),
        RW,
        flags=mmap.MAP_SHARED,
        protection=BOTH,
        touch=0,
    ),
    Mapping("shared-validated", "ok", (0, 2 * PAGE), flags=MAP_SHARED_VALIDATE),
    Mapping(
        "populated", f"ok {CONTENT[0]}", (0, 2 * PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_POPULATE, touch=0
    ),
    Mapping(
        "shared-writable-of-what-is-read", "EACCES", (0, 2 * PAGE), flags=mmap.MAP_SHARED, protection=BOTH
    ),
    Mapping("nothing", "EINVAL", (0, 0), length=0),
    Mapping("neither-shared-nor-private", "EINVAL", (0, 2 * PAGE), flags=0),
    Mapping("not-aligned", "EINVAL", None, offset=100),
    Mapping("what-is-only-written", "EACCES", (0, 2 * PAGE), os.O_WRONLY),
)


def start(world: World, *arguments: str) -> "subprocess.Popen[str]":
    command = [*(() if world.is_kernel else RUN), sys.executable, PROGRAM, *arguments]
    return harness.start(command)


async def lines_of(process: "subprocess.Popen[str]") -> list[str]:
    """What it printed, once it has ended."""
    with trio.fail_after(STEP):
        said, complaints = await trio.to_thread.run_sync(partial(process.communicate, timeout=STEP))
    assert complaints == ""
    return said.splitlines()


async def test_mappings(world: World) -> None:
    rows = [row for row in MAPPINGS if world.engine == "devfuse" or not row.flags & mmap.MAP_SHARED]
    paths = {row.name: world.file(row.name, SIZE) for row in rows}
    expected = [Expected("PRE_ACCESS", *row.asked, row.name) for row in rows if row.asked is not None]
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        process = start(world, *(row.argument(paths[row.name]) for row in rows))
        said = await lines_of(process)
        assert dict(zip(paths, said, strict=True)) == {row.name: row.result for row in rows}
        assert world.heard([event for event in listener.take() if event.path in paths.values()]) == expected


@pytest.mark.parametrize("error", [errno.EPERM, errno.EIO, errno.ENOSPC, errno.EDQUOT])
async def test_a_denied_mapping_fails_with_the_errno(world: World, error: int) -> None:
    path = world.file("denied", SIZE)
    row = Mapping("denied", errno.errorcode[error], (0, 2 * PAGE))
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: error) as listener:
        assert await lines_of(start(world, row.argument(path), row.argument(path))) == [row.result] * 2
        assert len(listener.take()) == 2


async def test_a_mapping_of_what_is_ignored_asks_nobody(world: World) -> None:
    watched, ignored = world.file("watched", SIZE), world.file("ignored", SIZE)
    row = Mapping("row", f"ok {CONTENT[0]}", (0, 2 * PAGE), touch=0)
    async with world.listener(world.everywhere(PRE_ACCESS)) as listener:
        await listener.group.mark(
            FAN_MARK_ADD | FAN_MARK_IGNORED_MASK | FAN_MARK_IGNORED_SURV_MODIFY, PRE_ACCESS, path=ignored
        )
        assert await lines_of(start(world, row.argument(ignored), row.argument(watched))) == [row.result] * 2
        assert [event.path for event in listener.take()] == [watched]


async def test_who_is_killed_while_his_mapping_waits(world: World) -> None:
    path = world.file("held", SIZE)
    row = Mapping("held", "ok", (0, 2 * PAGE))
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        process = start(world, row.argument(path))
        (heard,) = await listener.wait_for(1)
        os.kill(heard.pid, signal.SIGKILL)
        with trio.fail_after(STEP):
            code = await trio.to_thread.run_sync(process.wait)
        assert code == -signal.SIGKILL
        # Answered or not, nobody hangs, and the next one is asked for anew.
        listener.release()
        process = start(world, row.argument(path))
        await listener.wait_for(2)
        listener.release()
        assert await lines_of(process) == ["ok"]


async def test_the_handler_of_a_signal_waits_for_the_answer(world: World) -> None:
    path = world.file("signalled", SIZE)
    row = Mapping("signalled", "ok", (0, 2 * PAGE))
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        process = start(world, row.argument(path))
        (heard,) = await listener.wait_for(1)
        os.kill(heard.pid, signal.SIGWINCH)
        await trio.sleep(0.2)
        assert process.poll() is None
        listener.release()
        assert await lines_of(process) == ["ok"]


async def test_many_mappings_wait_at_once(world: World) -> None:
    """Each in a process of its own; none is answered before all have asked."""
    row = Mapping("row", "ok", (0, 2 * PAGE))
    paths = [world.file(f"file-{number}", SIZE) for number in range(8)]
    async with world.listener(world.everywhere(PRE_ACCESS), answer=lambda event: HOLD) as listener:
        processes = [start(world, row.argument(path)) for path in paths]
        await listener.wait_for(len(paths))
        assert listener.release() == len(paths)
        for process in processes:
            assert await lines_of(process) == ["ok"]
