"""Fetches that start fast and can be stopped at a certain system call: `python -m tests.support.tier.fetch_forks`, a line of JSON for each.

A line on standard input is [FetchOptions as a dict, number of the call, log file, path of a FIFO]; the answer is the process's number. Who comes to
that call (0: nobody does) writes a byte into the FIFO and goes no further, so that what is outside can be stopped before this process is killed.
"""

import ctypes
import faulthandler
import json
import os
import signal
import sys
import time

from fusehsm.tier.fetch import handler as fetcher
from fusehsm.tier.fetch.command import FetchOptions, fetch
from fusehsm.tier.stores import local as local_store

# What Python tells its audit hooks of before it calls the system, of what a fill, a record and an eviction are made of.
CALLS = {"os.setxattr", "os.removexattr", "os.utime", "mmap.__new__", "os.getxattr"}
PR_SET_PDEATHSIG = 1
MODULES = (fetcher, local_store)  # loaded before the fork


def stop_at(call: int, news: str) -> None:
    calls = 0

    def count(event: str, _: object) -> None:
        nonlocal calls
        if event in CALLS:
            calls += 1
            if calls == call:
                fd = os.open(news, os.O_WRONLY)
                os.write(fd, b"x")
                time.sleep(3600)

    sys.addaudithook(count)


def serve(options: FetchOptions, call: int, log: str, news: str) -> int:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, flags in ((0, os.O_RDONLY), (1, os.O_WRONLY), (2, os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        os.dup2(os.open(log if number == 2 else os.devnull, flags, 0o644), number)
    faulthandler.register(signal.SIGUSR1)
    if call:
        stop_at(call, news)
    try:
        return fetch(options)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        words, call, log, news = json.loads(line)
        words["mount_arguments"] = tuple(words.get("mount_arguments", ()))
        child = os.fork()
        if not child:
            os._exit(serve(FetchOptions(**words), call, log, news))
        print(child, flush=True)


if __name__ == "__main__":
    main()
