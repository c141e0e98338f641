"""A generator of sequences for the real kernel and the emulator: what it has drawn, it runs on both at its end, and shrinks what differs."""

import errno
import os
from collections.abc import Callable

from hypothesis import note
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, precondition, rule

from fusehsm.conform.sequences import ACCESSORS, FILES, Step
from fusehsm.fanotify.abi import (
    FAN_ACCESS_PERM,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_FLUSH,
    FAN_MARK_IGNORE,
    FAN_MARK_IGNORED_MASK,
    FAN_MARK_IGNORED_SURV_MODIFY,
    FAN_MARK_MOUNT,
    FAN_MARK_REMOVE,
    FAN_ONDIR,
    FAN_OPEN_EXEC_PERM,
    FAN_OPEN_PERM,
    LINUX_6_14,
)

P, A, O, X = LINUX_6_14.pre_access, FAN_ACCESS_PERM, FAN_OPEN_PERM, FAN_OPEN_EXEC_PERM  # noqa: E741 (the facts' names)
EDGES = (0, 1, 10, 100, 4095, 4096, 4097, 5000, 8192, 12288, 19999, 20000, 20480, 40000, 1 << 20)
places = st.sampled_from(EDGES) | st.integers(0, 30000)
counts = st.sampled_from((1, 100, 4095, 4096, 4097, 8192, 20000, 1 << 20)) | st.integers(1, 30000)
files = st.sampled_from(FILES)
accessors = st.integers(0, ACCESSORS - 1)
flags = st.builds(
    int.__or__,
    st.sampled_from((os.O_RDONLY, os.O_WRONLY, os.O_RDWR)),
    st.sampled_from((0, 0, os.O_APPEND, os.O_TRUNC, os.O_CREAT, os.O_CREAT | os.O_EXCL, os.O_NONBLOCK)),
)
masks = st.builds(
    int.__or__,
    st.sampled_from((P, A, O, P | A, O | A, P | A | O, A | X)),
    st.sampled_from((0, 0, FAN_EVENT_ON_CHILD, FAN_ONDIR)),
)
IGNORE, IGNORED, SURVIVING = FAN_MARK_IGNORE, FAN_MARK_IGNORED_MASK, FAN_MARK_IGNORED_SURV_MODIFY
kinds = st.sampled_from((0, 0, 0, IGNORE, IGNORE | SURVIVING, IGNORED, IGNORED | SURVIVING))
errors = st.sampled_from((0, 0, errno.EPERM, errno.EIO, errno.EBUSY))

Compare = Callable[[list[Step]], list[str]]


def machine(compare: Compare, *, allocates: bool, copies: bool) -> type[RuleBasedStateMachine]:
    """A state machine whose sequences `compare` must find no difference in; with steps that allocate, and copy within the kernel, or without."""

    class Sequences(RuleBasedStateMachine):
        opens = Bundle("opens")

        def __init__(self) -> None:
            super().__init__()
            self.steps: list[Step] = []
            self.mapped = False
            self.sent: int | None = None
            self.second = False
            self.denied = False
            self.number = 0

        def _step(self, *step: object) -> None:
            self.steps.append(step)

        @initialize(target=opens, file=files, how=st.sampled_from((os.O_RDONLY, os.O_RDWR)))
        def begin(self, file: str, how: int) -> int:
            return self._opened(0, file, how)

        def _opened(self, accessor: int, file: str, how: int) -> int:
            self._step("open", accessor, file, how)
            self.number += 1
            return self.number - 1

        @rule(target=opens, accessor=accessors, file=files, how=flags)
        def open(self, accessor: int, file: str, how: int) -> int:
            return self._opened(accessor, file, how)

        @rule(number=opens, count=counts, offset=places)
        def pread(self, number: int, count: int, offset: int) -> None:
            self._step("pread", number, count, offset)

        @rule(number=opens, count=counts)
        def read(self, number: int, count: int) -> None:
            self._step("read", number, count)

        @rule(number=opens, count=counts, offset=places)
        def pwrite(self, number: int, count: int, offset: int) -> None:
            self._step("pwrite", number, count, offset)

        @rule(number=opens, count=counts)
        def write(self, number: int, count: int) -> None:
            self._step("write", number, count)

        @rule(number=opens, offset=places)
        def lseek(self, number: int, offset: int) -> None:
            self._step("lseek", number, offset)

        @rule(number=opens, size=places)
        def ftruncate(self, number: int, size: int) -> None:
            self._step("ftruncate", number, size)

        @precondition(lambda self: allocates)
        @rule(number=opens, mode=st.sampled_from((0, 1, 3, 0x10, 0x11)), offset=places, count=counts)
        def fallocate(self, number: int, mode: int, offset: int, count: int) -> None:
            self._step("fallocate", number, mode, offset, count)

        # Through one descriptor: the divergence "sent through another descriptor".
        @precondition(lambda self: copies and not self.mapped)
        @rule(number=opens, offset=st.integers(0, 15000), count=st.integers(1, 5000))
        def sendfile(self, number: int, offset: int, count: int) -> None:
            if self.sent in (None, number):
                self.sent = number
                self._step("sendfile", number, offset, count)

        # Once: the divergence "pages in the cache" is what follows. And not denied: "mappings ask when touched".
        @precondition(lambda self: not self.mapped and self.sent is None and not self.denied)
        @rule(number=opens, page=st.integers(0, 4), count=st.integers(1, 20000))
        def map(self, number: int, page: int, count: int) -> None:
            self.mapped = True
            self._step("map", number, page * 4096, count)

        @rule(number=opens)
        def close(self, number: int) -> None:
            self._step("close", number)

        @rule(accessor=accessors, file=files, size=places)
        def truncate(self, accessor: int, file: str, size: int) -> None:
            self._step("truncate", accessor, file, size)

        @rule(accessor=accessors, file=files, new=files)
        def rename(self, accessor: int, file: str, new: str) -> None:
            self._step("rename", accessor, file, new)

        @rule(accessor=accessors, file=files)
        def unlink(self, accessor: int, file: str) -> None:
            self._step("unlink", accessor, file)

        @rule(
            group=st.integers(0, 1),
            how=st.sampled_from((FAN_MARK_ADD, FAN_MARK_ADD, FAN_MARK_REMOVE)),
            kind=kinds,
            mask=masks,
            name=st.sampled_from((*FILES, "")),
        )
        def mark(self, group: int, how: int, kind: int, mask: int, name: str) -> None:
            self._step("mark", group, how | kind, mask, name)

        # The first group's own mark on the file system stays: without it nothing is armed.
        @rule(kind=kinds, mask=masks, where=st.sampled_from((FAN_MARK_MOUNT, FAN_MARK_FILESYSTEM)))
        def mark_all(self, kind: int, mask: int, where: int) -> None:
            self._step("mark", 1, FAN_MARK_ADD | where | kind, mask, "")

        @rule(group=st.integers(0, 1))
        def flush(self, group: int) -> None:
            self._step("mark", group, FAN_MARK_FLUSH, 0, "")

        @rule()
        def change_the_second_group(self) -> None:
            self._step("close group" if self.second else "group")
            self.second = not self.second

        @rule(name=st.sampled_from(("PRE_ACCESS", "ACCESS_PERM", "OPEN_PERM")), error=errors)
        def deny(self, name: str, error: int) -> None:
            self._step("deny", name, error)
            if name == "PRE_ACCESS":
                self.denied = bool(error)

        def teardown(self) -> None:
            difference = compare(self.steps)
            if difference:
                note(f"steps = {self.steps!r}")
                raise AssertionError("\n".join(difference))

    return Sequences
