"""`fusehsm fetch` for tests: a process that is ended, or killed, and leaves no mount behind whatever happens."""

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from fusehsm.control import socket as control_socket
from fusehsm.engines.fuse_mount import unmount
from fusehsm.linux import mountinfo
from fusehsm.linux.mountinfo import id_of, read_mounts
from fusehsm.tier.stubs import mark as stub_mark
from fusehsm.tier.stubs import record as residency
from fusehsm.tier.stubs.record import Flags
from fusehsm.tier.stubs.tree import Namespace
from tests.support import harness


@dataclass
class Fetching:
    """A fetch that serves. `said`: the lines on stderr up to `ready`."""

    process: "subprocess.Popen[str]"
    store: str
    path: Path
    said: list[str]

    def end(self, number: signal.Signals = signal.SIGINT) -> tuple[str, str]:
        """End it as Ctrl-C does; its summary and what it has logged."""
        self.process.send_signal(number)
        return self.process.communicate(timeout=harness.PATIENCE)

    def kill(self) -> None:
        """SIGKILL. A mount stays and refuses."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def fetching(
    store: str | Path,
    path: Path,
    *options: str,
    within: Sequence[str] = (),
    command: Sequence[str] = harness.COMMAND,
    **more: object,
) -> Iterator[Fetching]:
    """Start it (`command`: fusehsm's, `within`: what comes before it), wait until it serves; killed at the end if it is still there, and what it
    mounted with it."""
    command = [*within, *command, "fetch", str(store), str(path), *options]
    with harness.start(command, **more) as process:
        try:
            assert process.stderr is not None
            said = []
            for line in process.stderr:
                said.append(line.rstrip("\n"))
                if line == "ready\n":
                    break
            else:
                raise AssertionError(f"no ready: {said}, exit code {process.wait()}")
            yield Fetching(process, str(store), path, said)
        finally:
            if process.poll() is None:
                process.kill()
                process.communicate()
            clear(path)


def clear(path: Path) -> None:
    """Take away what a killed fetch has left mounted: the daemon first, then the mount."""
    for mount in [mount for mount in read_mounts() if mount.mount_point == str(path)]:
        if mount.is_fusehsm:
            with suppress(OSError), control_socket.connect(mount) as connection:
                os.kill(control_socket.peer_of(connection).pid, signal.SIGKILL)
        with suppress(OSError):
            unmount(mount.mount_point, id_of(mount), lazily=True)


def expect_record_at_rest(path: str | Path, dir_fd: int | None = None) -> None:
    """The file has a record, and the record says that no fetch works on the file any more."""
    fd = os.open(path, os.O_RDONLY, dir_fd=dir_fd)
    try:
        mark = stub_mark.read(fd, Namespace.at(fd))
        assert mark is not None
        record = residency.read(fd, mark, Namespace.at(fd))
        assert record is not None
        assert not record.flags & Flags.OPEN
    finally:
        os.close(fd)


def is_mounted(path: Path) -> bool:
    """Whether something is mounted there."""
    return any(mount.mount_point == str(path) for mount in mountinfo.read_mounts())


def run(*command: str | Path, timeout: float = harness.PATIENCE) -> "subprocess.CompletedProcess[str]":
    """An accessor: a process of its own, which is given up on after a time."""
    return subprocess.run(
        [os.fspath(word) for word in command], capture_output=True, text=True, timeout=timeout, check=False
    )
