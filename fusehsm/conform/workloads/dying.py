"""Listeners in processes of their own that are killed: accesses that wait for them are allowed, and later ones make no event."""

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

from fusehsm.conform.scene import PAGE, PRE_ACCESS, Scene
from fusehsm.conform.workload import Script, Workload
from fusehsm.fanotify.abi import FAN_ACCESS_PERM, FAN_CLASS_CONTENT, FAN_CLOEXEC, FAN_OPEN_PERM


class Doomed:
    """A listener in a process of its own (listener_process.py)."""

    def __init__(self, process: trio.Process) -> None:
        self._process = process
        self._said = b""

    async def wait_for(self, *words: str) -> None:
        """Wait until the process has printed these words."""
        assert self._process.stdout is not None
        wanted = "".join(f"{word}\n" for word in words).encode()
        while self._said != wanted:
            piece = await self._process.stdout.receive_some()
            self._said += piece
            if not piece or not wanted.startswith(self._said):
                raise RuntimeError(f"the listener has said {self._said!r}")
        self._said = b""

    async def kill(self) -> None:
        """Send SIGKILL and wait for the end of the process."""
        self._process.kill()
        await self._process.wait()


@asynccontextmanager
async def listener_process(scene: Scene, mask: int, number: int) -> AsyncIterator[Doomed]:
    """Start a listener for the whole file system that reads at most `number` events. It is killed at the end."""
    module = "fusehsm.conform.listener_process"
    what = [scene.side.engine, str(scene.path), str(mask), str(number)]
    start = partial(
        trio.lowlevel.open_process, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    process = await start([sys.executable, "-m", module, *what])
    try:
        doomed = Doomed(process)
        await doomed.wait_for("ready")
        yield doomed
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    await stream.aclose()


def killed(mask: int, taken: int, waiting: int) -> Script:
    """Kill a listener for which `waiting` accessors wait. It has read the events of the first `taken`; the other events are queued."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        async with listener_process(scene, mask, taken) as doomed:
            calls = []
            for number in range(waiting):
                accessor = scene.accessor()
                call = scene.start("pread_path", path, 100, number * PAGE, by=accessor)
                calls.append((call, accessor))
                # The process reports nothing after the first "more".
                if number <= taken:
                    await doomed.wait_for("read" if number < taken else "more")
            scene.say("the accessors", "are done", [call.done for call, _ in calls])
            await doomed.kill()
            for call, accessor in calls:
                await scene.end(call, "pread_path", accessor)
            await scene.call("pread_path", path, 100, 0)
            await scene.call("pwrite_path", path, b"new", 0)
            await scene.call("truncate", path, 9000)

    return script


async def another_is_asked(scene: Scene) -> None:
    """After the first listener has died, the access is asked of a group of lower class."""
    path = scene.file()
    mask = FAN_ACCESS_PERM
    await scene.listen(
        scene.everywhere(mask), flags=FAN_CLASS_CONTENT | FAN_CLOEXEC, answer=lambda question: -2
    )
    async with listener_process(scene, mask, 1) as doomed:
        call = scene.start("pread_path", path, 100, 0)
        await doomed.wait_for("read")
        scene.say("the accessor", "is done", call.done)
        await doomed.kill()
        await scene.end(call, "pread_path")


MASKS = {"O": FAN_OPEN_PERM, "P": PRE_ACCESS, "A": FAN_ACCESS_PERM}
WORKLOADS = [
    *(
        Workload("dying", f"when {name} was {what}", killed(mask, taken, waiting))
        for name, mask in MASKS.items()
        for what, taken, waiting in (("queued", 0, 1), ("read", 1, 1), ("read and queued", 1, 2))
    ),
    Workload("dying", "when many were read and queued", killed(PRE_ACCESS, 3, 6)),
    Workload("dying", "and another is asked", another_is_asked),
]
