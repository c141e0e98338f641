"""Write leases of the running kernel (F_SETLEASE with F_WRLCK, fcntl(2)): one small function each, raising OSError with the kernel's errno."""

import fcntl
import re
import signal

# As /proc/PID/fdinfo has it (proc_pid_fdinfo(5)); as long as the holder may still end it in time, it is BREAKING.
_DOWNGRADED = re.compile(r"LEASE\s+ACTIVE\s+READ\b")


def take(descriptor: int) -> None:
    """Lease an open file: nobody else has it open or mapped, and who opens it from now on waits, for fs.lease-break-time at most.

    Raises BlockingIOError (EAGAIN) when somebody has it open, EACCES for who is neither its owner nor has CAP_LEASE, EINVAL where the
    filesystem has no leases.
    """
    # Who opens the file while the lease stands makes a signal for us: this one is ignored where nobody handles it, SIGIO would kill. Once the
    # lease has set an owner of the file, that is taken away, and there is no signal.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, 0)


def is_wanted(descriptor: int) -> bool:
    """Whether somebody waits for the lease to end, or has waited for so long that the kernel has broken it."""
    return fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK


def give_back(descriptor: int) -> bool:
    """End the lease; False when the kernel had broken it."""
    # One that somebody wanted to read for too long is a read lease then, and there still.
    with open(f"/proc/self/fdinfo/{descriptor}", encoding="ascii") as lines:
        if any(_DOWNGRADED.search(line) for line in lines):
            return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return False
    return True


def break_seconds() -> float:
    """For how long somebody may be kept waiting by a lease (/proc/sys/fs/lease-break-time, proc_sys_fs(5)); 45 where nobody tells."""
    try:
        with open("/proc/sys/fs/lease-break-time", encoding="ascii") as setting:
            return float(setting.read())
    except (OSError, ValueError):
        return 45.0
