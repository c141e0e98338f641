"""What happens to a fetch beside plain reading: changes and evictions meanwhile, its limits, and what makes no sense."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.tier.fetch.protocol import Evict, encode_request, found
from tests.support import harness
from tests.support.tier.fetching import clear, fetching, is_mounted, run
from tests.support.tier.populated import plant
from tests.support.tier.relay import relay
from tests.support.tier.servers import Served
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.any_engine

MIB = 1 << 20


@pytest.fixture
def big(places: Callable[[str], Path]) -> Path:
    """A store with one file of 12 MiB and a bit."""
    store = places("store")
    (store / "big").write_bytes(content_of(12 * MIB + 100))
    return store


_WRITING_DURING_A_FILL = """
import mmap, os, sys, threading
fd = os.open(sys.argv[1], os.O_RDWR)
mapped = mmap.mmap(fd, 4096)
mapped[0]
before = os.fstat(fd).st_mtime_ns
reader = threading.Thread(target=os.pread, args=(fd, 1, 8 << 20))
reader.start()
while os.fstat(fd).st_mtime_ns == before and reader.is_alive():
    pass
mapped[5:9] = b"mine"
reader.join()
mapped.close()
os.close(fd)
os.sync()
"""


def test_what_is_written_through_a_mapping_in_the_moment_of_a_fill_is_not_evicted(
    big: Path, target: Path, backend: str
) -> None:
    """The fill sets the times back, so they tell nothing of it."""
    plant(big, target)
    path = target / "big"
    with fetching(big, target, "--backend", backend, "--read-ahead", "0", "--block-size", "4M") as served:
        assert run(sys.executable, "-c", _WRITING_DURING_A_FILL, path).returncode == 0
        assert "is modified" in harness.fusehsm("evict", path).stderr
        assert run("dd", f"if={path}", "bs=1", "skip=5", "count=4").stdout == "mine"
        served.end()


def test_what_is_on_its_way_in_a_pipe_is_not_zeroed_by_an_eviction(
    big: Path, target: Path, backend: str
) -> None:
    """splice(2), and sendfile(2) to a socket alike, hand on the page cache's own pages, whose file may be closed by then."""
    plant(big, target)
    path = target / "big"
    reading, writing = os.pipe()
    try:
        with fetching(big, target, "--backend", backend) as served:
            assert run("cmp", big / "big", path).stdout == ""
            fd = os.open(path, os.O_RDONLY)
            try:
                assert os.splice(fd, writing, 100, offset_src=12 * MIB) == 100
            finally:
                os.close(fd)
            assert "evicted 1 files" in harness.fusehsm("evict", path).stdout
            assert os.read(reading, 100) == content_of(12 * MIB + 100)[-100:]
            served.end()
    finally:
        os.close(reading)
        os.close(writing)


def test_a_signal_while_it_mounts_leaves_no_mount(big: Path, target: Path) -> None:
    with harness.start([*harness.COMMAND, "fetch", str(big), str(target), "--backend", "fuse"]) as process:
        try:
            end = time.monotonic() + harness.PATIENCE
            while not is_mounted(target):
                assert time.monotonic() < end
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=harness.PATIENCE)
            assert not is_mounted(target)
        finally:
            process.kill()
            clear(target)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_another_mount_below_is_served_too(
    big: Path, target: Path, backend: str, places: Callable[[str], Path]
) -> None:
    (big / "sub").mkdir()
    (big / "big").rename(big / "sub" / "big")
    (target / "sub").mkdir()
    elsewhere = places("elsewhere")
    assert run("mount", "--bind", elsewhere, target / "sub").returncode == 0
    try:
        plant(big, target)
        with fetching(big, target, "--backend", backend) as served:
            for _ in range(2):
                assert run("cmp", big / "sub" / "big", target / "sub" / "big").stdout == ""
                assert "evicted 1 files" in harness.fusehsm("evict", target).stdout
            served.end()
        assert is_mounted(target / "sub")
    finally:
        run("umount", "--lazy", target / "sub")


_READING_AT_ONCE = """
import os, sys, threading
def read(name):
    try:
        said = os.pread(os.open(name, os.O_RDONLY), 10, 0)
    except OSError as error:
        said = error.strerror.encode()
    os.write(1, said + b"\\n")
for name in sys.argv[1:]:
    threading.Thread(target=read, args=(name,)).start()
"""


def test_who_waits_when_it_ends_is_refused(target: Path, backend: str, places: Callable[[str], Path]) -> None:
    """Also those whose turn has not come yet, more than are handled at once."""
    store = places("store")
    names = [f"{number}" for number in range(300)]
    for name in names:
        (store / name).write_bytes(b"content")
    plant(store, target)
    with fetching(store, target, "--backend", backend, "--limit-rate", "1") as served:
        command = [sys.executable, "-c", _READING_AT_ONCE, *(str(target / name) for name in names)]
        with harness.start(command) as readers:
            time.sleep(2)  # until all of them wait
            served.end()
            answers = set(readers.communicate(timeout=harness.PATIENCE)[0].splitlines())
    assert answers == {"content", "Input/output error"}


def test_a_large_block_comes_in_parts(target: Path, backend: str, places: Callable[[str], Path]) -> None:
    """Only 4 MiB of it are in memory at once."""
    store = places("store")
    (store / "big").write_bytes(content_of(20 * MIB))
    plant(store, target)
    with fetching(store, target, "--backend", backend, "--block-size", "16M", "--read-ahead", "0") as served:
        assert run("head", "-c1", target / "big").returncode == 0
        shown = harness.fusehsm("status", "--json", target / "big").stdout
        assert f'"resident": {16 * MIB}' in shown
        assert run("cmp", store / "big", target / "big").stdout == ""
        summary, _ = served.end()
    assert " 21.0 MB fetched in 5 requests" in summary


def test_a_limited_rate_takes_longer_than_the_deadline(big: Path, target: Path, backend: str) -> None:
    """Which is for stores that do not answer."""
    plant(big, target)
    with fetching(big, target, "--backend", backend, "--limit-rate", "3M", "--deadline", "0.5s") as served:
        compared = run("cmp", big / "big", target / "big")
        assert (compared.stdout, compared.stderr) == ("", "")
        served.end()


def test_a_limited_rate_is_of_bytes_not_blocks(
    target: Path, backend: str, places: Callable[[str], Path]
) -> None:
    store = places("store")
    for number in range(50):
        (store / f"{number}").write_bytes(b"content")
    plant(store, target)
    with fetching(store, target, "--backend", backend, "--limit-rate", "1M") as served:
        assert run("diff", "-r", store, target, timeout=10).stdout == ""
        served.end()


def test_few_descriptors(target: Path, backend: str, places: Callable[[str], Path]) -> None:
    """No access hangs or is refused: each waits for its turn."""
    store = places("store")
    names = [f"{number}" for number in range(100)]
    for name in names:
        (store / name).write_bytes(b"content")
    plant(store, target)
    limited = ["prlimit", "--nofile=128", *harness.COMMAND]
    with fetching(store, target, "--backend", backend, "--limit-rate", "300", command=limited) as served:
        command = [sys.executable, "-c", _READING_AT_ONCE, *(str(target / name) for name in names)]
        answers = set(run(*command).stdout.splitlines())
        assert answers == {"content"}
        served.end()


def test_who_waits_for_what_was_being_fetched_ahead_is_as_patient_as_others(
    nginx: Served, target: Path, backend: str
) -> None:
    """What is fetched ahead is given up on the first failure, but not when an accessor waits for it by then."""
    place = nginx.directory / f"ahead-{backend}"
    place.mkdir()
    (place / "big").write_bytes(content_of(8 * MIB))
    store = f"{nginx.url}/{place.name}"
    plant(store, target)
    good_again = 0.0

    def trouble(so_far: int) -> None:
        if so_far and time.monotonic() < good_again:
            time.sleep(0.3)
            raise ConnectionError

    with (
        relay(nginx.url) as line,
        fetching(f"{line.endpoint}/{place.name}", target, "--backend", backend) as served,
    ):
        line.on_answer = trouble
        assert run("head", "-c1", target / "big").returncode == 0
        good_again = time.monotonic() + 1.5
        compared = run("cmp", place / "big", target / "big")
        assert (compared.stdout, compared.stderr) == ("", "")
        served.end()


def test_not_from_itself(big: Path, target: Path) -> None:
    """A stub would be filled with its own zeros."""
    plant(big, target)
    for store, destination in ((target, target), (target, target.parent), (target.parent, target)):
        done = harness.fusehsm("fetch", store, destination, "--backend", "fuse")
        assert (done.returncode, "lie one in the other" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--block-size", "9" * 400),
        ("--deadline", "9" * 400),
        ("--prefetch", '0 1 "\\ud800"'),
        ("--prefetch", "0 1 " + "[" * 100_000),
        ("--prefetch", '0 1 "../big"'),
        ("--prefetch", f'{1 << 63} 1 "big"'),
        ("--prefetch", f'1 {(1 << 63) - 1} "big"'),
        ("--prefetch", f'0 {"9" * 5000} "big"'),
        ("--prefetch", '0 1 "' + "n" * 200_000),
        (),
    ],
    ids=[
        "size",
        "time",
        "no name",
        "no JSON",
        "elsewhere",
        "beyond all files",
        "ends beyond all files",
        "no number",
        "no end",
        "no destination",
    ],
)
def test_bad_usage(big: Path, target: Path, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """One line, which says so."""
    plant(big, target)
    destination = str(target) if arguments else ""
    if arguments[:1] == ("--prefetch",):
        (tmp_path / "list").write_text(f"{arguments[1]}\n")
        arguments = ("--prefetch", str(tmp_path / "list"))
    done = harness.fusehsm("fetch", big, destination, *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("fusehsm: ")
    assert done.stderr.count("\n") == 1


def test_a_client_that_never_reads_keeps_nobody_from_evicting(big: Path, target: Path, backend: str) -> None:
    plant(big, target)
    with fetching(big, target, "--backend", backend) as served:
        with found(str(target)).connection as connection:
            connection.settimeout(1)
            with pytest.raises(TimeoutError):
                while True:
                    connection.send(encode_request(Evict("")))
            assert harness.fusehsm("evict", target, timeout=10).returncode == 0
        served.end()


def test_a_list_that_cannot_be_written_refuses_nobody(
    target: Path, backend: str, places: Callable[[str], Path]
) -> None:
    store = places("store")
    for number in range(100):  # more than what is kept back
        (store / f"{number:0100}").write_bytes(b"content")
    plant(store, target)
    with fetching(store, target, "--backend", backend, "--record", "/dev/full") as served:
        compared = run("diff", "-r", store, target)
        assert (compared.stdout, compared.stderr) == ("", "")
        summary, complaints = served.end()
    assert "100 files complete" in summary
    assert "--record /dev/full: cannot be written, and is not complete: No space left" in complaints


def test_no_list_where_writing_it_would_be_an_access(big: Path, target: Path, backend: str) -> None:
    done = harness.fusehsm("fetch", big, target, "--backend", backend, "--record", target / "list")
    assert (done.returncode, "lies in the destination" in done.stderr) == (2, True)
    assert not is_mounted(target)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a program capabilities")
def test_a_program_keeps_its_capabilities(big: Path, target: Path, backend: str) -> None:
    """Which write(2) takes away, and a fill gives back."""
    plant(big, target)
    may_bind = bytes.fromhex("01000002000400000000000000000000 00000000")  # cap_net_bind_service=ep
    os.setxattr(target / "big", "security.capability", may_bind)
    with fetching(big, target, "--backend", backend) as served:
        assert run("cmp", big / "big", target / "big").stdout == ""
        served.end()
    assert os.getxattr(target / "big", "security.capability") == may_bind


@pytest.mark.kernel
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system")
def test_a_whole_file_system_is_served_wherever_it_is_seen(
    big: Path, target: Path, kernel_events: Path, tmp_path: Path
) -> None:
    """In other mount namespaces, and through other mounts."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 * MIB)
    assert run("mkfs.ext4", "-q", image).returncode == 0
    other = tmp_path / "other"
    other.mkdir()
    assert run("mount", "-o", "loop", image, target).returncode == 0
    try:
        assert run("mount", "--bind", target, other).returncode == 0
        plant(big, target)
        with fetching(big, target, "--backend", "kernel") as served:
            for accessor in (("cmp",), ("unshare", "--mount", "cmp")):
                for place in (target, other):
                    compared = run(*accessor, big / "big", place / "big")
                    assert (compared.stdout, compared.stderr) == ("", "")
                    assert "evicted 1 files" in harness.fusehsm("evict", target).stdout
            served.end()
    finally:
        run("umount", "--lazy", other)
        run("umount", "--lazy", target)


@pytest.mark.kernel
@pytest.mark.usefixtures("kernel_events")
def test_other_namespaces_and_mounts_see_no_zeros(
    places: Callable[[str], Path], target: Path, tmp_path: Path
) -> None:
    """A container gets a copy of each mount, without the marks on it; and who stood in the directory before sees what is below the bind mount."""
    store = places("store")
    (store / "sub").mkdir()
    for name in ("a", "b", "sub/c"):
        (store / name).write_bytes(content_of(100_000, len(name)))
    plant(store, target)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    early = subprocess.Popen(
        ["sh", "-c", f"read _; cmp {store}/sub/c sub/c"], cwd=target, stdin=subprocess.PIPE, text=True
    )
    with fetching(store, target, "--backend", "kernel") as served:
        early.communicate("go\n", timeout=harness.PATIENCE)
        assert early.returncode == 0
        assert run("unshare", "-m", "cmp", store / "a", target / "a").stdout == ""
        bound = f"mount --bind {target} {elsewhere} && cmp {store}/b {elsewhere}/b && cmp {store}/sub/c {elsewhere}/sub/c"
        done = run("unshare", "-m", "sh", "-c", bound)
        assert (done.returncode, done.stdout) == (0, "")
        assert harness.fusehsm("evict", target).stdout.startswith("evicted 3 files")
        assert run("unshare", "-m", "cmp", store / "a", target / "a").stdout == ""
        served.end()
