"""Telling whoever has started a service that it serves now (sd_notify(3), Type=notify of systemd.service(5))."""

import os
import socket
from contextlib import suppress


def say_ready() -> None:
    """Does nothing where nobody has asked for it (NOTIFY_SOCKET), or nobody listens any more."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as speaker, suppress(OSError):
        speaker.setblocking(False)
        speaker.sendto(b"READY=1", "\0" + address[1:] if address[0] == "@" else address)
