"""The bytes of events and responses: as a real kernel was seen to write them, and back."""

import errno
import fcntl
import os
import re
import struct
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fusehsm.fanotify import abi
from fusehsm.fanotify.abi import (
    DIALECTS,
    LINUX_6_14,
    PATCH_V1,
    PATCH_V2,
    Dialect,
    RawEvent,
    decode_events,
    decode_response,
    deny_errno,
    encode_audit_rule,
    encode_event,
    encode_response,
    event_length,
    mask_names,
    parse_mask,
)
from tests.support.requirements import require

DIALECT = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
PID = 0x1234
HEADER = Path("/usr/include/linux/fanotify.h")

# Metadata of fd 5 and pid 0x1234: length, version, reserved, metadata length, mask, fd, pid. As 6.18 wrote them; records of the other
# dialects follow from the struct in the series, and from the one that programs for its first posting define themselves.
_O = "18000000 03 00 1800 0000010000000000 05000000 34120000"
_A = "18000000 03 00 1800 0000020000000000 05000000 34120000"
_X = "18000000 03 00 1800 0000040000000000 05000000 34120000"
_P = "30000000 03 00 1800 0000100000000000 05000000 34120000"
_P_RANGE = "06 00 1800 00000000 0030120000000000 0020000000000000"
_O_PIDFD = "20000000 03 00 1800 0000010000000000 05000000 34120000 04 00 0800 06000000"
_P_PIDFD = "38000000 03 00 1800 0000100000000000 05000000 34120000 04 00 0800 ffffffff"
_OVERFLOW = "18000000 03 00 1800 0040000000000000 ffffffff 00000000"
_V2_P = "30000000 03 00 1800 0000080000000000 05000000 34120000"
_V1_M = "28000000 03 00 1800 0000100000000000 05000000 34120000"
_V2_RANGE = "06 00 1800 00000000 6400000000000000 0700000000000000"
_V1_RANGE = "06 00 1000 07000000 6400000000000000"


@pytest.mark.parametrize(
    ("dialect", "mask", "fd", "pid", "range_", "pidfd", "text"),
    [
        pytest.param(LINUX_6_14, 0x10000, 5, PID, None, None, _O, id="O"),
        pytest.param(LINUX_6_14, 0x20000, 5, PID, None, None, _A, id="A"),
        pytest.param(LINUX_6_14, 0x40000, 5, PID, None, None, _X, id="X"),
        pytest.param(LINUX_6_14, 0x100000, 5, PID, (0x123000, 0x2000), None, _P + _P_RANGE, id="P"),
        pytest.param(LINUX_6_14, 0x10000, 5, PID, None, 6, _O_PIDFD, id="O-pidfd"),
        pytest.param(LINUX_6_14, 0x100000, 5, PID, (0x123000, 0x2000), -1, _P_PIDFD + _P_RANGE, id="P-pidfd"),
        pytest.param(LINUX_6_14, 0x4000, -1, 0, None, None, _OVERFLOW, id="overflow"),
        pytest.param(PATCH_V2, 0x80000, 5, PID, (100, 7), None, _V2_P + _V2_RANGE, id="v2-PRE_ACCESS"),
        pytest.param(PATCH_V1, 0x100000, 5, PID, (100, 7), None, _V1_M + _V1_RANGE, id="v1-PRE_MODIFY"),
    ],
)
def test_event_bytes(
    dialect: Dialect,
    mask: int,
    fd: int,
    pid: int,
    range_: tuple[int, int] | None,
    pidfd: int | None,
    text: str,
) -> None:
    expected = bytes.fromhex(text)
    assert encode_event(dialect, mask, fd, pid, range_=range_, pidfd=pidfd) == expected
    assert event_length(dialect, has_range=range_ is not None, has_pidfd=pidfd is not None) == len(expected)
    offset, count = range_ or (None, None)
    assert decode_events(dialect, expected) == [RawEvent(mask, fd, pid, offset, count, pidfd, len(expected))]


def test_response_bytes() -> None:
    assert encode_response(5, abi.FAN_ALLOW) == bytes.fromhex("05000000 01000000")
    assert encode_response(5, deny_errno(errno.EIO)) == bytes.fromhex("05000000 02000005")
    assert encode_response(-1, abi.FAN_DENY | abi.FAN_INFO) == bytes.fromhex("ffffffff 22000000")
    assert encode_audit_rule(3, 1, 2) == bytes.fromhex("01 00 1000 03000000 01000000 02000000")


def test_constants_are_those_of_the_kernel_header() -> None:
    require(HEADER.exists(), f"needs {HEADER} (Debian: linux-libc-dev)")
    defined = dict(re.findall(r"^#define\s+(FAN_\w+)\s+\(?(-?\w+)\)?", HEADER.read_text(), re.MULTILINE))
    compared = 0
    for name, text in defined.items():
        if hasattr(abi, name) and re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
            assert getattr(abi, name) == int(text, 0), name
            compared += 1
    assert compared > 50


s32 = st.integers(-(2**31), 2**31 - 1)
u64 = st.integers(0, 2**64 - 1)


@st.composite
def events(draw: st.DrawFn, dialect: Dialect) -> RawEvent:
    has_range = draw(st.booleans())
    pidfd = draw(st.none() | s32)
    offset = draw(u64) if has_range else None
    count = draw(st.integers(0, dialect.range_layout.largest_count)) if has_range else None
    length = event_length(dialect, has_range=has_range, has_pidfd=pidfd is not None)
    return RawEvent(draw(u64), draw(s32), draw(s32), offset, count, pidfd, length)


def encoded(dialect: Dialect, event: RawEvent) -> bytes:
    range_ = None if event.offset is None or event.count is None else (event.offset, event.count)
    return encode_event(dialect, event.mask, event.fd, event.pid, range_=range_, pidfd=event.pidfd)


@DIALECT
@given(data=st.data())
def test_events_round_trip(dialect: Dialect, data: st.DataObject) -> None:
    wanted = data.draw(st.lists(events(dialect), max_size=5))
    buffer = b"".join(encoded(dialect, event) for event in wanted)
    assert decode_events(dialect, buffer) == wanted
    assert decode_events(dialect, memoryview(bytearray(buffer))) == wanted


@DIALECT
@given(data=st.data())
def test_a_buffer_cut_inside_an_event_is_refused(dialect: Dialect, data: st.DataObject) -> None:
    buffer = encoded(dialect, data.draw(events(dialect)))
    cut = data.draw(st.integers(1, len(buffer) - 1))
    with pytest.raises(ValueError):
        decode_events(dialect, buffer[:cut])


@DIALECT
@given(buffer=st.binary(max_size=100))
@example(buffer=b"")
def test_any_bytes_are_decoded_whole_or_refused(dialect: Dialect, buffer: bytes) -> None:
    try:
        decoded = decode_events(dialect, buffer)
    except ValueError:
        return
    assert sum(event.length for event in decoded) == len(buffer)


@given(fd=s32, response=st.integers(0, 2**32 - 1))
def test_responses_round_trip(fd: int, response: int) -> None:
    assert decode_response(encode_response(fd, response)) == (fd, response)


def _with(data: bytes, place: int, layout: str, value: int) -> bytes:
    changed = bytearray(data)
    struct.pack_into(layout, changed, place, value)
    return bytes(changed)


_GOOD = encode_event(LINUX_6_14, 0x100000, 5, PID, range_=(0, 4096), pidfd=6)


@pytest.mark.parametrize(
    ("buffer", "complaint"),
    [
        pytest.param(_with(_GOOD, 4, "=B", 2), "metadata version 2", id="version"),
        pytest.param(_with(_GOOD, 0, "=I", 57), "length 57", id="longer-than-the-buffer"),
        pytest.param(_with(_GOOD, 0, "=I", 23), "length 23", id="shorter-than-its-metadata"),
        pytest.param(_with(_GOOD, 0, "=I", 0), "length 0", id="no-length"),
        pytest.param(_with(_GOOD, 6, "=H", 23), "metadata 23", id="short-metadata"),
        pytest.param(_with(_GOOD, 6, "=H", 60), "metadata 60", id="long-metadata"),
        pytest.param(_with(_GOOD, 26, "=H", 3), "byte 24: length 3", id="short-record"),
        pytest.param(_with(_GOOD, 26, "=H", 100), "byte 24: length 100", id="long-record"),
        pytest.param(_with(_GOOD, 26, "=H", 12), "pidfd record", id="pidfd-record-length"),
        pytest.param(_with(_GOOD, 34, "=H", 16), "range record", id="range-record-length"),
        pytest.param(_GOOD[:55], "byte 0", id="cut"),
        pytest.param(_GOOD + b"\0" * 5, "5 bytes left", id="tail"),
        pytest.param(_with(_GOOD, 0, "=I", 26)[:26], "cut short", id="record-header-cut"),
    ],
)
def test_rubbish_is_named(buffer: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decode_events(LINUX_6_14, buffer)


def test_a_narrow_range_record_is_refused_by_a_dialect_with_wide_ones() -> None:
    with pytest.raises(ValueError, match="patch-v2 has 24"):
        decode_events(PATCH_V2, encode_event(PATCH_V1, 0x80000, 5, PID, range_=(0, 1)))


def test_unknown_info_records_are_passed_over() -> None:
    known = encode_event(LINUX_6_14, 0x100000, 5, PID, range_=(4096, 8192))
    buffer = known[:24] + bytes.fromhex("63 00 0800 deadbeef") + known[24:]
    buffer = _with(buffer, 0, "=I", len(buffer))
    assert decode_events(LINUX_6_14, buffer) == [RawEvent(0x100000, 5, PID, 4096, 8192, None, 56)]


def test_longer_metadata_is_passed_over() -> None:
    known = encode_event(LINUX_6_14, 0x100000, 5, PID, range_=(4096, 8192))
    buffer = _with(_with(known[:24] + bytes(8) + known[24:], 0, "=I", 56), 6, "=H", 32)
    assert decode_events(LINUX_6_14, buffer) == [RawEvent(0x100000, 5, PID, 4096, 8192, None, 56)]


def test_a_count_too_large_for_a_narrow_record_becomes_its_largest() -> None:
    (event,) = decode_events(PATCH_V1, encode_event(PATCH_V1, 0x80000, 5, PID, range_=(0, 2**32 + 5)))
    assert event.count == 2**32 - 1


@pytest.mark.parametrize(
    ("dialect", "pre_access", "pre_modify", "record", "permission"),
    [
        (LINUX_6_14, 0x100000, 0, 24, 0x170000),
        (PATCH_V2, 0x80000, 0x100000, 24, 0x1F0000),
        (PATCH_V1, 0x80000, 0x100000, 16, 0x1F0000),
    ],
)
def test_dialects(dialect: Dialect, pre_access: int, pre_modify: int, record: int, permission: int) -> None:
    assert (dialect.pre_access, dialect.pre_modify) == (pre_access, pre_modify)
    assert dialect.pre_content == pre_access | pre_modify
    assert dialect.write_bit == (pre_modify or pre_access)
    assert dialect.permission == permission
    assert dialect.range_layout.length == record
    assert dialect.deny_errnos == {1, 5, 11, 16, 26, 28, 122}
    assert DIALECTS[dialect.name] is dialect


@pytest.mark.parametrize(
    ("dialect", "names", "mask"),
    [
        (LINUX_6_14, [], 0),
        (LINUX_6_14, ["PRE_ACCESS"], 0x100000),
        (LINUX_6_14, ["fan_pre_access", " open_perm "], 0x110000),
        (PATCH_V2, ["PRE_ACCESS", "PRE_MODIFY"], 0x180000),
        (PATCH_V1, ["PRE_MODIFY", "ONDIR", "EVENT_ON_CHILD"], 0x48100000),
        (LINUX_6_14, ["CLOSE", "OPEN"], 0x38),
    ],
)
def test_parse_mask(dialect: Dialect, names: list[str], mask: int) -> None:
    assert parse_mask(names, dialect) == mask


@pytest.mark.parametrize(
    ("dialect", "name"), [(LINUX_6_14, "PRE_MODIFY"), (PATCH_V2, "FAN_"), (PATCH_V1, "PREACCESS")]
)
def test_an_unknown_mask_name_is_named_with_those_that_exist(dialect: Dialect, name: str) -> None:
    with pytest.raises(
        ValueError, match=rf"mask name '{name}': {dialect.name} has no such event; it has .*PRE_ACCESS"
    ):
        parse_mask(["OPEN_PERM", name], dialect)


@DIALECT
@given(data=st.data())
def test_mask_names_round_trip(dialect: Dialect, data: st.DataObject) -> None:
    every = mask_names(0xFFFF_FFFF, dialect)
    chosen = data.draw(st.sets(st.sampled_from([name for name in every if not name.startswith("0x")])))
    assert set(mask_names(parse_mask(chosen, dialect), dialect)) == chosen


def test_mask_names_gives_unnamed_bits_as_numbers_and_lowest_first() -> None:
    assert mask_names(0x48190000, LINUX_6_14) == [
        "OPEN_PERM",
        "0x80000",
        "PRE_ACCESS",
        "EVENT_ON_CHILD",
        "ONDIR",
    ]
    assert mask_names(0x190000, PATCH_V2) == ["OPEN_PERM", "PRE_ACCESS", "PRE_MODIFY"]
    assert mask_names(0, LINUX_6_14) == []


def test_the_flag_that_the_kernel_gives_every_open_file_of_a_64_bit_program(tmp_path: Path) -> None:
    # arm64 has another one than x86-64, whose value is O_NOFOLLOW there.
    descriptor = os.open(tmp_path, os.O_RDONLY)
    try:
        assert fcntl.fcntl(descriptor, fcntl.F_GETFL) & ~os.O_ACCMODE == abi.O_LARGEFILE
    finally:
        os.close(descriptor)
