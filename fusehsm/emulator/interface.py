"""What a gate is to those who own groups: the control socket's server, and handlers in the mount's own process."""

from typing import Any, Protocol

from fusehsm.emulator.group import Group, Pending
from fusehsm.fanotify.abi import Dialect


class Nodes(Protocol):
    """The nodes of a mount, by the number that the kernel and st_ino know them by."""

    def node(self, node_id: int, /) -> Any:
        """The node of that number. Raises OSError ESTALE when it is not known."""

    def open_root(self) -> int:
        """A new descriptor of the backing's root directory."""

    def node_of_backing(self, major: int, minor: int, inode: int, /) -> Any | None:
        """The node of a file of the backing, None if it is not known."""


class LeaseInterface(Protocol):
    """What leases a mount's files (emulator/leases.py)."""

    async def grant(self, node: Any, /) -> tuple[Any, int]:
        """Lease a file that nobody has open, so that who opens it waits; the lease, and a descriptor of its content on the backing. Raises
        OSError EAGAIN while somebody has it open."""

    async def take_back(self, lease: Any, /) -> None:
        """Its holder gives a lease back: nothing of the file is cached then. Raises OSError ETIMEDOUT when it was broken meanwhile."""

    def abandon(self, lease: Any, /) -> None:
        """The holder of a lease has gone."""


class GateFace(Protocol):
    """A gate (emulator/gate.py) as seen from its listeners' side."""

    destination: str
    default_dialect: Dialect

    @property
    def overlay(self) -> Nodes:
        """Its nodes."""

    @property
    def lessor(self) -> LeaseInterface:
        """What leases its files."""

    def add_group(self, group: Group) -> None:
        """Ask this group from now on about what its marks cover."""

    def remove_group(self, group: Group) -> None:
        """Close a group; what it has not answered is decided without it."""

    async def mark(self, group: Group, flags: int, mask: int, node: Any) -> None:
        """fanotify_mark(2) on a node (None with FAN_MARK_FLUSH); raises OSError as the kernel does."""

    async def drop(self, node: Any) -> None:
        """Drop a node's cached pages: its next access makes an event again."""

    async def map(self, node: Any, offset: int, length: int, flags: int, tid: int, *, writable: bool) -> None:
        """A thread that waits is about to map `length` bytes of an open file, which has the `flags` of open(2). Raises OSError when it is
        denied."""

    def open_event_fd(self, group: Group, pending: Pending, /) -> int:
        """A new descriptor of an event's file, by the group's event_f_flags. Raises OSError."""

    def status(self) -> dict[str, object]:
        """The mount's state as JSON-able values."""

    def release_held(self) -> int:
        """Let go what --unattended hold has parked; returns how many accesses."""
