"""The FUSE kernel protocol: numbers, layouts, and the encoding of answers. No I/O, and nothing that is specific to fusehsm.

Source: include/uapi/linux/fuse.h, protocol 7.31 (Linux 5.10 has 7.32) to 7.45. All integers are in the machine's byte order.
"""

import enum
import os
import stat
import struct
from dataclasses import dataclass
from typing import Final

MAJOR: Final = 7
OLDEST_MINOR: Final = 31
NEWEST_MINOR: Final = 45

ROOT_ID: Final = 1
FOREVER: Final = 1 << 62  # seconds of validity
LARGEST_WRITE: Final = 1 << 20  # bytes in one request: 256 pages, the default of fs.fuse.max_pages_limit
MAX_PAGES: Final = 256
MAX_BACKGROUND: Final = 65535
#: read(2) of /dev/fuse needs room for the largest request and its header, in bytes.
BUFFER_SIZE: Final = LARGEST_WRITE + 65536


class Opcode(enum.IntEnum):
    """enum fuse_opcode."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    GETLK = 31
    SETLK = 32
    SETLKW = 33
    ACCESS = 34
    CREATE = 35
    INTERRUPT = 36
    BMAP = 37
    DESTROY = 38
    IOCTL = 39
    POLL = 40
    NOTIFY_REPLY = 41
    BATCH_FORGET = 42
    FALLOCATE = 43
    READDIRPLUS = 44
    RENAME2 = 45
    LSEEK = 46
    COPY_FILE_RANGE = 47
    SETUPMAPPING = 48
    REMOVEMAPPING = 49
    SYNCFS = 50
    TMPFILE = 51
    STATX = 52
    COPY_FILE_RANGE_64 = 53


class Init(enum.IntFlag):
    """FUSE_* flags of INIT; those from bit 32 on are sent in flags2."""

    ASYNC_READ = 1 << 0
    POSIX_LOCKS = 1 << 1
    ATOMIC_O_TRUNC = 1 << 3
    BIG_WRITES = 1 << 5
    FLOCK_LOCKS = 1 << 10
    AUTO_INVAL_DATA = 1 << 12
    DO_READDIRPLUS = 1 << 13
    READDIRPLUS_AUTO = 1 << 14
    ASYNC_DIO = 1 << 15
    NO_OPEN_SUPPORT = 1 << 17
    PARALLEL_DIROPS = 1 << 18
    POSIX_ACL = 1 << 20
    MAX_PAGES = 1 << 22
    CACHE_SYMLINKS = 1 << 23
    NO_OPENDIR_SUPPORT = 1 << 24
    HANDLE_KILLPRIV_V2 = 1 << 28
    INIT_EXT = 1 << 30
    DIRECT_IO_ALLOW_MMAP = 1 << 36


class Attribute(enum.IntFlag):
    """FATTR_*: the attributes that a SETATTR changes."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    FH = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8


FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1
FOPEN_CACHE_DIR: Final = 1 << 3
FOPEN_NOFLUSH: Final = 1 << 5
FOPEN_PARALLEL_DIRECT_WRITES: Final = 1 << 6
NOFLUSH_MINOR: Final = 35  # first protocol minor with FOPEN_NOFLUSH: Linux 5.16
READ_LOCKOWNER: Final = 1 << 1  # the READ is for a call, not for the page cache (docs/facts.md, section 12)
WRITE_CACHE: Final = 1 << 0
WRITE_KILL_SUIDGID: Final = 1 << 2
FSYNC_FDATASYNC: Final = 1 << 0
IOCTL_DIR: Final = 1 << 4
LK_FLOCK: Final = 1 << 0

NOTIFY_INVAL_INODE: Final = 2
NOTIFY_INVAL_ENTRY: Final = 3
NOTIFY_STORE: Final = 4
NOTIFY_DELETE: Final = 6

IN_HEADER: Final = struct.Struct(
    "=IIQQIIIHH"
)  # len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding
OUT_HEADER: Final = struct.Struct("=IiQ")  # len, error, unique
INIT_IN: Final = struct.Struct("=IIII")  # major, minor, max_readahead, flags; flags2 follows from 7.36 on
INIT_IN_FLAGS2: Final = struct.Struct("=I")
INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI28x")
FORGET_IN: Final = struct.Struct("=Q")
FORGET_ONE: Final = struct.Struct("=QQ")
BATCH_FORGET_IN: Final = struct.Struct("=II")
SETATTR_IN: Final = struct.Struct("=II6QIIIIIIII")
MKNOD_IN: Final = struct.Struct("=IIII")
MKDIR_IN: Final = struct.Struct("=II")
RENAME_IN: Final = struct.Struct("=Q")
RENAME2_IN: Final = struct.Struct("=QII")
LINK_IN: Final = struct.Struct("=Q")
OPEN_IN: Final = struct.Struct("=II")
CREATE_IN: Final = struct.Struct("=IIII")
READ_IN: Final = struct.Struct("=QQIIQII")  # also READDIR
WRITE_IN: Final = struct.Struct("=QQIIQII")
RELEASE_IN: Final = struct.Struct("=QIIQ")
FLUSH_IN: Final = struct.Struct("=QIIQ")
FSYNC_IN: Final = struct.Struct("=QII")
SETXATTR_IN: Final = struct.Struct("=II")
GETXATTR_IN: Final = struct.Struct("=II")
ACCESS_IN: Final = struct.Struct("=II")
INTERRUPT_IN: Final = struct.Struct("=Q")
FALLOCATE_IN: Final = struct.Struct("=QQQII")
LSEEK_IN: Final = struct.Struct("=QqII")
COPY_FILE_RANGE_IN: Final = struct.Struct("=7Q")
IOCTL_IN: Final = struct.Struct("=QIIQII")  # fh, flags, cmd, arg, in_size, out_size
LK_IN: Final = struct.Struct("=QQQQIIII")  # fh, owner, start, end, type, pid, lk_flags, padding
STATX_IN: Final = struct.Struct("=IIQII")

SIZE_OUT: Final = struct.Struct("=II")  # WRITE, GETXATTR's size, COPY_FILE_RANGE
OFFSET_OUT: Final = struct.Struct("=Q")
LK_OUT: Final = struct.Struct("=QQII")
IOCTL_OUT: Final = struct.Struct("=iIII")
OPEN_OUT: Final = struct.Struct("=QIi")
STATFS_OUT: Final = struct.Struct("=5QIII28x")
_ENTRY_OUT: Final = struct.Struct("=QQQQII")
_ATTR_OUT: Final = struct.Struct("=QII")
# ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags
_ATTR: Final = struct.Struct("=QQQqqqIIIIIIIIII")
_DIRENT: Final = struct.Struct("=QQII")
_STATX_OUT: Final = struct.Struct("=QII16x")
# mask, blksize, attributes, nlink, uid, gid, mode, ino, size, blocks, attributes_mask, four times, devices, spare
_STATX: Final = struct.Struct("=IIQIIIHxxQQQQqIiqIiqIiqIiIIII112x")
_INVAL_INODE: Final = struct.Struct("=Qqq")
_INVAL_ENTRY: Final = struct.Struct("=QII")
_DELETE: Final = struct.Struct("=QQII")
_STORE: Final = struct.Struct("=QQII")

_SECOND: Final = 1_000_000_000  # nanoseconds
_STATX_BASIC_STATS: Final = 0x7FF
_STATX_BTIME: Final = 0x800
# The low bits of a minor number in the 32 bits of new_encode_dev() in the kernel.
_MINOR_LOW: Final = 0xFF


@dataclass(slots=True)
class Request:
    """One request: the fields of fuse_in_header, and the bytes after it."""

    #: The kind of request: an Opcode, or a number that is not known here.
    opcode: int
    #: The number of the request, by which it is answered.
    unique: int
    #: The node that it concerns.
    node_id: int
    #: The accessor's user.
    uid: int
    #: The accessor's group.
    gid: int
    #: The accessor's thread, 0 if the request has no accessor (RELEASE, write-back).
    pid: int
    #: The bytes after the header.
    body: bytes | memoryview


def decode_request(data: bytes | memoryview) -> Request:
    """The request in the bytes of one read(2) of /dev/fuse. Raises ValueError for bytes that the kernel does not send."""
    if len(data) < IN_HEADER.size:
        raise ValueError(f"a request of {len(data)} bytes")
    length, opcode, unique, node_id, uid, gid, pid, extension_words, _ = IN_HEADER.unpack_from(data)
    end = length - extension_words * 8
    if length != len(data) or end < IN_HEADER.size:
        raise ValueError(
            f"a request of {len(data)} bytes that says {length}, {extension_words} words of extensions"
        )
    return Request(opcode, unique, node_id, uid, gid, pid, data[IN_HEADER.size : end])


def changed_node(request: Request) -> int:
    """The id of the node whose content or attributes a request changes."""
    if request.opcode in (Opcode.COPY_FILE_RANGE, Opcode.COPY_FILE_RANGE_64):
        return int(COPY_FILE_RANGE_IN.unpack_from(request.body)[2])
    return request.node_id


def fills_cache(request: Request) -> bool:
    """Whether a READ is for the page cache, and not for a call."""
    return not READ_IN.unpack_from(request.body)[3] & READ_LOCKOWNER


def names_in(body: bytes | memoryview, start: int, count: int) -> list[bytes]:
    """`count` NUL-terminated strings from byte `start` on. Raises ValueError where there are fewer."""
    parts = bytes(body[start:]).split(b"\0", count)
    if len(parts) <= count:
        raise ValueError("a name without its end")
    return parts[:count]


def device_number(number: int) -> int:
    """st_rdev as the protocol's 32 bits (new_encode_dev() in the kernel)."""
    minor = os.minor(number)
    return (minor & _MINOR_LOW) | os.major(number) << 8 | (minor & ~_MINOR_LOW) << 12


def number_of_device(encoded: int) -> int:
    """The st_rdev of the protocol's 32 bits: the inverse of device_number()."""
    return os.makedev((encoded >> 8) & 0xFFF, (encoded & _MINOR_LOW) | (encoded >> 12) & 0xFFF00)


@dataclass(slots=True)
class Attributes:
    """The attributes of a node in an answer."""

    #: Its id, shown as st_ino.
    node_id: int
    #: Differs when the node id was used for another file before.
    generation: int
    #: attr_timeout: the seconds for which the kernel may cache them.
    valid: float
    #: All attributes but those below.
    status: os.stat_result
    #: The st_blocks to show, in blocks of 512 bytes.
    blocks: int
    #: The st_mtime to show, in nanoseconds since 1970; None: that of the status.
    mtime_ns: int | None = None

    @property
    def shown_mtime(self) -> int:
        """The st_mtime to show, in nanoseconds since 1970."""
        return self.status.st_mtime_ns if self.mtime_ns is None else self.mtime_ns


def _attributes(attributes: Attributes) -> bytes:
    status = attributes.status
    atime, atime_ns = divmod(status.st_atime_ns, _SECOND)
    mtime, mtime_ns = divmod(attributes.shown_mtime, _SECOND)
    ctime, ctime_ns = divmod(status.st_ctime_ns, _SECOND)
    return _ATTR.pack(
        attributes.node_id,
        status.st_size,
        attributes.blocks,
        atime,
        mtime,
        ctime,
        atime_ns,
        mtime_ns,
        ctime_ns,
        status.st_mode,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        device_number(status.st_rdev) if status.st_rdev else 0,
        status.st_blksize,
        0,
    )


def _valid(seconds: float) -> tuple[int, int]:
    if seconds >= FOREVER:
        return FOREVER, 0
    whole = int(seconds)
    return whole, int((seconds - whole) * _SECOND)


def entry_out(attributes: Attributes, entry_valid: float) -> bytes:
    """fuse_entry_out."""
    entry_seconds, entry_ns = _valid(entry_valid)
    seconds, ns = _valid(attributes.valid)
    head = _ENTRY_OUT.pack(attributes.node_id, attributes.generation, entry_seconds, seconds, entry_ns, ns)
    return head + _attributes(attributes)


def absent_out(entry_valid: float) -> bytes:
    """fuse_entry_out for a name that does not exist. The kernel caches that for so many seconds."""
    seconds, ns = _valid(entry_valid)
    return _ENTRY_OUT.pack(0, 0, seconds, 0, ns, 0) + bytes(_ATTR.size)


def attr_out(attributes: Attributes) -> bytes:
    """fuse_attr_out."""
    seconds, ns = _valid(attributes.valid)
    return _ATTR_OUT.pack(seconds, ns, 0) + _attributes(attributes)


def statx_out(attributes: Attributes, birth: tuple[int, int] | None) -> bytes:
    """fuse_statx_out; `birth` is (seconds, nanoseconds), None where the backing does not store it."""
    status = attributes.status
    seconds, ns = _valid(attributes.valid)
    mask = _STATX_BASIC_STATS | (_STATX_BTIME if birth is not None else 0)
    atime, mtime, ctime = (
        divmod(t, _SECOND) for t in (status.st_atime_ns, attributes.shown_mtime, status.st_ctime_ns)
    )
    born = birth or (0, 0)
    return _STATX_OUT.pack(seconds, ns, 0) + _STATX.pack(
        mask,
        status.st_blksize,
        0,
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_mode,
        attributes.node_id,
        status.st_size,
        attributes.blocks,
        0,
        *(*atime, 0),
        *(*born, 0),
        *(*ctime, 0),
        *(*mtime, 0),
        os.major(status.st_rdev),
        os.minor(status.st_rdev),
        0,
        0,
    )


def directory_entry(node_id: int, next_offset: int, name: bytes, mode: int) -> bytes:
    """fuse_dirent, padded to 8 bytes."""
    entry = (
        _DIRENT.pack(node_id, next_offset & 0xFFFF_FFFF_FFFF_FFFF, len(name), stat.S_IFMT(mode) >> 12) + name
    )
    return entry + bytes(-len(entry) % 8)


def init_out(minor: int, max_readahead: int, flags: int) -> bytes:
    """The answer to INIT, struct fuse_init_out, as bytes. Requests at once (max_background, congestion_threshold): as many as possible.

    `max_readahead` is in bytes. `flags`: bits of Init; those from bit 32 on go to flags2.
    """
    return INIT_OUT.pack(
        MAJOR,
        minor,
        max_readahead,
        flags & 0xFFFF_FFFF,
        MAX_BACKGROUND,
        MAX_BACKGROUND,
        LARGEST_WRITE,
        1,
        MAX_PAGES,
        0,
        flags >> 32,
    )


def reply(unique: int, body: bytes) -> bytes:
    """The complete message of an answer with a body."""
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), 0, unique) + body


def failure(unique: int, number: int) -> bytes:
    """The complete message of an answer with an errno."""
    return OUT_HEADER.pack(OUT_HEADER.size, -number, unique)


def _notification(code: int, body: bytes) -> bytes:
    return OUT_HEADER.pack(OUT_HEADER.size + len(body), code, 0) + body


def invalidate_inode(node_id: int, offset: int, length: int) -> bytes:
    """The notification that drops a node's cached attributes and pages of `length` bytes from `offset` on (0: to the end).

    A negative offset drops attributes only.
    """
    return _notification(NOTIFY_INVAL_INODE, _INVAL_INODE.pack(node_id, offset, length))


def invalidate_entry(parent_id: int, name: bytes) -> bytes:
    """The notification that drops a cached name in a directory, also a negative entry."""
    return _notification(NOTIFY_INVAL_ENTRY, _INVAL_ENTRY.pack(parent_id, len(name), 0) + name + b"\0")


def delete(parent_id: int, child_id: int, name: bytes) -> bytes:
    """The notification that a name has been removed on the backing."""
    return _notification(NOTIFY_DELETE, _DELETE.pack(parent_id, child_id, len(name), 0) + name + b"\0")


def store(node_id: int, offset: int, data: bytes) -> bytes:
    """The notification that puts `data` into a node's page cache."""
    return _notification(NOTIFY_STORE, _STORE.pack(node_id, offset, len(data), 0) + data)
