"""Populate that dies, as by kill -9, before a certain system call: `python -m tests.support.tier.killed`, a line of JSON for each attempt.

A line on standard input is [store, destination, call number, unnamed]; the answer is whether it died (or was through before).
"""

import json
import os
import signal
import sys

from fusehsm.tier.populate.create import Planter
from fusehsm.tier.stores.local import LocalStore

# What Python tells its audit hooks of before it calls the system, as far as it changes something.
CHANGES = {
    "open", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.removexattr", "os.rename", "os.setxattr", "os.symlink",
    "os.truncate", "os.utime",
}  # fmt: skip


def populate(store: str, destination: str, unnamed: bool) -> None:
    fd = os.open(destination, os.O_RDONLY | os.O_DIRECTORY)
    planter = Planter(fd, lambda path, why: None, unnamed=unnamed)
    for entry in LocalStore(store).tree():
        planter.plant(entry)
    planter.finish()


def die_at(call: int) -> None:
    calls = 0

    def count(event: str, _: object) -> None:
        nonlocal calls
        if event in CHANGES:
            calls += 1
            if calls == call:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def main() -> None:
    for line in sys.stdin:
        store, destination, call, unnamed = json.loads(line)
        child = os.fork()
        if not child:
            die_at(call)
            populate(store, destination, unnamed)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        print(json.dumps(os.WIFSIGNALED(status)), flush=True)


if __name__ == "__main__":
    main()
