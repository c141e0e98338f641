"""A permission to read holds for one system call, and for the bytes that the listener was asked for, whatever the accessor does meanwhile."""

import ctypes
import mmap
import os
import threading

import pytest
import trio

from fusehsm import drop
from fusehsm.conform.accessor import Accessor
from fusehsm.events import Event
from tests.conftest import MakeMount
from tests.support.async_listener import HOLD, listening
from tests.support.harness import Mount
from tests.support.stub_pattern import PAGE, Filler, Stub, evict, make_stub

pytestmark = pytest.mark.fuse

MIB = 1 << 20
PAGES = 128


@pytest.fixture(scope="module", params=["exact", "first-access"])
def mount(make_shared_mount: MakeMount, request: pytest.FixtureRequest) -> Mount:
    return make_shared_mount("--events", request.param)


only_exact = pytest.mark.parametrize("mount", ["exact"], indirect=True)


def stub_in(mount: Mount, name: str, size: int) -> tuple[Stub, Filler]:
    stub, filler = make_stub(mount.source, mount.path, name, len(name), size), Filler()
    filler.knows(stub)
    return stub, filler


def differing_pages(found: bytes, stub: Stub, offset: int = 0) -> list[int]:
    """The pages, by their offset in `found`, that are not the stub's from `offset` on."""
    return [
        at
        for at in range(0, len(found), PAGE)
        if found[at : at + PAGE] != stub.content[offset + at : offset + at + PAGE][: len(found) - at]
    ]


def read_twice(path: str, backing: str, size: int) -> tuple[int, bytes]:
    """A read at the file position, of `size` bytes whose second half has no memory, and the same call again for the rest.

    The file is emptied in between. preadv2(2) has six arguments, so that no register has another value in the second call.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.preadv2.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    memory = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    second_half = address + size // 2, size // 2
    vector = (ctypes.c_size_t * 2)(address, size)
    descriptor, null = os.open(path, os.O_RDONLY), os.open("/dev/null", os.O_RDONLY)
    copy = os.dup(null)
    counts = []
    # After some calls the interpreter's stack does not change any more.
    for number in range(32):
        if number == 30:
            os.dup2(descriptor, copy)
            libc.mprotect(*second_half, 0)
        elif number == 31:
            libc.mprotect(*second_half, mmap.PROT_READ | mmap.PROT_WRITE)
            os.truncate(backing, 0)
            os.truncate(backing, 2 * size)
        counts.append(libc.preadv2(copy, vector, 1, -1, 0))
    return counts[-2], ctypes.string_at(address, counts[-1])


@only_exact
async def test_the_same_call_again(mount: Mount, accessor: Accessor) -> None:
    """It is another call, also for a thread that makes it from the same place with the same buffer."""
    stub, filler = stub_in(mount, "twice", 4 * MIB)
    async with listening(mount.path, answer=filler):
        first, found = await accessor.run(read_twice, stub.path, str(stub.backing), 2 * MIB)
    assert first == MIB
    assert differing_pages(found, stub, MIB) == []


def send_while_the_offset_changes(
    path: str, pages: int, size: int, by_pointer: bool
) -> list[tuple[int, bytes]]:
    """sendfile(2) of each page of `size` bytes, while another thread moves the offset in memory or the file position; (page, bytes) of each call."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sendfile.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    descriptor = os.open(path, os.O_RDONLY)
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    at = ctypes.c_int64(0)
    over = threading.Event()
    page = 0

    def change() -> None:
        while not over.is_set():
            if by_pointer:
                at.value = 0
                at.value = page * size
            else:
                os.lseek(descriptor, 0, os.SEEK_SET)

    thread = threading.Thread(target=change)
    thread.start()
    found = []
    for page in range(2, pages):
        if not by_pointer:
            os.lseek(descriptor, page * size, os.SEEK_SET)
        sent = libc.sendfile(theirs, descriptor, ctypes.addressof(at) if by_pointer else None, size)
        found.append((page, os.read(ours, size) if sent > 0 else b""))
    over.set()
    thread.join()
    return found


@pytest.mark.parametrize("by_pointer", [True, False], ids=["pointer", "position"])
async def test_an_offset_that_another_thread_changes(
    mount: Mount, accessor: Accessor, by_pointer: bool
) -> None:
    """The kernel has taken one value and the mount sees another: whatever is sent was asked for."""
    stub, filler = stub_in(mount, f"raced-{by_pointer}", PAGES * PAGE)
    async with listening(mount.path, answer=filler):
        found = await accessor.run(send_while_the_offset_changes, stub.path, PAGES, PAGE, by_pointer)
    pages = {stub.content[at : at + PAGE] for at in range(0, stub.size, PAGE)}
    assert [page for page, data in found if data and data not in pages] == []
    assert sum(bool(data) for _, data in found) > PAGES // 2


def read_into_a_mapping(path: str, other: str, size: int) -> bytes:
    """read(2) of `size` bytes; the second half of the memory is a private mapping of the file `other`."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.read.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    libc.mmap.restype = ctypes.c_void_p
    memory = mmap.mmap(-1, size)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    mapped, fixed = os.open(other, os.O_RDONLY), 0x10
    half = size // 2
    assert libc.mmap(address + half, half, 3, mmap.MAP_PRIVATE | fixed, mapped, 0) == address + half
    assert libc.read(os.open(path, os.O_RDONLY), address, size) == size
    return ctypes.string_at(address, size)


@only_exact
async def test_content_that_goes_in_the_middle_of_a_call(mount: Mount, accessor: Accessor) -> None:
    """What is left of a long read(2) is asked for again if the content has been dropped between its requests."""
    size = 2 * MIB
    stub, filler = stub_in(mount, "middle", size)
    buffer, _ = stub_in(mount, "buffer", size // 2)
    found: list[bytes] = []

    def answer(event: Event) -> int:
        filler.fill(event)
        return HOLD if event.path == buffer.path else 0

    async def read() -> None:
        found.append(await accessor.run(read_into_a_mapping, stub.path, buffer.path, size))

    async with listening(mount.path, answer=answer) as listener, trio.open_nursery() as nursery:
        nursery.start_soon(read)
        # The second request of the call has no memory to write to yet.
        await listener.wait_until(lambda: any(event.path == buffer.path for event in listener.heard))
        evict(stub)
        await drop(stub.path)
        listener.release()
    assert differing_pages(found[0], stub) == []
