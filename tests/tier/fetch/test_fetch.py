"""`fusehsm fetch` on the real kernel and on the emulator, one expectation for both."""

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.control import socket as control_socket
from fusehsm.linux.mountinfo import read_mounts
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.tree import Namespace
from tests.support.harness import PATIENCE, environment, fusehsm
from tests.support.tier.fetching import fetching, is_mounted, run
from tests.support.tier.populated import plant
from tests.support.tier.servers import Served
from tests.support.tier.trees import content_of, describe, make_small_tree

pytestmark = pytest.mark.any_engine

MIB = 1 << 20


@pytest.fixture
def big(places: Callable[[str], Path]) -> Path:
    """A store with one file of 5 MiB and a bit."""
    store = places("store")
    (store / "big").write_bytes(content_of(5 * MIB + 100))
    return store


def resident(path: Path) -> list[int]:
    """The blocks that are here, of a file that no fetch serves."""
    fd = os.open(path, os.O_RDONLY)
    try:
        mark = stub_mark.read(fd, Namespace.at(fd))
        assert mark is not None
        record = residency.read(fd, mark, Namespace.at(fd))
        return (
            []
            if record is None
            else [block for block in range(record.blocks().number) if block in record.blocks()]
        )
    finally:
        os.close(fd)


def test_a_whole_tree_is_as_in_the_store(source: Path, target: Path, backend: str) -> None:
    os.truncate(source / "sparse", 5 * MIB)
    plant(source, target)
    stubs = describe(target)
    with fetching(source, target, "--backend", backend) as served:
        compared = run("diff", "-r", "--no-dereference", source, target)
        summary, complaints = served.end()
    assert (compared.returncode, complaints) == (int((source / "fifo").exists()), "")
    assert "accesses refused" not in summary
    assert not is_mounted(target)
    assert describe(target) == stubs  # times, modes, owners, links
    assert run("diff", "-r", "--no-dereference", source, target).returncode == compared.returncode


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_a_service_manager_is_told(big: Path, target: Path, tmp_path: Path, kind: str) -> None:
    plant(big, target)
    address = str(tmp_path / "notify") if kind == "path" else f"@{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1))
        manager.settimeout(PATIENCE)
        env = environment(NOTIFY_SOCKET=address)
        with fetching(big, target, "--backend", "fuse", env=env) as served:
            assert manager.recv(100) == b"READY=1"
            served.end()


def test_only_what_is_touched_is_fetched(big: Path, target: Path, backend: str) -> None:
    plant(big, target)
    with fetching(big, target, "--backend", backend, "--read-ahead", "0") as served:
        for _ in range(2):
            assert run("cmp", "-i", str(800 * 4096), "-n", "4096", big / "big", target / "big").stdout == ""
        summary, _ = served.end()
    assert resident(target / "big") == [3]
    assert "1.0 MB fetched in 1 requests" in summary


def test_http(nginx: Served, target: Path, backend: str) -> None:
    place = nginx.directory / f"fetch-{backend}"
    place.mkdir()
    make_small_tree(place)
    (place / "big").write_bytes(content_of(3 * MIB + 5))
    url = f"{nginx.url}/fetch-{backend}/"
    plant(url, target)
    with fetching(url, target, "--backend", backend) as served:
        compared = run("diff", "-r", place, target)
        _, complaints = served.end()
    assert (compared.stdout, complaints) == ("", "")


def test_a_file_that_has_changed_in_the_store_is_refused(big: Path, target: Path, backend: str) -> None:
    plant(big, target)
    with fetching(big, target, "--backend", backend, "--read-ahead", "0") as served:
        assert run("head", "-c1", target / "big").returncode == 0
        os.truncate(big / "big", 6 * MIB)
        read = run("dd", f"if={target}/big", "bs=1M", "skip=3", "count=1")
        assert "Input/output error" in read.stderr
        assert run("head", "-c1", target / "big").returncode == 0  # is here already
        _, complaints = served.end()
    assert "big: has changed in" in complaints


def test_what_is_written_stays(big: Path, target: Path, backend: str) -> None:
    """Around it comes the store's content."""
    plant(big, target)
    expected = bytearray(content_of(5 * MIB + 100))
    expected[2 * MIB + 5 : 2 * MIB + 10] = b"mine!"
    with fetching(big, target, "--backend", backend, "--read-ahead", "0") as served:
        writing = f"printf mine! | dd of={target}/big bs=1 seek={2 * MIB + 5} conv=notrunc status=none"
        assert run("sh", "-c", writing).returncode == 0
        assert run("cmp", target / "big", "-", timeout=5).returncode != 0
        served.end()
    (big.parent / "expected").write_bytes(expected)
    with fetching(big, target, "--backend", backend) as served:
        assert run("cmp", target / "big", big.parent / "expected").stdout == ""
        served.end()


def test_a_killed_fetch_leaves_no_zeros_to_be_read_through_its_mount(big: Path, target: Path) -> None:
    plant(big, target)
    with fetching(big, target, "--backend", "fuse", "--read-ahead", "0", "--on-error", "EAGAIN") as served:
        assert run("head", "-c1", target / "big").returncode == 0
        served.kill()
        assert (
            "Resource temporarily unavailable"
            in run("dd", f"if={target}/big", "bs=1M", "skip=3", "count=1").stderr
        )
        with fetching(big, target) as again:
            assert run("cmp", big / "big", target / "big").stdout == ""
            again.end(signal.SIGTERM)
        assert not is_mounted(target)


def test_two_cannot_serve_the_same(big: Path, target: Path, backend: str) -> None:
    plant(big, target)
    with (
        fetching(big, target, "--backend", backend),
        pytest.raises(AssertionError, match="another fusehsm fetch or populate"),
        fetching(big, target, "--backend", backend),
    ):
        pass


def test_local_files_are_left_alone(big: Path, target: Path, backend: str) -> None:
    plant(big, target)
    (target / "own").write_bytes(b"own")
    os.truncate(target / "own", 100_000)
    with fetching(big, target, "--backend", backend) as served:
        assert run("sh", "-c", f"echo more >> {target}/own; cat {target}/own | wc -c").stdout == "100005\n"
        assert run("sh", "-c", f"echo new > {target}/new; cat {target}/new").stdout == "new\n"
        summary, _ = served.end()
    assert "0 B fetched" in summary


def test_a_truncated_file_is_the_users_beyond(big: Path, target: Path, backend: str) -> None:
    plant(big, target)
    path = target / "big"
    with fetching(big, target, "--backend", backend, "--read-ahead", "0") as served:
        assert run("truncate", "-s", str(2 * MIB + 100), path).returncode == 0
        assert run("truncate", "-s", str(4 * MIB), path).returncode == 0
        read = run("cmp", path, big / "big")
        assert int(read.stdout.split("byte ")[1].split(",")[0]) > 2 * MIB + 100
        assert run("sh", "-c", f": > {path}; echo short > {path}; truncate -s 3M {path}").returncode == 0
        zeros = run("sh", "-c", f"tail -c +7 {path} | tr -d '\\0' | wc -c")
        assert (zeros.stdout, zeros.stderr) == ("0\n", "")
        served.end()
    assert path.read_bytes()[:6] == b"short\n"


def test_what_was_changed_while_nobody_served_is_refused_where_it_lacks_content(
    big: Path, target: Path, backend: str
) -> None:
    (big / "new").write_bytes(content_of(100))
    plant(big, target)
    with open(target / "big", "r+b") as file:
        file.write(b"unserved")
    (target / "new").write_bytes(b"whole, new")
    with fetching(big, target, "--backend", backend) as served:
        # After these eight bytes come zeros that nobody has ever meant.
        assert "Input/output error" in run("head", "-c8", target / "big").stderr
        assert run("head", "-c8", target / "new").stdout == "whole, n"
        read = run("dd", f"if={target}/big", "bs=1M", "skip=3", "count=1")
        assert "Input/output error" in read.stderr
        _, complaints = served.end()
    assert "was changed while no fetch served it" in complaints


def few_descriptors() -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))


def test_a_mapping_of_more_than_there_are_descriptors_for(
    places: Callable[[str], Path], target: Path, backend: str
) -> None:
    store = places("store")
    (store / "big").write_bytes(content_of(5 * MIB))
    plant(store, target)
    program = "import mmap, sys; f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); print(len(m[:]))"
    with fetching(
        store,
        target,
        "--backend",
        backend,
        "--block-size",
        "4K",
        "--read-ahead",
        "0",
        preexec_fn=few_descriptors,
    ) as served:
        mapped = run(sys.executable, "-c", program, target / "big")
        assert (mapped.stdout, mapped.stderr) == (f"{5 * MIB}\n", "")
        assert run("cmp", store / "big", target / "big").stdout == ""
        served.end()


@pytest.mark.fuse
def test_the_options_of_the_mount_pass_through(big: Path, target: Path) -> None:
    plant(big, target)
    options = ("--engine", "pyfuse3", "--cache", "shared", "--event-timeout", "30=EAGAIN", "--direct")
    with fetching(big, target, "--backend", "fuse", *options, "-o", "noatime") as served:
        (mount,) = [mount for mount in read_mounts() if mount.mount_point == str(target)]
        with control_socket.connect(mount) as connection:
            command = Path(f"/proc/{control_socket.peer_of(connection).pid}/cmdline").read_text()
        for option in options:
            assert f"\0{option}\0" in command
        assert run("cmp", big / "big", target / "big").stdout == ""
        served.end()
    for option in ("--engine", "--cache", "--events", "--event-timeout"):
        done = fusehsm("fetch", "--backend", "fuse", option, "rubbish", big, target)
        assert (done.returncode, "rubbish" in done.stderr, done.stderr.count("\n")) == (2, True, 1)
