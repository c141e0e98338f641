"""Do random things to a stub and to a plain copy of its origin, and say where they differ.

    python tests/support/mirror_model.py STUB COPY SEED OPERATIONS

Prints one line for every difference and exits 1 if there was one. The copy is an ordinary file: whatever a stub under a
mirror does, it must look the same.
"""

import mmap
import os
import random
import sys
from collections.abc import Callable
from typing import Any

Operation = Callable[[str], Any]


def with_fd(path: str, flags: int, action: Callable[[int], Any]) -> Any:
    """Open, act, close."""
    fd = os.open(path, flags)
    try:
        return action(fd)
    finally:
        os.close(fd)


def read_mapped(fd: int) -> bytes:
    """All of a file through a private mapping."""
    if os.fstat(fd).st_size == 0:
        return b""
    with mmap.mmap(fd, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        return mapping[:]


def an_operation(chooser: random.Random, size: int) -> tuple[str, Operation]:
    """Something to do to a file that was `size` bytes large at first, and its name."""
    offset = chooser.choice(
        (0, chooser.randrange(size + 9000), chooser.randrange(size + 9000) // 4096 * 4096)
    )
    length = chooser.choice((1, 10, 4096, 5000, chooser.randrange(1, size + 2)))
    data = chooser.randbytes(min(length, 20000))
    append, truncate = os.O_WRONLY | os.O_APPEND, os.O_WRONLY | os.O_TRUNC
    operations: list[tuple[int, str, Operation]] = [
        (
            8,
            f"read {offset}+{length}",
            lambda p: with_fd(p, os.O_RDONLY, lambda fd: os.pread(fd, length, offset)),
        ),
        (
            6,
            f"write {offset}+{len(data)}",
            lambda p: with_fd(p, os.O_RDWR, lambda fd: os.pwrite(fd, data, offset)),
        ),
        (2, f"append {len(data)}", lambda p: with_fd(p, append, lambda fd: os.write(fd, data))),
        (2, "map", lambda p: with_fd(p, os.O_RDONLY, read_mapped)),
        (2, f"truncate to {offset}", lambda p: os.truncate(p, offset)),
        (1, f"O_TRUNC, write {len(data)}", lambda p: with_fd(p, truncate, lambda fd: os.write(fd, data))),
        (2, "size", lambda p: os.stat(p).st_size),
    ]
    _, name, operation = chooser.choices(operations, [weight for weight, _, _ in operations])[0]
    return name, operation


def outcome(operation: Operation, path: str) -> Any:
    """What an operation returned, or the name of the error it ended with."""
    try:
        return operation(path)
    except OSError as error:
        return f"errno {error.errno}"


def brief(value: Any) -> str:
    """A value, short enough for a line."""
    return f"{len(value)} bytes {value[:8].hex()}…" if isinstance(value, bytes) else repr(value)


def main(stub: str, copy: str, seed: int, count: int) -> int:
    """Run `count` operations on both and compare after each."""
    chooser = random.Random(seed)
    size = os.stat(copy).st_size
    done: list[str] = []
    for _ in range(count):
        name, operation = an_operation(chooser, size)
        done.append(name)
        got, expected = outcome(operation, stub), outcome(operation, copy)
        if got != expected:
            print(f"seed {seed}: {brief(got)} instead of {brief(expected)} after: {'; '.join(done)}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
