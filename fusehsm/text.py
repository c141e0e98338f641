"""Text that others have named, made safe to print in one line."""

import os


def shown(path: str) -> str:
    """A path for a message: in one line, undecodable bytes and control characters as escapes."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text
    )
