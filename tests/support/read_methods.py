"""Every way to get at a file's bytes, as functions that travel to accessors: way(descriptor, size) -> {offset: bytes}.

They use only what accessor_worker.py gives to travelling functions.
"""

# Run where accessor_worker.py's names are: the imports are for the readers of this file.
import ctypes
import mmap
import os
import socket

Pieces = dict[int, bytes]


def pread_pieces(descriptor: int, size: int) -> Pieces:
    return {start: os.pread(descriptor, 1000, start) for start in (size - 500, 1, 4095, 12288, 60000, 0)}


def pread_all(descriptor: int, size: int) -> Pieces:
    return {0: os.pread(descriptor, size + 1, 0)}


def read_on(descriptor: int, size: int) -> Pieces:
    os.lseek(descriptor, 5000, 0)
    return {5000: os.read(descriptor, 7000), 12000: os.read(descriptor, 100)}


def vector(descriptor: int, size: int) -> Pieces:
    first, second = bytearray(5000), bytearray(300)
    os.preadv(descriptor, [first, second], 7)
    return {7: bytes(first + second)}


def map_private(descriptor: int, size: int) -> Pieces:
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        return {70000: mapping[70000:70100], 0: mapping[:]}


def map_part(descriptor: int, size: int) -> Pieces:
    with mmap.mmap(descriptor, 8192, mmap.MAP_PRIVATE, mmap.PROT_READ, offset=8192) as mapping:
        return {12288: mapping[4096:], 8192: mapping[:4096]}


def map_shared(descriptor: int, size: int) -> Pieces:
    try:
        mapping = mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ)
    except OSError:  # the divergence "shared mappings (exact)"
        return {}
    with mapping:
        return {0: mapping[:]}


def map_populate(descriptor: int, size: int) -> Pieces:
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE | 0x8000, mmap.PROT_READ) as mapping:
        return {0: mapping[:]}


def map_locked(descriptor: int, size: int) -> Pieces:
    with mmap.mmap(descriptor, 65536, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        ctypes.CDLL(None).mlock(ctypes.c_void_p(address), ctypes.c_size_t(65536))
        return {0: mapping[:]}


def map_advised(descriptor: int, size: int) -> Pieces:
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        mapping.madvise(3)  # MADV_WILLNEED
        return {0: mapping[:]}


def map_populated_by_advice(descriptor: int, size: int) -> Pieces:
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        mapping.madvise(22)  # MADV_POPULATE_READ
        return {0: mapping[:]}


def advised(descriptor: int, size: int) -> Pieces:
    os.posix_fadvise(descriptor, 0, size, os.POSIX_FADV_WILLNEED)
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        return {0: mapping[:]}


def read_ahead(descriptor: int, size: int) -> Pieces:
    ctypes.CDLL(None).readahead(descriptor, ctypes.c_int64(4096), ctypes.c_size_t(20000))
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        return {0: mapping[:]}


def send(descriptor: int, size: int) -> Pieces:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = os.sendfile(ours.fileno(), descriptor, 100, 10000)
        data = b""
        while len(data) < sent:
            data += theirs.recv(sent - len(data))
    return {100: data}


def send_then_map(descriptor: int, size: int) -> Pieces:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = os.sendfile(ours.fileno(), descriptor, 100, 10)
        data = theirs.recv(sent)
    with mmap.mmap(descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
        return {100: data, 0: mapping[:]}


def splice(descriptor: int, size: int) -> Pieces:
    reader, writer = os.pipe()
    moved = os.splice(descriptor, writer, 6000, offset_src=4000)
    data = os.read(reader, moved)
    os.close(reader)
    os.close(writer)
    return {4000: data}


def copy_range(descriptor: int, size: int) -> Pieces:
    target = os.open("/tmp", os.O_TMPFILE | os.O_RDWR)
    try:
        copied = os.copy_file_range(descriptor, target, size, 0, 0)
    except OSError:  # EXDEV
        copied = os.sendfile(target, descriptor, 0, size)
    data = os.pread(target, copied, 0)
    os.close(target)
    return {0: data}


def direct(descriptor: int, size: int) -> Pieces:
    again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 8192) as buffer:
        count = os.preadv(again, [buffer], 4096)
        data = buffer[:count]
    os.close(again)
    return {4096: data}


def read_into_own_mapping(descriptor: int, size: int) -> Pieces:
    """A read(2) whose buffer is an untouched private mapping of the same file: it faults inside the call."""
    with mmap.mmap(descriptor, 65536, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as mapping:
        view = memoryview(mapping)
        count = os.preadv(descriptor, [view[100:9000]], 100)
        view.release()
        return {0: mapping[:65536], 100: mapping[100 : 100 + count]}


def from_a_child(descriptor: int, size: int) -> Pieces:
    """Another process reads and maps what this one has opened."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with mmap.mmap(descriptor, 16384, mmap.MAP_PRIVATE, mmap.PROT_READ) as mapping:
            os.write(writer, mapping[8192:16384] + os.pread(descriptor, 8192, 0))
        os._exit(0)
    os.close(writer)
    data = b""
    while piece := os.read(reader, 65536):
        data += piece
    os.close(reader)
    os.waitpid(child, 0)
    return {8192: data[:8192], 0: data[8192:]}


WAYS = (
    pread_pieces,
    pread_all,
    read_on,
    vector,
    map_private,
    map_part,
    map_shared,
    map_populate,
    map_locked,
    map_advised,
    map_populated_by_advice,
    advised,
    read_ahead,
    send,
    send_then_map,
    splice,
    copy_range,
    direct,
    read_into_own_mapping,
    from_a_child,
)

# Those of which the range is not whole pages, and what then shows the pages' rest.
UNALIGNED = (
    pread_pieces,
    map_part,
    map_shared,
    advised,
    send_then_map,
    splice,
    read_into_own_mapping,
    from_a_child,
)
