"""Malformed and truncated requests never crash or hang the devfuse engine, nor lead it outside its source."""

import errno
import os
import struct
from collections.abc import Iterator

import pytest

from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.fuse_protocol import Opcode
from tests.support.fuse_fuzz import Target, attacked, message
from tests.support.fuse_fuzz_requests import LARGE_NUMBERS, ODD_NAMES, UNKNOWN_OPCODES, Requests
from tests.support.fuse_fuzz_server import DIRECTORIES, WORLDS
from tests.support.fuzzing import SEED, Case, Plan

REQUESTS = 2000
MOST_MEMORY = 192 << 20  # bytes; it begins with some 40 MiB
ROOT = protocol.ROOT_ID
# What the engine may say of bad input: one line each.
_LINES = (
    "ERROR /dev/fuse: ",
    "ERROR FUSE protocol ",
    "WARNING an access was denied: its file cannot be opened for the listener: ",
    "WARNING note: process ",  # a random accessor that is really there, and may not be looked at
)


@pytest.fixture(scope="module", params=list(WORLDS))
def world(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def target(world: str) -> Iterator[Target]:
    """One engine for all tests of a world; nothing that they send may do it harm."""
    with attacked(world) as target:
        yield target


def send(target: Target, opcode: int, body: bytes, node_id: int = ROOT) -> int | None:
    """The errno of its answer, 0 for none; None where there is no answer."""
    answer = target.attack(message(opcode, body, unique=target.next_unique(), node_id=node_id))
    return None if answer is None else answer.error


def node_of(target: Target, name: bytes) -> int:
    answer = target.ask(Opcode.LOOKUP, name + b"\0")
    assert answer.error == 0
    return int(struct.unpack_from("=Q", answer.body)[0])


@pytest.mark.parametrize("opcode", [*range(71), *UNKNOWN_OPCODES])
def test_bodies_of_every_length(target: Target, opcode: int) -> None:
    """Each opcode's body cut everywhere, and made longer."""
    whole = Requests(target, SEED).body(opcode)
    for end in range(min(len(whole), 100)):
        send(target, opcode, whole[:end])
    for more in (b"", b"\0", b"\0" * 8, b"x" * 4096):
        send(target, opcode, whole + more)
    if opcode not in list(Opcode):
        assert send(target, opcode, whole) == errno.ENOSYS


def test_rubbish_without_a_header(target: Target) -> None:
    for size in range(1, protocol.IN_HEADER.size):
        target.attack(b"\xff" * size)
        target.attack(bytes(size))


@pytest.mark.parametrize("opcode", [Opcode.GETATTR, Opcode.WRITE, Opcode.FORGET, 4096])
def test_headers_that_lie(target: Target, opcode: int) -> None:
    """The process that waits for such a request gets an error and does not wait forever."""
    for length in (0, 1, 39, 40, 55, 57, 1 << 20, (1 << 32) - 1):
        unique = target.next_unique()
        answer = target.attack(message(opcode, bytes(16), unique=unique, node_id=ROOT, length=length))
        assert answer is None or answer.error == errno.EIO
    for words in (3, 7, 0xFFFF):
        unique = target.next_unique()
        request = message(opcode, bytes(16), unique=unique, node_id=ROOT, extension_words=words)
        answer = target.attack(request)
        assert answer is None or answer.error == errno.EIO


def test_extensions_are_left_out_of_the_body(target: Target) -> None:
    request = message(
        Opcode.LOOKUP, b"anchor\0\0" + b"x" * 8, unique=target.next_unique(), node_id=ROOT, extension_words=1
    )
    answer = target.attack(request)
    assert answer is not None
    assert answer.error == 0


NAMED = {
    Opcode.LOOKUP: b"",
    Opcode.UNLINK: b"",
    Opcode.RMDIR: b"",
    Opcode.MKDIR: protocol.MKDIR_IN.pack(0o755, 0),
    Opcode.MKNOD: protocol.MKNOD_IN.pack(0o100644, 0, 0, 0),
    Opcode.CREATE: protocol.CREATE_IN.pack(os.O_RDWR, 0o100644, 0, 0),
    Opcode.LINK: protocol.LINK_IN.pack(ROOT),
    Opcode.GETXATTR: protocol.GETXATTR_IN.pack(0, 0),
    Opcode.SETXATTR: protocol.SETXATTR_IN.pack(0, 0),
    Opcode.REMOVEXATTR: b"",
}
# "n" * 255 is an ordinary name; "." and ".." of a directory can be looked up (fuse_get_parent() in the kernel).
WRONG_NAMES = [name for name in ODD_NAMES if len(name) != 255]


@pytest.mark.parametrize("opcode", NAMED)
@pytest.mark.parametrize("name", WRONG_NAMES, ids=lambda name: repr(name[:12]))
def test_names_that_are_none(target: Target, opcode: Opcode, name: bytes) -> None:
    error = send(target, opcode, NAMED[opcode] + name + b"\0")
    if opcode is Opcode.LOOKUP and name in (b".", b".."):
        assert error == 0
    else:
        assert error
    # Without its NUL no name is one.
    assert send(target, opcode, NAMED[opcode] + name) in (errno.EINVAL, errno.ENOSYS)


@pytest.mark.parametrize("name", WRONG_NAMES, ids=lambda name: repr(name[:12]))
def test_renaming_by_names_that_are_none(target: Target, name: bytes) -> None:
    for head, opcode in (
        (protocol.RENAME_IN.pack(ROOT), Opcode.RENAME),
        (protocol.RENAME2_IN.pack(ROOT, 2, 0), Opcode.RENAME2),
    ):
        assert send(target, opcode, head + name + b"\0other\0")
        assert send(target, opcode, head + b"other\0" + name + b"\0")


@pytest.mark.parametrize("name", [b"up", b"away", b"directory/loop"], ids=os.fsdecode)
def test_symbolic_links_are_not_followed(target: Target, name: bytes) -> None:
    directory, _, last = name.rpartition(b"/")
    parent = node_of(target, directory) if directory else ROOT
    answer = target.ask(Opcode.LOOKUP, last + b"\0", parent)
    assert answer.error == 0
    node = int(struct.unpack_from("=Q", answer.body)[0])
    assert send(target, Opcode.LOOKUP, b"file\0", node) == errno.ENOTDIR
    assert send(target, Opcode.OPENDIR, bytes(8), node) in (errno.ENOTDIR, errno.ENOSYS)
    assert send(target, Opcode.OPEN, bytes(8), node) in (errno.ELOOP, errno.ENOSYS)
    # EPERM: a listener cannot have it open either.
    read = protocol.READ_IN.pack(0, 0, 100, 0, 0, 0, 0)
    assert send(target, Opcode.READ, read, node) in (errno.ELOOP, errno.EPERM)
    assert send(target, Opcode.READDIR, protocol.READ_IN.pack(0, 0, 4096, 0, 0, 0, 0), node) == errno.ENOTDIR
    write = protocol.WRITE_IN.pack(0, 0, 1, 0, 0, 0, 0) + b"x"
    assert send(target, Opcode.WRITE, write, node) in (errno.ELOOP, errno.EPERM)


@pytest.mark.parametrize("number", [0, 2, 1 << 62, (1 << 64) - 1])
def test_nodes_and_handles_that_are_unknown(target: Target, number: int) -> None:
    read = protocol.READ_IN.pack(0, 0, 100, 0, 0, 0, 0)
    assert send(target, Opcode.GETATTR, bytes(16), number) == errno.ESTALE
    assert send(target, Opcode.LOOKUP, b"anchor\0", number) == errno.ESTALE
    assert send(target, Opcode.READ, read, number) == errno.ESTALE
    assert send(target, Opcode.FORGET, protocol.FORGET_IN.pack(1), number) is None
    if number > 2:
        for opcode in (Opcode.READ, Opcode.READDIR):
            request = protocol.READ_IN.pack(number, 0, 100, 0, 0, 0, 0)
            assert send(target, opcode, request) == errno.EBADF
        for opcode in (Opcode.RELEASE, Opcode.RELEASEDIR):
            assert send(target, opcode, protocol.RELEASE_IN.pack(number, 0, 0, 0)) == errno.EBADF


@pytest.mark.parametrize("number", LARGE_NUMBERS, ids=hex)
def test_offsets_and_sizes(target: Target, number: int) -> None:
    """However large, nothing of that size is made in memory."""
    node = node_of(target, b"anchor")
    size = min(number, (1 << 32) - 1)
    anchor = b"anchor" * 700
    answer = target.ask(Opcode.READ, protocol.READ_IN.pack(0, 0, size, 0, 0, 0, 0), node)
    if size <= 1 << 20:
        assert (answer.error, answer.body) == (0, anchor[:size])
    else:
        assert answer.error == errno.EINVAL
    beyond = target.ask(Opcode.READ, protocol.READ_IN.pack(0, number, 4096, 0, 0, 0, 0), node)
    assert (
        beyond.error == errno.EINVAL if number > (1 << 63) - 4096 else beyond.body == anchor[number:][:4096]
    )
    for opcode in (Opcode.GETXATTR, Opcode.LISTXATTR):
        send(target, opcode, protocol.GETXATTR_IN.pack(size, 0) + b"user.none\0", node)
    for plus in (Opcode.READDIR, Opcode.READDIRPLUS):
        assert send(target, plus, protocol.READ_IN.pack(0, 0, size, 0, 0, 0, 0)) in (0, None)
        send(target, plus, protocol.READ_IN.pack(0, number, 4096, 0, 0, 0, 0))
    send(target, Opcode.LSEEK, protocol.LSEEK_IN.pack(0, number >> 1, 3, 0), node)
    copy = protocol.COPY_FILE_RANGE_IN.pack(0, number, node, 0, number, number, 0)
    send(target, Opcode.COPY_FILE_RANGE, copy, node)
    assert target.peak() < MOST_MEMORY


def test_a_value_shorter_or_longer_than_it_says(target: Target) -> None:
    node = node_of(target, b"empty")
    value = b"user.three\0" + b"v" * 16
    assert send(target, Opcode.SETXATTR, protocol.SETXATTR_IN.pack(16, 0) + value, node) == 0
    for size in (17, 4096, (1 << 32) - 1):
        assert send(target, Opcode.SETXATTR, protocol.SETXATTR_IN.pack(size, 0) + value, node) == errno.EINVAL
    for size in (0, 2, 4, 1 << 20, (1 << 32) - 1):
        write = protocol.WRITE_IN.pack(0, 0, size, 0, 0, 0, 0)
        assert send(target, Opcode.WRITE, write + b"abc", node) == errno.EINVAL


@pytest.mark.parametrize("count", [0, 2, 1000, (1 << 32) - 1])
def test_forgetting_with_wrong_counts(target: Target, count: int) -> None:
    node = node_of(target, b"empty")
    one = protocol.FORGET_ONE.pack(node, 1)
    for body in (one, one[:15], one + b"\0", b""):
        assert send(target, Opcode.BATCH_FORGET, protocol.BATCH_FORGET_IN.pack(count, 0) + body) is None
    # Whatever it has forgotten, by its name it is found again.
    assert node_of(target, b"empty") == node


def test_interrupting_what_does_not_wait(target: Target) -> None:
    for unique in (0, 1, target.unique, target.unique + 2, target.unique + 4, (1 << 64) - 1):
        assert send(target, Opcode.INTERRUPT, protocol.INTERRUPT_IN.pack(unique)) is None


VERSIONS = {(7, 31): 0, (7, 45): 0, (7, 99): 0, **dict.fromkeys(((7, 30), (6, 31), (8, 0)), errno.EPROTO)}


def test_init_again(world: str) -> None:
    """With any flags; what is granted was offered."""
    with attacked(world) as target:
        for (major, minor), error in VERSIONS.items():
            init_again(target, major, minor, error)


def init_again(target: Target, major: int, minor: int, error: int) -> None:
    for flags in (0, 1, 0xFFFFFFFF & ~protocol.Init.INIT_EXT):
        answer = target.ask(Opcode.INIT, protocol.INIT_IN.pack(major, minor, 0xFFFFFFFF, flags))
        assert answer.error == error
        if not error:
            fields = protocol.INIT_OUT.unpack(answer.body)
            assert fields[:2] == (7, min(minor, 45))
            assert fields[3] & ~flags == 0
            assert fields[10] == 0
    # flags2 is announced, and not there.
    extended = protocol.INIT_IN.pack(major, minor, 0, 0xFFFFFFFF)
    assert send(target, Opcode.INIT, extended) == (error or errno.EINVAL)
    answer = target.ask(Opcode.INIT, extended + struct.pack("=I", 0xFFFFFFFF) + bytes(44))
    assert answer.error == error


@pytest.mark.fuzz
def test_at_random(world: str, fuzz_plan: Plan) -> None:
    """Requests of every kind, right and wrong, for what has been found so far. No leak of descriptors or memory, no traceback."""
    with attacked(world) as target:
        before = target.descriptors()
        requests = Requests(target, fuzz_plan.seed)

        def attempt(case: Case) -> None:
            if case.number % 500 == 0:
                for name in (b"anchor", b"empty", b"large", b"directory", b"fifo", b"socket", b"up"):
                    send(target, Opcode.LOOKUP, name + b"\0")
            target.attack(requests.next())

        fuzz_plan.run(REQUESTS, attempt)
        target.let_go()
        after = target.descriptors()
        # The root is never forgotten, so it may be being read.
        assert len(after) <= len(before) + DIRECTORIES + 1, after
        assert target.peak() < MOST_MEMORY
        lines = target.words().splitlines()
        odd = [line for line in lines if not line.startswith(_LINES)]
        assert not odd
        assert len(lines) <= target.sent
