"""Programs that read a non-blocking group until EAGAIN: all that was queued has come then, on the real kernel and under `fusehsm run`."""

import os
import subprocess
import sys

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.control.protocol import CREDIT
from tests.support.kernel_and_run import STEP, Program, RunWorld

pytestmark = pytest.mark.any_engine
pytest_plugins = ["tests.support.listener_program_fixtures"]

MANY = 5 * CREDIT + 7

DRAINING = """
import os, sys
from fusehsm.fanotify.abi import *
from fusehsm.linux import syscalls

place, size = sys.argv[1], int(sys.argv[2])
group = syscalls.fanotify_init(FAN_CLASS_NOTIF | FAN_CLOEXEC | FAN_NONBLOCK, os.O_RDONLY)
syscalls.fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN, path=os.fsencode(place))
print("ready", flush=True)
for drain in sys.stdin:
    count = 0
    while True:
        try:
            data = os.read(group, size)
        except BlockingIOError:
            break
        for event in decode_events(LINUX_6_14, data):
            os.close(event.fd)
            count += 1
    print(f"{drain.strip()} drain: {count}", flush=True)
"""


def open_each(directory: str, number: int) -> None:
    """Open so many files."""
    for index in range(number):
        os.close(os.open(f"{directory}/drained-{index}", os.O_RDONLY))


@pytest.mark.parametrize("size", [24, 1 << 16])
@pytest.mark.parametrize("number", [0, CREDIT, MANY])
def test_all_that_is_queued(run_world: RunWorld, accessor: Accessor, number: int, size: int) -> None:
    for index in range(number):
        (run_world.place / f"drained-{index}").touch()
    command = run_world.command(sys.executable, "-c", DRAINING, str(run_world.place), str(size))
    with Program(command, stdin=subprocess.PIPE) as listener:
        listener.wait_ready()
        stdin = listener.process.stdin
        assert stdin is not None
        for drain in ("first", "second"):
            accessor.call(open_each, str(run_world.place), number)
            stdin.write(f"{drain}\n")
            stdin.flush()
            listener.output.wait_for(f"{drain} drain: {number}".__eq__, STEP)
        stdin.close()
        assert listener.end() == 0
