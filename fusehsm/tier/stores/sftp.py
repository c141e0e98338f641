"""A directory on a host that ssh reaches, as a store. It has modes, owners, times (in seconds) and symbolic links, but no hard links and no holes.

Up to four files are read at a time, each over a channel of its own; more callers wait. The host's key must be in ~/.ssh/known_hosts. The user's keys
come from an agent or from ~/.ssh. ~/.ssh/config is not read.
"""

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import paramiko
from fsspec.implementations.sftp import SFTPFileSystem

from fusehsm.tier.stores.base import Entry, Kind, Rights, StoreError, changed
from fusehsm.tier.stores.fsspec import FsspecStore

_CHANNELS: Final = 4  # sshd permits 10 for a connection (MaxSessions)
_REQUEST: Final = (
    255 * 1024
)  # bytes; the most in one answer of OpenSSH. A server with shorter answers is asked again
_PATIENCE: Final = 60.0  # seconds


class _KnownHosts(SFTPFileSystem):  # type: ignore[misc]
    """fsspec's filesystem, but only for known host keys: fsspec's own accepts any."""

    cachable = False

    def _connect(self) -> None:
        self.client = paramiko.SSHClient()
        self.client.load_system_host_keys()
        self.client.set_missing_host_key_policy(paramiko.RejectPolicy())
        self.client.connect(
            self.host, **{"timeout": _PATIENCE, "banner_timeout": _PATIENCE, **self.ssh_kwargs}
        )
        # Nagle's algorithm would hold each small request until the last answer is acknowledged: 40 ms each.
        self.client.get_transport().sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ftp = self.client.open_sftp()


def connect(url: str) -> tuple[Any, str]:
    """The filesystem and the path of an sftp URL. Raises ValueError without a host, StoreError with cause and fix."""
    arguments = _KnownHosts._get_kwargs_from_urls(url)
    host = arguments.get("host")
    if not host:
        raise ValueError(f"{url}: names no host; write sftp://host/path")
    try:
        return _KnownHosts(**arguments), _KnownHosts._strip_protocol(url)
    except paramiko.BadHostKeyException:
        fix = "make sure that this is the right host, then run ssh-keygen -R " + host
        raise StoreError(
            errno.EACCES, f"its host key differs from the one in ~/.ssh/known_hosts; {fix}", host
        ) from None
    except paramiko.SSHException as error:
        fix = ""
        if "known_hosts" in str(error):
            fix = f"; connect once by hand (ssh {host}) and accept its key"
        elif "uthentication" in str(error):
            fix = f"; put a key that the host accepts into an agent or ~/.ssh (ssh-copy-id {host})"
        raise StoreError(errno.EACCES, f"{error}{fix}", host) from None
    except OSError as error:
        raise StoreError(
            error.errno or errno.EIO, f"cannot be reached: {error.strerror or error}", host
        ) from None


class SftpStore(FsspecStore):
    """The tree below a path on the host."""

    def __init__(self, name: str, filesystem: Any, root: str) -> None:
        super().__init__(name, filesystem, root or "/")
        self._idle: list[Any] = []
        self._free = threading.BoundedSemaphore(_CHANNELS)
        self._connecting = threading.Lock()

    def full(self, path: str) -> str:
        """The path on the host."""
        return f"{self._root}/{path}"

    def version(self, path: str) -> str:
        """The modification time and size."""
        with self.complaining(path, "cannot be looked up"), self._channel() as channel:
            return _version(channel.stat(self.full(path)))

    def rights(self, path: str) -> Rights | None:
        """The owner and mode; symbolic links are followed, as in read()."""
        with self.complaining(path, "cannot be looked up"), self._channel() as channel:
            status = channel.stat(self.full(path))
        mode = None if status.st_mode is None else stat.S_IMODE(status.st_mode)
        return None if status.st_uid is None else Rights(status.st_uid, status.st_gid, mode)

    def read(self, path: str, offset: int, length: int, version: str) -> bytes:
        """Read the range; the version of the open file is checked before and after."""
        with (
            self.complaining(path, "cannot be read", reading=True),
            self._channel() as channel,
            channel.open(self.full(path), "rb") as file,
        ):
            status = file.stat()
            if _version(status) != version:
                raise changed(self, path)
            length = max(0, min(length, status.st_size - offset))
            file.MAX_REQUEST_SIZE = _REQUEST
            # readv() sends many requests at once, read() sends one after the other.
            data = b"".join(file.readv([(offset, length)])) if length else b""
            if _version(file.stat()) != version:
                raise changed(self, path)
        if len(data) != length:
            raise StoreError(
                errno.EIO, f"{self.name} gave {len(data)} bytes where {length} were asked for", path
            )
        return data

    def close(self) -> None:
        """Close the connection."""
        self._filesystem.client.close()

    @contextmanager
    def _channel(self) -> Iterator[Any]:
        with self._free:
            with self._connecting:
                transport = self._filesystem.client.get_transport()
                if transport is None or not transport.is_active():
                    self._idle.clear()
                    self._filesystem._connect()
                channel = self._idle.pop() if self._idle else self._filesystem.client.open_sftp()
            try:
                yield channel
            except FileNotFoundError:
                self._idle.append(channel)
                raise
            except BaseException:
                channel.close()  # it may have an unread answer
                raise
            self._idle.append(channel)

    def _list(self, path: str, on_error: Callable[[StoreError], None]) -> Iterator[Entry]:
        prefix = f"{path}/" if path else ""
        with self._channel() as channel:
            try:
                listed = channel.listdir_attr(self.full(path))
            except UnicodeDecodeError:
                raise StoreError(
                    errno.EILSEQ,
                    "holds a name that is not UTF-8, which paramiko cannot read; rename it",
                    path,
                ) from None
            for status in listed:
                kind = _KINDS.get(stat.S_IFMT(status.st_mode or 0), Kind.OTHER)
                target = (
                    channel.readlink(self.full(prefix + status.filename)) if kind is Kind.SYMLINK else None
                )
                yield Entry(
                    prefix + status.filename,
                    kind,
                    size=status.st_size if kind is Kind.FILE else None,
                    mode=None if kind is Kind.SYMLINK else stat.S_IMODE(status.st_mode),
                    uid=status.st_uid,
                    gid=status.st_gid,
                    mtime_ns=None if status.st_mtime is None else status.st_mtime * 1_000_000_000,
                    target=None if target is None else os.fsdecode(target),
                    version=_version(status) if kind is Kind.FILE else None,
                )


def _version(status: Any) -> str:
    return f"mtime {status.st_mtime} size {status.st_size}"


_KINDS: Final = {stat.S_IFREG: Kind.FILE, stat.S_IFDIR: Kind.DIRECTORY, stat.S_IFLNK: Kind.SYMLINK}
