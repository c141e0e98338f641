"""The command line of `fusehsm run`, and its errors."""

from dataclasses import dataclass

from fusehsm.daemon.options import EVENT_MODES, LOCKS, check_choice
from fusehsm.fanotify.abi import DIALECTS
from fusehsm.supervisor.launcher import MOST_PLACES


@dataclass(frozen=True, slots=True)
class RunOptions:
    """The command line of `fusehsm run`."""

    #: The program and its arguments.
    command: tuple[str, ...]
    #: The directories to overlay in place.
    mounts: tuple[str, ...] = ()
    #: The command's dialect; None if the user chose none.
    abi: str | None = None
    #: The mounts' mode of events.
    events: str = "auto"
    #: The mounts' locks; None if the user chose none.
    locks: str | None = None
    #: Leave the mounts in place at the end.
    keep: bool = False
    #: The command is not a listener; its mmap(2) makes the event at once.
    accessor: bool = False
    #: The command sees each directory without the overlay.
    listener: bool = False
    #: Answer the calls on all descriptors, so that a group may have any number.
    any_descriptor: bool = False
    #: Do not report files of which the command allows a read of a hole.
    quiet: bool = False
    #: The longest time for which the command may wait for itself, in seconds; 0 for no limit.
    deadlock_timeout: float = 5.0


class RunError(OSError):
    """An error of one line for the user: thing, cause, fix."""


def check(options: RunOptions) -> None:
    """Raise ValueError, with one line, for options that do not go together."""
    if options.abi is not None and options.abi not in DIALECTS:
        raise ValueError(f"--abi {options.abi}: not a dialect; choose {', '.join(DIALECTS)}")
    check_choice("--events", options.events, EVENT_MODES)
    check_choice("--locks", options.locks or "local", LOCKS)
    if options.keep and not options.mounts:
        raise ValueError("--keep: there is no --mount that could be kept")
    if options.accessor and options.any_descriptor:
        raise ValueError("--any-descriptor, --accessor: an accessor has no groups; leave one of them out")
    if not 0 <= options.deadlock_timeout < float("inf"):
        raise ValueError(
            f"--deadlock-timeout {options.deadlock_timeout}: not a number of seconds; give 0 or more"
        )
    if not options.listener:
        return
    if options.accessor:
        raise ValueError("--listener, --accessor: a command is one or the other; leave one of them out")
    if not options.mounts:
        raise ValueError("--listener: there is no directory for the command to see; give --mount DIR")
    if len(options.mounts) > MOST_PLACES:
        raise ValueError(f"--listener: more than {MOST_PLACES} directories; give --mount one that holds them")
