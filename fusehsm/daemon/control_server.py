"""The mount's end of the control socket: makes groups for other processes.

A client can send rubbish, flood, never read, or die half-way. It then gets an error or is disconnected, and no other client waits for it:
every send is non-blocking, and each turn reads a bounded number of messages from one client.
"""

import contextlib
import errno
import logging
import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Final

import trio

from fusehsm.control import protocol
from fusehsm.control import socket as control_socket
from fusehsm.control.accept import serve_connections
from fusehsm.control.protocol import (
    Backing,
    Drop,
    Hello,
    Lease,
    LeaseStatus,
    Map,
    MarkBacking,
    MarkRequest,
    Reader,
    Release,
    Request,
    Status,
    Unlease,
    Welcome,
)
from fusehsm.control.socket import Peer
from fusehsm.daemon.event_channel import EventChannel
from fusehsm.emulator.group import Group
from fusehsm.emulator.interface import GateFace
from fusehsm.fanotify.abi import DIALECTS, FAN_MARK_FLUSH
from fusehsm.fanotify.marks import MAIN, MountKey
from fusehsm.linux import proc

MOST_GROUPS: Final = 128  # the default of fs.fanotify.max_user_groups
MOST_CONNECTIONS: Final = 256
_MOST_READERS: Final = 1024  # of a group; the oldest are forgotten

_log = logging.getLogger(__name__)


async def serve_control(
    gate: GateFace,
    device: tuple[int, int],
    *,
    places: Sequence[str] | None = None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve the control socket of the mount with that (major, minor) until cancelled; started when clients can connect.

    `places`: the directories to try (default: those of this user). Raises OSError with one line if there is no place for the socket.
    """
    with control_socket.listening(device, places) as listener:
        task_status.started()
        await serve_connections(listener, {0, os.getuid()}, MOST_CONNECTIONS, _Server(gate, device).serve)


class _Server:
    """The state that all sessions of one mount share."""

    def __init__(self, gate: GateFace, device: tuple[int, int]) -> None:
        self.gate = gate
        self.device = device
        self.groups = 0

    async def serve(self, connection: socket.socket, peer: Peer) -> None:
        """Serve a client until it hangs up or breaks the protocol."""
        session = _Session(self, connection, peer.pid)
        try:
            await session.run()
        finally:
            session.close()


class _Session:
    """One client: its requests, and its group after its hello."""

    def __init__(self, server: _Server, connection: socket.socket, pid: int) -> None:
        self._server = server
        self._pid = pid
        self._gate = server.gate
        self._connection = connection
        self._channel: EventChannel | None = None
        self._doorbell: int | None = None
        self._lease: Any = None

    async def run(self) -> None:
        """Serve until the client hangs up, on either of its sockets, or breaks the protocol."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            with contextlib.suppress(ConnectionError):
                await self._serve_requests()
            nursery.cancel_scope.cancel()

    def close(self) -> None:
        if self._lease is not None:
            self._gate.lessor.abandon(self._lease)
        if self._channel is not None:
            self._channel.close()
            self._gate.remove_group(self._channel.group)
            self._server.groups -= 1
        if self._doorbell is not None:
            os.close(self._doorbell)
        self._connection.close()

    async def _serve_requests(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._connection)
            try:
                message = self._receive()
            except BlockingIOError:
                continue
            if not message or len(message) > protocol.LARGEST_REQUEST:
                return
            descriptors: list[int] = []
            try:
                result = await self._perform(protocol.decode_request(message), descriptors)
                parts = protocol.encode_result(result)
            except ValueError as error:
                parts = protocol.encode_failure(OSError(errno.EPROTO, str(error)))
            except OSError as error:
                parts = protocol.encode_failure(error)
            try:
                await self._reply(parts, descriptors)
            finally:
                for descriptor in descriptors:
                    os.close(descriptor)

    def _receive(self) -> bytes:
        """Receive one request. A descriptor that comes with a hello is the doorbell.

        It is opened anew: the sender shares the flags of its descriptor, and could make this process wait for room in the pipe.
        """
        message, descriptors, _, _ = socket.recv_fds(self._connection, protocol.LARGEST_REQUEST + 1, 1)
        for descriptor in descriptors:
            if self._doorbell is None and stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                with contextlib.suppress(OSError):  # no process holds the other end any more
                    self._doorbell = os.open(
                        f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC
                    )
            os.close(descriptor)
        return message

    async def _reply(self, parts: list[bytes], descriptors: list[int]) -> None:
        for position, part in enumerate(parts):
            ancillary = control_socket.rights(descriptors if position == len(parts) - 1 else [])
            while True:
                try:
                    self._connection.sendmsg([part], ancillary)
                    break
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self._connection)

    async def _perform(self, request: Request, descriptors: list[int]) -> dict[str, Any]:
        match request:
            case Hello():
                welcome, descriptor = self._hello(request)
                descriptors.append(descriptor)
                return asdict(welcome)
            case MarkRequest():
                await self._mark(request)
                return {}
            case MarkBacking():
                await self._mark_backing(request)
                return {}
            case Reader():
                self._read_by(request.pid, request.started)
                return {}
            case Status():
                return self._gate.status()
            case Release():
                return {"released": self._gate.release_held()}
            case Drop():
                self._check_device(request.major, request.minor)
                await self._gate.drop(self._gate.overlay.node(request.inode))
                return {}
            case Map():
                self._check_device(request.major, request.minor)
                await self._map(request)
                return {}
            case Backing():
                descriptors.append(self._gate.overlay.open_root())
                return {}
            case Lease():
                self._check_device(request.major, request.minor)
                descriptors.append(await self._take_lease(request.inode))
                return {}
            case LeaseStatus():
                return {"wanted": self._held_lease().wanted}
            case Unlease():
                lease, self._lease = self._held_lease(), None
                await self._gate.lessor.take_back(lease)
                return {}

    def _hello(self, hello: Hello) -> tuple[Welcome, int]:
        if hello.version != protocol.VERSION:
            message = f"the mount speaks version {protocol.VERSION} of the control protocol, this program {hello.version}"
            raise OSError(errno.EPROTO, f"{message}: update the older one")
        if self._channel is not None:
            raise OSError(errno.EBUSY, "one group a connection")
        if self._server.groups >= MOST_GROUPS:
            raise OSError(errno.EMFILE, f"{self._gate.destination}: {MOST_GROUPS} groups already; close some")
        name = hello.dialect or self._gate.default_dialect.name
        if name not in DIALECTS:
            raise OSError(errno.EINVAL, f"unknown dialect {name[:40]!r}: choose one of {', '.join(DIALECTS)}")
        group = Group(hello.flags, hello.event_f_flags, DIALECTS[name])
        group.listener_pid = self._pid
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        self._channel = EventChannel(
            self._gate, group, ours, self._nursery.cancel_scope.cancel, self._doorbell
        )
        self._server.groups += 1
        self._gate.add_group(group)
        if (started := proc.started(self._pid)) is not None:
            self._read_by(self._pid, started)
        self._nursery.start_soon(self._listen, self._channel)
        self._nursery.start_soon(self._channel.send_the_stuck)
        return Welcome(name, self._gate.destination), theirs.detach()

    async def _listen(self, channel: EventChannel) -> None:
        with contextlib.suppress(ConnectionError):
            await channel.listen()
        self._nursery.cancel_scope.cancel()

    def _check_device(self, major: int, minor: int) -> None:
        if (major, minor) != self._server.device:
            raise OSError(errno.EXDEV, f"not on the fusehsm mount {self._gate.destination} of this group")

    async def _mark(self, mark: MarkRequest) -> None:
        if self._channel is None:
            raise OSError(errno.EBADF, "no group on this connection")
        if mark.flags & FAN_MARK_FLUSH:
            await self._gate.mark(self._channel.group, mark.flags, mark.mask, None)
            return
        if mark.inode is None:
            raise OSError(errno.EINVAL, "a mark needs an inode")
        # Listeners like to mark through an event descriptor, which is open on the backing's file.
        node = self._gate.overlay.node_of_backing(mark.major, mark.minor, mark.inode)
        mount = MAIN
        if node is None:
            self._check_device(mark.major, mark.minor)
            node = self._gate.overlay.node(mark.inode)
            if mark.mount is not None:
                mount = MountKey(mark.mount, mark.unique_mount)
        await self._gate.mark(self._channel.group, mark.flags, mark.mask, node, mount)

    async def _mark_backing(self, mark: MarkBacking) -> None:
        if self._channel is None:
            raise OSError(errno.EBADF, "no group on this connection")
        overlay = self._gate.overlay
        # By its name first: a node that is known may be of an earlier file with the same inode number.
        named = None
        if mark.path is not None:
            with contextlib.suppress(OSError):
                named = overlay.find(os.fsencode(mark.path))
        try:
            device = (mark.major, mark.minor)
            is_it = named is not None and named.is_file(device, mark.inode)
            node = named if is_it else overlay.node_of_backing(*device, mark.inode)
            if node is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            await self._gate.mark(self._channel.group, mark.flags, mark.mask, node)
        finally:
            if named is not None:
                self._gate.forget(named.id, 1)

    def _read_by(self, pid: int, started: int) -> None:
        if self._channel is None:
            raise OSError(errno.EBADF, "no group on this connection")
        readers = self._channel.group.readers
        readers[pid] = started
        if len(readers) > _MOST_READERS:
            del readers[next(iter(readers))]

    async def _take_lease(self, inode: int) -> int:
        if self._lease is not None:
            raise OSError(errno.EBUSY, "one lease a connection")
        self._lease, descriptor = await self._gate.lessor.grant(self._gate.overlay.node(inode))
        return descriptor

    def _held_lease(self) -> Any:
        if self._lease is None:
            raise OSError(errno.EBADF, "no lease on this connection")
        return self._lease

    async def _map(self, request: Map) -> None:
        """Ask for a mapping while the client waits. A client hangs up when its accessor is killed; nothing else tells the mount of that."""
        node = self._gate.overlay.node(request.inode)
        denial: OSError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._cancel_when_gone, nursery.cancel_scope)
            try:
                await self._gate.map(
                    node,
                    request.offset,
                    request.length,
                    request.flags,
                    request.tid,
                    writable=bool(request.writable),
                )
            except OSError as error:
                denial = error
            nursery.cancel_scope.cancel()
        if denial is not None:
            raise denial

    async def _cancel_when_gone(self, scope: trio.CancelScope) -> None:
        await trio.lowlevel.wait_readable(self._connection)
        # A client that sends its next request before the answer to this one breaks the protocol.
        scope.cancel()
