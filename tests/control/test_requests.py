"""Requests as JSON: what each of the two servers takes, and that it refuses everything else in words."""

import json
from typing import Any

import pytest

from fusehsm.control import protocol
from fusehsm.tier.fetch import protocol as fetch


@pytest.mark.parametrize(
    "request_",
    [
        protocol.Hello(1, 2, 3, None),
        protocol.Hello(1, 2, 3, "patch-v2"),
        protocol.MarkRequest(1, (1 << 64) - 1, 8, 1, None),
        protocol.Reader(1234, 567_890),
        protocol.Status(),
        protocol.LeaseStatus(),
        protocol.Map(0, 1, 2, 3, 4, 5, 6, 1),
    ],
)
def test_requests_of_a_mount(request_: protocol.Request) -> None:
    assert protocol.decode_request(protocol.encode_request(request_)) == request_


@pytest.mark.parametrize(
    "request_",
    [
        fetch.Evict("a/b"),
        fetch.Evict("", 0.5, 1 << 62),
        fetch.Evict("", 7, 0),
        fetch.List(""),
        fetch.Pin("x", True),
    ],
)
def test_requests_of_a_fetch(request_: fetch.Request) -> None:
    assert fetch.decode_request(fetch.encode_request(request_)) == request_


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"request": "evict", "path": 1, "older_than": None, "free": None}, "path: bad value"),
        ({"request": "evict", "path": None, "older_than": None, "free": None}, "path: bad value"),
        ({"request": "evict", "path": "", "older_than": -0.5, "free": None}, "older_than: bad value"),
        ({"request": "evict", "path": "", "older_than": float("nan"), "free": None}, "older_than: bad value"),
        ({"request": "evict", "path": "", "older_than": float("inf"), "free": None}, "older_than: bad value"),
        ({"request": "evict", "path": "", "older_than": True, "free": None}, "older_than: bad value"),
        ({"request": "evict", "path": "", "older_than": None, "free": 1.5}, "free: bad value"),
        ({"request": "evict", "path": "", "older_than": None, "free": (1 << 62) + 1}, "free: bad value"),
        ({"request": "evict", "path": ""}, "evict: its fields are path, older_than, free"),
        ({"request": "pin", "path": "", "pinned": 1}, "pinned: bad value"),
        ({"request": "list", "path": "", "more": 1}, "list: its fields are path"),
        ({"request": "mark"}, "unknown request 'mark'; this fetch knows evict, list, pin"),
        ({"request": None}, "unknown request 'None'; this fetch knows evict, list, pin"),
        (["evict"], "the request is not a JSON object"),
    ],
)
def test_other_requests_are_refused_in_words(fields: Any, why: str) -> None:
    with pytest.raises(ValueError) as refused:
        fetch.decode_request(json.dumps(fields).encode())
    assert str(refused.value) == why


@pytest.mark.parametrize("kind", ["mark", "mark-backing", "drop", "lease", "map"])
@pytest.mark.parametrize(("field", "largest"), [("major", 0xFFF), ("minor", 0xFFFFF)])
def test_device_numbers_are_of_the_kernels_size(kind: str, field: str, largest: int) -> None:
    """Before any of them is used: os.makedev() has errors of its own."""
    kinds: dict[str, protocol.Request] = {
        "mark": protocol.MarkRequest(1, 2, 3, 4, 5),
        "mark-backing": protocol.MarkBacking(1, 2, 3, 4, 5, None),
        "drop": protocol.Drop(3, 4, 5),
        "lease": protocol.Lease(3, 4, 5),
        "map": protocol.Map(3, 4, 5, 0, 1, 2, 3, 0),
    }
    fields = json.loads(protocol.encode_request(kinds[kind]))
    assert getattr(protocol.decode_request(json.dumps({**fields, field: largest}).encode()), field) == largest
    for number in (largest + 1, 1 << 31, 1 << 32, (1 << 64) - 1):
        with pytest.raises(ValueError, match=f"{field}: bad value"):
            protocol.decode_request(json.dumps({**fields, field: number}).encode())


@pytest.mark.parametrize("data", [b"", b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused_in_words(data: bytes) -> None:
    for decode in (protocol.decode_request, fetch.decode_request):
        with pytest.raises(ValueError) as refused:
            decode(data)
        assert str(refused.value) == "the request is not JSON"
