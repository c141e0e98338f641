"""Makes and finds the socket where a mount's server meets its clients. It is named after the mount's device number, in a directory of its owner.

Other servers use it, too, by another name (listening_as, connect_to). Reply is the common part of both clients (client.py,
blocking_client.py): it receives a server's reply.
"""

import contextlib
import errno
import fcntl
import os
import re
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from fusehsm.control.protocol import LARGEST_REPLY_PART, decode_reply, is_last_part
from fusehsm.linux.mountinfo import Mount

_BACKLOG = 128
_SHARED = "/tmp"  # where every user may make a directory, and nobody may rename another's
LARGEST_REPLY = 1 << 28
"""Bytes of a reply, which is kept in memory."""

LARGEST_FOREIGN_REPLY = 1 << 24
"""The same of another user's server."""

_FOREIGN_PATIENCE = 3  # seconds for another user's server to accept a connection
_OVERHEAD = 64  # bytes of memory for a part, besides its content
_TIME = struct.Struct("@ll")  # struct timeval
_DESCRIPTOR = struct.Struct("=i")
_DESCRIPTORS = socket.CMSG_SPACE(_DESCRIPTOR.size)  # a reply brings one descriptor at most
_CREDENTIALS = struct.Struct("=iII")
_SOCKET_NAME = re.compile(r"\d+:\d+(:\d+)?")


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end of a socket, as it was when it connected (SO_PEERCRED, unix(7))."""

    #: Process id.
    pid: int
    #: Effective user id.
    uid: int
    #: Effective group id.
    gid: int


def peer_of(connection: socket.socket) -> Peer:
    """The process at the other end of a unix socket."""
    return Peer(
        *_CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    )


def rights(descriptors: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data for sendmsg(2) that sends these descriptors (SCM_RIGHTS, unix(7))."""
    if not descriptors:
        return []
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(descriptors)}i", *descriptors))]


class Reply:
    """A reply on its way: the parts that have come, and the descriptor that one of them brings.

    Use it with `with`: the end of the block closes the descriptor, unless result() has handed it out.
    """

    def __init__(
        self, connection: socket.socket, largest: int = LARGEST_REPLY, *, takes_descriptor: bool = True
    ) -> None:
        """`largest`: bytes of all parts. Not `takes_descriptor`: the kernel drops one that comes. (To close a descriptor may mean to wait for the
        server of its filesystem.)"""
        self._connection = connection
        self._room = largest
        self._ancillary = _DESCRIPTORS if takes_descriptor else 0
        self._parts: list[bytes] = []
        self._descriptor: int | None = None

    def receive(self) -> bool:
        """Receive one part; returns whether it is the last.

        Raises ConnectionError if the server has hung up, ValueError for a message that is not part of a reply and for a reply that is too long,
        BlockingIOError if none has come.
        """
        part, ancillary, _, _ = self._connection.recvmsg(
            LARGEST_REPLY_PART + 1, self._ancillary, socket.MSG_CMSG_CLOEXEC
        )
        for _level, _type, data in ancillary:
            for (descriptor,) in _DESCRIPTOR.iter_unpack(data):
                self._close_descriptor()  # a reply has one at most
                self._descriptor = descriptor
        if not part:
            raise ConnectionResetError
        self._room -= len(part) + _OVERHEAD
        if self._room < 0:
            raise ValueError("a reply that is too long")
        self._parts.append(part)
        return is_last_part(part)

    def result(self) -> tuple[dict[str, Any], int | None]:
        """The result, and the descriptor or None, which the caller owns now.

        Raises the OSError of the server's answer, ValueError for other bytes.
        """
        result = decode_reply(self._parts)
        descriptor, self._descriptor = self._descriptor, None
        return result, descriptor

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close_descriptor()

    def _close_descriptor(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def directories(uid: int) -> list[str]:
    """The directories where the sockets of that user's mounts may be, the preferred one first."""
    places = [f"/run/user/{uid}/fusehsm"]
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    if uid == os.getuid() and own.startswith("/"):
        places.insert(0, os.path.join(own, "fusehsm"))
    if uid == 0:
        places.insert(0, "/run/fusehsm")
    else:
        places += _without_session(uid)
    return list(dict.fromkeys(places))


def _without_session(uid: int) -> list[str]:
    """The directories of a user without a session (su, cron, containers), who has no XDG directory; the usual one if nobody has made it yet.

    Anybody may make a directory with the usual name, and with any other one. Only those count that belong to the user.
    """
    name = f"fusehsm-{uid}"
    found = []
    with contextlib.suppress(OSError), os.scandir(_SHARED) as entries:
        for entry in entries:
            if entry.name != name and not entry.name.startswith(f"{name}-"):
                continue
            with contextlib.suppress(FileNotFoundError):
                if entry.stat(follow_symlinks=False).st_uid == uid and entry.is_dir(follow_symlinks=False):
                    found.append(entry.path)
    usual = os.path.join(_SHARED, name)
    return sorted(found) if found or os.path.lexists(usual) else [usual]


@contextmanager
def listening(device: tuple[int, int], places: Sequence[str] | None = None) -> Iterator[socket.socket]:
    """A listening, non-blocking socket for the mount of that device number; its name is removed afterwards.

    `places`: the directories to try (default: those of this user). A name that is there already is stale and is replaced, because a device number
    belongs to one mount at a time. Raises OSError with one line if there is no place for the socket.
    """
    with listening_as(_name(device), places) as listener:
        yield listener


@contextmanager
def listening_as(name: str, places: Sequence[str] | None = None) -> Iterator[socket.socket]:
    """The same for a name: numbers with colons in between. No other running server may use it."""
    directory = _open_own_directory(places)
    try:
        _sweep(directory)
        listener = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        with listener:
            # It has another name until it listens: a client that finds a socket must be able to connect to it.
            unborn = f".{name}.{os.getpid()}"
            with contextlib.suppress(FileNotFoundError):
                os.unlink(unborn, dir_fd=directory)
            listener.bind(f"/proc/self/fd/{directory}/{unborn}")
            listener.listen(_BACKLOG)
            with _locked(directory):
                os.rename(unborn, name, src_dir_fd=directory, dst_dir_fd=directory)
                identity = os.stat(name, dir_fd=directory).st_ino
            try:
                yield listener
            finally:
                with _locked(directory), contextlib.suppress(FileNotFoundError):
                    if os.stat(name, dir_fd=directory).st_ino == identity:
                        os.unlink(name, dir_fd=directory)
    finally:
        os.close(directory)


def is_foreign(mount: Mount) -> bool:
    """Whether another user has made the mount, so that its server is neither trusted nor waited for. Root's are nobody's enemy."""
    return mount.owner_uid not in (0, os.getuid())


def connect(mount: Mount, places: Sequence[str] | None = None) -> socket.socket:
    """A connection to the server of a mount. Blocks while the server's backlog is full, for 3 seconds at most if the mount is another user's.

    `places`: the directories to try (default: those of the mount's owner). Raises OSError with one line: ENOTCONN if no server serves the mount,
    EACCES if this user cannot reach its socket.
    """
    if places is None:
        places = directories(mount.owner_uid)
    point = mount.mount_point
    refused = False
    for place in places:
        try:
            directory = _open_directory(place, {mount.owner_uid, 0})
        except FileNotFoundError:
            continue
        except PermissionError as error:
            if error.filename is None:
                raise
            message = f"{point}: only root and its owner, user {mount.owner_uid}, may listen to it"
            raise PermissionError(errno.EACCES, message) from None
        try:
            patience = _FOREIGN_PATIENCE if is_foreign(mount) else None
            connection = _connect(f"/proc/self/fd/{directory}/{_name(mount.device)}", patience)
        except FileNotFoundError:
            continue
        except BlockingIOError:
            raise OSError(errno.ETIMEDOUT, f"{point}: its daemon does not answer") from None
        except ConnectionRefusedError:
            refused = True
            continue
        finally:
            os.close(directory)
        if peer_of(connection).uid not in (mount.owner_uid, 0):
            connection.close()
            raise PermissionError(errno.EACCES, f"{point}: its control socket belongs to another user")
        return connection
    if refused:
        raise OSError(errno.ENOTCONN, f"{point}: its daemon is gone; `fusehsm umount {point}` cleans up")
    raise OSError(
        errno.ENOTCONN,
        f"{point}: no control socket in {' or '.join(places)}; was it mounted with another XDG_RUNTIME_DIR?",
    )


def connect_to(name: str, owners: Sequence[int]) -> socket.socket | None:
    """A connection to the server of that name that runs for one of these users; None if there is none. Blocks as connect() does."""
    for owner in dict.fromkeys(owners):
        for place in directories(owner):
            try:
                directory = _open_directory(place, {owner})
            except OSError:
                continue
            try:
                patience = None if owner in (0, os.getuid()) else _FOREIGN_PATIENCE
                connection = _connect(f"/proc/self/fd/{directory}/{name}", patience)
            except OSError:
                continue
            finally:
                os.close(directory)
            if peer_of(connection).uid in (owner, 0):
                return connection
            connection.close()
    return None


def _connect(address: str, patience: int | None = None, *, blocking: bool = True) -> socket.socket:
    """Connect. `patience`: seconds to wait where the backlog is full, None for no limit; then, and if not `blocking`, raises BlockingIOError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        connection.setblocking(blocking)
        if patience is not None:
            # settimeout() does not wait for the backlog of a unix socket.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIME.pack(patience, 0))
        connection.connect(address)
    except BaseException:
        connection.close()
        raise
    return connection


def _name(device: tuple[int, int]) -> str:
    return f"{device[0]}:{device[1]}"


def _open_own_directory(places: Sequence[str] | None) -> int:
    """A descriptor of the first of the places that is ours, or that can be made; `places` None: where clients look."""
    uid = os.getuid()
    may_be_anywhere = places is None and uid != 0
    places = directories(uid) if places is None else places
    problems: list[str] = []
    for place in places:
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(place, 0o700)
            return _open_directory(place, {uid})
        except OSError as error:
            problems.append(error.strerror or "" if error.filename is None else f"{place}: {error.strerror}")
    if may_be_anywhere:
        try:
            # Another user has made a directory with the usual name. Nobody can make one first whose name is random.
            return _open_directory(tempfile.mkdtemp(prefix=f"fusehsm-{uid}-", dir=_SHARED), {uid})
        except OSError as error:
            problems.append(f"{_SHARED}: {error.strerror}")
    raise OSError(
        errno.ENOENT,
        f"no place for the control socket ({'; '.join(problems)}): set XDG_RUNTIME_DIR to a directory of yours",
    )


def _open_directory(place: str, owners: set[int]) -> int:
    """A descriptor of a directory into which only its owner can have put anything."""
    directory = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(directory)
    if status.st_uid not in owners or stat.S_IMODE(status.st_mode) & 0o077:
        os.close(directory)
        raise PermissionError(errno.EACCES, f"{place}: must belong to user {min(owners)} with mode 0700")
    return directory


def sweep() -> None:
    """Unlink this user's sockets that no server listens on any more; a server that was killed could not do it."""
    for place in directories(os.getuid()):
        with contextlib.suppress(OSError):
            directory = _open_directory(place, {os.getuid()})
            try:
                _sweep(directory)
            finally:
                os.close(directory)


def _sweep(directory: int) -> None:
    """Unlink the sockets in a directory that no server listens on any more."""
    with _locked(directory):
        for name in os.listdir(directory):
            if _SOCKET_NAME.fullmatch(name):
                try:
                    _connect(f"/proc/self/fd/{directory}/{name}", blocking=False).close()
                except ConnectionRefusedError:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=directory)
                except OSError:
                    pass  # the server is busy, or the socket is gone meanwhile


@contextmanager
def _locked(directory: int) -> Iterator[None]:
    """Lock a directory, so that no name gets another socket between the check of a socket and its removal."""
    fcntl.flock(directory, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(directory, fcntl.LOCK_UN)
