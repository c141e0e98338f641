"""Where the handler tests run: the real kernel, a mount in another process, a mount in this process. One face for all three."""

import abc
import os
import resource
from collections.abc import AsyncIterator, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import trio

from fusehsm.backends.base import Group
from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.backends.opening import open_group
from fusehsm.control.client import request
from fusehsm.control.protocol import Status
from fusehsm.daemon.handler_group import InProcessGroup, open_in_process
from fusehsm.fanotify.abi import LINUX_6_14
from fusehsm.handler import Handler, serve
from fusehsm.linux.mountinfo import mount_of

Mask = int | Iterable[str] | None


class Site(abc.ABC):
    """A directory whose accesses can be watched. `path` is the accessors' directory; `content` the same directory where touching it makes
    no events (and, for a mount in this process, no deadlock)."""

    def __init__(self, path: Path, content: Path) -> None:
        self.path = path
        self.content = content

    @abc.abstractmethod
    def group(self, mask: Mask = None, **options: Any) -> AbstractAsyncContextManager[Group]:
        """A group with a mark that covers `path`."""

    @abc.abstractmethod
    async def bare_group(self, flags: int, event_f_flags: int) -> Group:
        """A group without marks."""

    async def statistics(self) -> dict[str, int]:
        """The counts of the only group that has been asked for anything; the real kernel keeps none."""
        return {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While this is entered, `path` can be used."""
        yield

    def make(self, name: str, content: bytes = b"", mode: int = 0o644) -> str:
        """Make a file before anybody watches; its path for accessors."""
        file = self.content / name
        file.write_bytes(content)
        file.chmod(mode)
        return str(self.path / name)

    def stub(self, name: str, size: int) -> str:
        """Make a sparse file of that many bytes; its path for accessors."""
        path = self.make(name)
        os.truncate(self.content / name, size)
        return path

    @asynccontextmanager
    async def serving(
        self, handler: Handler, mask: Mask = None, *, limit: int = 64, **options: Any
    ) -> AsyncIterator[Group]:
        """A group that `handler` serves meanwhile."""
        async with self.group(mask, **options) as group, trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve, group, handler, limit=limit))
            yield group
            nursery.cancel_scope.cancel()


class OpenGroupSite(Site):
    """The real kernel, or a mount served by another process: open_group finds out which."""

    def group(self, mask: Mask = None, **options: Any) -> AbstractAsyncContextManager[Group]:
        return open_group(self.path, mask, **options)

    async def bare_group(self, flags: int, event_f_flags: int) -> Group:
        mount = await trio.to_thread.run_sync(mount_of, self.path)
        if mount.is_fusehsm:
            return await EmulatedGroup.connect(mount, flags, event_f_flags)
        return KernelGroup(flags, event_f_flags)

    async def statistics(self) -> dict[str, int]:
        mount = await trio.to_thread.run_sync(mount_of, self.path)
        return only_asked((await request(mount, Status()))["groups"]) if mount.is_fusehsm else {}


class InProcessSite(Site):
    """A mount that this very event loop serves. Nothing in this process may touch `path` but in a thread."""

    def __init__(self, mount_point: Path, backing: Path, engine: str) -> None:
        super().__init__(mount_point, backing)
        self._engine = engine
        self._gate: Any = None

    def group(self, mask: Mask = None, **options: Any) -> AbstractAsyncContextManager[Group]:
        return open_in_process(self._gate, mask, **options)

    async def bare_group(self, flags: int, event_f_flags: int) -> Group:
        return InProcessGroup(self._gate, flags, event_f_flags, self._gate.default_dialect)

    async def statistics(self) -> dict[str, int]:
        return only_asked(self._gate.status()["groups"])

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        from fusehsm.emulator.gate import Gate
        from fusehsm.engines import fuse_mount
        from fusehsm.engines.choice import make
        from fusehsm.fanotify.policy import Unattended, UnattendedPolicy
        from fusehsm.linux import mountinfo
        from fusehsm.overlay.overlay import Overlay

        overlay = Overlay(str(self.content))
        gate = Gate(
            overlay,
            destination=str(self.path),
            events="exact",
            dialect=LINUX_6_14,
            unattended=UnattendedPolicy(Unattended.ALLOW),
            event_timeout=None,
            page_size=resource.getpagesize(),
            open_limit=256,
        )
        self._gate = gate
        engine = make(self._engine, gate, private=True)
        options = {"default_permissions", "allow_other", "subtype=fusehsm", "fsname=in-process"}
        engine.mount(str(self.path), frozenset(options))
        try:
            device = next(m.device for m in mountinfo.read_mounts() if m.mount_point == str(self.path))
            gate.mounted(device, engine.caches(device))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(engine.serve)
                await trio.to_thread.run_sync(os.statvfs, self.path)
                yield
                nursery.cancel_scope.cancel()
        finally:
            gate.close()
            fuse_mount.unmount(str(self.path), mountinfo.id_at(str(self.path)), lazily=True)
            engine.close()
            overlay.close()


def only_asked(groups: list[dict[str, Any]]) -> dict[str, int]:
    """The statistics of the only group that has had an event."""
    (statistics,) = [group["statistics"] for group in groups if group["statistics"]["queued"]]
    return dict(statistics)


def open_for_both(name: str) -> list[str]:
    """The descriptors of this process that can read and write a file of that name, as event descriptors can."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{number}").endswith(f"/{name}"):
                flags = Path(f"/proc/self/fdinfo/{number}").read_text().split("flags:")[1].split()[0]
                if int(flags, 8) & os.O_ACCMODE == os.O_RDWR:
                    found.append(number)
    return found


def pidfds() -> int:
    """How many pidfds this process holds."""
    count = 0
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            count += os.readlink(f"/proc/self/fd/{number}") == "anon_inode:[pidfd]"
    return count
