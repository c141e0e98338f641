"""What happens to accesses that no listener answers: the values of --unattended and --event-timeout."""

import errno
from dataclasses import dataclass
from enum import Enum


class Unattended(Enum):
    """Who decides while no pre-content group stands, and about the events of one that has died.

    ALLOW is the kernel's own way; DENY refuses; HOLD parks the access until a pre-content group answers for it or it is released.
    """

    ALLOW = "allow"
    DENY = "deny"
    HOLD = "hold"


@dataclass(frozen=True, slots=True)
class UnattendedPolicy:
    """`action`, with the errno that DENY gives (ignored otherwise)."""

    action: Unattended
    errno: int = errno.EIO

    @classmethod
    def parse(cls, text: str) -> "UnattendedPolicy":
        """`allow`, `deny`, `deny=ERRNO` or `hold`; raises ValueError with one line that lists the choices."""
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
    """After `seconds` without an answer an access is refused with `errno`."""

    seconds: float
    errno: int = errno.EIO

    @classmethod
    def parse(cls, text: str) -> "EventTimeout":
        """`SECONDS` or `SECONDS=ERRNO`; raises ValueError with one line that says what is wrong."""
        number, separator, name = text.partition("=")
        try:
            seconds = float(number)
        except ValueError:
            raise ValueError(
                f"{text}: not a number of seconds; give SECONDS or SECONDS=ERRNO, 30=EIO for one"
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
    """The number of an errno such as EIO; raises ValueError with one line for a name that is none."""
    value = getattr(errno, name, None)
    if not name.startswith("E") or not isinstance(value, int):
        raise ValueError(f"{name}: not an errno name; EIO, EAGAIN and ENOSPC are some")
    return value
