"""Where a mount's server logs: a file, the system's log, or stderr."""

import logging
import logging.handlers
import os
import stat
import sys
from typing import TextIO

from fusehsm.daemon.options import MountError, MountOptions
from fusehsm.text import LineFormatter, shown

_SYSLOG = "/dev/log"


def start(options: MountOptions) -> None:
    """Log to --log-file, else in the foreground to stderr, as a daemon to the system's log. Raises MountError for a file that must not be used."""
    handler: logging.Handler
    if options.log_file is not None:
        handler = logging.StreamHandler(_opened(options.log_file))
        handler.setFormatter(LineFormatter("%(asctime)s fusehsm[%(process)d]: %(message)s"))
    elif options.foreground:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(LineFormatter("fusehsm: %(message)s"))
    elif os.path.exists(_SYSLOG):
        handler = logging.handlers.SysLogHandler(_SYSLOG)
        handler.setFormatter(LineFormatter("fusehsm[%(process)d]: %(message)s"))
    else:
        handler = logging.NullHandler()
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def _opened(path: str) -> TextIO:
    """The log, for appending. In a directory where others may write, they could have put another file in its place."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        fix = "give a --log-file that you may write, and no symbolic link"
        raise MountError(f"{shown(path)}: {error.strerror}; {fix}") from None
    status = os.fstat(descriptor)
    if stat.S_ISREG(status.st_mode) and (status.st_uid != os.geteuid() or status.st_nlink != 1):
        os.close(descriptor)
        what = "belongs to another user" if status.st_uid != os.geteuid() else "has another name, too"
        raise MountError(f"{shown(path)}: the file {what}; give a --log-file of your own")
    return open(descriptor, "a", encoding="utf-8", errors="backslashreplace")
