"""Names the security module (AppArmor, SELinux) that confines a process, for messages about what it forbids."""

import errno
import os
from typing import Final

RULES: Final = "docs/security-modules.md has the rules"


def confinement(pid: int | str = "self") -> str | None:
    """The confinement of a process, as words for a message. None: no module confines it, or this one may not ask."""
    profile = _label(f"/proc/{pid}/attr/apparmor/current") or _label(f"/proc/{pid}/attr/current")
    if profile is None or profile == "unconfined":
        return None
    if profile.endswith(")"):  # AppArmor's "name (mode)"
        return f"the AppArmor profile {profile}"
    return f"SELinux, for {profile}," if _selinux_enforces() else None


def of_either(pid: int) -> str | None:
    """confinement() of that process, or else of this one: a module may ask in the profiles of both."""
    return confinement(pid) or confinement()


def refusal() -> str:
    """The cause of an EACCES that file modes do not explain, and where its fix is: half a line for a message."""
    return f"{confinement() or 'a security module'} forbids it; {RULES}"


def may_explain(error: OSError) -> bool:
    """Whether a security module, and not a file mode, is the likely cause of an error."""
    return error.errno == errno.EACCES and (os.geteuid() == 0 or confinement() is not None)


def refusal_to_trace(pid: int) -> str:
    """The cause of a refused ptrace(2) access to a process, and its fix: half a line for a message."""
    module = of_either(pid)
    if module is not None:
        return f"{module} forbids ptrace between the two; {RULES}"
    if os.geteuid() != 0:
        return "it is another user's, its program may not be read, or Yama's ptrace_scope forbids it; run fusehsm as root"
    return "Yama's ptrace_scope or a container's filter forbids ptrace; allow it"


def _label(path: str) -> str | None:
    try:
        with open(path, "rb") as file:
            return file.read().rstrip(b"\0\n").decode(errors="replace") or None
    except OSError:
        return None


def _selinux_enforces() -> bool:
    return _label("/sys/fs/selinux/enforce") == "1"
