"""The listener of listener.c in Python, as prototypes are written: ctypes for two system calls, `os` and `select` for the others.

python_listener.py [--style poll|blocking] [--deny GLOB=ERRNO] [--mark FLAGS MASK PATH]... DIRECTORY
"""

import argparse
import ctypes
import errno
import fnmatch
import os
import select
import struct

PRE_CONTENT, NONBLOCK, CLOEXEC = 0x8, 0x2, 0x1
AT_FDCWD = -100
ALLOW, DENY = 1, 2
RANGE = 6
PAGE = 4096
FLAGS = {"add": 0x1, "mount": 0x10}
MASKS = {"PRE_ACCESS": 0x100000, "OPEN_PERM": 0x10000, "ACCESS_PERM": 0x20000}

libc = ctypes.CDLL(None, use_errno=True)
libc.fanotify_mark.argtypes = [ctypes.c_int, ctypes.c_uint, ctypes.c_uint64, ctypes.c_int, ctypes.c_char_p]


def value_of(words: dict[str, int], text: str) -> int:
    return sum(words[word] for word in text.split("|"))


def mark(group: int, flags: int, mask: int, path: str) -> int:
    return ctypes.get_errno() if libc.fanotify_mark(group, flags, mask, AT_FDCWD, path.encode()) else 0


def fill(fd: int, offset: int, count: int) -> None:
    size = os.fstat(fd).st_size
    for place in range(offset, min(offset + count, size), PAGE):
        try:
            hole = os.lseek(fd, place, os.SEEK_DATA) != place
        except OSError:
            hole = True
        if hole:
            os.pwrite(
                fd, bytes(i % 251 + i // PAGE % 5 for i in range(place, min(place + PAGE, size))), place
            )


def handle(group: int, event: bytes, denied: str, denial: str) -> None:
    mask, fd, _ = struct.unpack_from("=Qii", event, 8)
    name = os.path.basename(os.readlink(f"/proc/self/fd/{fd}"))
    where = struct.unpack_from("=QQ", event, 32) if len(event) >= 48 and event[24] == RANGE else None
    what = "|".join(word for word, bit in MASKS.items() if mask & bit)
    refused = bool(denied) and fnmatch.fnmatch(name, denied)
    decision = f"DENY {denial}" if refused else "ALLOW"
    print(what, *(where or ("-", "-")), name, decision, flush=True)
    if where is not None and not refused:
        fill(fd, *where)
    os.write(group, struct.pack("=iI", fd, DENY | getattr(errno, denial) << 24 if refused else ALLOW))
    os.close(fd)
    if name == "end":
        raise SystemExit(0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--style", default="poll")
    parser.add_argument("--deny", default="=")
    parser.add_argument("--mark", nargs=3, action="append", default=[])
    parser.add_argument("directory")
    options = parser.parse_args()
    polls = options.style == "poll"
    group = libc.fanotify_init(PRE_CONTENT | CLOEXEC | (NONBLOCK if polls else 0), os.O_RDWR)
    if group < 0:
        raise OSError(ctypes.get_errno(), "fanotify_init")
    for flags, mask, path in options.mark:
        result = mark(group, value_of(FLAGS, flags), value_of(MASKS, mask), path)
        print(
            f"mark {flags} {mask} {os.path.basename(path)}: {errno.errorcode.get(result, 'OK')}", flush=True
        )
    if mark(group, FLAGS["add"], MASKS["PRE_ACCESS"], f"{options.directory}/end"):
        raise OSError(ctypes.get_errno(), "end")
    poll = select.poll()
    poll.register(group, select.POLLIN)
    print("ready", flush=True)
    while True:
        if polls:
            poll.poll()
        events = os.read(group, 4096)
        while events:
            (size,) = struct.unpack_from("=I", events)
            handle(group, events[:size], *options.deny.split("=", 1))
            events = events[size:]


if __name__ == "__main__":
    main()
