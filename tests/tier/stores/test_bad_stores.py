"""Stores that cannot be opened, that answer with nonsense, or that hold names which no file can have."""

import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusehsm.tier.stores.base import StoreChanged, StoreError
from fusehsm.tier.stores.http import HttpStore
from fusehsm.tier.stores.open import open_store
from tests.support.tier.servers import Served
from tests.support.tier.trees import content_of

# What goes wrong


def test_an_unknown_host_key_is_not_trusted(
    sshd: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="accept its key"):
        open_store(sshd.url)


def test_a_host_that_does_not_let_us_in(
    sshd: Served, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / ".ssh"
    home.mkdir()
    known = Path(os.environ["HOME"], ".ssh", "known_hosts").read_text()
    (home / "known_hosts").write_text(known)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StoreError, match="ssh-copy-id"):
        open_store(sshd.url)


def test_a_connection_that_was_lost_is_made_again(sshd: Served) -> None:
    there = sshd.place(f"lost-{os.urandom(4).hex()}")
    (there.directory / "file").write_bytes(b"content")
    with open_store(there.url) as store:
        version = store.version("file")
        store._filesystem.client.close()  # type: ignore[attr-defined]
        assert store.read("file", 0, 7, version) == b"content"


@pytest.fixture
def http_root(nginx: Served) -> Iterator[HttpStore]:
    store = open_store(nginx.url)
    assert isinstance(store, HttpStore)
    with store:
        yield store


def test_a_server_that_answers_with_another_range(http_root: HttpStore) -> None:
    assert http_root.read("lying/x", 0, 4, 'etag "lie"') == b"zero"
    with pytest.raises(StoreError, match="another range: bytes 0-3/8"):
        http_root.read("lying/x", 2, 2, 'etag "lie"')
    with pytest.raises(StoreError, match="a part of the range"):
        http_root.read("lying/x", 0, 6, 'etag "lie"')
    with pytest.raises(StoreChanged):
        http_root.read("lying/x", 0, 4, 'etag "truth"')


def test_a_server_that_is_out_of_order(http_root: HttpStore) -> None:
    with pytest.raises(StoreError, match="503"):
        http_root.version("failing/x")
    with pytest.raises(StoreError, match="503"):
        http_root.read("failing/x", 0, 1, "etag")


def test_a_file_that_has_become_shorter_than_the_range(nginx: Served) -> None:
    there = nginx.place(f"short-{os.urandom(4).hex()}")
    (there.directory / "file").write_bytes(content_of(1000))
    with open_store(there.url) as store:
        version = store.version("file")
        (there.directory / "file").write_bytes(b"short")
        with pytest.raises(StoreChanged):
            store.read("file", 900, 50, version)


def test_names_with_any_bytes_over_http(nginx: Served) -> None:
    there = nginx.place(f"names-{os.urandom(4).hex()}")
    names = {
        b"\xff\xfe",
        b"a b",
        b"q?x=1",
        b"h#x",
        b"100%25",
        b"<&\"'>",
        b"semi;colon",
        b"\xc3\xa4",
        b"a:b",
        b"~+,=@",
        b"\\",
    }
    for name in names:
        Path(os.fsdecode(os.fsencode(there.directory) + b"/" + name)).write_bytes(name)
    with open_store(there.url) as store:
        files = {entry.path: entry for entry in store.tree()}
        assert {os.fsencode(path) for path in files} == names
        for path, entry in files.items():
            assert store.read(path, 0, 100, entry.version or "") == os.fsencode(path)


def test_a_page_with_links_to_all_kinds_of_places(nginx: Served) -> None:
    there = nginx.place(f"page-{os.urandom(4).hex()}")
    (there.directory / "file").write_bytes(b"x")
    (there.directory / "index.html").write_text(
        '<a href="file">1</a><A HREF="./file">2</A><a href="?C=N;O=D">3</a><a href="https://example.org/x">4</a>'
        '<a href="/">5</a><a href="../">6</a><a href="deep/er">7</a><a name="x">8</a><a href="file#part">9</a>'
        '<a href="mailto:a@b">10</a><a href="%2e%2e%2fescape">11</a>'
    )
    failed: list[StoreError] = []
    with open_store(there.url) as store:
        assert [entry.path for entry in store.tree(failed.append)] == ["file"]
    # What cannot be looked up is told, not left out.
    assert [error.filename for error in failed] == ["../escape"]


BAD = [
    ("nonsense://x", ValueError, "unknown protocol nonsense"),
    ("gs://bucket/x", StoreError, r"run: pip install 'fusehsm\[gcs\]'"),
    ("s3://", ValueError, "names no bucket; write s3://bucket/prefix"),
    ("zip://x", ValueError, "names no archive; write zip://::file:///path/to/archive"),
    ("http://127.0.0.1:1/x", StoreError, "(?i)connect"),
    ("sftp://127.0.0.1:1/x", StoreError, "cannot be reached"),
    ("sftp:///x", ValueError, "names no host"),
    ("http://127.0.0.1:1/x?y", ValueError, "a query"),
    ("/none/at/all", FileNotFoundError, "No such file"),
    ("/dev/null", NotADirectoryError, "no directory, nor a zip or tar file"),
    ("git:///none:main@", OSError, "(?i)not found|repository"),
    ("memory://none/at/all", FileNotFoundError, "is not in memory://none"),
]


@pytest.mark.parametrize(("url", "error", "message"), BAD)
def test_bad_stores(url: str, error: type[Exception], message: str) -> None:
    def list_all() -> None:
        with open_store(url) as store:
            list(store.tree())

    with pytest.raises(error, match=message):
        list_all()


def test_passwords_do_not_show() -> None:
    with pytest.raises(StoreError) as caught, open_store("http://me:secret@127.0.0.1:1/x") as store:
        list(store.tree())
    assert "secret" not in str(caught.value)


def test_no_archive_at_all(tmp_path: Path) -> None:
    for name in ("x.zip", "x.tar"):
        (tmp_path / name).write_bytes(b"no archive")
        with pytest.raises(StoreError, match="cannot be opened"):
            open_store(str(tmp_path / name))


@pytest.mark.parametrize(("protocol", "package"), [("sftp", "paramiko"), ("s3", "s3fs")])
def test_a_package_that_is_missing(protocol: str, package: str) -> None:
    # In a process of its own, where nothing has been imported yet.
    program = (
        f"import sys; sys.modules['{package}'] = None\n"
        "from fusehsm.tier.stores.open import open_store\n"
        f"try: open_store('{protocol}://host/x')\n"
        "except OSError as error: print(error.strerror)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    fix = f"run: pip install 'fusehsm[{protocol}]'"
    assert done.stdout == f"{protocol} needs the package {package}, which is not installed; {fix}\n"


def test_hostile_names_in_archives_are_handed_on_as_they_are(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("../up", "/absolute", "fine/../up", "./fine//file"):
            archive.writestr(name, "x")
    with open_store(str(tmp_path / "x.zip")) as store:
        assert sorted(entry.path for entry in store.tree()) == [
            "../up",
            "/absolute",
            "fine",
            "fine/../up",
            "fine/file",
        ]
