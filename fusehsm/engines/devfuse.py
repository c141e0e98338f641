"""The engine that reads /dev/fuse itself: the mount, the loop of requests, interruptions, and notifications to the kernel.

The worker that reads a request also answers it, in the same task. Only when the answer has to wait, another worker is woken or started to
read. So a request that needs no wait starts no task, and any number of requests may wait.
"""

import errno
import logging
import os
import struct
from contextlib import suppress
from typing import Final

import trio

from fusehsm.emulator.gate import Gate
from fusehsm.emulator.page_cache import CacheControl
from fusehsm.emulator.waiting import KillWatch
from fusehsm.engines import fuse_mount
from fusehsm.engines import fuse_protocol as protocol
from fusehsm.engines.cache_policy import CachePolicy
from fusehsm.engines.fuse_locks import LockOperations
from fusehsm.engines.fuse_operations import Answer, Body, Operations
from fusehsm.engines.fuse_protocol import Init, Opcode, Request
from fusehsm.linux.fuse_settings import ReadAhead
from fusehsm.linux.suspension import ReadingTurn, is_cancellation, noting_suspension

log = logging.getLogger(__name__)

_WANTED: Final = (
    Init.ASYNC_READ
    | Init.BIG_WRITES
    | Init.DO_READDIRPLUS
    | Init.READDIRPLUS_AUTO
    | Init.ASYNC_DIO
    | Init.NO_OPEN_SUPPORT
    | Init.NO_OPENDIR_SUPPORT
    | Init.PARALLEL_DIROPS
    | Init.HANDLE_KILLPRIV_V2
    # The kernel checks permissions, so it must know the backing's ACLs. By mode bits alone it would admit a group that an ACL excludes.
    | Init.POSIX_ACL
    | Init.MAX_PAGES
    | Init.INIT_EXT
)
_BODIES: Final = (bytes, bytearray, memoryview)
_AT_ONCE: Final = 64  # requests answered before other tasks run
_IDLE_WORKERS: Final = 64  # kept for the next requests that have to wait
_BIG: Final = 1 << 16  # a request of so many bytes or more keeps the buffer, and is not copied
# Requests that may be answered with EINTR while they are still in progress: they make nothing that the kernel would have to release.
_LEAVES_NOTHING: Final = frozenset(
    (
        Opcode.READ,
        Opcode.WRITE,
        Opcode.SETATTR,
        Opcode.FALLOCATE,
        Opcode.COPY_FILE_RANGE,
        Opcode.COPY_FILE_RANGE_64,
    )
)
_CHANGES: Final = _LEAVES_NOTHING - {Opcode.READ}
# Errors of decoding a request, and of system calls for numbers that no C type holds. The kernel sends no such requests.
_MALFORMED: Final = (ValueError, struct.error, OverflowError)
_ERRNO_LIMIT: Final = 512  # errnos from here on are internal to the kernel (docs/facts.md, section 14)
_NEVER_ANSWERED: Final = frozenset(
    (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY)
)


class DevFuse:
    """The engine `devfuse`; implements `base.Engine`.

    `shares_locks`: locks on files are locks on the backing; None: where the kernel tells of each open and its end anyway.
    """

    def __init__(self, gate: Gate, *, private: bool, shares_locks: bool | None = None) -> None:
        self._gate = gate
        self._policy = CachePolicy(gate, private=private)
        # Where all content goes through the page cache, OPEN is not needed: after one ENOSYS the kernel opens and closes by itself. But a file
        # of a backing that other processes change must be checked at each open.
        self._stateful_open = (
            gate.exact or not private or gate.default_dialect.open_event or shares_locks is True
        )
        self._shares_locks = self._stateful_open and shares_locks is not False
        gate.lessor.stateful_open = self._stateful_open
        self._operations = Operations(
            gate, self._policy, stateful_open=self._stateful_open, inval_entry=self._inval_entry
        )
        self._locks = LockOperations(gate)
        self._answers = {
            **self._operations.table(),
            **self._locks.table(),
            Opcode.INIT: self._init,
            Opcode.INTERRUPT: self._interrupt,
        }
        self._counts = [0] * (max(Opcode) + 1)
        # Requests whose answer waits, by `unique`; those of them whose accessor has got a signal; those that fill the page cache.
        self._waiting: dict[int, Request] = {}
        self._interrupted: dict[int, Request] = {}
        self._filling: dict[int, Request] = {}
        self._kill_watch = KillWatch(self._interrupted, self._let_die)
        self._fill_watch = KillWatch(self._filling, self._let_page_go)
        self._connection: fuse_mount.Connection | None = None
        self._device = -1  # its descriptor
        self._view = memoryview(bytearray(protocol.BUFFER_SIZE))
        self._turn = ReadingTurn(self._start_worker, most_idle=_IDLE_WORKERS)
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery | None = None

    # Life

    def mount(self, mount_point: str, options: frozenset[str]) -> None:
        self._connection = fuse_mount.mount(mount_point, options)
        self.attach(self._connection.descriptor)

    def attach(self, descriptor: int) -> None:
        """Serve the requests of a non-blocking descriptor of /dev/fuse, which the caller has opened and will close."""
        self._device = descriptor

    def caches(self, device: tuple[int, int]) -> CacheControl:
        return KernelCaches(self._device, device)

    async def serve(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._kill_watch.run)
                nursery.start_soon(self._fill_watch.run)
                nursery.start_soon(self._gate.locks.watch.run)
                nursery.start_soon(self._work)

    def stop(self) -> None:
        self._scope.cancel()

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def requests(self) -> dict[str, int]:
        return {Opcode(number).name: count for number, count in enumerate(self._counts) if count}

    # The loop

    async def _work(self) -> None:
        worker = object()
        answered = 0
        while True:
            while self._turn.reader is not worker:
                if not await self._turn.wait(worker):
                    return
            request = self._read()
            if request is None:
                answered = 0
                await trio.lowlevel.wait_readable(self._device)
                continue
            answer = self._start(request)
            if answer is not None:
                self._waiting[request.unique] = request
                if request.opcode == Opcode.READ and protocol.fills_cache(request):
                    self._filling[request.unique] = request
                    if self._fill_watch.sleeps:
                        self._fill_watch.wake()
                await self._finish(request, answer)
            answered += 1
            if answered >= _AT_ONCE:
                answered = 0
                await trio.lowlevel.checkpoint()

    def _start_worker(self) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._work)

    def _read(self) -> Request | None:
        """The next request; None when there is none now. Ends serve() when the filesystem has been unmounted."""
        try:
            size = os.readv(self._device, (self._view,))
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno == errno.ENODEV:
                self._scope.cancel()
            elif error.errno not in (
                errno.EINTR,
                errno.ENOENT,
            ):  # ENOENT: the request was interrupted before it could be read
                raise
            return None
        data: bytes | memoryview
        if size < _BIG:
            data = bytes(self._view[:size])
        else:
            data = self._view[:size]
            self._view = memoryview(bytearray(protocol.BUFFER_SIZE))
        try:
            return protocol.decode_request(data)
        except ValueError as error:
            log.error("/dev/fuse: %s", error)
            # Its accessor must not wait for ever. Without a header no answer is possible.
            if size >= protocol.IN_HEADER.size:
                _, opcode, unique, *_ = protocol.IN_HEADER.unpack_from(data)
                if opcode not in _NEVER_ANSWERED:
                    self._send(protocol.failure(unique, errno.EIO))
            return None

    def _start(self, request: Request) -> Answer | None:
        """Answer a request if that needs no wait; otherwise return the coroutine that makes the answer."""
        opcode = request.opcode
        answer = self._answers.get(opcode)
        if answer is None:
            if opcode not in _NEVER_ANSWERED:
                self._send(protocol.failure(request.unique, errno.ENOSYS))
            return None
        self._counts[opcode] += 1
        try:
            result = answer(request)
        except BaseException as error:  # a bug fails this request, and not the mount
            self._fail(request, error)
            return None
        if not isinstance(result, _BODIES):
            return result
        if opcode not in _NEVER_ANSWERED:
            self._reply(request, result)
        return None

    async def _finish(self, request: Request, answer: Answer) -> None:
        result: Body = b""
        failure: BaseException | None = None
        try:
            result = await noting_suspension(answer, self._turn.pass_on)
        except BaseException as error:
            failure = error
            if is_cancellation(error):
                failure = OSError(errno.EIO, os.strerror(errno.EIO))
                raise
        finally:
            self._interrupted.pop(request.unique, None)
            self._filling.pop(request.unique, None)
            # Otherwise its accessor has got EINTR already.
            if self._waiting.pop(request.unique, None) is not None:
                if failure is None:
                    self._reply(request, result)
                else:
                    self._fail(request, failure)
            elif failure is None and request.opcode in _CHANGES:
                self._gate.changed_unseen(protocol.changed_node(request))

    def _reply(self, request: Request, body: Body) -> None:
        if len(body) < _BIG:
            self._send(protocol.reply(request.unique, bytes(body)))
            return
        header = protocol.OUT_HEADER.pack(protocol.OUT_HEADER.size + len(body), 0, request.unique)
        try:
            os.writev(self._device, [header, body])
        except OSError as error:
            self._not_taken(error)

    def _fail(self, request: Request, error: BaseException) -> None:
        number = errno.EIO
        if isinstance(error, OSError) and error.errno is not None:
            # The kernel refuses answers with other errnos (fuse_dev_do_write()), and their accessors would wait for ever.
            if 0 < error.errno < _ERRNO_LIMIT:
                number = error.errno
        else:
            what = f"{Opcode(request.opcode).name} of node {request.node_id}, {len(request.body)} bytes"
            if isinstance(error, _MALFORMED):
                number = errno.EINVAL
                log.error("/dev/fuse: %s: %s", what, error)
            else:
                log.error("a request failed: %s", what, exc_info=error)
        if request.opcode not in _NEVER_ANSWERED:
            self._send(protocol.failure(request.unique, number))

    def _send(self, message: bytes) -> None:
        try:
            os.write(self._device, message)
        except OSError as error:
            self._not_taken(error)

    @staticmethod
    def _not_taken(error: OSError) -> None:
        # ENOENT: no accessor waits for it any more; ENODEV, EPERM: the filesystem is gone.
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EPERM):
            log.error("an answer was not taken: %s", error)

    # Special requests

    def _init(self, request: Request) -> bytes:
        major, minor, max_readahead, flags = protocol.INIT_IN.unpack_from(request.body)
        if major != protocol.MAJOR or minor < protocol.OLDEST_MINOR:
            log.error("FUSE protocol %d.%d: too old; needs Linux 5.10 or later", major, minor)
            raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))
        if flags & Init.INIT_EXT:
            flags |= protocol.INIT_IN_FLAGS2.unpack_from(request.body, protocol.INIT_IN.size)[0] << 32
        wanted = _WANTED
        if self._policy.private:
            wanted |= Init.CACHE_SYMLINKS
        else:
            wanted |= Init.AUTO_INVAL_DATA
        if self._stateful_open:
            # Without OPEN this flag would lose O_TRUNC (docs/facts.md, section 11).
            wanted |= Init.ATOMIC_O_TRUNC
        if self._shares_locks:
            wanted |= Init.POSIX_LOCKS | Init.FLOCK_LOCKS
        if self._gate.exact:
            wanted |= Init.DIRECT_IO_ALLOW_MMAP
            if os.geteuid() != 0:
                # An ordinary user cannot switch read-ahead off later, when there are marks.
                max_readahead = 0
        self._operations.negotiated = Init(flags & wanted)
        self._operations.tells_closers = self._gate.exact and minor >= protocol.NOFLUSH_MINOR
        return protocol.init_out(min(minor, protocol.NEWEST_MINOR), max_readahead, flags & wanted)

    def _interrupt(self, request: Request) -> bytes:
        (unique,) = protocol.INTERRUPT_IN.unpack_from(request.body)
        waiting = self._waiting.get(unique)
        if waiting is None or self._locks.interrupt(waiting):
            return b""
        if not self._let_die(waiting):
            # INTERRUPT comes for the first signal only (docs/facts.md, section 15). A later signal may kill.
            self._interrupted[unique] = waiting
            if self._kill_watch.sleeps:
                self._kill_watch.wake()
        return b""

    def _let_die(self, request: Request) -> bool:
        """Answer EINTR if the accessor is being killed, as it cannot die before an answer; returns whether it is being killed."""
        if not self._gate.interrupted(request.pid):
            return False
        self._interrupted.pop(request.unique, None)
        if request.opcode in _LEAVES_NOTHING and self._waiting.pop(request.unique, None) is not None:
            self._send(protocol.failure(request.unique, errno.EINTR))
        return True

    def _let_page_go(self, request: Request) -> bool:
        """End a fill of the page cache if its accessor has died; returns whether it has.

        The kernel sends no INTERRUPT for read-ahead (ASYNC_READ; docs/facts.md, section 15). Its accessor dies without an answer. The page
        stays locked until there is one, and other accessors of that page wait in a state that no signal ends.
        """
        unique = request.unique
        if unique not in self._filling or not self._gate.left(request.pid):
            return False
        self._filling.pop(unique, None)
        if self._waiting.pop(unique, None) is not None:
            self._send(protocol.failure(unique, errno.EINTR))
        return True

    def _inval_entry(self, parent_id: int, name: bytes) -> None:
        # In a thread: the kernel holds the directory's lock until the current request is answered.
        message = protocol.invalidate_entry(parent_id, name)
        descriptor = self._device

        def tell() -> None:
            with suppress(OSError):
                os.write(descriptor, message)

        trio.lowlevel.start_thread_soon(tell, lambda outcome: None)


class KernelCaches:
    """`page_cache.CacheControl` by FUSE notifications."""

    def __init__(self, descriptor: int, device: tuple[int, int]) -> None:
        self._descriptor = descriptor
        self._read_ahead = ReadAhead(device)

    def inval_inode(self, node_id: int) -> None:
        os.write(self._descriptor, protocol.invalidate_inode(node_id, 0, 0))

    def inval_range(self, node_id: int, offset: int, size: int) -> None:
        os.write(self._descriptor, protocol.invalidate_inode(node_id, offset, size))

    def inval_attributes(self, node_id: int) -> None:
        os.write(self._descriptor, protocol.invalidate_inode(node_id, -1, 0))

    def set_page_exact(self, exact: bool) -> None:
        self._read_ahead.switch(off=exact)
