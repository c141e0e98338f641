"""The base of all measurements: an ext4 image, compiled helpers, mounts and listeners, all removed at the end."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

ROOT = Path(__file__).resolve().parent.parent
HANDLER = "bench.handlers:allow"
PATIENCE = 1200  # seconds for one accessor

Process = subprocess.Popen[bytes]


class SceneError(Exception):
    """A thing that the benchmark needs is missing or has failed. The message is one line with the cause."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The output of bench/accessor.c."""

    #: Nanoseconds in all.
    total: int
    #: The number of operations.
    operations: int
    #: Nanoseconds of the median operation.
    median: int
    #: Bytes that were read.
    size: int
    #: Nanoseconds that one operation in a hundred exceeds.
    late: int

    @property
    def microseconds(self) -> float:
        """Microseconds for one operation, on average."""
        return self.total / self.operations / 1000

    @property
    def mebibytes_per_second(self) -> float:
        """The throughput in MiB a second."""
        return self.size / (1 << 20) / (self.total / 1e9)


class Scene:
    """A place for measurements. As root its files lie on an ext4 image of their own, else in the temporary directory."""

    def __init__(self, image_size: int) -> None:
        """`image_size`: the size of the sparse image in bytes."""
        self._image_size = image_size
        self._stack = contextlib.ExitStack()
        self.is_root = os.geteuid() == 0
        self.has_bindfs = shutil.which("bindfs") is not None
        self.has_kernel = False  # whether the kernel makes pre-content events on ext4 and the user may listen

    def __enter__(self) -> Self:
        try:
            directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="fusehsm-bench-"))
            self.work = Path(os.path.realpath(directory))
            self._stack.callback(self._unmount_all)
            self.files = self.work / "files"
            self.files.mkdir()
            for name in ("accessor", "listener"):
                run(
                    os.environ.get("CC", "cc"),
                    "-O2",
                    "-pthread",
                    "-o",
                    str(self.work / name),
                    str(ROOT / "bench" / f"{name}.c"),
                )
            if self.is_root:
                self._mount_image()
                self.has_kernel = self._kernel_has_pre_content()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def measure(self, directory: Path, *arguments: str, before: Sequence[str] = ()) -> Timing:
        """Run bench/accessor.c in the working directory `directory`. If `before` is given, it is a command that runs the accessor."""
        output = run(*before, str(self.work / "accessor"), *arguments, directory=directory)
        return Timing(*map(int, output.split()))

    def drop_caches(self) -> None:
        """Empty the kernel's page, dentry and inode caches (root only)."""
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")

    @contextlib.contextmanager
    def direct_image(self) -> Iterator[None]:
        """Keep the image's blocks out of the page cache a second time, as the image file's own content.

        On a machine with few cores, copying them would take time from the measured processes.
        """
        devices = (
            run("losetup", "-n", "-O", "NAME", "-j", str(self.work / "image")).split() if self.is_root else []
        )
        for switch in ("on", "off"):
            for device in devices:
                with contextlib.suppress(SceneError):  # not every file system supports it
                    run("losetup", f"--direct-io={switch}", device)
            if switch == "on":
                yield

    def _mount_image(self) -> None:
        image = self.work / "image"
        with open(image, "wb") as file:
            file.truncate(self._image_size)
        run("mkfs.ext4", "-q", "-F", "-N", "2500000", str(image))
        run("mount", "-o", "loop", str(image), str(self.files))

    def _kernel_has_pre_content(self) -> bool:
        probe = self.files / "probe"
        probe.touch()
        with Stage(self) as stage, contextlib.suppress(SceneError):
            stage.listen_in_c(probe)
            return True
        return False

    def _unmount_all(self) -> None:
        for point in reversed(mounts_under(self.work)):
            lazily = ["umount", "-l"] if self.is_root else ["fusermount3", "-u", "-z"]
            subprocess.run([*lazily, point], check=False)


class Stage:
    """The mounts and listeners of one measurement. They end when the stage is left, the last one first."""

    def __init__(self, scene: Scene) -> None:
        self._scene = scene
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def mount(
        self,
        source: Path,
        *options: str,
        prefix: Sequence[str] = (),
        point: Path | None = None,
        **variables: str,
    ) -> tuple[Path, int]:
        """Mount `source` with fusehsm; `prefix` stands before the command. Returns the mount point and the server's process id."""
        point = point or self.new_directory()
        command = [
            *prefix,
            sys.executable,
            "-m",
            "fusehsm",
            "mount",
            str(source),
            str(point),
            "--foreground",
            *options,
        ]
        daemon = self._start(command, stderr=subprocess.PIPE, **variables)
        assert daemon.stderr is not None
        self._wait_for_ready(daemon, daemon.stderr)
        return point, daemon.pid

    def bindfs(self, source: Path, *options: str) -> tuple[Path, int]:
        """Mount `source` with bindfs. Returns the mount point and the server's process id."""
        point = self.new_directory()
        daemon = self._start(["bindfs", "-f", "--no-allow-other", *options, str(source), str(point)])
        while not mounts_under(point):
            if daemon.poll() is not None:
                raise SceneError(f"bindfs on {source}: exit {daemon.returncode}")
            time.sleep(0.02)
        return point, daemon.pid

    def listen(self, path: Path, backend: str) -> None:
        """Start a Python listener on the real kernel ("kernel") or on a mount of fusehsm ("fuse")."""
        self._start_listener([sys.executable, "-m", "bench.listen", str(path), backend])

    def listen_in_c(self, path: Path, *before: str) -> None:
        """Start bench/listener.c on one file. If `before` is given, it is a command that runs the listener.

        Raises SceneError if there are no pre-content events.
        """
        self._start_listener([*before, str(self._scene.work / "listener"), str(path)])

    def mirror(self, origin: Path, root: Path, counts: Path) -> None:
        """Start the handler of examples/mirror.py as a listener of the real kernel. At its end it writes the number of its events to `counts`."""
        self._start_listener(
            [sys.executable, "-m", "bench.listen", str(root), "kernel", str(origin), str(counts)]
        )

    def fetch(self, store: str, path: Path, *options: str) -> None:
        """Start `fusehsm fetch`. At its end it waits until everything is on the disk."""
        command = [sys.executable, "-m", "fusehsm", "fetch", store, str(path), *options]
        server = self._start(command, stderr=subprocess.PIPE)
        assert server.stderr is not None
        self._wait_for_ready(server, server.stderr)

    def status(self, point: Path) -> dict[str, Any]:
        """The output of `fusehsm status --json` for a mount."""
        command = [sys.executable, "-m", "fusehsm", "status", "--json", str(point)]
        environment = os.environ | {"XDG_RUNTIME_DIR": str(self._scene.work)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        (found,) = json.loads(done.stdout)
        return dict(found)

    def requests(self, point: Path) -> Counter[str]:
        """The number of a mount's requests so far, by kind."""
        return Counter(self.status(point)["requests"])

    def new_directory(self) -> Path:
        """Make a directory for a mount point."""
        return Path(tempfile.mkdtemp(prefix="mount-", dir=self._scene.work))

    def _start(self, command: list[str], *, stderr: int | None = None, **variables: str) -> Process:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "XDG_RUNTIME_DIR": str(self._scene.work), **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
        self._stack.callback(end, process)
        return process

    def _start_listener(self, command: list[str]) -> None:
        listener = self._start(command)
        assert listener.stdout is not None
        self._wait_for_ready(listener, listener.stdout)

    def _wait_for_ready(self, process: Process, stream: IO[bytes]) -> None:
        said = []
        for line in stream:
            if line == b"ready\n":
                break
            said.append(line.decode(errors="replace"))
        else:
            raise SceneError(f"{process.args!r}: exit {process.wait()}: {''.join(said).strip()}")
        threading.Thread(target=drain, args=(stream,), daemon=True).start()


def drain(stream: IO[bytes]) -> None:
    """Copy a process's further output to stderr, so that the process never waits for its reader."""
    with contextlib.suppress(ValueError, OSError):  # end() closes the stream
        for line in stream:
            sys.stderr.write(line.decode(errors="replace"))


def run(*arguments: str, directory: Path | None = None) -> str:
    """Run a program and return its output. Raises SceneError if it is missing, fails or does not end."""
    try:
        done = subprocess.run(
            arguments,
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise SceneError(f"{arguments[0]}: not found") from None
    except subprocess.TimeoutExpired:
        raise SceneError(f"{' '.join(arguments)}: no end after {PATIENCE} s") from None
    except subprocess.CalledProcessError as error:
        raise SceneError(f"{' '.join(arguments)}: exit {error.returncode}: {error.stderr.strip()}") from None
    return done.stdout


def end(process: Process) -> None:
    """Terminate a process, kill it if it does not end, and reap it."""
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def mounts_under(directory: Path) -> list[str]:
    """The mount points at and below `directory`, oldest first. It reads the mount table, which cannot block."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        points = [line.split(" ")[4] for line in table]
    return [point for point in points if point == str(directory) or point.startswith(f"{directory}/")]


def resident_bytes(pid: int) -> int:
    """A process's resident memory in bytes."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SceneError(f"/proc/{pid}/status: no VmRSS: the process is gone")


def make_tree(directory: Path, files: int, *, in_one_directory: int, size: int) -> list[str]:
    """Make `files` files of `size` bytes. Returns their paths relative to `directory`."""
    content = os.urandom(size)
    paths = []
    for number in range(files):
        path = f"d{number // in_one_directory:04d}/f{number % in_one_directory:04d}"
        if number % in_one_directory == 0:
            (directory / path).parent.mkdir(parents=True)
        with open(directory / path, "wb") as file:
            file.write(content)
        paths.append(path)
    return paths


def make_file(path: Path, size: int) -> Path:
    """Make a file of `size` random bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        for start in range(0, size, 1 << 20):
            file.write(os.urandom(min(1 << 20, size - start)))
    return path


@contextlib.contextmanager
def stopwatch() -> Iterator[list[float]]:
    """A list to which the duration of the block is appended, in seconds."""
    seconds: list[float] = []
    start = time.monotonic()
    yield seconds
    seconds.append(time.monotonic() - start)


@contextlib.contextmanager
def placed_on(cores: set[int] | None) -> Iterator[None]:
    """Processes that are started in the block run on these cores only; None: on all cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
