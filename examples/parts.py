"""Read random parts of a file in one way and print their hashes, as a JSON list of [offset, length, sha256].

    python examples/parts.py FILE pread|private|shared COUNT SEED

It is a separate program, so its parent process can stop waiting if the file system does not answer.
"""

import hashlib
import json
import mmap
import os
import random
import sys

LONGEST = 1 << 20
WAYS = ("pread", "private", "shared")


def read_part(fd: int, way: str, offset: int, length: int) -> bytes:
    """The bytes [offset, offset + length) of an open file, by pread(2) or through a mapping of just those pages."""
    if way == "pread":
        pieces = []
        while length and (piece := os.pread(fd, length, offset)):
            pieces.append(piece)
            offset, length = offset + len(piece), length - len(piece)
        return b"".join(pieces)
    lead = offset % mmap.ALLOCATIONGRANULARITY
    flags = mmap.MAP_PRIVATE if way == "private" else mmap.MAP_SHARED
    with mmap.mmap(fd, lead + length, flags=flags, prot=mmap.PROT_READ, offset=offset - lead) as mapping:
        return mapping[lead : lead + length]


def main(path: str, way: str, count: int, seed: int) -> None:
    """Print [offset, length, sha256] of `count` parts. The same seed gives the same parts."""
    chooser = random.Random(f"{way}{seed}")
    fd = os.open(path, os.O_RDONLY)
    size = os.fstat(fd).st_size
    parts = []
    for _ in range(count):
        offset = chooser.randrange(size)
        length = min(chooser.randint(1, LONGEST), size - offset)
        parts.append([offset, length, hashlib.sha256(read_part(fd, way, offset, length)).hexdigest()])
    os.close(fd)
    json.dump(parts, sys.stdout)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
