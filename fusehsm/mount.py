"""Runs a mount from start to end: logging, mounting, serving, signals, the daemon, unmounting."""

from __future__ import annotations

import errno
import logging
import os
import resource
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from fusehsm.control import socket as control_socket
from fusehsm.daemon.log import start as start_logging
from fusehsm.daemon.options import NOTE, MountError, MountOptions, Plan, checked, note_about
from fusehsm.engines import fuse_mount
from fusehsm.fanotify.abi import DIALECTS
from fusehsm.linux import mountinfo
from fusehsm.linux.beneath import follow

if TYPE_CHECKING:
    import trio

    from fusehsm.emulator.gate import Gate
    from fusehsm.engines.base import Engine

log = logging.getLogger(__name__)

_READY = b"ready\n"
_START_DEADLINE = 60.0  # seconds until the mount must answer
_END_DEADLINE = 30.0  # seconds until the daemon must have ended after unmounting
_INNER_PATIENCE = 5.0  # seconds for the mounts inside this mount to go before it does
_INNER_INTERVAL = 0.02  # seconds
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def mount(options: MountOptions) -> int:
    """Mount. Returns the exit code: in the foreground when the mount has ended, as a daemon when it answers.

    Raises MountError, and ValueError for bad usage.
    """
    plan = checked(options)
    note = note_about(plan.events, options.engine)
    if note:
        print(f"{NOTE}{note}", file=sys.stderr, flush=True)
    start_logging(options)
    if options.foreground:
        _serve(options, plan, lambda: print("ready", file=sys.stderr, flush=True))
        return 0
    return _daemonise(options, plan)


# Serving


def _daemonise(options: MountOptions, plan: Plan) -> int:
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _run_daemon(options, plan, writer)
    os.close(writer)
    try:
        message = _wait_for_start(reader, child)
    finally:
        os.close(reader)
    if message == _READY:
        return 0
    text = message.decode(errors="replace").strip()
    raise MountError(
        text or f"{options.destination}: the server ended without a message; try again with --foreground"
    )


def _wait_for_start(reader: int, child: int) -> bytes:
    deadline = time.monotonic() + _START_DEADLINE
    message = b""
    while not message.endswith(b"\n"):
        readable, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not readable:
            os.kill(child, signal.SIGKILL)
            raise MountError(
                f"the mount did not answer within {_START_DEADLINE:.0f} s and was given up; try again with --foreground"
            )
        piece = os.read(reader, 65536)
        if not piece:
            break
        message += piece
    return message


def _run_daemon(options: MountOptions, plan: Plan, writer: int) -> None:
    """Run the daemon for its whole life; never returns."""
    code = 1
    waited_for = True

    def tell(message: bytes) -> None:
        """Send the result of the start, once. Later no process waits for it, and the number names another file."""
        nonlocal waited_for
        if waited_for:
            waited_for = False
            with suppress(OSError):
                os.write(writer, message)
            os.close(writer)

    try:
        os.setsid()
        os.umask(0o022)
        null = os.open(os.devnull, os.O_RDWR)
        for standard in (0, 1, 2):
            os.dup2(null, standard)
        os.chdir("/")
        _serve(options, plan, lambda: tell(_READY))
        code = 0
    except (MountError, ValueError) as error:
        tell(f"{error}\n".encode(errors="surrogateescape"))
    except BaseException as error:
        log.exception("the mount's server failed")
        tell(
            f"{options.destination}: {type(error).__name__}: {error}; try again with --foreground\n".encode()
        )
    finally:
        os._exit(code)


def _serve(options: MountOptions, plan: Plan, ready: Callable[[], None]) -> None:
    """Mount and serve until unmounted. Raises MountError if it cannot be mounted."""
    # These three are used after the mount is made: see _import_from_elsewhere.
    import fusehsm.daemon.control_server
    import fusehsm.daemon.deadlock
    import fusehsm.daemon.handler_group  # noqa: F401
    from fusehsm.emulator.gate import Gate
    from fusehsm.emulator.unfilled import UnfilledFiles
    from fusehsm.engines.base import MountRefused
    from fusehsm.engines.choice import make
    from fusehsm.overlay.overlay import Overlay

    open_limit = _raise_open_limit()
    try:
        overlay = Overlay(_backing_path(options, plan), pins=open_limit // 8)
    except OSError as error:
        raise MountError(f"{plan.source}: {error.strerror}; SRC must be a directory you may read") from None
    overlay.event_root = options.event_root
    gate = Gate(
        overlay,
        destination=plan.destination,
        events=plan.events,
        dialect=DIALECTS[options.abi],
        unattended=plan.unattended,
        event_timeout=plan.event_timeout,
        page_size=resource.getpagesize(),
        open_limit=open_limit // 3,
        direct=options.direct,
    )
    if options.tell_holes:
        unfilled = UnfilledFiles(overlay, plan.destination, gate.open_descriptor, log.warning)
        gate.listeners.on_allowed = unfilled.allowed
    engine = make(options.engine, gate, private=plan.private, shares_locks=plan.shares_locks)
    _import_from_elsewhere(plan.destination)
    noted = _note_signals()
    try:
        engine.mount(plan.destination, plan.fuse_options)
    except MountRefused as error:
        raise MountError(str(error)) from None
    ours: mountinfo.Mount | None = None
    unmount = True

    def stands() -> None:
        # From now on only an intended end unmounts it. If this server fails, no process may read the stubs that are beneath.
        nonlocal unmount
        unmount = False
        ready()

    try:
        ours = _mounted_at(plan.destination)
        ours_id = mountinfo.id_of(ours)
        if options.lifeline is not None:
            with suppress(OSError):  # no process holds its other end any more
                os.write(options.lifeline, ours_id.pack())
        gate.mounted(ours.device, engine.caches(ours.device), ours_id)
        gate.requests = engine.requests
        unmount = _run(gate, engine, plan, ours, stands, noted, options.lifeline) or unmount
    finally:
        gate.close()
        if ours is not None and unmount:
            _give_back(ours, ours_id)
        engine.close()
        overlay.close()
        if ours is not None and not unmount and _stands(ours):
            log.critical(
                "%s: this mount has no server any more and refuses all accesses; fusehsm umount removes it",
                plan.destination,
            )


def _backing_path(options: MountOptions, plan: Plan) -> str:
    return plan.source if options.backing is None else f"/proc/self/fd/{options.backing}"


def _import_from_elsewhere(destination: str) -> None:
    """Remove the mount point from Python's search path for modules: an import there would wait for this process itself.

    `python -m` puts the working directory first.
    """
    inside = os.path.join(destination, "")
    sys.path[:] = [
        place for place in sys.path if not os.path.join(os.path.realpath(place), "").startswith(inside)
    ]


def _note_signals() -> list[int]:
    """Make ending signals be listed from now on, instead of ending this process.

    Otherwise a signal during the mounting, or a second one during the unmounting (timeout(1) sends two), would leave a mount without a server.
    """
    noted: list[int] = []
    for number in _ENDING:
        signal.signal(number, lambda got, frame: noted.append(got))
    return noted


def _run(
    gate: Gate,
    engine: Engine,
    plan: Plan,
    ours: mountinfo.Mount,
    ready: Callable[[], None],
    noted: list[int],
    lifeline: int | None,
) -> bool:
    """Run the event loop. Returns True if its end was asked for; False if the filesystem was unmounted or its connection was ended from outside.

    The end is asked for by a signal, also one `noted` before, or when no process holds the other end of the socket `lifeline` any more.
    """
    import trio

    from fusehsm.daemon.control_server import serve_control
    from fusehsm.daemon.deadlock import Watchdog, refuse_calls
    from fusehsm.daemon.handler_group import serve_in_process

    ending = trio.Event()

    async def on_signals(*, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(*_ENDING) as signals:
            task_status.started()
            async for number in signals:
                noted.append(number)
                ending.set()

    async def end_with(lifeline: int) -> None:
        await trio.lowlevel.wait_readable(lifeline)
        ending.set()

    async def stop_when_asked() -> None:
        await ending.wait()
        # A process that has mounted something inside needs this mount to get there and unmount it. So does the daemon of a nested --mount, which is
        # asked to end at the same time.
        with trio.move_on_after(_INNER_PATIENCE):
            while mountinfo.mounts_on(ours.mount_id):  # noqa: ASYNC110 (trio cannot wait for POLLPRI)
                await trio.sleep(_INNER_INTERVAL)
        engine.stop()

    async def announce() -> None:
        # After the engine has stopped, nothing answers this call any more.
        await trio.to_thread.run_sync(os.statvfs, plan.destination, abandon_on_cancel=True)
        ready()
        if noted:
            ending.set()

    async def main() -> bool:
        async with trio.open_nursery() as nursery:
            await nursery.start(on_signals)
            await nursery.start(serve_control, gate, ours.device)
            if plan.handler is not None:
                await nursery.start(serve_in_process, gate, plan.handler)
            nursery.start_soon(announce)
            nursery.start_soon(stop_when_asked)
            if lifeline is not None:
                nursery.start_soon(end_with, lifeline)
            await engine.serve()
            gate.listeners.abandon()
            nursery.cancel_scope.cancel()
        return ending.is_set()

    try:
        if plan.handler is None:
            return trio.run(main)
        allow_calls = refuse_calls(plan.destination, threading.get_ident())
        try:
            with Watchdog() as watchdog:
                ended = trio.run(main)
        finally:
            allow_calls()  # to unmount is a call that names the mount
        if watchdog.has_ended_it:
            raise MountError(
                f"{plan.destination}: the handler waited for its own mount; have it use a thread (trio.to_thread.run_sync)"
            )
        return ended
    except ExceptionGroup as group:
        cause: Exception = group
        while isinstance(cause, ExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if isinstance(cause, OSError):
            raise MountError(f"{plan.destination}: {cause.strerror or cause}") from group
        raise


def _raise_open_limit() -> int:
    """Raise this process's soft limit of descriptors to its hard limit; returns the limit in effect."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    with suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return hard
    return soft


def _mounted_at(destination: str) -> mountinfo.Mount:
    """The mount that was made last on `destination`. Sends no request to any server, least of all to this mount's."""
    found = [m for m in mountinfo.read_mounts() if m.mount_point == destination and m.is_fusehsm]
    if not found:
        raise MountError(f"{destination}: mounted, but not in /proc/self/mountinfo; see fusehsm doctor")
    return found[-1]


# Unmounting


def _stands(ours: mountinfo.Mount) -> bool:
    """Whether that mount is still in this mount namespace."""
    return any(m.mount_id == ours.mount_id and m.device == ours.device for m in mountinfo.read_mounts())


def _give_back(ours: mountinfo.Mount, ours_id: mountinfo.MountId) -> None:
    """Unmount this process's mount, if it is there. Mounts of others are left alone."""
    point = ours.mount_point
    try:
        fuse_mount.unmount(point, ours_id, lazily=True)
        return
    except OSError as error:
        reason = error.strerror
    for above in mountinfo.mounts_on(ours.mount_id):
        reason = f"{above.mount_point} is mounted on it; unmount that, then run fusehsm umount {point}"
    if _stands(ours):
        log.warning("%s: left mounted: %s", point, reason)


def unmount(path: str, wanted: mountinfo.MountId | None = None) -> None:
    """Unmount a fusehsm mount and wait for its daemon. `wanted`: unmount only this one. Raises MountError."""
    mount_ = _find(path)
    found = mountinfo.id_of(mount_)
    if wanted not in (None, found):
        raise MountError(f"{path}: another mount has come in its place; fusehsm status shows it")
    daemon = _daemon_pid(mount_)
    # A killed daemon leaves a mount without a server: its open files only get errors, and must not keep the mount.
    _unmount(path, mount_.mount_point, found, lazily=daemon is None)
    if daemon is not None:
        if not control_socket.is_foreign(mount_):
            _wait_for_end(daemon, path)
    else:
        control_socket.sweep()


def _daemon_pid(mount_: mountinfo.Mount) -> int | None:
    try:
        with control_socket.connect(mount_) as connection:
            return control_socket.peer_of(connection).pid
    except OSError:
        return None


def _find(path: str) -> mountinfo.Mount:
    # Not realpath(): it would send the mount a request, which may never be answered.
    absolute = os.path.abspath(path)
    mounts = [m for m in mountinfo.read_mounts() if m.is_fusehsm]
    found = [m for m in mounts if m.mount_point == absolute]
    if not found:
        with suppress(OSError):
            above, way = follow(os.path.dirname(absolute))
            os.close(above)
            resolved = os.path.join(way[-1][0], os.path.basename(absolute))
            found = [m for m in mounts if m.mount_point == resolved]
    if not found:
        raise MountError(f"{path}: not a fusehsm mount; fusehsm status lists them")
    return found[-1]


def _unmount(path: str, mount_point: str, wanted: mountinfo.MountId, *, lazily: bool) -> None:
    try:
        fuse_mount.unmount(mount_point, wanted, lazily=lazily)
    except OSError as error:
        fix = "see fusehsm doctor"
        if mountinfo.mounts_on(wanted.number):
            fix = f"unmount that first, or both with umount -l {path}"
        elif error.errno == errno.EBUSY:
            fix = "close the files that are open there (fuser -vm shows them) and try again"
        raise MountError(f"{path}: {error.strerror}; {fix}") from None


def _wait_for_end(pid: int, path: str) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:
        return
    try:
        if not select.select([descriptor], [], [], _END_DEADLINE)[0]:
            raise MountError(
                f"{path}: unmounted, but its server (process {pid}) has not ended; it may be writing, else kill it"
            )
    finally:
        os.close(descriptor)
