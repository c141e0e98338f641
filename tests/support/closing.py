"""Functions for accessors that close a descriptor last in another process than the one that opened it."""

import os


def close_in_child(descriptor: int) -> int:
    """Close it here, and then for good in a child; the child's pid."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.read(reader, 1)
        os.close(descriptor)
        os._exit(0)
    os.close(descriptor)
    os.close(writer)
    os.waitpid(child, 0)
    os.close(reader)
    return child
