"""Commands that ask a fetch: whose they ask, and what they make of any answer."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fusehsm import cli
from fusehsm.control.socket import listening_as
from fusehsm.tier.fetch.protocol import socket_name
from tests.support.harness import fusehsm
from tests.support.requirements import require_fuse, require_root
from tests.support.tier.others import MALLORY, answering, listening_for, silent_mount
from tests.support.tier.populated import plant

pytestmark = pytest.mark.any_engine

_ITEM = {
    "path": "f", "size": 10, "resident": 5, "disk": 4096, "stub": True, "modified": False, "pinned": False, "used_ns": 1,
}  # fmt: skip
_KEPT = dict.fromkeys(("modified", "pinned", "in_use", "recent", "failed"), 0)
_ESCAPES = "\x1b[2J\x1b]0;owned\x07\u202e\n"


def _right(request: bytes) -> Iterator[dict[str, Any]]:
    match json.loads(request)["request"]:
        case "list":
            yield {"lines": [_ITEM]}
            yield {"result": {}}
        case "pin":
            yield {"result": {"changed": 3}}
        case _:
            yield {"result": {"evicted": 1, "freed": 10, **_KEPT}}


def _line(**fields: Any) -> bytes:
    return json.dumps({"lines": [{**_ITEM, **fields}]}).encode()


SENSELESS = {
    "no JSON": b"\xff",
    "a list": b"[1]",
    "nothing in it": b"{}",
    "no lines": b'{"lines": []}',
    "lines that are none": b'{"lines": 5}',
    "lines of numbers": b'{"lines": [1]}',
    "a line without fields": b'{"lines": [{}]}',
    "a size of words": _line(size="x"),
    "a size that is true": _line(size=True),
    "a size of 65 bits": _line(size=1 << 64),
    "a size of 5000 digits": b'{"lines": [{"size": ' + b"9" * 5000 + b"}]}",
    "a path of numbers": _line(path=1),
    "a result of numbers": b'{"result": 5}',
    "an errno of words": b'{"errno": "x", "message": 1}',
    "an errno of 200": b'{"errno": ' + b"9" * 200 + b', "message": "x"}',
    "an errno below 0": b'{"errno": -5, "message": "x"}',
    "nested too deep": b"[" * 60_000,
    "its end": b"",
}


@pytest.fixture
def tree(places: Callable[[str], Path]) -> Path:
    root = places("asked")
    (root / "f").write_bytes(b"x")
    return root


@pytest.mark.parametrize("answer", SENSELESS)
def test_what_makes_no_sense_is_one_line(tree: Path, capfd: pytest.CaptureFixture[str], answer: str) -> None:
    commands = (["status"], ["status", "--json"], ["evict"], ["pin"], ["unpin"])
    # An empty message cannot be told from the end of the connection.
    with (
        listening_as(socket_name(str(tree))) as listener,
        answering(listener, lambda request: [SENSELESS[answer]] if SENSELESS[answer] else []) as asked,
    ):
        for command in commands:
            assert cli.main([*command, str(tree)]) == 1
            (line,) = capfd.readouterr().err.splitlines()
            assert line.startswith(f"fusehsm: {tree}: ")
            assert "its fetch" in line
        assert len(asked) == len(commands)


def test_right_answers_are_told(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        listening_as(socket_name(str(tree))) as listener,
        answering(listener, lambda request: (json.dumps(part).encode() for part in _right(request))),
    ):
        assert cli.main(["status", str(tree)]) == 0
        assert "1 files of 10 B, 5 B here (50 %); 1 from the store" in capfd.readouterr().out
        assert cli.main(["status", "--json", str(tree)]) == 0
        assert json.loads(capfd.readouterr().out)["files"] == [_ITEM]
        assert cli.main(["pin", str(tree)]) == 0
        assert capfd.readouterr().out == "pinned 3 files\n"
        assert cli.main(["evict", str(tree)]) == 0
        assert capfd.readouterr().out == "evicted 1 files, 10 B freed\n"


def test_what_an_answer_says_is_escaped(tree: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def answer(request: bytes) -> Iterator[bytes]:
        if json.loads(request)["request"] == "list":
            yield _line(path=_ESCAPES)
        else:
            yield json.dumps({"lines": [{"path": _ESCAPES, "why": _ESCAPES}]}).encode()
        yield json.dumps({"errno": 5, "message": _ESCAPES}).encode()

    with listening_as(socket_name(str(tree))) as listener, answering(listener, answer):
        for command in ("status", "evict", "pin"):
            assert cli.main([command, str(tree)]) == 1
            said = "".join(capfd.readouterr())
            assert "owned" in said
            assert not {letter for letter in said if not letter.isprintable()} - {"\n"}


def test_root_asks_only_its_own_fetch_unless_told(tree: Path) -> None:
    require_root()
    os.chown(tree, MALLORY, MALLORY)

    def answer(request: bytes) -> Iterator[bytes]:
        return (json.dumps(part).encode() for part in _right(request))

    with listening_for(MALLORY, socket_name(str(tree))) as listener, answering(listener, answer) as asked:
        for command in ("evict", "pin", "unpin"):
            done = fusehsm(command, tree)
            assert (done.returncode, done.stdout) == (1, "")
            assert "or ask another user's with --user" in done.stderr
        assert fusehsm("status", tree).returncode == 1
        assert asked == []
        for user in ("--user", str(MALLORY)), ("--user", "nobody-of-that-name"):
            done = fusehsm("pin", *user, tree)
            expected = (0, "pinned 3 files\n") if user[1] == str(MALLORY) else (2, "")
            assert (done.returncode, done.stdout) == expected
        assert len(asked) == 1


@pytest.mark.parametrize("way", ["itself", "by a link"])
def test_commands_do_not_wait_for_another_users_mount(tree: Path, target: Path, way: str) -> None:
    require_root()
    require_fuse()
    (tree / "point").mkdir()
    path = tree / "point" / "f"
    if way == "by a link":
        (tree / "link").symlink_to("point/f")
        path = tree / "link" / "x"
    with silent_mount(MALLORY, tree / "point"):
        for command in ("status", "evict", "pin", "umount"):
            done = fusehsm(command, path)
            assert done.returncode == 1
            assert len(done.stderr.splitlines()) == 1


def test_the_status_of_a_tree_leaves_another_users_mount_out(source: Path, target: Path) -> None:
    require_root()
    require_fuse()
    plant(source, target)
    with silent_mount(MALLORY, target / "sub"):
        done = fusehsm("status", target)
    assert done.returncode == 0
    assert f"is a mount of user {MALLORY}, which is not entered; it is left out" in done.stderr
    assert "a file" in done.stdout
