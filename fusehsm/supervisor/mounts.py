"""Makes the mounts of `fusehsm run`, and removes them at its end."""

import errno
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from fusehsm.daemon.child import foreground_mount, pass_on_notes
from fusehsm.daemon.options import MountError
from fusehsm.linux import mountinfo, security_modules
from fusehsm.linux.signals import signals_held
from fusehsm.linux.subprocesses import own_command, own_environment
from fusehsm.mount import unmount
from fusehsm.supervisor.launcher import Launcher, LaunchError
from fusehsm.supervisor.options import RunError, RunOptions
from fusehsm.supervisor.view import View

# Settings (sysctl(8)) that forbid user namespaces: the name, the value that forbids, one that allows.
_NAMESPACE_SETTINGS: Final = (
    ("user.max_user_namespaces", "0", "10000"),
    ("kernel.unprivileged_userns_clone", "0", "1"),
    ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
)


def mount_places(stack: ExitStack, options: RunOptions) -> None:
    """Overlay each directory in place, until the end of `stack` or for good (--keep). Raises RunError, OSError with one line."""
    with ExitStack() as mounts:
        # One after the other, because one directory may lie in another.
        for place in _places(options):
            _mount(mounts, place, options)
        kept = mounts.pop_all()
    if not options.keep:
        stack.push(kept)


def mount_with_view(stack: ExitStack, launcher: Launcher, options: RunOptions) -> View:
    """Overlay each directory in place for all others, and give the command a view without the overlays. Raises as mount_places()."""
    # A directory within another comes after it: the outer overlay must not cover the inner one.
    places = sorted(_places(options), key=lambda place: len(place.rstrip("/").split("/")))
    try:
        copies = launcher.make_view(places, user=os.geteuid() != 0)
    except LaunchError as error:
        raise no_view(error) from None
    for shown, served in copies:
        stack.callback(os.close, shown)
        stack.callback(os.close, served)
    with ExitStack() as mounts:
        for place, both in zip(places, copies, strict=True):
            _mount(mounts, place, options, both)
        kept = mounts.pop_all()
    if not options.keep:
        stack.push(kept)
    if os.geteuid() != 0 or not mountinfo.mount_of("/").is_shared:
        note = "fusehsm run: note: what the command mounts is seen by the command alone"
        print(note, file=sys.stderr, flush=True)
    view = View.of([(place, copy) for place, (copy, _) in zip(places, copies, strict=True)])
    stack.callback(view.close)
    return view


def no_view(error: LaunchError) -> RunError:
    """The error of one line for a view that could not be made."""
    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSPC) and os.geteuid() != 0:
        cause = (
            f"ordinary users may not make user namespaces here; {_namespaces_fix()}, or run it as root, or leave --listener out; "
            "the kernel never allows them in a chroot"
        )
    elif error.errno == errno.EACCES:
        cause = f"no mount namespace for the command: {security_modules.refusal()}"
    elif error.errno == errno.EPERM:
        cause = (
            "mount namespaces are forbidden here; in a container allow CAP_SYS_ADMIN, or leave --listener out"
        )
    else:
        cause = f"no mount namespace for the command: {error.strerror}; leave --listener out"
    return RunError(f"fusehsm run: --listener: {cause}")


def _namespaces_fix() -> str:
    """The setting that keeps ordinary users from making user namespaces, as a command that changes it."""
    for name, forbids, allows in _NAMESPACE_SETTINGS:
        with suppress(OSError):
            if Path("/proc/sys", *name.split(".")).read_text().strip() == forbids:
                return f"as root, run sysctl {name}={allows}"
    return f"allow them: {security_modules.refusal()}"


def _places(options: RunOptions) -> list[str]:
    return list(dict.fromkeys(map(os.path.realpath, options.mounts)))


def _mount(mounts: ExitStack, place: str, options: RunOptions, view: Sequence[int] = ()) -> None:
    """Overlay one directory. `view`: the descriptors of the command's copy of it, and of the one to serve."""
    arguments = ["--direct", "--events", options.events, *(["--abi", options.abi] if options.abi else [])]
    arguments += ["--locks", options.locks] if options.locks else []
    if not options.quiet and not options.listener:
        arguments.append("--tell-holes")
    if view:
        # Shared, because the command changes the backing behind the overlay's back.
        arguments += ["--event-root", str(view[0]), "--backing", str(view[1]), "--cache", "shared"]
    if not options.keep:
        mounts.enter_context(foreground_mount(place, place, *arguments, pass_fds=view))
        return
    arguments += ["--allow-other"] if os.geteuid() == 0 else []
    # In a session of its own: Ctrl-C comes to this process, which then unmounts it.
    with signals_held():
        done = subprocess.run(
            own_command("mount", *arguments, place, place),
            env=own_environment(),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=view,
            text=True,
        )
        if done.returncode == 0:
            # Until the command begins: if another directory cannot be mounted, no mount is kept.
            mounts.callback(_unmount, place, mountinfo.id_at(place))
    said = pass_on_notes(done.stderr)
    if done.returncode:
        raise RunError(said.strip().removeprefix("fusehsm: "))


def _unmount(place: str, mount_id: mountinfo.MountId) -> None:
    with suppress(MountError):
        unmount(place, mount_id)
