"""The engine that reads /dev/fuse itself: mounting, the loop of requests, interruptions, and what is told to the kernel unasked.

How a request costs little: whichever worker finds one answers it itself, in the same task, and only when the answer has to wait is another
worker woken (or made) to read meanwhile. So what needs no waiting spawns nothing, and any number may wait.
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
from fusehsm.engines.fuse_operations import Answer, Body, Operations
from fusehsm.engines.fuse_protocol import Init, Opcode, Request
from fusehsm.engines.read_ahead import ReadAhead
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
    # The kernel checks rights, so it must know the backing's ACLs: by mode bits alone it would let a group in that an ACL keeps out.
    | Init.POSIX_ACL
    | Init.MAX_PAGES
    | Init.INIT_EXT
)
_BODIES: Final = (bytes, bytearray, memoryview)
_AT_ONCE: Final = 64  # requests answered before other tasks get their turn
_IDLE_WORKERS: Final = 64  # kept for the next requests that have to wait
_BIG: Final = 1 << 16  # bytes of a request from which on its buffer is given away instead of copied
# What may be answered before it is done: nothing remains of it that the kernel would have to take back.
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
# What taking a request apart raises, and what system calls raise for numbers that no C type holds: the kernel does not send such.
_MALFORMED: Final = (ValueError, struct.error, OverflowError)
_ERRNO_LIMIT: Final = 512  # from here on they are the kernel's own
_NEVER_ANSWERED: Final = frozenset(
    (Opcode.FORGET, Opcode.BATCH_FORGET, Opcode.INTERRUPT, Opcode.NOTIFY_REPLY)
)


class DevFuse:
    """`base.Engine`."""

    def __init__(self, gate: Gate, *, private: bool) -> None:
        self._gate = gate
        self._policy = CachePolicy(gate, private=private)
        # Where every access of content comes through the page cache, openings tell nothing that matters: after one ENOSYS the kernel opens
        # and closes by itself. A backing that others change must be looked at when it is opened, though.
        self._stateful_open = gate.exact or not private or gate.default_dialect.open_event
        gate.lessor.stateful_open = self._stateful_open
        self._operations = Operations(
            gate, self._policy, stateful_open=self._stateful_open, inval_entry=self._inval_entry
        )
        self._answers = {
            **self._operations.table(),
            Opcode.INIT: self._init,
            Opcode.INTERRUPT: self._interrupt,
        }
        self._counts = [0] * (max(Opcode) + 1)
        self._waiting: dict[int, Request] = {}  # what waits for something, by `unique`
        self._interrupted: dict[int, Request] = {}  # what waits although a signal has come
        self._filling: dict[int, Request] = {}  # what waits to fill the page cache
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
        """Serve the requests of a /dev/fuse, not blocking, that somebody else has opened and will close."""
        self._device = descriptor

    def caches(self, device: tuple[int, int]) -> CacheControl:
        return KernelCaches(self._device, device)

    async def serve(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                nursery.start_soon(self._kill_watch.run)
                nursery.start_soon(self._fill_watch.run)
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
        """The next request; None when there is none now. Ends `serve` when the filesystem has been unmounted."""
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
            ):  # ENOENT: it was interrupted before it could be read
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
            # Whoever waits for it must not wait for ever; without a header there is nobody to answer.
            if size >= protocol.IN_HEADER.size:
                _, opcode, unique, *_ = protocol.IN_HEADER.unpack_from(data)
                if opcode not in _NEVER_ANSWERED:
                    self._send(protocol.failure(unique, errno.EIO))
            return None

    def _start(self, request: Request) -> Answer | None:
        """Answer, if that needs no waiting; else what is left to do."""
        opcode = request.opcode
        answer = self._answers.get(opcode)
        if answer is None:
            if opcode not in _NEVER_ANSWERED:
                self._send(protocol.failure(request.unique, errno.ENOSYS))
            return None
        self._counts[opcode] += 1
        try:
            result = answer(request)
        except BaseException as error:  # a mistake costs this request, and nothing else
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
            # Otherwise its accessor has gone, with EINTR.
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
            # The kernel refuses answers with others (fuse_dev_do_write()), and their accessors would wait for ever.
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
        # ENOENT: nobody waits for it any more; ENODEV, EPERM: the filesystem is gone.
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
            # Otherwise O_TRUNC would be lost with the OPEN that is not sent.
            wanted |= Init.ATOMIC_O_TRUNC
        if self._gate.exact:
            wanted |= Init.DIRECT_IO_ALLOW_MMAP
            if os.geteuid() != 0:
                # Nobody may switch it off later, when there are marks.
                max_readahead = 0
        self._operations.negotiated = Init(flags & wanted)
        self._operations.tells_closers = self._gate.exact and minor >= protocol.NOFLUSH_MINOR
        return protocol.init_out(min(minor, protocol.NEWEST_MINOR), max_readahead, flags & wanted)

    def _interrupt(self, request: Request) -> bytes:
        (unique,) = protocol.INTERRUPT_IN.unpack_from(request.body)
        waiting = self._waiting.get(unique)
        if waiting is not None and not self._let_die(waiting):
            # The kernel tells of the first signal only; another may come that kills.
            self._interrupted[unique] = waiting
            if self._kill_watch.sleeps:
                self._kill_watch.wake()
        return b""

    def _let_die(self, request: Request) -> bool:
        """Answer EINTR if its accessor is being killed, which until then cannot die; whether it is."""
        if not self._gate.interrupted(request.pid):
            return False
        self._interrupted.pop(request.unique, None)
        if request.opcode in _LEAVES_NOTHING and self._waiting.pop(request.unique, None) is not None:
            self._send(protocol.failure(request.unique, errno.EINTR))
        return True

    def _let_page_go(self, request: Request) -> bool:
        """End a fill of the page cache whose accessor has died, and say whether it has.

        The kernel reports no death of an accessor that reads ahead (ASYNC_READ). Such an accessor dies without an answer. Its page stays locked
        until there is one, and whoever wants that page waits in a state that nothing ends.
        """
        unique = request.unique
        if unique not in self._filling or not self._gate.left(request.pid):
            return False
        self._filling.pop(unique, None)
        if self._waiting.pop(unique, None) is not None:
            self._send(protocol.failure(unique, errno.EINTR))
        return True

    def _inval_entry(self, parent_id: int, name: bytes) -> None:
        # The kernel holds the directory's lock until the request is answered that brought us here.
        message = protocol.invalidate_entry(parent_id, name)
        descriptor = self._device

        def tell() -> None:
            with suppress(OSError):
                os.write(descriptor, message)

        trio.lowlevel.start_thread_soon(tell, lambda outcome: None)


class KernelCaches:
    """`stale.CacheControl` by notifications."""

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
