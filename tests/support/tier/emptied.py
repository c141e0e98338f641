"""Empty a stub, and die before a certain system call: `python -m tests.support.tier.emptied PATH CALL`."""

import os
import signal
import sys

from fusehsm.tier.stubs.stub import StubFile
from fusehsm.tier.stubs.tree import Tree

CALLS = {"os.setxattr", "os.utime", "os.removexattr"}


def main() -> None:
    path, call = sys.argv[1], int(sys.argv[2])
    fd = os.open(path, os.O_RDWR)
    file = StubFile.recover(fd, os.path.basename(path), Tree.of(fd), 4096)
    assert file is not None
    calls = 0

    def count(event: str, _: object) -> None:
        nonlocal calls
        if event in CALLS:
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    def sync() -> None:
        count("os.utime", None)
        os.fsync(fd)

    sys.addaudithook(count)
    file.punch(fd, sync)


if __name__ == "__main__":
    main()
