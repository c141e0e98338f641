"""The demonstration: stubs of a real tree are filled when processes touch them, and every byte is checked.

    python examples/demo.py [--megabytes 200]

It makes stubs of Python's standard library, of a program and of one large file, and mounts them with the mirror handler. Then it runs Python from
the mount, searches a part of the tree, runs the program and reads parts of the large file. It compares all that was read with the origin. It needs
no root and leaves nothing behind. Exit code 1 if there was a difference.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
PROGRAM = "sha256sum"
SEARCHED = ("email", "json", "xml", "importlib")
PARTS = 40
SEED = 20140
PATIENCE = 300  # seconds for one accessor


class DemoError(Exception):
    """The demonstration cannot go on. The message is one line with the cause."""


@dataclass(frozen=True, slots=True)
class Row:
    """The result of one step."""

    name: str
    # The number of files that it read.
    files: int
    # The number of events that it made.
    events: int
    # Bytes that these events fetched.
    fetched: int
    # Bytes of all stubs on disk after the step.
    disk: int
    # The time that it took.
    seconds: float


@dataclass(slots=True)
class Demo:
    """One run: its directories and its results."""

    # The directory for everything.
    work: Path
    # The size of the large file in MiB.
    megabytes: int
    # A line for each difference from the origin.
    differences: list[str]
    # A row for each finished step.
    rows: list[Row]

    @property
    def origin(self) -> Path:
        """The directory with the content."""
        return self.work / "origin"

    @property
    def stubs(self) -> Path:
        """The backing: sparse files without content."""
        return self.work / "stubs"

    @property
    def mount(self) -> Path:
        """The directory in which the stubs are used."""
        return self.work / "mount"

    @property
    def counters(self) -> Path:
        """The file with the handler's counts (examples/counted.py)."""
        return self.work / "counters.json"

    @property
    def library(self) -> str:
        """The directory of the standard library, relative to PYTHONHOME/lib."""
        return f"python{sys.version_info.major}.{sys.version_info.minor}"

    # The tree

    def make_origin(self) -> int:
        """Make the origin, with links to content that exists already, and its stubs. Returns the number of stubs."""
        (self.origin / "lib").mkdir(parents=True)
        (self.origin / "lib" / self.library).symlink_to(sysconfig.get_path("stdlib"))
        (self.origin / "bin").mkdir()
        (self.origin / "bin" / PROGRAM).symlink_to(elf_program())
        generator = random.Random(SEED)
        with open(self.origin / "large.bin", "wb") as large:
            for _ in range(self.megabytes):
                large.write(generator.randbytes(1 << 20))
        return sum(1 for _ in make_stubs(self.origin, self.stubs))

    # The steps. Each uses the mount, compares with the origin, and returns the number of files that it read.

    def python_imports(self) -> int:
        """Run a Python program with the mount as its whole standard library."""
        interpreter = os.path.realpath(sys.executable)
        environment = {"PYTHONHOME": str(self.mount), "LC_ALL": "C.UTF-8"}
        arguments = [interpreter, "-S", "-s", "-B", "-P", str(HERE / "imports.py")]
        hashes = json.loads(run(arguments, env=environment))
        if not hashes.pop("").startswith("1.4142135623730950488016887242096980785696718753769 1 done"):
            self.differences.append("the imported modules computed something else")
        for path, digest in hashes.items():
            try:
                relative = Path(path).relative_to(self.mount)
            except ValueError:
                self.differences.append(f"{path} was imported from outside of the mount")
                continue
            self.compare(str(relative), digest, sha256_of(self.origin / relative))
        return len(hashes)

    def search(self) -> int:
        """Search a part of the tree with grep -r."""
        arguments = ["grep", "-r", "-n", "-I", "--include=*.py", "def ", *SEARCHED]
        found, expected = (
            sorted(run(arguments, cwd=root / "lib" / self.library).splitlines())
            for root in (self.mount, self.origin)
        )
        if found != expected or not found:
            self.differences.append(f"grep -r found {len(found)} lines, {len(expected)} in the origin")
        return len({line.split(b":", 1)[0] for line in found})

    def execute(self) -> int:
        """Run an ELF program from the mount, on a file from the mount."""
        subject = Path("lib") / self.library / "pydoc_data" / "topics.py"
        output = run([str(self.mount / "bin" / PROGRAM), str(self.mount / subject)], env={"LC_ALL": "C"})
        self.compare(str(subject), output.decode().split()[0], sha256_of(self.origin / subject))
        return 2

    def large_parts(self, way: str) -> int:
        """Read random parts of the large file by pread or through mappings."""
        arguments = [
            sys.executable,
            str(HERE / "parts.py"),
            str(self.mount / "large.bin"),
            way,
            str(PARTS),
            str(SEED),
        ]
        parts = json.loads(run(arguments))
        with open(self.origin / "large.bin", "rb") as large:
            for offset, length, digest in parts:
                expected = hashlib.sha256(os.pread(large.fileno(), length, offset)).hexdigest()
                self.compare(f"large.bin {offset}+{length} by {way}", digest, expected)
        if len(parts) != PARTS:
            self.differences.append(f"{len(parts)} parts read by {way} instead of {PARTS}")
        return 1

    def compare(self, name: str, digest: str, expected: str) -> None:
        """Note a difference between the content from the mount and the origin."""
        if digest != expected:
            self.differences.append(f"{name}: sha256 {digest[:16]}…, in the origin {expected[:16]}…")

    # Counts

    def step(self, name: str, action: Callable[[], int], console: Console) -> None:
        """Run one step and note its row."""
        events, fetched = self.counts()
        start = time.monotonic()
        with console.status(name):
            files = action()
        seconds = time.monotonic() - start
        events_after, fetched_after = self.counts()
        row = Row(
            name, files, events_after - events, fetched_after - fetched, disk_usage(self.stubs), seconds
        )
        self.rows.append(row)

    def counts(self) -> tuple[int, int]:
        """The number of the handler's events and of its fetched bytes so far."""
        try:
            events, fetched = json.loads(self.counters.read_text())
        except FileNotFoundError:
            return 0, 0
        return events, fetched


def elf_program() -> str:
    """The path of an ELF program of this machine. Raises DemoError if there is none."""
    path = shutil.which(PROGRAM)
    if path is None:
        raise DemoError(f"{PROGRAM}: not found; install coreutils")
    with open(path, "rb") as file:
        if file.read(4) != b"\x7fELF":
            raise DemoError(f"{path}: not an ELF binary; install GNU coreutils")
    return os.path.realpath(path)


def make_stubs(origin: Path, stubs: Path) -> Iterator[Path]:
    """Make a sparse file of the same size, mode and times for every readable file of `origin`; yields their paths."""
    for directory, names, files in os.walk(origin, followlinks=True):
        names[:] = [name for name in names if name not in ("site-packages", "dist-packages")]
        target = stubs / Path(directory).relative_to(origin)
        target.mkdir(parents=True, exist_ok=True)
        for name in files:
            source = os.path.join(directory, name)
            if not (os.path.isfile(source) and os.access(source, os.R_OK)):
                continue
            status = os.stat(source)
            stub = target / name
            with open(stub, "wb") as file:
                file.truncate(status.st_size)
                os.fchmod(file.fileno(), status.st_mode & 0o777 | 0o600)
            os.utime(stub, ns=(status.st_atime_ns, status.st_mtime_ns))
            yield stub


def disk_usage(path: Path) -> int:
    """Bytes on disk of a tree's files, as `du` counts them."""
    return sum(
        os.lstat(os.path.join(directory, name)).st_blocks * 512
        for directory, _, files in os.walk(path)
        for name in files
    )


def sha256_of(path: Path) -> str:
    """The hash of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def run(
    arguments: list[str],
    *,
    cwd: Path | None = None,
    env: dict[str, str] | None = None,
    patience: float = PATIENCE,
) -> bytes:
    """Run a program and return its output. Raises DemoError if it fails or does not end within `patience` seconds."""
    try:
        done = subprocess.run(
            arguments,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=patience,
            check=True,
        )
    except subprocess.TimeoutExpired:
        raise DemoError(f"{arguments[0]}: no end after {patience:.0f} s") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.decode(errors="replace").strip().splitlines()[-1:] or [""]
        raise DemoError(f"{' '.join(arguments[:6])}: exit {error.returncode}: {last[0]}") from None
    return done.stdout


@contextmanager
def mounted(demo: Demo) -> Iterator[None]:
    """Mount the stubs with the mirror handler; unmount in all cases at the end."""
    environment = os.environ | {
        "MIRROR_ORIGIN": str(demo.origin),
        "MIRROR_ROOT": str(demo.mount),
        "COUNTERS": str(demo.counters),
        "PYTHONPATH": str(HERE.parent),
        "XDG_RUNTIME_DIR": str(demo.work),  # the control socket lies there and is removed with it
    }
    command = [sys.executable, "-m", "fusehsm", "mount", str(demo.stubs), str(demo.mount)]
    command += ["--foreground", "--handler", "examples.counted:handler"]
    daemon = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert daemon.stderr is not None
    ready = threading.Event()
    relay = threading.Thread(target=relay_log, args=(daemon.stderr, ready))
    relay.start()
    try:
        ready.wait()
        if daemon.poll() is not None:
            raise DemoError(f"fusehsm mount: exit {daemon.returncode}; the cause is above")
        yield
    finally:
        end(daemon, demo.mount)
        relay.join()
        daemon.stderr.close()


def relay_log(stream: IO[bytes], ready: threading.Event) -> None:
    """Copy the daemon's stderr to ours. Its line "ready", or its end, sets `ready`."""
    for line in stream:
        if line == b"ready\n":
            ready.set()
        else:
            sys.stderr.write(line.decode(errors="replace"))
    ready.set()


def end(daemon: subprocess.Popen[bytes], point: Path) -> None:
    """Let the daemon unmount and end. If it does not, kill it and unmount lazily."""
    daemon.terminate()
    try:
        daemon.wait(timeout=30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as table:
        mounted = any(line.split(" ")[4] == str(point) for line in table)
    if mounted:
        lazily = ["umount", "-l"] if os.geteuid() == 0 else ["fusermount3", "-u", "-z"]
        subprocess.run([*lazily, str(point)], check=False)


def table_of(demo: Demo, stubs: int, before: int, total: Row) -> Table:
    """The table at the end."""
    table = Table(title=f"{stubs:,} stubs; on disk {size_of(before)} before, {size_of(total.disk)} after")
    table.add_column("step")
    for title in ("files", "events", "fetched", "du after", "seconds"):
        table.add_column(title, justify="right")
    for row in [*demo.rows, total]:
        cells = (
            f"{row.files:,}",
            f"{row.events:,}",
            size_of(row.fetched),
            size_of(row.disk),
            f"{row.seconds:.2f}",
        )
        table.add_row(row.name, *cells, end_section=row is demo.rows[-1])
    return table


def size_of(count: int) -> str:
    """The text for a number of bytes, in MiB."""
    return f"{count / (1 << 20):.1f} MiB"


def demonstrate(work: Path, megabytes: int, console: Console) -> list[str]:
    """Run everything under `work`, print the table and return the differences."""
    demo = Demo(work, megabytes, [], [])
    demo.mount.mkdir()
    with console.status("making stubs"):
        stubs = demo.make_origin()
    before = disk_usage(demo.stubs)
    start = time.monotonic()
    with mounted(demo):
        demo.step("python3 from the mount", demo.python_imports, console)
        demo.step("grep -r", demo.search, console)
        demo.step(f"ELF binary ({PROGRAM})", demo.execute, console)
        for way in ("pread", "private", "shared"):
            name = f"{PARTS} parts by {'pread' if way == 'pread' else f'mmap, {way}'}"
            demo.step(name, partial(demo.large_parts, way), console)
    seconds = time.monotonic() - start
    events, fetched = demo.counts()
    total = Row("all", sum(row.files for row in demo.rows), events, fetched, disk_usage(demo.stubs), seconds)
    if fetched == 0 or total.disk <= before:
        demo.differences.append("nothing was fetched: the stubs' own zeros were read")
    console.print(table_of(demo, stubs, before, total))
    return demo.differences


def main() -> int:
    """Run the demonstration in a temporary directory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--megabytes", type=int, default=200, help="size of the large file (default: 200)")
    megabytes = parser.parse_args().megabytes
    console = Console()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that everything is removed after SIGTERM too
    with tempfile.TemporaryDirectory(prefix="fusehsm-demo-") as work:
        try:
            differences = demonstrate(Path(os.path.realpath(work)), megabytes, console)
        except DemoError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
    for difference in differences:
        print(f"demo: {difference}", file=sys.stderr)
    if not differences:
        console.print("Every byte that was read is the origin's.")
    return 1 if differences else 0


if __name__ == "__main__":
    sys.exit(main())
