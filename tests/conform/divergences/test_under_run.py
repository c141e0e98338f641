"""Groups under `fusehsm run`, where a process of another tree gets hold of one."""

import ctypes
import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.kernel_and_run import RUN, STEP

pytestmark = [pytest.mark.fuse, pytest.mark.kernel]

SENDER = """
import ctypes, socket, sys
group = ctypes.CDLL(None).fanotify_init(0x8 | 0x2, 0)  # FAN_CLASS_PRE_CONTENT | FAN_NONBLOCK
control = socket.socket(fileno=int(sys.argv[1]))
socket.send_fds(control, [b"group"], [group])
control.recv(1)
"""


@contextmanager
def received(*before: str) -> Iterator[int]:
    """A group that another program, started by the words `before`, has made and sent."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            command = [*before, sys.executable, "-c", SENDER, str(theirs.fileno())]
            sender = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        ours.settimeout(STEP)
        _, (group,), _, _ = socket.recv_fds(ours, 16, 1)
        try:
            yield group
        finally:
            os.close(group)
            ours.send(b"!")
            assert sender.wait(STEP) == 0


def errno_of_read(group: int) -> int | None:
    with pytest.raises(OSError) as caught:
        os.read(group, 4096)
    return caught.value.errno


def errno_of_mark(group: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.fanotify_mark(group, 0x80, ctypes.c_uint64(0), -100, None)  # FAN_MARK_FLUSH
    return ctypes.get_errno() if failed else 0


async def test_groups_outside_of_the_tree(kernel_events: object) -> None:
    with received() as group:
        assert (errno_of_read(group), errno_of_mark(group)) == (errno.EAGAIN, 0)
    with received(*RUN, "--any-descriptor", "--") as group:
        assert (errno_of_read(group), errno_of_mark(group)) == (errno.EINVAL, errno.EINVAL)
