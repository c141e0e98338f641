"""Reads of files by a process of its own (tier/validate/worker.py), which may die of them or never come back: then they end with what happened to
it."""

import errno
import marshal
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from fusehsm.linux.subprocesses import own_environment
from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.tier.validate.plan import Read, Window
from fusehsm.tier.validate.worker import DIED, LONGEST_MESSAGE, STARTED, WINDOW_FILE_SIZE, Problem

TIMEOUT: Final = "TIMEOUT"
_AT_ONCE: Final = 256  # reads in one message
_START: Final = 60.0  # seconds for a worker to come up
_DEATH: Final = 5.0  # seconds for a killed reader to go; one that waits for an answer need not be able to


@dataclass(frozen=True, slots=True)
class Difference:
    """`offset`: of the first byte that differs, in the file. `zeros`: the page around it was all zeros, as far as it was read."""

    step: str
    offset: int
    zeros: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """`error`: the name of an errno, of the signal that the reader died of, or TIMEOUT."""

    step: str
    error: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one read: how many bytes were compared, and what was wrong. `gave_up`: the rest of the file is not to be read."""

    compared: int = 0
    problems: tuple[Difference | Failure, ...] = ()
    gave_up: bool = False


class Reader:
    """One process that reads below the directory `root_fd`, and is replaced when it dies. For one thread, which alone may close it."""

    def __init__(self, root_fd: int, timeout: float) -> None:
        """`timeout`: seconds after which a read is given up on."""
        self._root_fd = root_fd
        self._timeout = timeout
        self._window_fd = os.memfd_create("fusehsm-validate")
        os.ftruncate(self._window_fd, WINDOW_FILE_SIZE)
        self._window = mmap.mmap(self._window_fd, WINDOW_FILE_SIZE)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._connection: socket.socket | None = None
        self._pidfd = -1
        self._serial = 0

    def read(self, path: str, size: int, window: Window, data: bytes) -> Iterator[tuple[Read, Outcome]]:
        """Every read of the window with what came of it, up to one that gives up. `data` is what the store has there, `size` the file's, in bytes."""
        self._window[: len(data)] = data
        self._window[len(data) : len(data) + PAGE_SIZE] = bytes(PAGE_SIZE)
        waiting = list(window.reads)
        while waiting:
            batch = waiting[:_AT_ONCE]
            for read, outcome in zip(batch, self._batch(path, size, window.offset, batch), strict=False):
                waiting.pop(0)
                yield read, outcome
                if outcome.gave_up:
                    return

    def close(self) -> None:
        """End the processes."""
        self._stop()
        self._window.close()
        os.close(self._window_fd)

    def _batch(self, path: str, size: int, base: int, reads: Sequence[Read]) -> Iterator[Outcome]:
        """Outcomes of the first of the reads, of all unless the reader died or the last of them gave up."""
        connection = self._ready()
        self._serial += 1
        wanted = [(read.steps, read.offset, read.length) for read in reads]
        connection.send(marshal.dumps((self._serial, path, size, base, wanted)))
        for read in reads:
            compared = 0
            problems: list[Difference | Failure] = []
            for step in range(len(read.steps)):
                answer = self._next_answer(connection)
                if isinstance(answer, str):
                    problems.append(Failure(read.step_name(step), answer))
                    yield Outcome(compared, tuple(problems), gave_up=answer == TIMEOUT)
                    return
                number, count, problem = answer
                compared += count
                if problem is not None:
                    problems.append(_problem("open" if number < 0 else read.step_name(step), problem))
                if number < 0:
                    yield Outcome(compared, tuple(problems), gave_up=True)
                    return
            yield Outcome(compared, tuple(problems))

    def _next_answer(self, connection: socket.socket) -> tuple[int, int, Problem | None] | str:
        """What the reader says to the next step of the present request, or the name of what ended it."""
        connection.settimeout(self._timeout)
        try:
            while True:
                message = connection.recv(LONGEST_MESSAGE)
                if not message:  # the keeper itself has been killed
                    self._stop()
                    return "SIGKILL"
                told = marshal.loads(message)
                if told[0] == DIED:
                    self._forget_reader()
                    return _signal_name(told[1])
                serial, *answer = told
                if serial == self._serial:
                    return answer[0], answer[1], answer[2]
        except TimeoutError:
            self._kill_reader()
            return TIMEOUT

    def _ready(self) -> socket.socket:
        """The connection to a reader that waits for a request."""
        while True:
            if self._connection is None:
                self._start()
            connection = self._connection
            assert connection is not None
            try:
                if self._pidfd >= 0:
                    connection.settimeout(0)  # somebody may have killed it while it had nothing to do
                else:
                    connection.settimeout(_START)
                message, descriptors, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 1)
            except BlockingIOError:
                return connection
            except TimeoutError:
                self._stop()
                raise OSError(errno.ETIMEDOUT, "validate's own reader does not come up") from None
            if not message:
                failed_to_start = self._pidfd < 0
                self._stop()
                if failed_to_start:
                    raise OSError(errno.ECHILD, "validate's own reader does not start")
                continue
            told = marshal.loads(message)
            if told[0] == STARTED:
                (self._pidfd,) = descriptors
            elif told[0] == DIED:
                self._forget_reader()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = (theirs.fileno(), self._window_fd, self._root_fd)
        # -P: modules are not looked for in the working directory, which may be anybody's.
        command = [sys.executable, "-P", "-m", "fusehsm.tier.validate.worker", *map(str, descriptors)]
        with theirs:
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for who asked
                env=own_environment(),
            )
        self._connection = ours

    def _forget_reader(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _kill_reader(self) -> None:
        """Kill it; where it does not die of that, leave it behind, and start anew."""
        connection = self._connection
        assert connection is not None
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        connection.settimeout(_DEATH)
        try:
            while message := connection.recv(LONGEST_MESSAGE):
                if marshal.loads(message)[0] == DIED:
                    self._forget_reader()
                    return
        except TimeoutError:
            pass
        self._stop()

    def _stop(self) -> None:
        """End the keeper, before it can fork another reader, and the reader."""
        if self._keeper is not None:
            self._keeper.kill()
            self._keeper.wait()
            self._keeper = None
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self._forget_reader()
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"  # a real-time one


def _problem(step: str, problem: Problem) -> Difference | Failure:
    number, offset, zeros = problem
    if number:
        return Failure(step, errno.errorcode.get(number, str(number)))
    return Difference(step, offset, zeros)
