"""Starts `fusehsm mount --foreground` as a child, so that the mount lives as long as the process that needs it."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fusehsm.control import socket as control_socket
from fusehsm.daemon.options import NOTE
from fusehsm.engines.fuse_mount import unmount
from fusehsm.linux.mountinfo import Mount, MountId, read_mounts
from fusehsm.linux.signals import signals_blocked, signals_held
from fusehsm.linux.subprocesses import own_command, own_environment

_PATIENCE = 30.0  # seconds for a daemon to end
_LONGEST_MESSAGE = 64  # bytes of the daemon's message with the number of its mount


@dataclass(frozen=True, slots=True)
class ForegroundMount:
    """A mount that is ready."""

    #: The mount's server.
    daemon: "subprocess.Popen[str]"
    #: The thread that reads the server's output; it ends with the server.
    reader: threading.Thread


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def foreground_mount(
    source: str,
    destination: str,
    *options: str,
    hear: Callable[[str], None] = _complain,
    pass_fds: Sequence[int] = (),
) -> Iterator[ForegroundMount]:
    """Run `fusehsm mount` of one directory at another, and unmount it at the end in every case.

    `pass_fds`: descriptors that the server inherits.

    Other users may use the mount if root mounts it. `hear` gets the server's notes, and in another thread each line that it prints once it is
    ready.

    The mount also ends when this process is killed, because this process holds the other end of a socket. (PR_SET_PDEATHSIG does not survive
    setfsuid(2), which filesystem servers call.) Raises OSError with the command's output if the mount does not come up.
    """
    lifeline, held = socket.socketpair()
    command = own_command("mount", "--foreground", "--lifeline", str(lifeline.fileno()))
    allow_other = ["--allow-other"] if os.geteuid() == 0 else []
    try:
        daemon, reader = None, None
        try:
            with lifeline, signals_held():
                daemon = subprocess.Popen(
                    [*command, *options, *allow_other, source, destination],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    env=own_environment(),
                    pass_fds=[lifeline.fileno(), *pass_fds],
                    text=True,
                )
            _wait_until_ready(daemon, hear)
            reader = threading.Thread(target=_pass_on, args=(daemon, hear), daemon=True)
            with signals_blocked():
                reader.start()
            yield ForegroundMount(daemon, reader)
        finally:
            if daemon is not None:
                _end(daemon, held, destination)
            if reader is not None:
                reader.join(_PATIENCE)  # else the server's last lines could be lost
    finally:
        held.close()


def _wait_until_ready(daemon: "subprocess.Popen[str]", hear: Callable[[str], None]) -> None:
    assert daemon.stderr is not None
    said = []
    for line in daemon.stderr:
        if line == "ready\n":
            return
        if line.startswith(NOTE):
            hear(line.rstrip("\n"))
            continue
        said.append(line.strip().removeprefix("fusehsm: "))
    raise OSError(" ".join(said) or f"the mount did not start: exit code {daemon.wait()}")


def _pass_on(daemon: "subprocess.Popen[str]", hear: Callable[[str], None]) -> None:
    assert daemon.stderr is not None
    with daemon.stderr:
        for line in daemon.stderr:
            hear(line.rstrip("\n"))


def _end(daemon: "subprocess.Popen[str]", held: socket.socket, destination: str) -> None:
    """Let the daemon unmount, as a service manager would. Kill it if that takes too long. Unmount the mount of a daemon that was killed."""
    daemon.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        daemon.wait(_PATIENCE)
    if daemon.poll() is None:
        daemon.kill()
        daemon.wait()
    if daemon.returncode >= 0:
        return
    held.setblocking(False)
    with suppress(OSError):  # the daemon has sent no number, or its mount is gone already
        left = MountId.unpack(held.recv(_LONGEST_MESSAGE))
        if left is not None:
            _unmount_dead(destination, left)


def pass_on_notes(said: str) -> str:
    """Print the notes among the lines that `fusehsm mount` has printed. Returns the other lines."""
    others = []
    for line in said.splitlines():
        if line.startswith(NOTE):
            _complain(line)
        else:
            others.append(line)
    return "\n".join(others)


def _unmount_dead(destination: str, left: MountId) -> None:
    """Unmount the mount of a daemon that is dead by now."""
    for mount in read_mounts():
        if mount.mount_id == left.number and _is_served(mount):
            return  # another mount with the same number (before Linux 6.8)
    absolute = os.path.abspath(destination)
    point = os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute))
    unmount(point, left, lazily=True)


def _is_served(mount: Mount) -> bool:
    try:
        control_socket.connect(mount).close()
    except OSError:
        return False
    return True
