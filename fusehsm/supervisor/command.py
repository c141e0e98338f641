"""Runs `fusehsm run`: makes the mounts, runs the command under the filter, passes signals on, returns the exit code."""

import errno
import logging
import os
import re
import resource
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NoReturn

from fusehsm.fanotify.abi import DIALECTS
from fusehsm.linux import security_modules
from fusehsm.linux.signals import Interrupted, interruptible
from fusehsm.linux.syscalls import prctl
from fusehsm.supervisor import filters
from fusehsm.supervisor.calls import Calls, Workers
from fusehsm.supervisor.launch import VIEW
from fusehsm.supervisor.launcher import Launcher, LaunchError
from fusehsm.supervisor.mounts import mount_places, mount_with_view, no_view
from fusehsm.supervisor.notifier import Notifier
from fusehsm.supervisor.numbers import (
    PR_SET_CHILD_SUBREAPER,
    SECCOMP_FILTER_FLAG_NEW_LISTENER,
    SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
    Architecture,
    architecture,
)
from fusehsm.supervisor.options import RunError, RunOptions, check
from fusehsm.supervisor.view import View
from fusehsm.text import LineFormatter, shown

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # the exit codes of shells

_OLDEST_KERNEL: Final = (5, 9)
_FROM_TERMINAL: Final = 0x80  # SI_KERNEL: the terminal has sent the signal to the command as well
_PASSED_ON: Final = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGCONT,
)
_JOB_CONTROL: Final = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_FIXES: Final = {
    errno.EINVAL: "this kernel has no seccomp user notification; it needs Linux 5.9 or later",
    errno.ENOSYS: "this kernel has no seccomp; it needs Linux 5.9 or later with CONFIG_SECCOMP_FILTER",
    errno.EBUSY: "a supervisor of system calls is at work here already (fusehsm run within fusehsm run, or a container's); run it outside",
    errno.EPERM: "seccomp(2) is forbidden here; in a container allow it (--security-opt seccomp=unconfined)",
}

_log = logging.getLogger(__name__)


def run(options: RunOptions) -> NoReturn:
    """Run the command and end as it does: with its exit code, or by the signal that killed it.

    Raises OSError with one line, ValueError for bad usage.
    """
    check(options)
    machine = architecture()
    check_kernel(os.uname().release)
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("fusehsm run: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    directory = os.getcwd()
    # The first ending signal that comes before the command starts ends this process in good order. Later ones do not disturb that.
    with interruptible():
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            code = _run_with_mounts(options, machine, directory)
            sys.stdout.flush()
            sys.stderr.flush()
            if code < 0:
                _die_of(-code)
            # Do not wait for threads that still wait for calls, or for another file system's server.
            os._exit(code)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _run_with_mounts(options: RunOptions, machine: Architecture, directory: str) -> int:
    """Make the mounts and run the command. Returns the exit code, negative for a signal. Signals that are passed on stay blocked.

    At the end all mounts are gone that are not to be kept.
    """
    try:
        with ExitStack() as mounts:
            if not options.listener:
                mount_places(mounts, options)
                return _Run(options, machine, directory).run(mounts.enter_context(Launcher()))
            # Its view is made before the mounts, so it outlives them.
            launcher = mounts.enter_context(Launcher())
            view = mount_with_view(mounts, launcher, options)
            return _Run(options, machine, directory).run(launcher, view)
    except Interrupted as interrupted:
        return -interrupted.number


def check_kernel(release: str) -> None:
    """Check a kernel by its release, as uname(2) gives it. Raises RunError if that kernel cannot do this."""
    version = tuple(int(number) for number in re.findall(r"\d+", release)[:2])
    if version < _OLDEST_KERNEL:
        raise RunError(
            f"fusehsm run: Linux {release} cannot hand descriptors to a supervised process; it needs 5.9 or later"
        )


def _die_of(number: int) -> None:
    """End by the command's signal, so that a waiting parent sees the same. Leaves no core file of this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if number != signal.SIGKILL:
        # Before it is unblocked: one that has come since the command's end would still run the handler.
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])


class _Run:
    """One command under the filter."""

    def __init__(self, options: RunOptions, machine: Architecture, directory: str) -> None:
        self._options = options
        self._machine = machine
        self._directory = directory
        self._descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)

    def run(self, launcher: Launcher, view: View | None = None) -> int:
        """Run it. Returns the exit code, negative for a signal."""
        with suppress(OSError, ValueError):  # events of all groups together bring many descriptors
            resource.setrlimit(resource.RLIMIT_NOFILE, (self._descriptors[1], self._descriptors[1]))
        if os.geteuid() != 0:
            # If Yama guards ptrace(2), and so a process's memory, only ancestors may read it. So orphans of the command become our children.
            prctl(PR_SET_CHILD_SUBREAPER, 1)
        # They stay blocked after the command's end: no process is left to pass them on to, and the mounts must go.
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, (*_PASSED_ON, *_JOB_CONTROL, signal.SIGCHLD))
        try:
            descriptor, killable = launcher.start(self._orders(blocked))
            if view is not None:
                view.begin(launcher.process.pid)
            calls = self._serve(Notifier(descriptor), view, killable=killable)
            launcher.confirm()
        except LaunchError as error:
            return self._failed(error)
        code = self._wait(launcher.process)
        calls.close()
        return code

    def _orders(self, blocked: set[signal.Signals | int]) -> dict[str, object]:
        program = (
            filters.for_accessors(self._machine)
            if self._options.accessor
            else filters.for_listeners(self._machine, any_descriptor=self._options.any_descriptor)
        )
        return {
            "command": list(self._options.command),
            # By its name: if the directory lies on a mount, a descriptor from before is underneath the mount.
            "directory": self._directory,
            "program": program,
            "seccomp": self._machine.seccomp,
            "flags": [
                SECCOMP_FILTER_FLAG_NEW_LISTENER | SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV,
                SECCOMP_FILTER_FLAG_NEW_LISTENER,
            ],
            "descriptors": self._descriptors,
            "ignored": [int(number) for number in _PASSED_ON if signal.getsignal(number) == signal.SIG_IGN],
            "blocked": [int(number) for number in blocked],
            "supervisor": os.getpid(),
        }

    def _serve(self, notifier: Notifier, view: View | None, *, killable: bool) -> Calls:
        dialect = None if self._options.abi is None else DIALECTS[self._options.abi]
        calls = Calls(
            notifier,
            self._machine,
            dialect,
            view,
            any_descriptor=self._options.any_descriptor,
            killable=killable,
            # With a view of its own the command never waits for a mount.
            deadlock_timeout=0 if view is not None else self._options.deadlock_timeout,
        )
        Workers(notifier, calls)
        return calls

    def _failed(self, error: LaunchError) -> int:
        """Handle a command that was not started. Returns its exit code, or raises RunError."""
        step, number = error.step, error.errno or 0
        if not step:
            raise RunError("fusehsm run: the command was killed before it began")
        if step == VIEW:
            raise no_view(error)
        if step == "filter":
            raise RunError(f"fusehsm run: {_FIXES.get(number, os.strerror(number))}")
        if step == "directory":
            raise RunError(f"{self._directory}: {os.strerror(number)}; run it from another directory")
        found = "not found" if number == errno.ENOENT else os.strerror(number)
        fix = (
            "give a program that is in the PATH, or its path"
            if number == errno.ENOENT
            else "give a program that can be run"
        )
        print(f"fusehsm: {shown(self._options.command[0])}: {found}; {fix}", file=sys.stderr, flush=True)
        return NOT_FOUND if number == errno.ENOENT else NOT_EXECUTABLE

    def _wait(self, child: "subprocess.Popen[bytes]") -> int:
        """Wait until the command has ended. Returns its exit code."""
        watched = {*_PASSED_ON, *_JOB_CONTROL, signal.SIGCHLD}
        while (code := self._look_at(child)) is None:
            got = signal.sigwaitinfo(watched)
            if got.si_signo == signal.SIGCONT:
                self._continue(child)
            elif got.si_signo in _PASSED_ON and got.si_code != _FROM_TERMINAL:
                _pass_on(child, got.si_signo)
            if got.si_signo == signal.SIGCHLD:
                self._reap_strays(child)
        return code

    def _look_at(self, child: "subprocess.Popen[bytes]") -> int | None:
        """The command's exit code if it has ended, else None. If the terminal has stopped the command, stop this process, too."""
        with suppress(ChildProcessError):
            self._stop_with(os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOHANG))
        return child.poll()

    @staticmethod
    def _stop_with(change: os.waitid_result | None) -> None:
        if change is not None and change.si_code == os.CLD_STOPPED and change.si_status in _JOB_CONTROL:
            os.kill(os.getpid(), signal.SIGSTOP)

    def _continue(self, child: "subprocess.Popen[bytes]") -> None:
        """Pass SIGCONT on, unless the command has had it, as from a shell's fg.

        The command may have been stopped again since then, and is to stay stopped.
        """
        with suppress(ChildProcessError):
            change = os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
            if change is None:
                _pass_on(child, signal.SIGCONT)
            else:
                self._stop_with(change)

    @staticmethod
    def _reap_strays(child: "subprocess.Popen[bytes]") -> None:
        """Wait for dead orphans of the command, which are children of this process (PR_SET_CHILD_SUBREAPER)."""
        if os.geteuid() == 0:
            return
        with suppress(OSError, ValueError):
            pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for pid in map(int, pids):
                status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                if pid != child.pid and status[0] == "Z" and _is_stray(pid):
                    os.waitpid(pid, os.WNOHANG)


def _pass_on(child: "subprocess.Popen[bytes]", number: int) -> None:
    """Send the command a signal. If that is forbidden (a set-id program, a security module), say so: the command goes on, and so do its mounts."""
    try:
        child.send_signal(number)
    except PermissionError:
        module = security_modules.of_either(child.pid)
        cause = f"{module} forbids it; {security_modules.RULES}" if module else "it is another user's"
        _log.warning("%s is not passed on to process %d: %s", signal.Signals(number).name, child.pid, cause)


def _is_stray(pid: int) -> bool:
    """Whether a child is an orphan of the command. The servers of the mounts are not: each leads its own session."""
    return os.getsid(pid) != pid
