"""Users of a tree that is served: each does at random to files of its own whatever can be done to files, and knows what must be in them."""

import errno
import os
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from fusehsm.linux import syscalls
from tests.support.tier import soak_model as model
from tests.support.tier.mapped import mapped
from tests.support.tier.soak_model import Change, Content

PAGE = 4096
PUNCH = 0x03


class Wrong(AssertionError):
    """Something was read that must not be there."""


class User:
    """Works on `files` below `root`. `refusals` counts the errnos that it got; `suspect()`: whether a kill may be why something was read wrong;
    `in_flight()`: whether there was one while something was done, so that it may have come about or not."""

    def __init__(
        self,
        root: Path,
        files: list[Content],
        seed: int,
        largest: int,
        suspect: Callable[[], bool],
        in_flight: Callable[[], bool] = lambda: False,
    ) -> None:
        self.root = root
        self.files = files
        self.acts = 0
        self.refusals: dict[int | None, int] = {}
        self._choose = random.Random(seed)
        self._largest = largest
        self._suspect = suspect
        self._in_flight = in_flight
        self._numbers = iter(range(1 << 30))
        self._word = f"own-{seed}-{len(files)}"

    def act(self) -> None:
        """Do something. Raises Wrong."""
        self.acts += 1
        choose = self._choose
        kinds = [
            (self._read, 8),
            (self._write, 6),
            (self._write_mapped, 3),
            (self._read_mapped, 2),
            (self._append, 2),
            (self._truncate, 3),
        ]
        kinds += [
            (self._punch, 2),
            (self._overwrite, 1),
            (self._rename, 1),
            (self._chmod, 1),
            (self._link, 1),
            (self._unlink, 1),
            (self._create, 1),
        ]
        act = choose.choices([kind for kind, _ in kinds], [weight for _, weight in kinds])[0]
        try:
            if not self.files:
                act = self._create
            content = choose.choice(self.files) if self.files else None
            act(content) if content else self._create(None)
        except OSError as error:
            self.refusals[error.errno] = self.refusals.get(error.errno, 0) + 1

    def check(self, content: Content, choose: random.Random) -> int:
        """Compare a whole file, piece by piece; the number of pieces that were refused. Raises Wrong."""
        try:
            path = self._path(content)
        except FileNotFoundError:
            return 0  # unlinked in the moment of the kill
        refused = 0
        try:
            fd = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise Wrong(f"{path} cannot be opened: {error}") from None
        try:
            size = os.fstat(fd).st_size
            if not content.may_have_size(size):
                raise Wrong(f"{path} is {size} bytes long, not {[len(v) for v in content.versions]}")
            offsets = list(range(0, size, 2 * PAGE))
            choose.shuffle(offsets)
            for offset in offsets:
                try:
                    data = os.pread(fd, 2 * PAGE, offset)
                except OSError:
                    refused += 1
                    continue
                self._expect(content, path, offset, data, lambda: False)
                if len(data) != min(2 * PAGE, size - offset):
                    raise Wrong(f"{path}: {len(data)} bytes at {offset}")
        finally:
            os.close(fd)
        return refused

    def _expect(
        self, content: Content, path: str, offset: int, data: bytes, suspect: Callable[[], bool]
    ) -> None:
        wrong = content.wrong(offset, data)
        if wrong is None or suspect():
            return
        version = content.versions[0]
        around = slice(max(wrong - 4, offset), wrong + 12)
        was = data[around.start - offset : around.stop - offset]
        raise Wrong(
            f"{path}: at {wrong} of {len(version)} {was.hex()} instead of {bytes(version[around]).hex()}, "
            f"of {len(content.versions)} versions, after {content.history}"
        )

    def _name(self, content: Content) -> str:
        self._settle(content)
        return self._choose.choice(content.names)

    def _path(self, content: Content) -> str:
        return str(self.root / self._name(content))

    @contextmanager
    def _open(self, content: Content, flags: int) -> Iterator[int]:
        fd = os.open(self._path(content), flags)
        try:
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _doing(self, content: Content, what: str, change: Change) -> Iterator[None]:
        before = content.versions
        after = content.begin(change)
        content.history = [*content.history[-15:], what]
        try:
            yield
        except OSError as error:
            content.history[-1] += f": {error.strerror}"
            raise
        if self._in_flight():
            content.grow_unheard(before, after)
        else:
            content.versions = after
        content.history.append(f"{what}: done")

    def _bytes(self, size: int) -> bytes:
        return (
            bytes([self._choose.randrange(1, 256)]) * size
            if self._choose.random() < 0.5
            else self._choose.randbytes(size)
        )

    def _somewhere(self, content: Content) -> tuple[int, int]:
        start = self._choose.randrange(max(content.size, 1))
        return start, self._choose.choice((1, 100, PAGE, 5000, 20_000))

    def _read(self, content: Content) -> None:
        start, length = self._somewhere(content)
        with self._open(content, os.O_RDONLY) as fd:
            data = os.pread(fd, length, start)
        self._expect(content, content.names[0], start, data, self._suspect)

    def _write(self, content: Content) -> None:
        start, length = self._somewhere(content)
        if self._choose.random() < 0.2:
            start &= -PAGE
            length = PAGE
        data = self._bytes(length)
        with (
            self._open(content, self._choose.choice((os.O_RDWR, os.O_WRONLY))) as fd,
            self._doing(content, f"write {start}+{length}", model.write(start, data)),
        ):
            if os.pwrite(fd, data, start) != length:
                raise OSError(0, "short")

    def _append(self, content: Content) -> None:
        if len(content.versions) > 1:
            return
        data = self._bytes(self._choose.choice((1, 300, 5000)))
        with (
            self._open(content, os.O_WRONLY | os.O_APPEND) as fd,
            self._doing(content, f"append {len(data)}", model.append(data)),
        ):
            if os.write(fd, data) != len(data):
                raise OSError(0, "short")

    def _truncate(self, content: Content) -> None:
        for _ in range(self._choose.choice((1, 2, 2))):
            size = (
                self._choose.randrange(self._largest)
                if self._choose.random() < 0.4
                else self._choose.randrange(content.size + 1)
            )
            if self._choose.random() < 0.3:
                size &= -PAGE
            if self._choose.random() < 0.5:
                with self._doing(content, f"truncate {size}", model.truncate(size)):
                    os.truncate(self._path(content), size)
            else:
                with (
                    self._open(content, os.O_RDWR) as fd,
                    self._doing(content, f"truncate {size}", model.truncate(size)),
                ):
                    os.ftruncate(fd, size)

    def _overwrite(self, content: Content) -> None:
        with self._doing(content, "O_TRUNC", model.truncate(0)):
            fd = os.open(self._path(content), os.O_WRONLY | os.O_TRUNC)
        with closing(os.fdopen(fd, "wb", buffering=0)) as file:
            data = self._bytes(self._choose.choice((1, 3000, 10_000)))
            with self._doing(content, f"write 0+{len(data)}", model.write(0, data)):
                if file.write(data) != len(data):
                    raise OSError(0, "short")

    def _punch(self, content: Content) -> None:
        start, length = self._somewhere(content)
        with (
            self._open(content, os.O_RDWR) as fd,
            self._doing(content, f"punch {start}+{length}", model.punch(start, start + length)),
        ):
            syscalls.fallocate(fd, PUNCH, start, length)

    def _write_mapped(self, content: Content) -> None:
        # The kernel copies: where a store would be the end of us by SIGBUS it has an error.
        with self._open(content, os.O_RDWR) as fd:
            start, length = self._pages(fd)
            if not length:
                return
            first = self._choose.randrange(length)
            data = self._bytes(self._choose.randrange(1, length - first + 1))
            with (
                mapped(fd, start, length, writable=True) as mapping,
                self._doing(content, f"store {start + first}+{len(data)}", model.write(start + first, data)),
                _memory(data) as memory,
            ):
                if os.preadv(memory, [memoryview(mapping.bytes)[first : first + len(data)]], 0) != len(data):
                    raise OSError(0, "short")
                mapping.sync()

    def _read_mapped(self, content: Content) -> None:
        with self._open(content, os.O_RDONLY) as fd:
            start, length = self._pages(fd)
            if not length:
                return
            with mapped(fd, start, length, writable=False) as mapping, _memory(b"") as memory:
                data = os.pread(memory, os.write(memory, mapping.bytes), 0)
            self._expect(content, content.names[0], start, data, self._suspect)

    def _pages(self, fd: int) -> tuple[int, int]:
        """Some pages of the file, as offset and length up to its end."""
        size = os.fstat(fd).st_size
        if not size:
            return 0, 0
        start = self._choose.randrange(size) & -PAGE
        return start, min(self._choose.choice((1, 3)) * PAGE, size - start)

    def _rename(self, content: Content) -> None:
        old, new = self._name(content), self._new_name(content)
        content.doubtful |= {old, new}
        os.rename(self.root / old, self.root / new)
        self._settle(content)

    def _link(self, content: Content) -> None:
        old, new = self._name(content), self._new_name(content)
        content.doubtful.add(new)
        os.link(self.root / old, self.root / new)
        self._settle(content)

    def _new_name(self, content: Content) -> str:
        return f"{os.path.dirname(content.names[0])}/{self._word}-{next(self._numbers)}"

    def _chmod(self, content: Content) -> None:
        os.chmod(self._path(content), self._choose.choice((0o600, 0o644, 0o755)))

    def _unlink(self, content: Content) -> None:
        name = self._name(content)
        if len(content.names) == 1 and self._choose.random() < 0.5:
            return
        content.doubtful.add(name)
        os.unlink(self.root / name)
        self._settle(content)

    def _settle(self, content: Content) -> None:
        """Find out which of its doubtful names it has."""
        for name in list(content.doubtful):
            try:
                os.lstat(self.root / name)
            except FileNotFoundError:
                content.names = [other for other in content.names if other != name]
            else:
                content.names = [*content.names, *({name} - set(content.names))]
            content.doubtful.discard(name)
        if not content.names:
            self.files.remove(content)
            raise FileNotFoundError(errno.ENOENT, "gone")

    def _create(self, content: Content | None) -> None:
        if len(self.files) > 20:
            return
        directory = os.path.dirname(content.names[0]) if content else ""
        name = f"{directory}/{self._word}-{next(self._numbers)}".lstrip("/")
        data = self._bytes(self._choose.choice((0, 10, 6000)))
        new = Content([bytearray()], [name], touched=True)
        fd = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        self.files.append(new)
        try:
            with self._doing(new, "create", model.write(0, data)):
                if os.write(fd, data) != len(data):
                    raise OSError(0, "short")
        finally:
            os.close(fd)


@contextmanager
def _memory(data: bytes) -> Iterator[int]:
    fd = os.memfd_create("soak")
    try:
        os.write(fd, data)
        yield fd
    finally:
        os.close(fd)
