"""Mounts for as long as the process that wants them lives: `fusehsm mount --foreground` as a child."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from fusehsm.engines.fuse_mount import unmount
from fusehsm.held_signals import signals_held
from fusehsm.own_command import own_command, own_environment

_PATIENCE = 30.0  # seconds for a daemon to go


@dataclass(frozen=True, slots=True)
class ForegroundMount:
    """A mount that is ready: its server, and the thread that reads what it says, which ends with it."""

    daemon: "subprocess.Popen[str]"
    reader: threading.Thread


def _complain(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def foreground_mount(
    source: str, destination: str, *options: str, hear: Callable[[str], None] = _complain
) -> Iterator[ForegroundMount]:
    """`fusehsm mount` of one directory at another, which other users may use where root mounts it; unmounted at the end whatever happened.
    What its server says from now on goes to `hear`, a line at a time, in another thread.

    It ends, too, when this process is killed: it holds the other end of a pipe (PR_SET_PDEATHSIG does not outlast a change of setfsuid(2), as
    servers of file systems make it). Raises OSError with what the command said if the mount does not come up.
    """
    lifeline, held = os.pipe()
    command = own_command("mount", "--foreground", "--lifeline", str(lifeline))
    allow_other = ["--allow-other"] if os.geteuid() == 0 else []
    try:
        daemon = None
        try:
            with os.fdopen(lifeline, "rb", buffering=0), signals_held():
                daemon = subprocess.Popen(
                    [*command, *options, *allow_other, source, destination],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                    env=own_environment(),
                    pass_fds=[lifeline],
                    text=True,
                )
            _wait_until_ready(daemon)
            reader = threading.Thread(target=_pass_on, args=(daemon, hear), daemon=True)
            reader.start()
            yield ForegroundMount(daemon, reader)
        finally:
            if daemon is not None:
                _end(daemon, destination)
    finally:
        os.close(held)


def _wait_until_ready(daemon: "subprocess.Popen[str]") -> None:
    assert daemon.stderr is not None
    said = []
    for line in daemon.stderr:
        if line == "ready\n":
            return
        said.append(line.strip().removeprefix("fusehsm: "))
    raise OSError(" ".join(said) or f"the mount did not come up: exit code {daemon.wait()}")


def _pass_on(daemon: "subprocess.Popen[str]", hear: Callable[[str], None]) -> None:
    assert daemon.stderr is not None
    with daemon.stderr:
        for line in daemon.stderr:
            hear(line.rstrip("\n"))


def _end(daemon: "subprocess.Popen[str]", destination: str) -> None:
    """Unmount as a service manager would; if that takes too long, kill the daemon, which ends the connection, and unmount lazily."""
    daemon.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        daemon.wait(_PATIENCE)
    if daemon.poll() is None:
        daemon.kill()
        daemon.wait()
    absolute = os.path.abspath(destination)
    with suppress(OSError):  # it is gone already, as a daemon that ends leaves it
        unmount(
            os.path.join(os.path.realpath(os.path.dirname(absolute)), os.path.basename(absolute)), lazily=True
        )
