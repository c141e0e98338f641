"""The FUSE protocol's layouts and codecs, without a mount."""

import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.fuse_protocol import Attribute, Attributes, Init, Opcode, Request

fixed = settings(derandomize=True, database=None)
WORDS = st.integers(0, (1 << 32) - 1)
LONG_WORDS = st.integers(0, (1 << 64) - 1)
NAMES = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)

# Which fields of the C structure the struct's values are, in order, "" for one that is padding.
LAYOUTS = {
    "fuse_in_header": (protocol.IN_HEADER, "len opcode unique nodeid uid gid pid total_extlen padding"),
    "fuse_out_header": (protocol.OUT_HEADER, "len error unique"),
    "fuse_forget_in": (protocol.FORGET_IN, "nlookup"),
    "fuse_forget_one": (protocol.FORGET_ONE, "nodeid nlookup"),
    "fuse_batch_forget_in": (protocol.BATCH_FORGET_IN, "count dummy"),
    "fuse_setattr_in": (
        protocol.SETATTR_IN,
        "valid padding fh size lock_owner atime mtime ctime atimensec mtimensec ctimensec mode unused4 uid gid unused5",
    ),
    "fuse_mknod_in": (protocol.MKNOD_IN, "mode rdev umask padding"),
    "fuse_mkdir_in": (protocol.MKDIR_IN, "mode umask"),
    "fuse_rename_in": (protocol.RENAME_IN, "newdir"),
    "fuse_rename2_in": (protocol.RENAME2_IN, "newdir flags padding"),
    "fuse_link_in": (protocol.LINK_IN, "oldnodeid"),
    "fuse_open_in": (protocol.OPEN_IN, "flags open_flags"),
    "fuse_create_in": (protocol.CREATE_IN, "flags mode umask open_flags"),
    "fuse_read_in": (protocol.READ_IN, "fh offset size read_flags lock_owner flags padding"),
    "fuse_write_in": (protocol.WRITE_IN, "fh offset size write_flags lock_owner flags padding"),
    "fuse_release_in": (protocol.RELEASE_IN, "fh flags release_flags lock_owner"),
    "fuse_fsync_in": (protocol.FSYNC_IN, "fh fsync_flags padding"),
    "fuse_getxattr_in": (protocol.GETXATTR_IN, "size padding"),
    "fuse_access_in": (protocol.ACCESS_IN, "mask padding"),
    "fuse_interrupt_in": (protocol.INTERRUPT_IN, "unique"),
    "fuse_fallocate_in": (protocol.FALLOCATE_IN, "fh offset length mode padding"),
    "fuse_lseek_in": (protocol.LSEEK_IN, "fh offset whence padding"),
    "fuse_lk_in": (protocol.LK_IN, "fh owner lk.start lk.end lk.type lk.pid lk_flags padding"),
    "fuse_lk_out": (protocol.LK_OUT, "lk.start lk.end lk.type lk.pid"),
    "fuse_ioctl_in": (protocol.IOCTL_IN, "fh flags cmd arg in_size out_size"),
    "fuse_ioctl_out": (protocol.IOCTL_OUT, "result flags in_iovs out_iovs"),
    "fuse_copy_file_range_in": (
        protocol.COPY_FILE_RANGE_IN,
        "fh_in off_in nodeid_out fh_out off_out len flags",
    ),
    "fuse_write_out": (protocol.SIZE_OUT, "size padding"),
    "fuse_getxattr_out": (protocol.SIZE_OUT, "size padding"),
    "fuse_lseek_out": (protocol.OFFSET_OUT, "offset"),
    "fuse_open_out": (protocol.OPEN_OUT, "fh open_flags"),
    "fuse_init_out": (
        protocol.INIT_OUT,
        "major minor max_readahead flags max_background congestion_threshold max_write time_gran max_pages map_alignment flags2",
    ),
    "fuse_statfs_out": (
        protocol.STATFS_OUT,
        "st.blocks st.bfree st.bavail st.files st.ffree st.bsize st.namelen st.frsize",
    ),
}
_ATTRIBUTES = (
    "ino size blocks atime mtime ctime atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"
)
# What is read of a structure's beginning: the rest came later, or is asked for with a flag that is not.
PREFIXES = {
    "fuse_init_in": (protocol.INIT_IN, "major minor max_readahead flags"),
    "fuse_setxattr_in": (protocol.SETXATTR_IN, "size flags"),
}


@pytest.fixture(scope="module")
def header(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """What this machine's <linux/fuse.h> says: bytes of `structure`, offset in bytes of `structure.field`, values of constants."""
    place = tmp_path_factory.mktemp("header")
    structures = [
        *LAYOUTS,
        *PREFIXES,
        "fuse_entry_out",
        "fuse_attr_out",
        "fuse_attr",
        "fuse_dirent",
        "fuse_direntplus",
        "fuse_notify_inval_inode_out",
        "fuse_notify_inval_entry_out",
        "fuse_notify_delete_out",
        "fuse_notify_store_out",
    ]
    lines = [f'printf("{name} %zu\\n", sizeof(struct {name}));' for name in structures]
    fields = {name: names.split() for name, (_, names) in (LAYOUTS | PREFIXES).items()}
    fields |= {
        "fuse_entry_out": [
            "nodeid",
            "generation",
            "entry_valid",
            "attr_valid",
            "entry_valid_nsec",
            "attr_valid_nsec",
            "attr",
        ],
        "fuse_attr_out": ["attr_valid", "attr_valid_nsec", "attr"],
        "fuse_attr": _ATTRIBUTES.split(),
        "fuse_dirent": ["ino", "off", "namelen", "type", "name"],
        "fuse_init_in": ["major", "minor", "max_readahead", "flags", "flags2"],
        "fuse_notify_inval_inode_out": ["ino", "off", "len"],
        "fuse_notify_inval_entry_out": ["parent", "namelen"],
        "fuse_notify_delete_out": ["parent", "child", "namelen"],
        "fuse_notify_store_out": ["nodeid", "offset", "size"],
    }
    lines += [
        f'printf("{name}.{field} %zu\\n", offsetof(struct {name}, {field}));'
        for name, names in fields.items()
        for field in names
    ]
    constants = [
        *(f"FUSE_{opcode.name}" for opcode in Opcode if opcode < Opcode.STATX),
        *(f"FUSE_{flag.name}" for flag in Init if flag < 1 << 32),
        *(f"FATTR_{flag.name}" for flag in Attribute),
        *CONSTANTS,
    ]
    lines += [f'printf("{name} %lld\\n", (long long){name});' for name in constants]
    source = place / "header.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/fuse.h>\n"
        f"int main(void) {{ {' '.join(lines)} return 0; }}\n",
        encoding="ascii",
    )
    subprocess.run(["cc", "-o", place / "header", source], check=True, timeout=60)
    output = subprocess.run([place / "header"], check=True, capture_output=True, text=True, timeout=60).stdout
    return {name: int(value) for name, value in (line.split() for line in output.splitlines())}


CONSTANTS = {
    "FOPEN_DIRECT_IO": protocol.FOPEN_DIRECT_IO,
    "FOPEN_KEEP_CACHE": protocol.FOPEN_KEEP_CACHE,
    "FOPEN_CACHE_DIR": protocol.FOPEN_CACHE_DIR,
    "FOPEN_PARALLEL_DIRECT_WRITES": protocol.FOPEN_PARALLEL_DIRECT_WRITES,
    "FUSE_LK_FLOCK": protocol.LK_FLOCK,
    "FUSE_IOCTL_DIR": protocol.IOCTL_DIR,
    "FUSE_READ_LOCKOWNER": protocol.READ_LOCKOWNER,
    "FUSE_WRITE_CACHE": protocol.WRITE_CACHE,
    "FUSE_WRITE_KILL_SUIDGID": protocol.WRITE_KILL_SUIDGID,
    "FUSE_FSYNC_FDATASYNC": protocol.FSYNC_FDATASYNC,
    "FUSE_NOTIFY_INVAL_INODE": protocol.NOTIFY_INVAL_INODE,
    "FUSE_NOTIFY_INVAL_ENTRY": protocol.NOTIFY_INVAL_ENTRY,
    "FUSE_NOTIFY_STORE": protocol.NOTIFY_STORE,
    "FUSE_NOTIFY_DELETE": protocol.NOTIFY_DELETE,
    "FUSE_ROOT_ID": protocol.ROOT_ID,
    "FUSE_KERNEL_VERSION": protocol.MAJOR,
}


def offsets(layout: struct.Struct, count: int) -> list[int]:
    """Where each of a struct's first values lies, found by changing one byte after the other."""
    found: list[int] = []
    for position in range(layout.size):
        data = bytearray(layout.size)
        data[position] = 1
        values = layout.unpack(data)
        changed = [index for index, value in enumerate(values) if value]
        if changed and changed[0] == len(found):
            found.append(position)
    return found[:count]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_the_headers(header: dict[str, int], name: str) -> None:
    layout, names = LAYOUTS[name]
    assert layout.size == header[name]
    fields = names.split()
    assert offsets(layout, len(fields)) == [header[f"{name}.{field}"] for field in fields]


@pytest.mark.parametrize("name", PREFIXES)
def test_beginnings_of_layouts_are_the_headers(header: dict[str, int], name: str) -> None:
    layout, names = PREFIXES[name]
    assert layout.size <= header[name]
    assert offsets(layout, 9) == [header[f"{name}.{field}"] for field in names.split()]


def test_the_second_word_of_flags_follows_the_first(header: dict[str, int]) -> None:
    assert protocol.INIT_IN.size == header["fuse_init_in.flags2"]


def test_numbers_are_the_headers(header: dict[str, int]) -> None:
    assert {name: header[name] for name in CONSTANTS} == CONSTANTS
    for opcode in Opcode:
        if opcode < Opcode.STATX:
            assert header[f"FUSE_{opcode.name}"] == opcode
    for flag in Init:
        if flag < 1 << 32:
            assert header[f"FUSE_{flag.name}"] == flag
    for attribute in Attribute:
        assert header[f"FATTR_{attribute.name}"] == attribute


def test_what_came_after_this_machines_header() -> None:
    """Linux 6.18's include/uapi/linux/fuse.h: FUSE_STATX (7.39), FUSE_COPY_FILE_RANGE_64 (7.45), FUSE_DIRECT_IO_ALLOW_MMAP (7.39)."""
    assert (Opcode.STATX, Opcode.COPY_FILE_RANGE_64) == (52, 53)
    assert Init.DIRECT_IO_ALLOW_MMAP == 1 << 36
    # struct fuse_statx_in: getattr_flags, reserved, fh, sx_flags, sx_mask.
    assert offsets(protocol.STATX_IN, 9) == [0, 4, 8, 16, 20]
    assert protocol.STATX_IN.size == 24


# Answers


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    path.chmod(0o640)
    os.utime(path, ns=(1_000_000_007, -1_500_000_000))
    return path


def attributes_of(path: Path, valid: float = 1.5) -> Attributes:
    return Attributes(77, 5, valid, path.lstat(), 16)


def word(data: bytes, position: int, form: str = "=Q") -> int:
    return int(struct.unpack_from(form, data, position)[0])


def check_attributes(header: dict[str, int], data: bytes, status: os.stat_result) -> None:
    assert len(data) == header["fuse_attr"]

    def field(name: str, form: str = "=I") -> int:
        return word(data, header[f"fuse_attr.{name}"], form)

    assert (field("ino", "=Q"), field("size", "=Q"), field("blocks", "=Q")) == (77, 7, 16)
    assert (field("atime", "=q"), field("atimensec")) == (1, 7)
    assert (field("mtime", "=q"), field("mtimensec")) == (-2, 500_000_000)
    assert field("ctime", "=q") * 10**9 + field("ctimensec") == status.st_ctime_ns
    assert (field("mode"), field("nlink")) == (status.st_mode, status.st_nlink)
    assert (field("uid"), field("gid"), field("rdev")) == (status.st_uid, status.st_gid, 0)
    assert (field("blksize"), field("flags")) == (status.st_blksize, 0)


def test_an_entry(header: dict[str, int], file: Path) -> None:
    data = protocol.entry_out(attributes_of(file), 2.25)
    assert len(data) == header["fuse_entry_out"]

    def field(name: str, form: str = "=Q") -> int:
        return word(data, header[f"fuse_entry_out.{name}"], form)

    assert (field("nodeid"), field("generation")) == (77, 5)
    assert (field("entry_valid"), field("entry_valid_nsec", "=I")) == (2, 250_000_000)
    assert (field("attr_valid"), field("attr_valid_nsec", "=I")) == (1, 500_000_000)
    check_attributes(header, data[header["fuse_entry_out.attr"] :], file.stat())


def test_no_entry(header: dict[str, int]) -> None:
    data = protocol.absent_out(3)
    assert len(data) == header["fuse_entry_out"]
    assert word(data, header["fuse_entry_out.entry_valid"]) == 3
    assert data.count(0) == len(data) - 1


def test_attributes(header: dict[str, int], file: Path) -> None:
    data = protocol.attr_out(attributes_of(file))
    assert len(data) == header["fuse_attr_out"]
    assert word(data, header["fuse_attr_out.attr_valid"]) == 1
    assert word(data, header["fuse_attr_out.attr_valid_nsec"], "=I") == 500_000_000
    check_attributes(header, data[header["fuse_attr_out.attr"] :], file.stat())


def test_extended_attributes_of_a_file(file: Path) -> None:
    """struct fuse_statx_out: attr_valid, attr_valid_nsec, flags, two spare longs; then struct fuse_statx, whose places are statx(2)'s up to
    its devices."""
    status = file.stat()
    data = protocol.statx_out(attributes_of(file), (12, 34))
    assert len(data) == 288
    assert (word(data, 0), word(data, 8, "=I")) == (1, 500_000_000)
    statx = data[32:]
    assert word(statx, 0, "=I") == 0xFFF
    assert word(statx, 4, "=I") == status.st_blksize
    assert struct.unpack_from("=IIIH", statx, 16) == (
        status.st_nlink,
        status.st_uid,
        status.st_gid,
        status.st_mode,
    )
    assert struct.unpack_from("=QQQ", statx, 32) == (77, 7, 16)
    assert struct.unpack_from("=qI", statx, 0x40) == (1, 7)
    assert struct.unpack_from("=qI", statx, 0x50) == (12, 34)
    assert struct.unpack_from("=qI", statx, 0x60) == divmod(status.st_ctime_ns, 10**9)
    assert struct.unpack_from("=qI", statx, 0x70) == (-2, 500_000_000)
    assert word(protocol.statx_out(attributes_of(file), None), 32, "=I") == 0x7FF


@pytest.mark.parametrize("seconds", [1e9, float(1 << 62), float("inf")])
def test_very_long_times(header: dict[str, int], file: Path, seconds: float) -> None:
    data = protocol.attr_out(attributes_of(file, seconds))
    assert word(data, header["fuse_attr_out.attr_valid"]) == min(seconds, 1 << 62)
    assert word(data, header["fuse_attr_out.attr_valid_nsec"], "=I") == 0


@fixed
@given(st.floats(0, 1e9))
def test_times_are_rounded_down(seconds: float) -> None:
    data = protocol.absent_out(seconds)
    whole, part = word(data, 16), word(data, 32, "=I")
    assert 0 <= part < 10**9
    assert abs(whole + part / 10**9 - seconds) <= 1e-6


@fixed
@given(LONG_WORDS, LONG_WORDS, NAMES, st.sampled_from([stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK]))
def test_entries_of_a_directory(node_id: int, offset: int, name: bytes, kind: int) -> None:
    """FUSE_DIRENT_SIZE(): padded to 8 bytes."""
    data = protocol.directory_entry(node_id, offset, name, kind | 0o644)
    assert len(data) == (24 + len(name) + 7) // 8 * 8
    assert struct.unpack_from("=QQII", data) == (node_id, offset, len(name), kind >> 12)
    assert data[24:].rstrip(b"\0") == name.rstrip(b"\0")


def test_places_in_a_directory_entry(header: dict[str, int]) -> None:
    assert header["fuse_direntplus"] == header["fuse_entry_out"] + header["fuse_dirent"]
    places = [header[f"fuse_dirent.{field}"] for field in ("ino", "off", "namelen", "type", "name")]
    assert places == [0, 8, 16, 20, 24]


def test_init() -> None:
    flags = int(Init.INIT_EXT | Init.DIRECT_IO_ALLOW_MMAP | Init.MAX_PAGES)
    fields = protocol.INIT_OUT.unpack(protocol.init_out(40, 4096, flags))
    assert fields == (7, 40, 4096, flags & 0xFFFFFFFF, 65535, 65535, 1 << 20, 1, 256, 0, flags >> 32)


@fixed
@given(LONG_WORDS, st.binary(max_size=40))
def test_replies(unique: int, body: bytes) -> None:
    assert protocol.reply(unique, body) == struct.pack("=IiQ", 16 + len(body), 0, unique) + body
    assert protocol.failure(unique, 5) == struct.pack("=IiQ", 16, -5, unique)


def test_notifications(header: dict[str, int]) -> None:
    """The kernel wants names with their NUL (fuse_notify_inval_entry())."""
    messages = {
        ("fuse_notify_inval_inode_out", 2): (
            protocol.invalidate_inode(9, -1, 4096),
            {"ino": 9, "off": (1 << 64) - 1, "len": 4096},
            b"",
        ),
        ("fuse_notify_inval_entry_out", 3): (
            protocol.invalidate_entry(9, b"name"),
            {"parent": 9},
            b"name\0",
        ),
        ("fuse_notify_delete_out", 6): (
            protocol.delete(9, 10, b"name"),
            {"parent": 9, "child": 10},
            b"name\0",
        ),
        ("fuse_notify_store_out", 4): (
            protocol.store(9, 8192, b"data"),
            {"nodeid": 9, "offset": 8192},
            b"data",
        ),
    }
    for (name, code), (data, fields, tail) in messages.items():
        assert protocol.OUT_HEADER.unpack_from(data) == (len(data), code, 0)
        body = data[16:]
        assert body[header[name] :] == tail
        assert {field: word(body, header[f"{name}.{field}"]) for field in fields} == fields
        length = {"fuse_notify_store_out": "size", "fuse_notify_inval_inode_out": None}.get(name, "namelen")
        if length is not None:
            assert word(body, header[f"{name}.{length}"], "=I") == 4


# Requests


def encoded(body: bytes, *, length: int | None = None, words: int = 0) -> bytes:
    said = 40 + len(body) if length is None else length
    return protocol.IN_HEADER.pack(said, 15, 7, 8, 9, 10, 11, words, 0) + body


@fixed
@given(st.binary(max_size=64), st.integers(0, 4))
def test_requests(body: bytes, words: int) -> None:
    request = protocol.decode_request(encoded(body + bytes(8 * words), words=words))
    assert request == Request(15, 7, 8, 9, 10, 11, body)


def test_a_request_in_a_view() -> None:
    """Large ones are not copied."""
    data = memoryview(encoded(b"body"))
    request = protocol.decode_request(data)
    assert isinstance(request.body, memoryview)
    assert bytes(request.body) == b"body"


@fixed
@given(st.binary(max_size=39))
def test_too_short_for_a_header(data: bytes) -> None:
    with pytest.raises(ValueError, match=f"a request of {len(data)} bytes"):
        protocol.decode_request(data)


@fixed
@given(st.binary(max_size=16), WORDS)
def test_lengths_that_lie(body: bytes, length: int) -> None:
    if length == 40 + len(body):
        length += 1
    with pytest.raises(ValueError, match=f"says {length}"):
        protocol.decode_request(encoded(body, length=length))


@fixed
@given(st.binary(max_size=16), st.integers(3, 0xFFFF))
def test_extensions_longer_than_the_request(body: bytes, words: int) -> None:
    with pytest.raises(ValueError, match=f"{words} words of extensions"):
        protocol.decode_request(encoded(body, words=words))


@fixed
@given(st.binary(max_size=200))
def test_whatever_comes_is_a_request_or_an_error(data: bytes) -> None:
    try:
        request = protocol.decode_request(data)
    except ValueError:
        return
    assert len(request.body) <= len(data) - 40


@fixed
@given(st.binary(max_size=8), st.lists(NAMES, max_size=3), st.binary(max_size=8))
def test_names(before: bytes, names: list[bytes], after: bytes) -> None:
    """What follows the last name is not theirs."""
    body = before + b"".join(name + b"\0" for name in names) + after
    assert protocol.names_in(body, len(before), len(names)) == names
    assert protocol.names_in(memoryview(body), len(before), len(names)) == names


@fixed
@given(st.lists(NAMES, min_size=1, max_size=3))
def test_names_without_their_end(names: list[bytes]) -> None:
    with pytest.raises(ValueError, match="a name without its end"):
        protocol.names_in(b"\0".join(names), 0, len(names))


@pytest.mark.parametrize("start", [0, 1, 40])
def test_names_where_there_are_none(start: int) -> None:
    with pytest.raises(ValueError, match="a name without its end"):
        protocol.names_in(b"", start, 1)


# Device numbers


@fixed
@given(st.integers(0, 0xFFF), st.integers(0, 0xFFFFF))
def test_device_numbers(major: int, minor: int) -> None:
    """include/linux/kdev_t.h, new_encode_dev(): 12 bits of major number, 20 of minor number."""
    number = os.makedev(major, minor)
    encoded_number = protocol.device_number(number)
    assert encoded_number == (minor & 0xFF) | (major << 8) | ((minor & ~0xFF) << 12)
    assert encoded_number < 1 << 32
    assert protocol.number_of_device(encoded_number) == number


@fixed
@given(WORDS)
def test_every_word_is_a_device_number(encoded_number: int) -> None:
    assert protocol.device_number(protocol.number_of_device(encoded_number)) == encoded_number
