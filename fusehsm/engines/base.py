"""What carries FUSE requests: the interface that every engine has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:  # commands that only mount or unmount need no event loop
    from fusehsm.emulator.page_cache import CacheControl


class MountRefused(Exception):
    """It cannot be mounted: one line with the cause and the mend."""


class Engine(Protocol):
    """One mount's requests, from mounting to the end. Made by choice.make()."""

    def mount(self, mount_point: str, options: frozenset[str]) -> None:
        """Mount; `options` as `-o` of mount.fuse3(8). Raises MountRefused."""

    def caches(self, device: tuple[int, int]) -> CacheControl:
        """The kernel's caches of this mount, whose (major, minor) is `device`."""

    async def serve(self) -> None:
        """Answer requests until the filesystem is unmounted, or stop() is called."""

    def stop(self) -> None:
        """Make `serve` return."""

    def close(self) -> None:
        """Free everything, after `serve` has returned. Unmounts nothing; a mount that still stands is refused from then on."""

    def requests(self) -> dict[str, int]:
        """How many requests have come, by their names in fuse.h; empty when the engine does not count."""
