"""The interface of a gate for the owners of groups: the control socket's server, and handlers in the mount's own process."""

from typing import Any, Protocol

from fusehsm.emulator.group import Group, Pending
from fusehsm.fanotify.abi import Dialect
from fusehsm.fanotify.marks import MAIN, MountKey


class Nodes(Protocol):
    """The nodes of a mount, by node id, which is also their st_ino."""

    def node(self, node_id: int, /) -> Any:
        """The node of that id. Raises OSError ESTALE when it is not known."""

    def open_root(self) -> int:
        """A new descriptor of the backing's root directory; the caller closes it."""

    def node_of_backing(self, major: int, minor: int, inode: int, /) -> Any | None:
        """The node of the backing file with that device and inode number; None if it is not known."""

    def find(self, path: bytes, /) -> Any:
        """The node at a path below the backing's root; counts one reference. Raises OSError."""


class LeaseInterface(Protocol):
    """The lessor of a mount's files (emulator/leases.py)."""

    async def grant(self, node: Any, /) -> tuple[Any, int]:
        """Lease a file that no process has open. Processes that open it later wait.

        Returns the lease, and a descriptor of the backing file, which the caller closes. Raises OSError EAGAIN while a process has it open.
        """

    async def take_back(self, lease: Any, /) -> None:
        """The holder gives a lease back. Afterwards the kernel caches nothing of the file. Raises OSError ETIMEDOUT if it was broken before."""

    def abandon(self, lease: Any, /) -> None:
        """The holder of a lease has gone."""


class GateFace(Protocol):
    """A gate (emulator/gate.py) as its listeners see it."""

    #: The mount point.
    destination: str
    #: The dialect of groups that name none.
    default_dialect: Dialect

    @property
    def overlay(self) -> Nodes:
        """The mount's nodes."""

    @property
    def lessor(self) -> LeaseInterface:
        """The lessor of the mount's files."""

    def add_group(self, group: Group) -> None:
        """Ask this group from now on about the accesses that its marks cover."""

    def remove_group(self, group: Group) -> None:
        """Close a group. The policy of --unattended decides the events that it has not answered."""

    async def mark(self, group: Group, flags: int, mask: int, node: Any, mount: MountKey = MAIN) -> None:
        """fanotify_mark(2) on a node (None: with FAN_MARK_FLUSH), found by `mount`. Raises OSError as the kernel does."""

    def forget(self, node_id: int, count: int, /) -> bool:
        """Drop `count` references to a node; returns whether it has left the table with this call (False for an id that is not known)."""

    async def drop(self, node: Any) -> None:
        """Drop a node's cached pages. Its next access makes an event again."""

    async def map(self, node: Any, offset: int, length: int, flags: int, tid: int, *, writable: bool) -> None:
        """Ask for a mapping of `length` bytes at `offset` of an open file. Thread `tid` waits for the answer.

        `flags` are the file's flags of open(2). Raises OSError when the mapping is denied.
        """

    def open_event_fd(self, group: Group, pending: Pending, /) -> int:
        """Open an event's file with the group's event_f_flags; the caller closes the descriptor. Raises OSError."""

    def status(self) -> dict[str, object]:
        """The mount's state as JSON-able values."""

    def release_held(self) -> int:
        """Let every access pass that waits for a group to come (--unattended hold); returns how many these are."""
