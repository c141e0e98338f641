"""`make soak`: fetch is killed at hundreds of random moments while users work; every byte that can be read afterwards must be right.

An episode: a tree of stubs, one or several kills in a row, each while users read and write, then a fetch through which everything is compared. A kill
is SIGKILL of fetch at a moment, or at one of its system calls, of the mount's daemon, or of both; now and then there is an orderly end instead.
"""

import argparse
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from fusehsm.conform.sides import ext4_image
from fusehsm.control import socket as control_socket
from fusehsm.linux.mountinfo import read_mounts
from fusehsm.tier.populate.create import Planter
from fusehsm.tier.stores.local import LocalStore
from tests.support import harness
from tests.support.tier.fetching import clear
from tests.support.tier.soak_model import Content
from tests.support.tier.soak_user import User, Wrong

BACKENDS = ("kernel", "fuse")
USERS = 2
PATIENCE = 60.0  # seconds


class Forks:
    """tests/support/tier/fetch_forks.py."""

    def __init__(self, directory: Path) -> None:
        self._process = harness.start(
            [sys.executable, "-m", "tests.support.tier.fetch_forks"], stdin=subprocess.PIPE, stderr=None
        )
        self._news = directory / "news"
        os.mkfifo(self._news)
        self.news_fd = os.open(self._news, os.O_RDONLY | os.O_NONBLOCK)
        self._keep_fd = os.open(self._news, os.O_WRONLY)
        self.log = directory / "log"

    def start(self, call: int, **options: object) -> "Fetch":
        """A fetch that serves."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BlockingIOError):
            os.read(self.news_fd, 100)
        self.log.write_bytes(b"")
        self._process.stdin.write(json.dumps([options, call, str(self.log), str(self._news)]) + "\n")
        self._process.stdin.flush()
        fetch = Fetch(int(self._process.stdout.readline()))
        deadline = time.monotonic() + PATIENCE
        while not self.log.read_bytes().endswith(b"ready\n") and b"\nready\n" not in self.log.read_bytes():
            if fetch.is_dead() or time.monotonic() > deadline:
                fetch.kill()
                raise AssertionError(f"fetch does not start: {self.log.read_text()}")
            if select.select([self.news_fd], [], [], 0.002)[0]:
                break
        return fetch

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(PATIENCE)
        os.close(self.news_fd)
        os.close(self._keep_fd)


class Fetch:
    """A process that serves."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._pidfd = os.pidfd_open(pid)

    def is_dead(self, seconds: float = 0.0) -> bool:
        """Whether it is, at least after so long."""
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], seconds)[0])

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End it and wait."""
        if self._pidfd < 0:
            return
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)
        if not self.is_dead(PATIENCE):
            signal.pidfd_send_signal(self._pidfd, signal.SIGUSR1)  # it says where it is
            self.is_dead(1)
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            assert self.is_dead(PATIENCE)
            raise AssertionError("fetch does not end")
        os.close(self._pidfd)
        self._pidfd = -1


class Soak:
    """Episodes below one destination."""

    def __init__(self, directory: Path, backend: str, seed: int) -> None:
        self.points = 0
        self.checked = 0
        self.refused = 0
        self.acts = 0
        self.kinds: Counter[str] = Counter()
        self.refusals: Counter[int | None] = Counter()
        self._backend = backend
        self._choose = random.Random(f"{backend} {seed}")
        self._store = directory / f"store-{backend}"
        self._target = directory / f"tree-{backend}"
        self._store.mkdir()
        self._target.mkdir()
        self._root_fd = os.open(self._target, os.O_RDONLY | os.O_DIRECTORY)
        work = directory / f"work-{backend}"
        work.mkdir()
        self._forks = Forks(work)
        self._episodes = 0

    def close(self) -> None:
        """Leave nothing mounted."""
        self._forks.close()
        clear(self._target)
        os.close(self._root_fd)

    def episode(self) -> None:
        """Raises Wrong."""
        self._episodes += 1
        choose = self._choose
        name = f"e{self._episodes}"
        block = choose.choice((4096, 8192, 16384, 65536))
        groups = self._plant(name, block)
        options: dict[str, object] = {
            "store": str(self._store),
            "destination": str(self._target),
            "backend": self._backend,
            "read_ahead": choose.choice(("0", "64K", "1M")),
            "keep_interval": choose.choice((0.02, 0.1, 5.0)),
            "deadline": "5s",
            "mount_arguments": ("--unattended", "deny=EIO"),
        }
        kills = choose.choice((1, 1, 2, 3))
        for _ in range(kills):
            options["block_size"] = str(block if choose.random() < 0.9 else choose.choice((4096, 65536)))
            self._work_until_killed(groups, options)
        fetch = self._forks.start(0, **options)
        try:
            for files in groups:
                user = User(self._target, files, 0, 1, lambda: False)
                for content in list(files):
                    self.refused += user.check(content, choose)
                    self.checked += 1
        except Wrong as error:
            raise Wrong(
                f"{self._backend}, episode {self._episodes}, {kills} kills: {error}\n{self._forks.log.read_text()}"
            ) from None
        finally:
            fetch.kill()
        shutil.rmtree(self._store / name)
        for directory, _, names, fd in os.fwalk(name, topdown=False, dir_fd=self._root_fd):
            for file in names:
                os.unlink(file, dir_fd=fd)
            del directory
        os.rmdir(name, dir_fd=self._root_fd)

    def _plant(self, name: str, block: int) -> list[list[Content]]:
        """Stubs of files of all sizes, for each user; no user works with the last group."""
        choose = self._choose
        place = self._store / name
        place.mkdir()
        groups = []
        sizes = (0, 1, 1000, block - 1, block, block + 1, 10 * block + 123, 24 * block)
        for user in range(USERS + 1):
            files = []
            for number, size in enumerate(sizes):
                content = bytearray(choose.randbytes(size))
                path = f"{name}/{user}-{number}"
                with open(self._store / path, "wb") as file:
                    if number == len(sizes) - 1:  # islands
                        content = bytearray(size)
                        os.truncate(file.fileno(), size)
                        for _ in range(4):
                            offset, data = (
                                choose.randrange(size),
                                choose.randbytes(choose.choice((10, 4096, 9000))),
                            )
                            data = data[: size - offset]
                            content[offset : offset + len(data)] = data
                            os.pwrite(file.fileno(), data, offset)
                    else:
                        file.write(content)
                files.append(Content([content], [path], bytes(content)))
            groups.append(files)
        # Planted where nobody hears of it, so that one mount serves many episodes.
        planter = Planter(self._root_fd, lambda path, why: None)
        with LocalStore(str(self._store)) as store:
            for entry in store.tree():
                if entry.path == name or entry.path.startswith(f"{name}/"):
                    planter.plant(entry)
            planter.finish()
        planter.close()
        return groups

    def _work_until_killed(self, groups: list[list[Content]], options: dict[str, object]) -> None:
        choose = self._choose
        self.points += 1
        at_call = choose.random() < 0.5
        fetch = self._forks.start(choose.randrange(1, 120) if at_call else 0, **options)
        stopping = threading.Event()

        def suspect() -> bool:
            # An access that waits for the kernel's listener is allowed when it dies.
            return self._backend == "kernel" and (stopping.is_set() or fetch.is_dead(0.3))

        def in_flight() -> bool:
            return self._backend == "kernel" and stopping.is_set()

        failures: list[BaseException] = []
        users = [
            User(self._target, files, choose.randrange(1 << 30), 200_000, suspect, in_flight)
            for files in groups[:USERS]
        ]
        readers = [_Reader(self._target, groups[USERS], choose.randrange(1 << 30), 1, suspect)]

        def work(user: User) -> None:
            try:
                while not stopping.is_set():
                    user.act()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(user,), daemon=True) for user in [*users, *readers]]
        for thread in threads:
            thread.start()
        select.select(
            [self._forks.news_fd], [], [], choose.uniform(0.0, 0.4) if at_call else choose.uniform(0, 0.15)
        )
        stopping.set()
        for files in groups:
            for content in files:
                content.history.append("kill")
        try:
            kind = self._kill(fetch, orderly=not at_call)
        except AssertionError as error:
            raise AssertionError(f"{self._backend}: {error}: {self._forks.log.read_text()}") from None
        self.kinds[f"{self._backend} {kind}{' at a call' if at_call else ''}"] += 1
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                fetch.kill()
                clear(self._target)
                raise AssertionError(f"an access hangs after {kind}")
        for user in [*users, *readers]:
            self.acts += user.acts
            self.refusals.update(user.refusals)
        if failures:
            raise Wrong(
                f"{self._backend}, episode {self._episodes}, while served: {failures[0]!r}\n{self._forks.log.read_text()}"
            )

    def _kill(self, fetch: Fetch, *, orderly: bool) -> str:
        draw = self._choose.random()
        if self._backend == "fuse" and draw < 0.12:
            if draw < 0.06:
                self._kill_daemon()
                fetch.is_dead(0.2)
                fetch.kill()
                return "daemon"
            fetch.kill()
            self._kill_daemon()
            return "both"
        if orderly and draw > 0.88:
            fetch.kill(signal.SIGINT if draw > 0.94 else signal.SIGTERM)
            return "orderly end"
        fetch.kill()
        return "fetch"

    def _kill_daemon(self) -> None:
        for mount in [mount for mount in read_mounts() if mount.mount_point == str(self._target)]:
            if mount.is_fusehsm:
                with suppress(OSError), control_socket.connect(mount) as connection:
                    daemon = Fetch(control_socket.peer_of(connection).pid)
                    daemon.kill()


class _Reader(User):
    """Only reads."""

    def act(self) -> None:
        self.acts += 1
        try:
            self._choose.choice((self._read, self._read_mapped))(self._choose.choice(self.files))
        except OSError as error:
            self.refusals[error.errno] = self.refusals.get(error.errno, 0) + 1


@contextmanager
def soaking(directory: Path, backend: str, seed: int) -> Iterator[Soak]:
    """A soak on a file system that has what the backend needs."""
    soak = Soak(directory, backend, seed)
    try:
        yield soak
    finally:
        soak.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, default=500, help="kills in all (default: 500)")
    parser.add_argument(
        "--seed",
        type=int,
        default=int(time.time()),
        help="where the random numbers begin (default: the time)",
    )
    parser.add_argument("--backend", choices=BACKENDS, action="append")
    arguments = parser.parse_args()
    backends = arguments.backend or BACKENDS
    print(f"seed {arguments.seed}", flush=True)
    signal.signal(signal.SIGTERM, interrupt)
    # A background job of a shell ignores it, and so would every fetch that is ended with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started = time.monotonic()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusehsm-soak-")))
        root = stack.enter_context(ext4_image(directory / "ext4", 2048))
        soaks = [stack.enter_context(soaking(root, backend, arguments.seed)) for backend in backends]
        try:
            while sum(soak.points for soak in soaks) < arguments.points:
                for soak in soaks:
                    soak.episode()
        except (Interrupted, KeyboardInterrupt):
            print("interrupted; up to here:")
        report(soaks, time.monotonic() - started)


def report(soaks: list[Soak], seconds: float) -> None:
    """What has been tried and found right."""
    kinds = sum((soak.kinds for soak in soaks), Counter())
    refusals = sum((soak.refusals for soak in soaks), Counter())
    print(f"{sum(kinds.values())} kills in {seconds:.0f} s: {dict(kinds)}")
    print(f"{sum(soak.acts for soak in soaks):,} acts of users, refused with {dict(refusals)}")
    checked, refused = sum(soak.checked for soak in soaks), sum(soak.refused for soak in soaks)
    print(f"{checked:,} files compared, {refused:,} reads of them refused; no byte wrong", flush=True)


class Interrupted(BaseException):
    """A signal asks the soak to end; it then unmounts everything."""


def interrupt(*_: object) -> None:
    """A signal handler."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Interrupted


if __name__ == "__main__":
    main()
