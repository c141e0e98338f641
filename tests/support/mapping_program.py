"""Maps files as its arguments say and prints what came of it: a program for test_mappings.py. Standard library only.

Each argument is PATH:ACCESS:LENGTH:PROT:FLAGS:OFFSET:TOUCH, the numbers as for open(2) and mmap(2); TOUCH: a page of the mapping to look at,
or -1. A line each: "ok", "ok BYTE" or the errno's name.
"""

import ctypes
import errno
import os
import signal
import sys

libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]


def main() -> None:
    # Handled, and not ignored: that would not come here at all.
    signal.signal(signal.SIGWINCH, lambda *_: None)
    for argument in sys.argv[1:]:
        path, *numbers = argument.rsplit(":", 6)
        access, length, protection, flags, offset, touch = map(int, numbers)
        descriptor = os.open(path, access)
        place = libc.mmap(None, length, protection, flags, descriptor, offset)
        if place == ctypes.c_void_p(-1).value:
            print(errno.errorcode[ctypes.get_errno()], flush=True)
        elif touch < 0:
            print("ok", flush=True)
        else:
            print("ok", ctypes.string_at(place + touch * 4096, 1)[0], flush=True)
        os.close(descriptor)


main()
