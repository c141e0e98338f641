"""evict, pin, status and their like against a running fetch, on the real kernel and on the emulator, one expectation for both."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs.tree import Namespace
from tests.support import harness
from tests.support.tier.fetching import fetching, run
from tests.support.tier.populated import plant
from tests.support.tier.trees import content_of

pytestmark = pytest.mark.any_engine

MIB = 1 << 20
NAMES = ("a", "b", "sub/c")


@pytest.fixture
def store(places: Callable[[str], Path], target: Path) -> Path:
    """Three files of 3 MiB, of which `target` has stubs."""
    root = places("store")
    (root / "sub").mkdir()
    for seed, name in enumerate(NAMES):
        (root / name).write_bytes(content_of(3 * MIB, seed + 1))
    plant(root, target)
    return root


def read(*paths: Path) -> None:
    for path in paths:
        assert run("sha256sum", path).returncode == 0


def disk(path: Path) -> int:
    """Bytes. Mounts show a block where there is none (conform/divergences.py)."""
    blocks = os.stat(path).st_blocks
    return blocks * 512 if blocks > 1 else 0


def is_stub(path: Path) -> bool:
    """As it was planted, and nothing else."""
    fd = os.open(path, os.O_RDONLY)
    try:
        mark = stub_mark.read(fd, Namespace.at(fd))
        assert mark is not None
        alone = os.listxattr(fd) == [Namespace.at(fd).stub]
        return alone and mark.describes(fd, os.fstat(fd)) and stub_mark.is_all_hole(fd)
    finally:
        os.close(fd)


@contextmanager
def using(program: str, path: Path) -> Iterator[None]:
    """A process that does something with the file and stays."""
    script = f"import mmap, os, sys\n{program}\nprint('ready', flush=True)\nsys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", script, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield
        finally:
            process.kill()


def status(path: Path) -> dict[str, dict[str, Any]]:
    found = json.loads(harness.fusehsm("status", "--json", path).stdout)
    return {item["path"]: item for item in found["files"]}


def test_evicted_content_is_fetched_again(store: Path, target: Path, backend: str) -> None:
    with fetching(store, target, "--backend", backend) as served:
        read(*(target / name for name in NAMES))
        done = harness.fusehsm("evict", target)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("evicted 3 files, 9.4 MB freed")
        assert [disk(target / name) for name in NAMES] == [0, 0, 0]
        for name in NAMES:
            assert run("cmp", store / name, target / name).stdout == ""
        done = harness.fusehsm("evict", target / "a")
        assert done.stdout.startswith("evicted 1 files")
        served.end()
    assert is_stub(target / "a")
    assert not is_stub(target / "b")
    assert (target / "b").read_bytes() == (store / "b").read_bytes()


def test_who_serves_the_stubs_is_told(store: Path, target: Path, backend: str) -> None:
    nobody = "nobody serves them: what is not here reads as zeros until `fusehsm fetch STORE DST` runs\n"

    def told() -> tuple[bool, bool]:
        in_words = harness.fusehsm("status", target).stdout.endswith(nobody)
        return in_words, json.loads(harness.fusehsm("status", "--json", target).stdout)["served"]

    assert told() == (True, False)
    with fetching(store, target, "--backend", backend) as served:
        read(target / "a")
        assert told() == (False, True)
        read(*(target / name for name in NAMES))
        served.end()
    assert told() == (False, False), "all is here, so nothing reads as zeros"


def test_files_that_end_within_a_block(store: Path, target: Path, backend: str) -> None:
    """A block of which only a part is punched keeps zeros, which must not be taken for content."""
    sizes = (1, 4095, 4097, 100_001, MIB - 1, MIB + 1)
    for size in sizes:
        (store / f"odd-{size}").write_bytes(content_of(size, size))
    plant(store, target)
    with fetching(store, target, "--backend", backend) as served:
        for _ in range(2):
            for size in sizes:
                assert run("cmp", store / f"odd-{size}", target / f"odd-{size}").stdout == ""
            assert harness.fusehsm("evict", target).stdout.startswith(f"evicted {len(sizes)} files")
        served.end()
    assert all(is_stub(target / f"odd-{size}") for size in sizes)


def test_also_what_another_run_has_fetched(store: Path, target: Path, backend: str) -> None:
    with fetching(store, target, "--backend", backend) as served:
        read(target / "a", target / "b")
        served.end()
    with fetching(store, target, "--backend", backend) as served:
        done = harness.fusehsm("evict", target)
        assert done.stdout.startswith("evicted 2 files")
        served.end()
    assert is_stub(target / "a")


@pytest.mark.parametrize(
    "program",
    [
        "fd = os.open(sys.argv[1], os.O_RDONLY)",
        "fd = os.open(sys.argv[1], os.O_RDWR)",
        "fd = os.open(sys.argv[1], os.O_RDONLY); m = mmap.mmap(fd, 0, prot=mmap.PROT_READ); os.close(fd); m[0]",
    ],
    ids=["read", "write", "mapped"],
)
def test_not_while_in_use(store: Path, target: Path, backend: str, program: str) -> None:
    with fetching(store, target, "--backend", backend) as served:
        read(target / "a", target / "b")
        with using(program, target / "a"):
            done = harness.fusehsm("evict", target / "a")
            assert done.returncode == 1
            assert "is in use" in done.stderr
            done = harness.fusehsm("evict", target)
            assert (done.returncode, done.stdout) == (0, "evicted 1 files, 3.1 MB freed; stay: 1 in use\n")
        assert run("cmp", store / "a", target / "a").stdout == ""
        # Where nothing tells of what is written through a mapping, having been open for writing counts as written to.
        stays = backend == "kernel" and "O_RDWR" in program
        assert harness.fusehsm("evict", target / "a").returncode == int(stays)
        served.end()


def test_not_what_the_user_has_written(store: Path, target: Path, backend: str) -> None:
    """Neither by write(2) nor through a mapping, nor with the time set back."""
    mapping = (
        "fd = os.open(sys.argv[1], os.O_RDWR); m = mmap.mmap(fd, 0); m[5:9] = b'mine'; m.flush(); m.close()"
    )
    times = os.stat(target / "sub" / "c")
    with fetching(store, target, "--backend", backend) as served:
        read(*(target / name for name in NAMES))
        assert run("sh", "-c", f"printf mine | dd of={target}/a bs=1 seek=5 conv=notrunc").returncode == 0
        assert run(sys.executable, "-c", f"import mmap, os, sys\n{mapping}", target / "b").returncode == 0
        assert run("sh", "-c", f"printf mine | dd of={target}/sub/c bs=1 seek=5 conv=notrunc").returncode == 0
        os.utime(target / "sub" / "c", ns=(times.st_atime_ns, times.st_mtime_ns))
        done = harness.fusehsm("evict", target)
        assert "evicted 0 files, 0 B freed; stay: 3 modified" in done.stdout
        done = harness.fusehsm("evict", target / "a")
        assert (done.returncode, "is modified" in done.stderr) == (1, True)
        assert all(item["modified"] for item in status(target).values())
        served.kill()
        with fetching(store, target, "--backend", backend) as again:
            assert "stay: 3 modified" in harness.fusehsm("evict", target).stdout
            again.end()
    for name in NAMES:
        assert (target / name).read_bytes()[5:9] == b"mine"


def test_pinned_files_stay(store: Path, target: Path, backend: str) -> None:
    with fetching(store, target, "--backend", backend) as served:
        read(*(target / name for name in NAMES))
        assert harness.fusehsm("pin", target / "sub").stdout == "pinned 1 files\n"
        assert "evicted 2 files" in harness.fusehsm("evict", target).stdout
        done = harness.fusehsm("evict", target / "sub" / "c")
        assert (done.returncode, "is pinned" in done.stderr) == (1, True)
        served.end()
    with fetching(store, target, "--backend", backend) as served:
        assert "stay: 1 pinned" in harness.fusehsm("evict", target).stdout
        assert harness.fusehsm("unpin", target).stdout == "unpinned 1 files\n"
        assert "evicted 1 files" in harness.fusehsm("evict", target).stdout
        served.end()


def test_the_least_recently_used_go_first(store: Path, target: Path, backend: str) -> None:
    with fetching(store, target, "--backend", backend) as served:
        for name in ("b", "sub/c", "a"):
            read(target / name)
            time.sleep(0.02)
        done = harness.fusehsm("evict", "--older-than", "1h", target)
        assert done.stdout == "evicted 0 files, 0 B freed; stay: 3 recently used\n"
        done = harness.fusehsm("evict", "--free", "4M", target)
        assert done.stdout.startswith("evicted 2 files")
        assert {name for name in NAMES if disk(target / name)} == {"a"}
        done = harness.fusehsm("evict", "--free", "1G", target)
        assert (done.returncode, "could be freed" in done.stderr) == (1, True)
        served.end()


def test_a_watermark(store: Path, target: Path, backend: str) -> None:
    with fetching(store, target, "--backend", backend, "--max-size", "5M") as served:
        for name in NAMES:
            read(target / name)
            end = time.monotonic() + harness.PATIENCE
            while sum(disk(target / other) for other in NAMES) > 5 * MIB:
                assert time.monotonic() < end
                time.sleep(0.01)
        assert disk(target / "sub" / "c")
        for name in NAMES:
            assert run("cmp", store / name, target / name).stdout == ""
        served.end()


def test_status(store: Path, target: Path, backend: str) -> None:
    (target / "own").write_bytes(b"own")
    with fetching(store, target, "--backend", backend, "--read-ahead", "0") as served:
        assert run("dd", f"if={target}/a", "bs=1M", "count=1", "of=/dev/null").returncode == 0
        read(target / "b")
        found = status(target)
        assert {path: (item["resident"], item["stub"]) for path, item in found.items()} == {
            "a": (MIB, True),
            "b": (3 * MIB, True),
            "own": (3, False),
            "sub/c": (0, True),
        }
        text = harness.fusehsm("status", target).stdout.splitlines()
        assert text[1].split() == ["3.1", "MB", "1.0", "MB", "33", "%", "-", "a"]
        assert text[-1].startswith("4 files of 9.4 MB, 4.2 MB here (44 %); 3 from the store, 0 modified")
        assert list(status(target / "sub" / "c")) == ["sub/c"]
        served.end()
    assert {path: item["resident"] for path, item in status(target).items()} == {
        path: item["resident"] for path, item in found.items()
    }


def test_what_was_touched_is_fetched_ahead_next_time(
    store: Path, target: Path, backend: str, tmp_path: Path
) -> None:
    with fetching(
        store, target, "--backend", backend, "--record", str(tmp_path / "list"), "--read-ahead", "0"
    ) as served:
        assert run("dd", f"if={target}/b", "bs=1M", "skip=2", "count=1", "of=/dev/null").returncode == 0
        read(target / "a")
        harness.fusehsm("evict", target)
        served.end()
    lines = (tmp_path / "list").read_text().splitlines()
    assert lines[0] == f'{2 * MIB} {MIB} "b"'
    assert {line.split()[-1] for line in lines} == {'"a"', '"b"'}
    with fetching(store, target, "--backend", backend, "--prefetch", str(tmp_path / "list")) as served:
        end = time.monotonic() + harness.PATIENCE
        while (found := status(target))["a"]["resident"] < 3 * MIB or found["b"]["resident"] < MIB:
            assert time.monotonic() < end
        served.end()
    assert found["sub/c"]["resident"] == 0


def test_nobody_serves(store: Path, target: Path) -> None:
    done = harness.fusehsm("evict", target / "a")
    assert done.returncode == 1
    fix = "none of your fusehsm fetch processes serves it; start one: fusehsm fetch STORE DST"
    assert fix in done.stderr
    assert harness.fusehsm("evict", target / "nothing").stderr.endswith("No such file or directory\n")
    assert harness.fusehsm("evict", "--free", "much", target).returncode == 2
