"""s3://: what is particular about buckets, and what goes wrong with them and on the way to them."""

import itertools
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec.config
import pytest

from fusehsm.tier.stores.base import Entry, Kind, Store, StoreChanged, StoreError
from fusehsm.tier.stores.open import open_store
from fusehsm.tier.stores.s3 import AHEAD
from tests.support.harness import PATIENCE, fusehsm
from tests.support.tier.relay import relay
from tests.support.tier.s3_server import S3
from tests.support.tier.trees import (
    Telling,
    changes_since,
    content_of,
    describe,
    expect_stubs,
    make_small_tree,
)

pytestmark = pytest.mark.any_engine

LARGE = 16 << 20  # bytes; more than what lies in sockets' buffers when somebody stops reading


def complaints_of(store: Store) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tree by path, and what was complained of."""
    errors: list[StoreError] = []
    entries = {entry.path: entry for entry in store.tree(errors.append)}
    return entries, {str(error.filename): str(error.strerror) for error in errors}


# What is listed


def test_more_keys_than_a_list_has_at_a_time(s3: S3, s3_prefix: str) -> None:
    """The server has at most 100 in one answer (s3_server.py)."""
    names = [f"{number:04}" for number in range(90)] + [f"{number:04}/x" for number in range(90, 101)]
    s3.put_many("tests", {f"{s3_prefix}/{name}": name.encode() for name in names})
    with open_store(f"s3://tests/{s3_prefix}") as store:
        entries = list(store.tree())
        paths = [entry.path for entry in entries]
        assert [entry.path for entry in entries if entry.kind is Kind.FILE] == names
        assert paths == sorted(paths, key=lambda path: path.encode().split(b"/"))
        assert len(paths) == 101 + 11


def test_a_whole_bucket(s3: S3, tmp_path: Path) -> None:
    url = s3.make_bucket("whole")
    with open_store(url) as store:
        assert list(store.tree()) == []
    make_small_tree(tmp_path)
    s3.upload(tmp_path, "whole")
    with open_store(url + "/") as store:
        entries = {entry.path: entry for entry in store.tree()}
        assert list(entries) == [
            "a file",
            "empty",
            "hollow",
            "sub",
            "sub/b#?%&.bin",
            "sub/deep",
            "sub/deep/http-like:name@2x",
            "sub/sp\u00e4t",
        ]
        assert abs((entries["empty"].mtime_ns or 0) / 1e9 - time.time()) < 60


def test_lists_are_asked_for_ahead_of_their_turn(
    s3: S3, s3_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"{above}/{below}/{file}" for above in range(20) for below in range(2) for file in range(2)]
    s3.put_many("tests", {f"{s3_prefix}/{name}": b"x" for name in names})
    # The root's list and one of those below it come over the first connection; for the others new ones must be made, all at the same time.
    all_asked, connections = threading.Barrier(AHEAD - 1, timeout=20), itertools.count()

    def hold(so_far: int) -> None:
        if so_far == 0 and 1 <= next(connections) < AHEAD:
            all_asked.wait()

    with relay(s3.endpoint) as line:
        line.on_answer = hold
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        with open_store(f"s3://tests/{s3_prefix}") as store:
            paths = [entry.path for entry in store.tree()]
            assert next(connections) >= AHEAD
            assert [path for path in paths if path.count("/") == 2] == sorted(
                names, key=lambda name: name.split("/")
            )
            # Who stops in the middle leaves nothing behind that would answer another walk.
            stopped = store.tree()
            next(stopped)
            assert isinstance(stopped, Generator)
            stopped.close()
            s3.put("tests", f"{s3_prefix}/0/new", b"x")
            assert "0/new" in [entry.path for entry in store.tree()]


def test_keys_that_are_no_paths(s3: S3, s3_prefix: str) -> None:
    impossible = "is a key that no file can have as its path, so "
    keys = [
        "fine",
        "up/../x",
        "up/x",
        "dot/./x",
        "two//x",
        "two/x",
        "/first",
        "marker/",
        "end//",
        "both",
        "both/x",
    ]
    s3.put_many("tests", {f"{s3_prefix}/{key}": key.encode() for key in keys})
    with open_store(f"s3://tests/{s3_prefix}") as store:
        entries, complaints = complaints_of(store)
        assert list(entries) == [
            "both",
            "both/x",
            "dot",
            "end",
            "fine",
            "marker",
            "two",
            "two/x",
            "up",
            "up/x",
        ]
        assert complaints == {
            "up/../": impossible + "what lies below it is left out; rename it",
            "dot/./": impossible + "what lies below it is left out; rename it",
            "two//": impossible + "what lies below it is left out; rename it",
            "end//": impossible + "what lies below it is left out; rename it",
            "/": impossible + "what lies below it is left out; rename it",
            "marker/": impossible + "its content is left out; rename it",
            "both": "is an object and a directory of others; the object is left out; rename one of them",
        }
        # They can be read all the same, each for itself: nobody on the way makes another key of them.
        for key in keys:
            assert store.read(key, 0, 100, store.version(key)) == key.encode()


def test_names_with_all_kinds_of_characters(s3: S3, s3_prefix: str) -> None:
    names = ["a b", "q?x=1", "h#x", "100%25", "%2e%2e", "<&\"'>", "semi;colon", "\u00e4", "a:b", "~+,=@", "\\", "\U0001f600", "\x01\n"]  # fmt: skip
    s3.put_many("tests", {f"{s3_prefix}/{name}/{name}": name.encode() for name in names})
    with open_store(f"s3://tests/{s3_prefix}") as store:
        files = {entry.path: entry for entry in store.tree() if entry.kind is Kind.FILE}
        assert set(files) == {f"{name}/{name}" for name in names}
        for path, entry in files.items():
            assert entry.version == store.version(path)
            assert store.read(path, 0, 100, entry.version or "") == path.split("/")[0].encode()


def test_a_name_that_no_key_can_have(s3: S3) -> None:
    with open_store("s3://tests") as store, pytest.raises(OSError):
        store.version(os.fsdecode(b"\xff"))


# What is read


def test_an_object_of_several_parts(s3: S3, s3_prefix: str) -> None:
    content = content_of((10 << 20) + 1000)
    s3.put_parts(
        "tests", f"{s3_prefix}/file", [content[: 5 << 20], content[5 << 20 : 10 << 20], content[10 << 20 :]]
    )
    with open_store(f"s3://tests/{s3_prefix}") as store:
        (entry,) = store.tree()
        assert (entry.size, entry.version) == (len(content), store.version("file"))
        assert "-3" in (entry.version or "")
        for offset, length in [((5 << 20) - 7, 20), ((10 << 20) - 1, 5000), (1, 9 << 20), (len(content), 1)]:
            assert (
                store.read("file", offset, length, entry.version or "") == content[offset : offset + length]
            )


def test_the_same_content_again_is_the_same_version(s3: S3, s3_prefix: str) -> None:
    with open_store(f"s3://tests/{s3_prefix}") as store:
        s3.put("tests", f"{s3_prefix}/file", b"content")
        version = store.version("file")
        s3.put("tests", f"{s3_prefix}/file", b"content")
        assert store.read("file", 3, 9, version) == b"tent"
        # Beyond the end, where servers tell no version by themselves.
        assert store.read("file", 7, 9, version) == b""
        s3.put("tests", f"{s3_prefix}/file", b"con")
        with pytest.raises(StoreChanged):
            store.read("file", 7, 9, version)


def test_a_range_of_a_version_that_is_known_when_it_is_seen(s3: S3, s3_prefix: str) -> None:
    """One request, and none for the body of another version."""
    s3.put("tests", f"{s3_prefix}/file", b"0123456789")
    s3.put("tests", f"{s3_prefix}/large", bytes(LARGE))
    with relay(s3.endpoint) as line, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        with open_store(f"s3://tests/{s3_prefix}") as store:
            version = store.version("file")
            line.asked.clear()
            assert store.read_if("file", 3, 4, lambda now: now == version) == (version, b"3456")
            assert store.read_if("file", 8, 100, lambda now: True) == (version, b"89")
            assert len(line.asked) == 2
            assert store.read_if("file", 10, 100, lambda now: True) == (version, b"")
            received = line.received
            with pytest.raises(StoreChanged):
                store.read_if("large", 0, LARGE, lambda now: now == version)
            assert line.received - received < LARGE
            with pytest.raises(StoreChanged):
                store.read_if("file", 10, 100, lambda now: False)
            with pytest.raises(FileNotFoundError):
                store.read_if("nothing", 0, 1, lambda now: True)


def test_an_object_that_is_replaced_while_it_is_read(s3: S3, s3_prefix: str) -> None:
    """The answer is on its way when it happens: it is of the old version to its end, or an error."""
    old, new = b"o" * LARGE, b"n" * LARGE
    s3.put("tests", f"{s3_prefix}/file", old)
    replaced, began = threading.Event(), threading.Event()

    def hold(so_far: int) -> None:
        if so_far > 1 << 20:
            began.set()
            assert replaced.wait(PATIENCE)

    with relay(s3.endpoint) as line:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AWS_ENDPOINT_URL", line.endpoint)
            store = open_store(f"s3://tests/{s3_prefix}")
            version = store.version("file")
        line.on_answer = hold
        with store, ThreadPoolExecutor(1) as threads:
            reading = threads.submit(store.read, "file", 0, LARGE, version)
            assert began.wait(PATIENCE)
            s3.put("tests", f"{s3_prefix}/file", new)
            replaced.set()
            assert reading.result() == old
            with pytest.raises(StoreChanged):
                store.read("file", 0, LARGE, version)


def test_a_writer_beside_readers_never_makes_mixed_content(s3: S3, s3_prefix: str) -> None:
    """Objects of one letter each."""
    key, size = f"{s3_prefix}/file", 1 << 20
    ended = threading.Event()

    def write() -> None:
        for letter in b"bcdefghijklm":
            s3.put("tests", key, bytes([letter]) * size)
        ended.set()

    def read() -> int:
        changes = 0
        version = store.version("file")
        while not ended.is_set():
            try:
                data = store.read("file", 0, size, version)
                assert len(data) == size
                assert len(set(data)) == 1
            except StoreChanged:
                changes += 1
                version = store.version("file")
        return changes

    s3.put("tests", key, b"a" * size)
    with open_store(f"s3://tests/{s3_prefix}") as store, ThreadPoolExecutor(4) as threads:
        readers = [threads.submit(read) for _ in range(3)]
        threads.submit(write).result()
        assert all(reader.result() for reader in readers)


@pytest.mark.parametrize("at_once", [1, 40])
def test_ranges_are_fetched_at_the_same_time(
    s3: S3, s3_prefix: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No answer comes before all have been asked for."""
    content = content_of(100_000)
    s3.put("tests", f"{s3_prefix}/file", content)
    with relay(s3.endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        with open_store(f"s3://tests/{s3_prefix}") as store, ThreadPoolExecutor(at_once) as threads:
            version = store.version("file")
            all_asked = threading.Barrier(at_once, timeout=20)

            def wait_for_all(so_far: int) -> None:
                all_asked.wait()

            line.on_answer = wait_for_all
            asked = [
                threads.submit(store.read, "file", 1000 * number, 500, version) for number in range(at_once)
            ]
            for number, range_ in enumerate(asked):
                assert range_.result() == content[1000 * number : 1000 * number + 500]


# What goes wrong


WRONG = [
    ("s3://none-such/x", {}, "there is no bucket none-such; see that its name and AWS_ENDPOINT_URL are right"),
    ("s3://tests", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "the secret key is not the access key's; set AWS_ACCESS_KEY_ID and"),
    ("s3://tests", {"AWS_ACCESS_KEY_ID": "tests:nobody"}, "key; set AWS_ACCESS_KEY_ID and|key's; set AWS_ACCESS_KEY_ID and"),
    ("s3://tests", {"AWS_ACCESS_KEY_ID": "tests:stranger"}, "access is denied; the credentials need s3:ListBucket"),
    ("s3://tests", {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "http://127.0.0.1:1 cannot be reached; see that AWS_ENDPOINT_URL is right"),
    ("s3://tests", {"AWS_ENDPOINT_URL": "nonsense"}, "Invalid endpoint: nonsense"),
    ("s3://tests", {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true"}, "no credentials are set; set"),
    ("s3://BAD_bucket", {}, "the server answered InvalidBucketName"),
    ("s3://tests/none/at/all", {}, "is not in s3://tests/none/at/all"),
]  # fmt: skip


@pytest.mark.parametrize(("url", "environment", "message"), WRONG)
def test_what_cannot_be_listed(
    s3: S3, monkeypatch: pytest.MonkeyPatch, url: str, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    with open_store(url) as store, pytest.raises(OSError, match=message) as caught:
        list(store.tree())
    assert s3.secret_key not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 15


def test_a_single_object_is_no_tree(s3: S3, s3_prefix: str) -> None:
    s3.put("tests", f"{s3_prefix}/file", b"x")
    with (
        open_store(f"s3://tests/{s3_prefix}/file") as store,
        pytest.raises(StoreError, match="single object"),
    ):
        list(store.tree())


def test_credentials_that_may_list_no_more(s3: S3, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.put("tests", f"{s3_prefix}/file", b"x")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tests:stranger")
    with open_store(f"s3://tests/{s3_prefix}") as store:
        with pytest.raises(StoreError, match="cannot be looked up: access is denied"):
            store.version("file")
        with pytest.raises(StoreError, match="cannot be read: access is denied"):
            store.read("file", 0, 1, 'etag "x"')


def test_a_server_that_never_answers(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {"config_kwargs": {"read_timeout": 0.3}})
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        began = time.monotonic()
        with (
            open_store("s3://tests") as store,
            pytest.raises(StoreError, match="does not answer; see that it is up"),
        ):
            store.read("x", 0, 1, 'etag "x"')
    assert time.monotonic() - began < 30


def test_a_server_that_is_killed(s3: S3, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of an answer."""
    s3.put("tests", f"{s3_prefix}/file", content_of(LARGE))
    killed, began = threading.Event(), threading.Event()

    def hold(so_far: int) -> None:
        if so_far > 1 << 20:
            began.set()
            assert killed.wait(PATIENCE)

    with s3.another_door() as (door, process), relay(door.endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        with open_store(f"s3://tests/{s3_prefix}") as store, ThreadPoolExecutor(1) as threads:
            version = store.version("file")
            line.on_answer = hold
            reading = threads.submit(store.read, "file", 0, LARGE, version)
            assert began.wait(PATIENCE)
            os.kill(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)
            killed.set()
            with pytest.raises(StoreError, match="cannot be read: ") as caught:
                reading.result()
            assert not isinstance(caught.value, StoreChanged)


def test_connections_that_break(s3: S3, s3_prefix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = content_of(LARGE)
    s3.put("tests", f"{s3_prefix}/file", content)
    breaks = [True, True]

    def cut(so_far: int) -> None:
        if so_far > 1 << 20 and breaks:
            breaks.pop()
            raise ConnectionError

    with relay(s3.endpoint) as line:
        monkeypatch.setenv("AWS_ENDPOINT_URL", line.endpoint)
        with open_store(f"s3://tests/{s3_prefix}") as store:
            version = store.version("file")
            line.on_answer = cut
            assert store.read("file", 0, LARGE, version) == content
            assert not breaks
            breaks += [True] * 100
            with pytest.raises(StoreError, match="the connection broke 3 times"):
                store.read("file", 0, LARGE, version)
            assert len(breaks) > 90


# The command


def test_populate_from_a_bucket(s3: S3, s3_prefix: str, target: Path, tmp_path: Path) -> None:
    make_small_tree(tmp_path)
    s3.upload(tmp_path, "tests", s3_prefix)
    url = f"s3://tests/{s3_prefix}"
    done = fusehsm("populate", url, target)
    assert (done.returncode, done.stderr) == (0, "")
    telling = Telling(modes=False, owners=False, times=0, directory_times=False)
    assert describe(target, telling) == describe(tmp_path, telling)
    expect_stubs(target)
    assert abs((target / "a file").stat().st_mtime - time.time()) < 60
    before = changes_since(target)
    assert "8 right" in fusehsm("populate", url, target).stdout
    assert changes_since(target) == before
    s3.put("tests", f"{s3_prefix}/a file", b"other")
    assert "1 updated, 7 right" in fusehsm("populate", url, target).stdout
    assert (target / "a file").stat().st_size == 5


def from_a_profile(s3: S3, place: Path) -> dict[str, str]:
    (place / "config").write_text(f"[profile us]\nendpoint_url = {s3.endpoint}\nregion = us-east-1\n")
    (place / "credentials").write_text(
        f"[us]\naws_access_key_id = {s3.access_key}\naws_secret_access_key = {s3.secret_key}\n"
    )
    return {
        "AWS_CONFIG_FILE": str(place / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(place / "credentials"),
        "AWS_PROFILE": "us",
    }


def from_variables_of_fsspec(s3: S3, place: Path) -> dict[str, str]:
    return {
        "FSSPEC_S3_ENDPOINT_URL": s3.endpoint,
        "FSSPEC_S3_KEY": s3.access_key,
        "FSSPEC_S3_SECRET": s3.secret_key,
    }


def from_one_variable_of_fsspec(s3: S3, place: Path) -> dict[str, str]:
    said = {"endpoint_url": s3.endpoint, "key": s3.access_key, "secret": s3.secret_key}
    return {"FSSPEC_S3": json.dumps({**said, "config_kwargs": {"read_timeout": 5}})}


@pytest.mark.parametrize(
    "environment_of", [from_a_profile, from_variables_of_fsspec, from_one_variable_of_fsspec]
)
def test_other_ways_to_say_where_and_who(
    s3: S3,
    s3_prefix: str,
    target: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment_of: Callable[[S3, Path], dict[str, str]],
) -> None:
    s3.put("tests", f"{s3_prefix}/file", b"content")
    for name in s3.environment:
        monkeypatch.delenv(name)
    done = fusehsm("populate", f"s3://tests/{s3_prefix}", target, env=environment_of(s3, tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert (target / "file").stat().st_size == 7


def test_failures_of_populate_are_one_line(s3: S3, s3_prefix: str, target: Path) -> None:
    done = fusehsm("populate", "s3://none-such/x", target)
    assert (done.returncode, done.stderr) == (
        1,
        "fusehsm: s3://none-such/x: cannot be listed: there is no bucket none-such; see that its name and AWS_ENDPOINT_URL are right\n",
    )
    s3.put_many("tests", {f"{s3_prefix}/{key}": b"x" for key in ("../up", "fine", "//etc")})
    done = fusehsm("populate", f"s3://tests/{s3_prefix}", target)
    why = "is a key that no file can have as its path, so what lies below it is left out; rename it"
    assert (done.returncode, sorted(done.stderr.splitlines())) == (
        1,
        [f"fusehsm: /: {why}", f"fusehsm: {target}/../: {why}"],
    )
    assert [path.name for path in target.iterdir()] == ["fine"]
