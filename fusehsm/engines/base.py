"""The interface of every engine. An engine carries FUSE requests to the gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # commands that only mount or unmount need no event loop
    from fusehsm.emulator.page_cache import CacheControl


class MountRefused(Exception):
    """The mount has failed. The text is one line with the cause and the fix."""


class Engine(Protocol):
    """The requests of one mount, from mount to unmount. choice.make() makes it."""

    def mount(self, mount_point: str, options: frozenset[str]) -> None:
        """Mount on a directory; `options` are those of `-o` in mount.fuse3(8). Raises MountRefused."""

    def caches(self, device: tuple[int, int]) -> CacheControl:
        """The control of the kernel's caches of this mount, whose (major, minor) is `device`."""

    async def serve(self) -> None:
        """Answer requests until the filesystem is unmounted or stop() is called."""

    def stop(self) -> None:
        """Make serve() return."""

    def close(self) -> None:
        """Free everything, after serve() has returned. Does not unmount: accesses of a mount that still exists then fail."""

    def requests(self) -> dict[str, int]:
        """How many requests have come, by their names in fuse.h; empty if the engine does not count them."""
