"""`fusehsm trace` on the real kernel and on the emulator, with the same expectations."""

import errno
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from fusehsm.commands.trace import Line, as_text, quote
from fusehsm.conform.accessor import Accessor
from fusehsm.linux.mountinfo import read_mounts
from tests.conftest import MakeAccessor, MakeMount
from tests.support import harness
from tests.support.harness import COMMAND, PATIENCE, LogReader, fusehsm

pytestmark = [pytest.mark.any_engine, pytest.mark.fuse]

PAGE = 4096
KEYS = ["time", "event", "mask", "pid", "path", "offset", "count", "response", "errno", "latency_us"]


@dataclass(slots=True)
class World:
    """Where events come from: a directory, and how to trace there."""

    path: Path
    backend: str

    def file(self, name: str | bytes, size: int = 5 * PAGE) -> str:
        """A new file; made before anybody listens."""
        path = os.path.join(os.fsencode(self.path), os.fsencode(name))
        with open(path, "wb") as file:
            file.write(bytes(size))
        return os.fsdecode(path)


@pytest.fixture(scope="module")
def kernel(kernel_events: Path, places: Callable[[str], Path]) -> World:
    return World(places("traced"), "kernel")


@pytest.fixture(scope="module")
def emulator(make_shared_mount: MakeMount, places: Callable[[str], Path]) -> World:
    place = places("traced")
    make_shared_mount("--events", "exact", source=place, path=place)
    return World(place, "fuse")


@pytest.fixture(params=["kernel", "emulator"])
def world(request: pytest.FixtureRequest) -> World:
    found: World = request.getfixturevalue(request.param)
    return found


@dataclass(slots=True)
class Trace:
    """A running `fusehsm trace` whose marks stand."""

    process: "subprocess.Popen[str]"
    output: LogReader
    complaints: LogReader = field(repr=False)

    def objects(self, number: int) -> list[dict[str, Any]]:
        """So many JSON lines, all that there are when it has ended."""
        self.wait_for(number)
        return [json.loads(line) for line in self.output.lines]

    def wait_for(self, number: int) -> list[str]:
        """Wait for so many lines."""
        self.output.wait_for(lambda line: len(self.output.lines) >= number)
        return self.output.lines

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Its exit code, once it has ended by itself."""
        code = self.process.wait(PATIENCE)
        self.output.wait_for_end()
        self.complaints.wait_for_end()
        return code


@contextmanager
def tracing(path: Path | str, *options: str, env: dict[str, str] | None = None) -> Iterator[Trace]:
    """`fusehsm trace`, once it is ready."""
    process = harness.start([*COMMAND, "trace", str(path), *options], env=harness.environment(**(env or {})))
    assert process.stdout is not None
    assert process.stderr is not None
    trace = Trace(process, LogReader(process.stdout), LogReader(process.stderr))
    try:
        trace.complaints.wait_for(lambda line: line == "ready")
        yield trace
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(PATIENCE)
        trace.output.wait_for_end()
        trace.complaints.wait_for_end()
        process.stdout.close()
        process.stderr.close()


def test_json(world: World, accessor: Accessor) -> None:
    path = world.file("json")
    before = time.time()
    with tracing(
        world.path, "--json", "--count", "5", "--mask", "PRE_ACCESS,OPEN_PERM", "--backend", world.backend
    ) as trace:
        descriptor = accessor.call("open", path, os.O_RDWR)
        accessor.call("pread", descriptor, 5000, 4000)
        accessor.call("pwrite", descriptor, b"x", 2 * PAGE)
        accessor.call("ftruncate", descriptor, 5000)
        accessor.call("truncate", path, PAGE)
        assert trace.wait() == 0
        objects = trace.objects(5)
        assert trace.complaints.lines == ["ready"]
    assert [list(line) for line in objects] == [KEYS] * 5
    assert [(line["event"], line["mask"], line["offset"], line["count"]) for line in objects] == [
        (["OPEN_PERM"], 0x10000, None, None),
        (["PRE_ACCESS"], 0x100000, 0, 3 * PAGE),
        (["PRE_ACCESS"], 0x100000, 2 * PAGE, PAGE),
        (["PRE_ACCESS"], 0x100000, PAGE, PAGE),
        (["PRE_ACCESS"], 0x100000, PAGE, 0),
    ]
    for line in objects:
        assert line["pid"] == accessor.pid
        assert line["path"] == path
        assert (line["response"], line["errno"]) == ("ALLOW", None)
        assert 0 < line["latency_us"] < PATIENCE * 1e6
        assert before <= line["time"] <= time.time()


def test_lines_for_people(world: World, accessor: Accessor) -> None:
    path = world.file('a "name"\n')
    with tracing(world.path, "--backend", world.backend) as trace:
        accessor.call("pread_path", path, 100, PAGE)
        (line,) = trace.wait_for(1)
    shown = path.replace('"', '\\"').replace("\n", "\\n")
    pattern = rf'\d\d:\d\d:\d\d\.\d{{6}} {accessor.pid} PRE_ACCESS\("{re.escape(shown)}", 4096, 4096\) = ALLOW <[0-9.]+ us>'
    assert re.fullmatch(pattern, line)


def test_names_that_are_not_utf8(world: World, accessor: Accessor) -> None:
    path = world.file(b"caf\xe9")
    with tracing(world.path, "--json", "--backend", world.backend) as trace:
        accessor.call("pread_path", path, 100, 0)
        (line,) = trace.objects(1)
    assert os.fsencode(line["path"]) == os.fsencode(path)


@pytest.mark.parametrize("name", ["EPERM", "EIO", "EAGAIN", "EBUSY", "ETXTBSY", "ENOSPC", "EDQUOT"])
def test_denying_what_matches(world: World, accessor: Accessor, name: str) -> None:
    denied, allowed = world.file(f"{name}.secret"), world.file(f"{name}.open")
    pattern = f"{world.path}/*.secret"
    with tracing(
        world.path, "--json", "--backend", world.backend, "--deny", name, "--match", pattern
    ) as trace:
        with pytest.raises(OSError) as caught:
            accessor.call("pread_path", denied, 100, 0)
        assert errno.errorcode[caught.value.errno or 0] == name
        accessor.call("pread_path", allowed, 100, 0)
        objects = trace.objects(2)
    assert [(line["path"], line["response"], line["errno"]) for line in objects] == [
        (denied, "DENY", name),
        (allowed, "ALLOW", None),
    ]


def test_denying_everything(world: World, accessor: Accessor) -> None:
    path = world.file("denied")
    with (
        tracing(world.path, "--deny", "EIO", "--backend", world.backend, "--count", "1") as trace,
    ):
        with pytest.raises(OSError) as caught:
            accessor.call("pwrite_path", path, b"x", 0)
        assert caught.value.errno == errno.EIO
        assert trace.wait() == 0
        assert trace.output.lines[0].split(" = ")[1].startswith("DENY EIO <")


def test_what_marks_cover(world: World, accessor: Accessor) -> None:
    (world.path / "sub" / "below").mkdir(parents=True)
    files = [world.file(name) for name in ("sub/one", "sub/two", "sub/below/three", "beside")]
    for mark, target, expected in (
        ("inode", files[0], files[:1]),
        ("children", str(world.path / "sub"), files[:2]),
        ("filesystem", files[0], files),
    ):
        with tracing(target, "--json", "--mark", mark, "--backend", world.backend) as trace:
            for file in files:
                accessor.call("pread_path", file, 100, 0)
            trace.wait_for(len(expected))
            assert trace.end() == 0
            assert [json.loads(line)["path"] for line in trace.output.lines] == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_it_cleanly(world: World, accessor: Accessor, number: int) -> None:
    path = world.file(f"signal-{number}")

    def mounts_there() -> list[str]:
        return [mount.filesystem_type for mount in read_mounts() if mount.mount_point == str(world.path)]

    before = mounts_there()
    with tracing(world.path, "--backend", world.backend) as trace:
        accessor.call("pread_path", path, 100, 0)
        trace.wait_for(1)
        # On the real kernel the directory is bind-mounted on itself meanwhile.
        assert mounts_there() == (["ext4"] if world.backend == "kernel" else before)
        assert trace.end(number) == 0
        assert trace.complaints.lines == ["ready"]
        assert len(trace.output.lines) == 1
    assert mounts_there() == before
    accessor.call("pread_path", path, 100, 0)  # nobody is asked any more


def test_auto_takes_what_is_there(world: World, accessor: Accessor) -> None:
    path = world.file("auto")
    with tracing(world.path, "--json") as trace:
        accessor.call("pread_path", path, 100, 0)
        assert trace.objects(1)[0]["path"] == path


def test_many_accessors_at_once(world: World, make_accessor: MakeAccessor) -> None:
    path = world.file("many", 64 * PAGE)
    with tracing(world.path, "--json", "--backend", world.backend, "--count", "32") as trace:
        calls = [make_accessor().start("pread_path", path, 1, number * PAGE) for number in range(32)]
        assert [call.result() for call in calls] == [b"\0"] * 32
        assert trace.wait() == 0
        assert sorted(line["offset"] for line in trace.objects(32)) == [number * PAGE for number in range(32)]


def test_a_reader_that_goes_away(world: World, accessor: Accessor) -> None:
    path = world.file("broken-pipe")
    reader, writer = os.pipe()
    process = harness.start([*COMMAND, "trace", str(world.path), "--backend", world.backend], stdout=writer)
    os.close(writer)
    assert process.stderr is not None
    complaints = LogReader(process.stderr)
    try:
        complaints.wait_for(lambda line: line == "ready")
        os.close(reader)
        accessor.call("pread_path", path, 100, 0)
        assert process.wait(PATIENCE) == 1
        assert complaints.wait_for_end() == ["ready"]
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def test_colours_on_a_terminal(world: World, accessor: Accessor) -> None:
    path = world.file("coloured")
    master, slave = pty.openpty()
    environment = harness.environment(TERM="xterm-256color")
    del environment["NO_COLOR"]
    command = [
        *COMMAND,
        "trace",
        str(world.path),
        "--backend",
        world.backend,
        "--count",
        "1",
        "--deny",
        "EIO",
    ]
    process = harness.start(command, stdout=slave, env=environment)
    os.close(slave)
    assert process.stderr is not None
    complaints = LogReader(process.stderr)
    try:
        complaints.wait_for(lambda line: line == "ready")
        with pytest.raises(OSError):
            accessor.call("pread_path", path, 100, 0)
        assert process.wait(PATIENCE) == 0
        shown = b""
        with suppress(OSError):  # EIO: the other end is closed
            while select.select([master], [], [], 0)[0] and (piece := os.read(master, 65536)):
                shown += piece
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(master)
    assert b"\x1b[31mDENY EIO" in shown
    plain = re.sub(rb"\x1b\[[0-9;]*m", b"", shown).decode()
    assert re.fullmatch(
        rf'[0-9:.]+ {accessor.pid} PRE_ACCESS\("{re.escape(path)}", 0, 4096\) = DENY EIO <.*>\r\n', plain
    )


def test_the_mount_goes_away(make_mount: MakeMount) -> None:
    mount = make_mount()
    with tracing(mount.path) as trace:
        assert mount.stop() == 0
        assert trace.wait() == 1
        ready, complaint = trace.complaints.lines
    assert ready == "ready"
    assert complaint.startswith(f"fusehsm: {mount.path}: ")


@pytest.mark.parametrize(
    ("options", "choices"),
    [
        (["--mask", "PRE_ACCES"], ["PRE_ACCES", "PRE_ACCESS", "OPEN_PERM"]),
        (["--mask", ""], ["PRE_ACCESS"]),
        (["--deny", "ENOENT"], ["ENOENT", "EPERM", "EIO", "EAGAIN", "EBUSY", "ETXTBSY", "ENOSPC", "EDQUOT"]),
        (["--deny", "5"], ["EPERM", "EDQUOT"]),
        (["--match", "*"], ["--deny"]),
        (["--mark", "tree"], ["inode", "children", "mount", "filesystem"]),
        (["--backend", "ebpf"], ["auto", "kernel", "fuse"]),
        (["--abi", "v3"], ["linux-6.14", "patch-v2", "patch-v1"]),
        (["--count", "none"], ["--count", "--help"]),
        (["--count", "0"], ["--count", "--help"]),
        (["--colour"], ["--colour", "--help"]),
    ],
    ids=" ".join,
)
def test_bad_usage_is_one_line_with_the_choices(
    kernel: World, options: list[str], choices: list[str]
) -> None:
    done = fusehsm("trace", kernel.path, *options)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("fusehsm: ")
    assert all(choice in line for choice in choices)


def test_what_cannot_be_traced(kernel: World) -> None:
    for path, options, words in (
        (kernel.path / "missing", [], ["missing", "No such file"]),
        (
            Path("/proc"),
            ["--backend", "kernel"],
            ["/proc", "proc has no pre-content events", "fusehsm mount"],
        ),
        (kernel.path, ["--backend", "fuse"], [str(kernel.path), "fusehsm mount"]),
        (kernel.path, ["--abi", "patch-v2", "--backend", "kernel"], ["patch-v2", "fusehsm mount"]),
    ):
        done = fusehsm("trace", path, *options)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith("fusehsm: ")
        assert all(word in line for word in words), line


def test_text_of_a_notification() -> None:
    line = Line(0.25, ["OPEN", "CLOSE_NOWRITE"], 0x30, 7, "/a", None, None, None, None, None)
    assert as_text(line).split(" ", 1)[1] == '7 OPEN|CLOSE_NOWRITE("/a")'
    assert as_text(line).split(" ", 1)[0].endswith(":00.250000")


def test_quoting() -> None:
    assert quote("/srv/übung") == '"/srv/übung"'
    assert quote('a"b\\c') == '"a\\"b\\\\c"'
    assert quote("a\nb\x1b[0m") == '"a\\nb\\x1b[0m"'
    assert quote(os.fsdecode(b"caf\xe9")) == '"caf\\xe9"'
