"""The mirror handler, with one expectation on the real kernel, over the socket and in-process; the demonstration; the benchmark."""

import hashlib
import json
import mmap
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from examples.demo import Demo, DemoError
from fusehsm.conform.accessor import Accessor
from tests.support import engines, harness
from tests.support.harness import ROOT, Mount

OLD = 1_500_000_000_123_456_789  # nanoseconds since 1970: a time that no test could set by accident


@dataclass
class Place:
    """Stubs that a mirror serves: made under `stubs`, used under `root`, filled from `origin`.

    On the real kernel both are one directory; `stubs` then leads there past the watched mount, because a stub that is made under a
    mirror's eyes is a file of the accessor's own.
    """

    kind: str
    engine: str
    origin: Path
    source: Path
    stubs: Path
    root: Path
    running: ExitStack = field(default_factory=ExitStack)

    def start(self) -> None:
        """Start whatever serves the stubs."""
        variables = {"MIRROR_ORIGIN": str(self.origin), "MIRROR_ROOT": str(self.root)}
        if self.kind != "kernel":
            handler = ("--handler", "examples.mirror:handler") if self.kind == "in-process" else ()
            arguments = ("--engine", self.engine, *handler)
            self.running.enter_context(Mount(self.source, self.root, *arguments, env=variables))
        if self.kind != "in-process":
            command = [sys.executable, "-m", "examples.mirror", str(self.origin), str(self.root)]
            listener = harness.start(command, cwd=ROOT, stdout=subprocess.DEVNULL)
            self.running.callback(self._end, listener)
            assert listener.stderr is not None
            log = harness.LogReader(listener.stderr)
            log.wait_for(lambda line: line == "ready")

    def stop(self) -> None:
        """Stop it, the listener before the mount."""
        self.running.close()

    def add(self, name: str, content: bytes) -> str:
        """Put content into the origin and make its stub; the path where accessors find it."""
        (self.origin / name).write_bytes(content)
        with open(self.stubs / name, "xb") as stub:
            stub.truncate(len(content))
        os.utime(self.stubs / name, ns=(OLD, OLD))
        assert self.resident(name) == 0
        return str(self.root / name)

    def resident(self, name: str) -> int:
        """Bytes of a stub on disk."""
        return os.stat(self.stubs / name).st_blocks * 512

    @staticmethod
    def _end(listener: "subprocess.Popen[str]") -> None:
        listener.send_signal(signal.SIGINT)
        listener.wait(harness.PATIENCE)
        assert listener.stderr is not None
        listener.stderr.close()


@pytest.fixture(
    scope="module",
    params=engines.parameters("kernel", words=["socket", "in-process"]),
)
def place(
    request: pytest.FixtureRequest, places: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A served directory of stubs."""
    kind, engine = request.param
    request.getfixturevalue("kernel_events" if kind == "kernel" else "fuse")
    source = places("stubs")
    root = source if kind == "kernel" else tmp_path_factory.mktemp("mirror")
    descriptor = os.open(source, os.O_PATH)
    place = Place(kind, engine, places("origin"), source, Path(f"/proc/self/fd/{descriptor}"), root)
    try:
        place.start()
        yield place
    finally:
        place.stop()
        os.close(descriptor)


def bytes_of(name: str, size: int) -> bytes:
    """Content that nothing else has."""
    return random.Random(name).randbytes(size)


def test_fills_what_is_read_and_leaves_size_and_times(place: Place, accessor: Accessor) -> None:
    content = bytes_of("partial", 3_000_000)
    path = place.add("partial", content)
    assert accessor.call("pread_path", path, 5000, 1_000_000) == content[1_000_000:1_005_000]
    assert 0 < place.resident("partial") < 1 << 20
    assert accessor.call("read_file", path) == content
    assert place.resident("partial") >= 3_000_000
    for seen in (os.stat(place.stubs / "partial"), accessor.call("stat", path)):
        assert (seen.st_size, seen.st_mtime_ns) == (3_000_000, OLD)


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 10_000])
def test_never_extends_a_file(place: Place, accessor: Accessor, size: int) -> None:
    name = f"eof-{size}"
    content = bytes_of(name, size)
    path = place.add(name, content)
    (place.origin / name).write_bytes(content + b"the origin has grown" * 500)
    assert accessor.call("pread_path", path, 65536, max(0, size - 10)) == content[max(0, size - 10) :]
    assert accessor.call("pread_path", path, 100, size + 1) == b""
    assert accessor.call("read_file", path) == content
    assert os.stat(place.stubs / name).st_size == size


def test_a_fill_never_overwrites_what_was_written(place: Place, accessor: Accessor) -> None:
    content = bytearray(bytes_of("written", 50_000))
    path = place.add("written", bytes(content))
    for offset, data in (
        (5000, b"first" * 20),
        (49_990, b"at the end"),
        (60_000, b"beyond it"),
        (8190, b"over a page"),
    ):
        assert accessor.call("pwrite_path", path, data, offset) == len(data)
        content += bytes(max(0, offset - len(content)))
        content[offset : offset + len(data)] = data
    assert accessor.call("read_file", path) == content
    assert (place.stubs / "written").read_bytes() == content


def test_what_was_cut_off_does_not_come_back(place: Place, accessor: Accessor) -> None:
    content = bytes_of("cut", 100_000)
    path = place.add("cut", content)
    accessor.call("truncate", path, 10_000)
    accessor.call("truncate", path, 90_000)
    assert accessor.call("read_file", path) == content[:10_000] + bytes(80_000)
    path = place.add("emptied", content)

    def write_anew(path: str) -> None:
        with open(path, "wb") as file:
            file.write(b"new")
        os.truncate(path, 90_000)

    accessor.call(write_anew, path)
    assert accessor.call("read_file", path) == b"new" + bytes(89_997)


def test_large_ranges_come_in_chunks(place: Place, accessor: Accessor) -> None:
    content = bytes_of("large", 7_654_321)

    def map_all(path: str) -> bytes:
        descriptor = os.open(path, os.O_RDONLY)
        with mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
            return bytes(mapping)

    assert accessor.call(map_all, place.add("mapped", content)) == content
    assert accessor.call("pread_path", place.add("read", content), 1 << 23, 0) == content


def test_many_accessors_of_one_file_at_once(place: Place, make_accessor: Callable[..., Accessor]) -> None:
    size, writers = 4_000_000, 12
    content = bytearray(bytes_of("shared", size))
    path = place.add("shared", bytes(content))

    def read_and_write(
        path: str, size: int, index: int, reads: list[tuple[int, int]], starts: list[int]
    ) -> None:
        descriptor = os.open(path, os.O_RDWR)
        for (length, offset), start in zip(reads, starts, strict=True):
            os.pread(descriptor, length, offset)
            assert os.pwrite(descriptor, bytes([index]) * 1000, start) == 1000

    calls = []
    for index in range(writers):
        chooser = random.Random(index)
        # Each writes to a stripe of its own in every 64 KiB, never aligned to a page, and reads anywhere.
        starts = [block + index * 5003 for block in chooser.sample(range(0, size - 65536, 65536), 40)]
        reads = [(chooser.randrange(1, 300_000), chooser.randrange(size)) for _ in starts]
        calls.append(make_accessor().start(read_and_write, path, size, index, reads, starts))
        for start in starts:
            content[start : start + 1000] = bytes([index]) * 1000
    for call in calls:
        call.result()
    assert make_accessor().call("read_file", path) == content
    assert os.stat(place.stubs / "shared").st_size == size


@pytest.mark.parametrize("seed", range(10))
def test_random_operations_look_like_a_plain_file(place: Place, tmp_path: Path, seed: int) -> None:
    name = f"model-{seed}"
    content = bytes_of(name, random.Random(seed).randrange(1, 60_000))
    (tmp_path / name).write_bytes(content)
    script = str(ROOT / "tests" / "support" / "mirror_model.py")
    command = [sys.executable, script, place.add(name, content), str(tmp_path / name), str(seed), "60"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=harness.PATIENCE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_without_content_the_access_fails_and_can_be_tried_again(place: Place, accessor: Accessor) -> None:
    content = bytes_of("missing", 20_000)
    path = place.add("missing", content)
    for there in (None, content[:12_050]):
        (place.origin / "missing").unlink(missing_ok=True)
        if there is not None:
            (place.origin / "missing").write_bytes(there)
        with pytest.raises(OSError, match="Input/output error"):
            accessor.call("pread_path", path, 100, 12_000)
        assert place.resident("missing") == 0
    (place.origin / "missing").write_bytes(content)
    assert accessor.call("read_file", path) == content


def test_a_file_of_the_accessors_own_needs_no_origin(place: Place, accessor: Accessor) -> None:
    path = str(place.root / "own")
    descriptor = accessor.call("open", path, os.O_RDWR | os.O_CREAT)
    accessor.call("pwrite", descriptor, b"x", 100_000)
    assert accessor.call("read_file", path) == bytes(100_000) + b"x"


def test_an_inode_number_used_again_is_another_file(place: Place, accessor: Accessor) -> None:
    numbers = set()
    contents = {f"reused-{turn}": bytes_of(f"reused-{turn}", 9000) for turn in range(6)}
    for name in contents:
        (place.origin / name).touch()  # now, or it would take the number that the stub before it had
    for name, content in contents.items():
        path = place.add(name, content)
        numbers.add(os.stat(place.stubs / name).st_ino)
        assert accessor.call("read_file", path) == content
        accessor.call("unlink", path)
    assert len(numbers) < 6, "the filesystem never used a number again: this test shows nothing"


def test_a_file_without_a_name_is_still_filled(place: Place, accessor: Accessor) -> None:
    content = bytes_of("nameless", 9000)
    path = place.add("nameless", content)
    descriptor = accessor.call("open", path, os.O_RDONLY)
    accessor.call("unlink", path)
    assert accessor.call("pread", descriptor, 10_000, 0) == content


def test_a_restarted_mirror_goes_on(place: Place, make_accessor: Callable[..., Accessor]) -> None:
    content = bytearray(bytes_of("restarted", 300_000))
    path = place.add("restarted", bytes(content))
    make_accessor().call("pwrite_path", path, b"local", 100_000)
    content[100_000:100_005] = b"local"
    place.stop()
    place.start()
    assert make_accessor().call("read_file", path) == content


def test_punched_holes_stay_holes(place: Place, accessor: Accessor) -> None:
    content = bytearray(bytes_of("punched", 100_000))
    path = place.add("punched", bytes(content))
    command = ["fallocate", "--punch-hole", "--offset", "8192", "--length", "40960", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=harness.PATIENCE, check=False)
    if done.returncode == 0:
        content[8192 : 8192 + 40960] = bytes(40960)
    else:
        assert "supported" in done.stderr
    assert accessor.call("read_file", path) == content


def run(script: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = harness.environment(**variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)


@pytest.mark.fuse
def test_the_demonstration(fuse: None, tmp_path: Path) -> None:
    done = run("examples/demo.py", "--megabytes", "8", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "40 parts by mmap, shared" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text(encoding="utf-8")


def test_the_demonstration_sees_a_stubs_zeros(tmp_path: Path) -> None:
    demo = Demo(tmp_path, 1, [], [])
    assert demo.make_origin() > 500
    demo.mount.symlink_to(demo.stubs)  # no mount and no mirror: whatever is read is zeros
    for way in ("pread", "private", "shared"):
        demo.large_parts(way)
    assert len(demo.differences) == 120
    for action in (demo.search, demo.python_imports):
        with pytest.raises(DemoError):
            action()
    with pytest.raises((DemoError, OSError)):
        demo.execute()


@pytest.mark.kernel
@pytest.mark.fuse
def test_the_benchmark(fuse: None, kernel_events: Path, tmp_path: Path) -> None:
    quickly = ("--quick", "--only", "a,b,j", "--repetitions", "1", "--json", "-")
    done = run("bench/run.py", *quickly, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    results: dict[str, Any] = json.loads(done.stdout)
    cases = {quantity["name"]: set(quantity["cases"]) for quantity in results["quantities"]}
    expected = {
        "kernel, Python handler",
        "kernel, C listener",
        "fusehsm, in-process",
        "fusehsm, over the socket",
    }
    assert expected < cases["pread of 4 KiB, one event, any core"]
    c_listener = "the same C listener"
    assert {
        "kernel, C listener",
        f"fusehsm run, {c_listener}",
        f"fusehsm run --listener, {c_listener}",
    } < cases["pread of 4 KiB, one event, C listener, any core"]
    for name in (
        "stat of its own, 200 files",
        "open+read+close of its own, 200 files",
        "pread of 4 KiB of its own",
    ):
        assert cases[name] == {"native", "fusehsm run --mount", "fusehsm run --listener --mount"}
    assert len(results["targets"]) == 8 - ("bindfs" not in cases["stat, warm, 500 files"])
    assert list(tmp_path.iterdir()) == []


def test_hash_of_parts_is_of_those_parts(tmp_path: Path) -> None:
    content = bytes_of("parts", 3_000_000)
    (tmp_path / "file").write_bytes(content)
    for way in ("pread", "private", "shared"):
        done = run("examples/parts.py", str(tmp_path / "file"), way, "20", "7")
        assert done.returncode == 0, done.stderr
        parts = json.loads(done.stdout)
        assert len(parts) == 20
        for offset, length, digest in parts:
            assert hashlib.sha256(content[offset : offset + length]).hexdigest() == digest
