"""Stores: what is listed and read is what is there, in any number of threads, and what changes under a reader is an error, never mixed content."""

import os
import random
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from fusehsm.tier.stores.base import Entry, Kind, Store, StoreChanged
from fusehsm.tier.stores.open import open_store
from tests.support.tier.s3_server import S3
from tests.support.tier.servers import Served
from tests.support.tier.trees import content_of, files_of, make_small_tree

MakeStore = Callable[[Path], str]


def git(place: Path, *words: str) -> None:
    who = ("-c", "user.name=somebody", "-c", "user.email=somebody@localhost")
    subprocess.run(["git", "-C", str(place), *who, *words], check=True, capture_output=True)


def as_local(source: Path) -> str:
    return str(source)


def as_zip(source: Path) -> str:
    path = source.parent / f"{source.name}.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(source.rglob("*")):
            archive.write(name, name.relative_to(source))
    return f"zip://::file://{path}"


def as_tar(source: Path) -> str:
    path = source.parent / f"{source.name}.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(source, ".")
    return str(path)


def as_tar_gz(source: Path) -> str:
    path = source.parent / f"{source.name}.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, "above/it")
    return f"tar://above/it::file://{path}"


def as_git(source: Path) -> str:
    git(source, "init", "-q", "-b", "main")
    git(source, "add", ".")
    git(source, "commit", "-q", "-m", "all")
    return f"git://{source}:main@"


def as_memory(source: Path) -> str:
    filesystem = fsspec.filesystem("memory")
    root = f"/{source.name}-{os.urandom(4).hex()}"
    filesystem.mkdir(root)
    for name, content in files_of(source).items():
        filesystem.pipe_file(f"{root}/{name}", content)
    return f"memory:/{root}"


KINDS = ["local", "zip", "tar", "tar_gz", "git", "memory", "http", "rangeless", "etagless", "sftp", "s3"]


@pytest.fixture(params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str, str]:
    """The small tree, the store that it is, and the store's kind."""
    kind: str = request.param
    name = f"tree-{os.urandom(4).hex()}"
    if kind in ("http", "rangeless", "etagless"):
        nginx: Served = request.getfixturevalue("nginx")
        above = nginx.directory / (kind if kind != "http" else "")
        above.mkdir(exist_ok=True)
        place = above / name
        place.mkdir()
        make_small_tree(place)
        return place, f"{nginx.url}/{place.relative_to(nginx.directory)}", kind
    if kind == "sftp":
        there = request.getfixturevalue("sshd").place(name)
        make_small_tree(there.directory)
        return there.directory, there.url, kind
    place = tmp_path / name
    place.mkdir()
    make_small_tree(place)
    if kind == "s3":
        request.getfixturevalue("s3").upload(place, "tests", name)
        return place, f"s3://tests/{name}", kind
    make: MakeStore = globals()[f"as_{kind}"]
    return place, make(place), kind


@pytest.fixture
def store(served: tuple[Path, str, str]) -> Iterator[Store]:
    with open_store(served[1]) as store:
        yield store


def files_in(store: Store) -> dict[str, Entry]:
    return {entry.path: entry for entry in store.tree() if entry.kind is Kind.FILE}


def test_what_is_there_is_listed_and_read(served: tuple[Path, str, str], store: Store) -> None:
    source, _, kind = served
    wanted = {path: data for path, data in files_of(source).items() if not path.startswith(".git/")}
    entries = list(store.tree())
    files = files_in(store)
    assert {path: entry.size for path, entry in files.items()} == {
        path: len(data) for path, data in wanted.items()
    }
    for path, entry in files.items():
        assert entry.version is not None
        assert store.version(path) == entry.version
        assert store.read(path, 0, 1 << 20, entry.version) == wanted[path]
        if entry.mtime_ns is not None and kind != "s3":  # there it is when the object was made
            precision = 2_000_000_000 if kind == "zip" else 1_000_000_000
            assert abs(entry.mtime_ns - (source / path).stat().st_mtime_ns) < precision
        if entry.mode is not None:
            assert entry.mode == (source / path).stat().st_mode & 0o7777
    directories = [entry.path for entry in entries if entry.kind is Kind.DIRECTORY]
    assert directories == ["sub", "sub/deep"] if kind in ("git", "memory") else ["hollow", "sub", "sub/deep"]
    # A directory comes before what it holds, and names are in order.
    paths = [entry.path for entry in entries]
    assert paths == sorted(paths, key=lambda path: path.encode().split(b"/"))


def test_ranges(served: tuple[Path, str, str], store: Store) -> None:
    content = (served[0] / "a file").read_bytes()
    size = len(content)
    version = store.version("a file")
    for offset, length in [(0, 1), (1, 4096), (size - 1, 1), (size - 10, 100), (4095, 65537), (size, 5), (size + 9, 5), (7, 0)]:  # fmt: skip
        assert store.read("a file", offset, length, version) == content[offset : offset + length]
    assert store.read("empty", 0, 10, store.version("empty")) == b""
    assert list(store.data("a file", 10, 20)) == [(10, 20)]
    assert list(store.data("a file", 10, 0)) == []


def test_ranges_at_a_time_in_many_threads(served: tuple[Path, str, str], store: Store) -> None:
    wanted = {
        path: data for path, data in files_of(served[0]).items() if data and not path.startswith(".git/")
    }
    versions = {path: store.version(path) for path in wanted}
    choose = random.Random(6)
    asked = [
        (path, choose.randrange(len(wanted[path])), choose.randrange(1, 20_000))
        for path in choose.choices(sorted(wanted), k=80)
    ]
    with ThreadPoolExecutor(16) as threads:
        for (path, offset, length), data in zip(
            asked,
            threads.map(lambda ask: store.read(ask[0], ask[1], ask[2], versions[ask[0]]), asked),
            strict=True,
        ):
            assert data == wanted[path][offset : offset + length]


def test_what_is_not_there(store: Store) -> None:
    with pytest.raises(FileNotFoundError):
        store.version("sub/none")
    with pytest.raises((StoreChanged, FileNotFoundError)):
        store.read("sub/none", 0, 1, "any")


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
@pytest.mark.parametrize("served", [kind for kind in KINDS if kind not in ("git", "memory")], indirect=True)
def test_what_changes_under_a_reader_is_an_error(
    served: tuple[Path, str, str], store: Store, how: str, request: pytest.FixtureRequest
) -> None:
    source, _, kind = served
    path = source / "a file"
    if kind in ("zip", "tar", "tar_gz"):
        path = next(source.parent.glob(f"{source.name}.*"))
    version = store.version("a file")
    assert len(store.read("a file", 0, 50, version)) == 50
    if how == "removed":
        path.unlink()
    else:
        other = path if how == "in place" else source / "other"
        other.write_bytes(b"something else altogether")
        other.replace(path)
    if kind == "s3":
        s3: S3 = request.getfixturevalue("s3")
        s3.client.delete_object(Bucket="tests", Key=f"{source.name}/a file")
        s3.upload(source, "tests", source.name)
    with pytest.raises(StoreChanged, match="populate again"):
        store.read("a file", 50, 50, version)


def test_a_commit_under_a_reader(tmp_path: Path) -> None:
    make_small_tree(tmp_path)
    (tmp_path / "link").symlink_to("../else where")
    (tmp_path / "a file").chmod(0o755)
    with open_store(as_git(tmp_path)) as store:
        entries = {entry.path: entry for entry in store.tree()}
        assert (entries["link"].kind, entries["link"].target) == (Kind.SYMLINK, "../else where")
        assert (entries["a file"].mode, entries["a file"].mtime_ns) == (0o755, None)
        version = store.version("a file")
        (tmp_path / "a file").write_bytes(content_of(100_000, 9))
        assert store.read("a file", 0, 8, version) == content_of(
            8
        )  # the work tree is not what the store shows
        git(tmp_path, "commit", "-q", "-a", "-m", "more")
        with pytest.raises(StoreChanged):
            store.read("a file", 0, 8, version)


def test_memory_that_changes(tmp_path: Path) -> None:
    make_small_tree(tmp_path)
    url = as_memory(tmp_path)
    with open_store(url) as store:
        version = store.version("a file")
        fsspec.filesystem("memory").pipe_file(
            url.removeprefix("memory:/") + "/a file", content_of(100_000, 7)
        )
        with pytest.raises(StoreChanged):
            store.read("a file", 0, 8, version)


def test_a_writer_beside_readers_never_makes_mixed_content(tmp_path: Path) -> None:
    """Whatever read() returns is of one version: here files of one letter each."""
    path = tmp_path / "file"
    path.write_bytes(b"a" * 50_000)
    ended = threading.Event()

    def write() -> None:
        for letter in b"bcdefghijklmnopqrstuvwxyz" * 4:
            path.write_bytes(bytes([letter]) * 50_000)
        ended.set()

    writer = threading.Thread(target=write)
    with open_store(str(tmp_path)) as store:
        version, changes = store.version("file"), 0
        writer.start()
        while not ended.is_set():
            try:
                assert len(set(store.read("file", 0, 50_000, version))) <= 1  # it is empty at times
            except StoreChanged:
                changes += 1
                version = store.version("file")
        writer.join()
    assert changes


# What single kinds tell


def test_a_local_directory_tells_everything(tmp_path: Path) -> None:
    (tmp_path / "sparse").touch()
    os.truncate(tmp_path / "sparse", 1 << 20)
    with open(tmp_path / "sparse", "r+b") as file:
        file.seek(65536)
        file.write(b"x" * 4096)
    os.link(tmp_path / "sparse", tmp_path / "twin")
    (tmp_path / "link").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe", 0o640)
    with open_store(str(tmp_path)) as store:
        entries = {entry.path: entry for entry in store.tree()}
        assert entries["sparse"].identity == entries["twin"].identity is not None
        assert entries["link"].target == "nowhere"
        assert (entries["pipe"].kind, entries["pipe"].mode) == (Kind.OTHER, 0o640)
        assert list(store.data("twin", 0, 1 << 20)) == [(65536, 4096)]
        assert list(store.data("twin", 66000, 100)) == [(66000, 100)]
        assert list(store.data("twin", 100, 100)) == []
        assert list(store.data("twin", 1 << 19, 1 << 19)) == []
        status = (tmp_path / "sparse").stat()
        assert (entries["sparse"].uid, entries["sparse"].mtime_ns) == (status.st_uid, status.st_mtime_ns)


def test_no_symbolic_link_in_a_local_store_is_followed(tmp_path: Path) -> None:
    store_at, outside = tmp_path / "store", tmp_path / "outside"
    (store_at / "directory").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    with open_store(str(store_at)) as store:
        (store_at / "directory" / "secret").write_bytes(b"public")
        version = store.version("directory/secret")
        (store_at / "directory").rename(store_at / "old")
        (store_at / "directory").symlink_to(outside)
        with pytest.raises(OSError, match=r"symbolic|directory"):
            store.read("directory/secret", 0, 6, version)
        assert [entry.path for entry in store.tree()] == ["directory", "old", "old/secret"]
        with pytest.raises(OSError, match="cross-device"):
            store.read("../outside/secret", 0, 6, version)


def test_a_tar_file_tells_links_owners_and_fractions_of_a_second(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "d").mkdir(parents=True)
    (tree / "b").write_bytes(b"content")
    os.link(tree / "b", tree / "d" / "a")
    (tree / "s").symlink_to("b")
    os.utime(tree / "b", ns=(0, 1_234_567_890_123_456_789))
    command = ["tar", "--format=posix", "--sort=name", "-C", str(tree), "-cf", str(tmp_path / "x.tar"), "."]
    subprocess.run(command, check=True)
    with open_store(str(tmp_path / "x.tar")) as store:
        entries = {entry.path: entry for entry in store.tree()}
        first, second = entries["b"], entries["d/a"]
        assert first.identity == second.identity is not None
        assert (second.size, second.mtime_ns) == (7, 1_234_567_890_123_456_789)
        assert first.uid == os.geteuid()
        assert (entries["s"].kind, entries["s"].target) == (Kind.SYMLINK, "b")
        assert second.version is not None
        assert store.read("d/a", 3, 10, second.version) == b"tent"


def test_a_zip_file_tells_symbolic_links(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "link").symlink_to("to/somewhere")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        information = zipfile.ZipInfo("link")
        information.create_system, information.external_attr = 3, 0o120777 << 16
        archive.writestr(information, "to/somewhere")
        archive.writestr("implied/directory/file", "content")
    with open_store(str(tmp_path / "x.zip")) as store:
        entries = {entry.path: entry for entry in store.tree()}
    assert (entries["link"].kind, entries["link"].target) == (Kind.SYMLINK, "to/somewhere")
    assert [entry.path for entry in entries.values() if entry.kind is Kind.DIRECTORY] == [
        "implied",
        "implied/directory",
    ]


def test_sftp_tells_modes_and_symbolic_links(sshd: Served) -> None:
    there = sshd.place(f"links-{os.urandom(4).hex()}")
    (there.directory / "file").write_bytes(b"x")
    (there.directory / "file").chmod(0o4711)
    (there.directory / "link").symlink_to("/absolute/and\u00e4")
    with open_store(there.url) as store:
        entries = {entry.path: entry for entry in store.tree()}
    assert (entries["file"].mode, entries["file"].uid) == (0o4711, os.geteuid())
    assert (entries["link"].kind, entries["link"].target) == (Kind.SYMLINK, "/absolute/and\u00e4")


def test_sftp_ranges_of_many_requests(sshd: Served) -> None:
    there = sshd.place(f"large-{os.urandom(4).hex()}")
    content = random.Random(1).randbytes(3_000_000)
    (there.directory / "file").write_bytes(content)
    with open_store(there.url) as store:
        version = store.version("file")
        assert store.read("file", 12_345, 2_500_000, version) == content[12_345 : 12_345 + 2_500_000]
        assert store.read("file", 2_999_000, 1 << 20, version) == content[2_999_000:]


def test_an_archive_on_a_web_server(nginx: Served, tmp_path: Path) -> None:
    there = nginx.place(f"archive-{os.urandom(4).hex()}")
    make_small_tree(tmp_path)
    for number in (0, 1):
        with zipfile.ZipFile(there.directory / f"{number}.zip", "w") as archive:
            archive.write(tmp_path / "a file", "a file")
            archive.writestr("other", "x" * number)
    with open_store(f"zip://::{there.url}/0.zip") as store:
        version = store.version("a file")
        assert store.read("a file", 5, 5000, version) == content_of(100_000)[5:5005]
        (there.directory / "1.zip").replace(there.directory / "0.zip")
        with pytest.raises(StoreChanged):
            store.read("a file", 5, 5000, version)
