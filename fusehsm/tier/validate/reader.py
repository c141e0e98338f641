"""Reads of files by another process (tier/validate/worker.py). If it dies or never answers, the outcome of the read says so."""

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
_START: Final = 60.0  # seconds for a worker to start
_DEATH: Final = 5.0  # seconds for a killed reader to end; a reader that waits for an answer may not end


@dataclass(frozen=True, slots=True)
class Difference:
    """A read saw other bytes than the store has."""

    # Name of the step (Read.step_name).
    step: str
    # Offset in the file of the first byte that differs.
    offset: int
    # The part of its page that was read is all zeros.
    zeros: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """A read failed."""

    # Name of the step, or "open".
    step: str
    # Name of an errno, of the signal that killed the reader, or TIMEOUT.
    error: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one read."""

    # Bytes compared.
    compared: int = 0
    # Differences and failures of the steps.
    problems: tuple[Difference | Failure, ...] = ()
    # The rest of the file must not be read.
    gave_up: bool = False


class Reader:
    """A process that reads below the directory `root_fd`, and is replaced when it dies. Only one thread may use and close it."""

    def __init__(self, root_fd: int, timeout: float) -> None:
        """`timeout`: seconds for one step of a read."""
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
        """Each read of the window and its outcome, up to one that gives up. `data`: the store's content there; `size`: of the file in bytes."""
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
        """Kill the processes, and close the window."""
        self._stop()
        self._window.close()
        os.close(self._window_fd)

    def _batch(self, path: str, size: int, base: int, reads: Sequence[Read]) -> Iterator[Outcome]:
        """The outcomes of the reads in their order; they end early if the reader dies or a read gives up."""
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
        """The reader's answer (index of the read, bytes, problem) to the next step, or the name of the signal or TIMEOUT that ended it."""
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
        """The connection to a reader that waits for a request. Raises OSError ETIMEDOUT or ECHILD if no reader starts."""
        while True:
            if self._connection is None:
                self._start()
            connection = self._connection
            assert connection is not None
            try:
                if self._pidfd >= 0:
                    connection.settimeout(0)  # the idle reader may have been killed
                else:
                    connection.settimeout(_START)
                message, descriptors, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE, 1)
            except BlockingIOError:
                return connection
            except TimeoutError:
                self._stop()
                raise OSError(errno.ETIMEDOUT, "validate's reader does not begin") from None
            if not message:
                failed_to_start = self._pidfd < 0
                self._stop()
                if failed_to_start:
                    raise OSError(errno.ECHILD, "validate's reader cannot be started")
                continue
            told = marshal.loads(message)
            if told[0] == STARTED:
                (self._pidfd,) = descriptors
            elif told[0] == DIED:
                self._forget_reader()

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        descriptors = (theirs.fileno(), self._window_fd, self._root_fd)
        # -P: no modules from the working directory, which may belong to any user.
        command = [sys.executable, "-P", "-m", "fusehsm.tier.validate.worker", *map(str, descriptors)]
        with theirs:
            self._keeper = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=descriptors,
                start_new_session=True,  # Ctrl-C is for the command only
                env=own_environment(),
            )
        self._connection = ours

    def _forget_reader(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _kill_reader(self) -> None:
        """Kill the reader. If it does not end, leave it behind; the next request starts a new one."""
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
        """Kill the keeper, before it can fork another reader, then the reader."""
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
        return f"signal {number}"  # a real-time signal


def _problem(step: str, problem: Problem) -> Difference | Failure:
    number, offset, zeros = problem
    if number:
        return Failure(step, errno.errorcode.get(number, str(number)))
    return Difference(step, offset, zeros)
