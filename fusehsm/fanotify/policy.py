"""The policies for accesses that no listener answers: the values of --unattended and --event-timeout."""

import errno
from dataclasses import dataclass
from enum import Enum


class Unattended(Enum):
    """The decision about accesses while there is no pre-content group, and about the events of a group that has died.

    ALLOW is the kernel's rule. DENY denies the access. HOLD keeps the access waiting until a pre-content group answers or `fusehsm status
    --release` lets it go.
    """

    ALLOW = "allow"
    DENY = "deny"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class UnattendedPolicy:
    """The value of --unattended."""

    action: Unattended
    #: The errno of a denial; only DENY uses it.
    errno: int = errno.EIO

    @classmethod
    def parse(cls, text: str) -> "UnattendedPolicy":
        """Parse `allow`, `deny`, `deny=ERRNO` or `hold`. Raises ValueError with one line that lists the choices."""
        word, separator, name = text.partition("=")
        try:
            action = Unattended(word)
        except ValueError:
            raise ValueError(f"{text}: not a policy; choose allow, deny, deny=ERRNO or hold") from None
        if not separator:
            return cls(action)
        if action is not Unattended.DENY:
            raise ValueError(f"{text}: only deny takes an errno; choose allow, deny, deny=ERRNO or hold")
        return cls(action, _errno_in(text, name))


@dataclass(frozen=True, slots=True)
class EventTimeout:
    """The value of --event-timeout: an access without an answer is denied after this time."""

    seconds: float
    #: The errno of the denial.
    errno: int = errno.EIO

    @classmethod
    def parse(cls, text: str) -> "EventTimeout":
        """Parse `SECONDS` or `SECONDS=ERRNO`. Raises ValueError with one line: cause and fix."""
        number, separator, name = text.partition("=")
        try:
            seconds = float(number)
        except ValueError:
            raise ValueError(
                f"{text}: not a number of seconds; give SECONDS or SECONDS=ERRNO, for example 30=EIO"
            ) from None
        if not 0 < seconds < 1e9:
            raise ValueError(f"{text}: seconds must be more than 0")
        return cls(seconds, _errno_in(text, name) if separator else errno.EIO)


def _errno_in(text: str, name: str) -> int:
    try:
        return errno_by_name(name)
    except ValueError as error:
        raise ValueError(f"{text}: {error}") from None


def errno_by_name(name: str) -> int:
    """The number of an errno name such as EIO. Raises ValueError with one line for any other word."""
    value = getattr(errno, name, None)
    if not name.startswith("E") or not isinstance(value, int):
        raise ValueError(f"{name}: not an errno name; give one such as EIO, EAGAIN or ENOSPC")
    return value
