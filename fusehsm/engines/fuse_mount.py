"""Mounts and unmounts for the engine that reads /dev/fuse itself: by mount(2) where that is permitted, else through fusermount3."""

import errno
import logging
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from fusehsm.engines.base import MountRefused as MountRefused
from fusehsm.linux import mountinfo, security_modules, syscalls

log = logging.getLogger(__name__)

_HELPER: Final = "fusermount3"
_SUBTYPE: Final = mountinfo.FILESYSTEM_TYPE.partition(".")[2]
_HELPER_END: Final = 10.0  # seconds for fusermount3 to end once nothing keeps it
_UMOUNT_NOFOLLOW: Final = 8  # umount2(2)
# MS_NOSUID and MS_NODEV: the defaults of libfuse's parse_mount_opts() and of fusermount3, also for root.
_DEFAULT_FLAGS: Final = 0x2 | 0x4

# A flag of mount(2), the option that sets it, the option that clears it.
_FLAGS: Final = (
    (0x1, "ro", "rw"),
    (0x2, "nosuid", "suid"),
    (0x4, "nodev", "dev"),
    (0x8, "noexec", "exec"),
    (0x10, "sync", "async"),
    (0x80, "dirsync", None),
    (0x100, "nosymfollow", "symfollow"),
    (0x400, "noatime", "atime"),
    (0x800, "nodiratime", "diratime"),
    (0x100_0000, "strictatime", "nostrictatime"),
    (0x200_0000, "lazytime", "nolazytime"),
)
# The mount's source, and options that the kernel takes as data. The contexts are those of SELinux.
_TAKEN: Final = re.compile(
    "fsname=.+|allow_other|default_permissions|max_read=[0-9]{1,9}|(fs|def|root)?context=.+", re.DOTALL
)
_IGNORED: Final = re.compile(
    # Options for programs that read /etc/fstab (fstab(5), mount(8), systemd.mount(5)). They do not concern the mount itself.
    "(?s)[xX]-.*|comment=.*|user=.*|defaults|(no)?(auto|user|users|owner|group)|nofail|_netdev"
    # Options for what the kernel now does by default: access times, and options of libfuse 2.
    "|(no)?relatime|nonempty|big_writes|large_read|intr",
)
_REFUSED: Final = {
    **dict.fromkeys(("fd", "rootmode", "user_id", "group_id", "subtype"), "fusehsm sets that; leave it out"),
    # The kernel has no such check. allow_other in its place would admit every user.
    "allow_root": "this engine cannot let in root alone; use --allow-other or --engine pyfuse3",
    "debug": "it is libfuse's; use --engine pyfuse3",
    "max_read": "not a number of bytes; give one",
    "fsname": "empty; give a name",
}
_MOUNT_FIXES: Final = {
    errno.EPERM: "mounting needs CAP_SYS_ADMIN, which a container must be given",
    errno.ENOENT: "create it with mkdir -p",
    errno.EINVAL: "leave out the -o options that this kernel lacks",
}
# Messages of fusermount3, and the fix for each. The first that matches counts.
_FIXES: Final = (
    # fusermount3 mounts as root, so file modes are not the cause.
    (
        "mount failed: Permission denied",
        f"a security module forbids it to {_HELPER}; {security_modules.RULES}",
    ),
    ("user_allow_other", "put the line user_allow_other into /etc/fuse.conf"),
    ("unknown option", "leave it out, or mount as root and without auto_unmount"),
    ("no write access|not owned by user", "an ordinary user mounts only on directories that they own"),
    ("is forbidden", "use a DST on an ordinary filesystem"),
    ("mount_max", "unmount some of them"),
    ("No such file", "create it with mkdir -p"),
    ("Permission denied", "use a directory that you may enter"),
    ("Operation not permitted", "fusermount3 must be set-uid root; a container must be given CAP_SYS_ADMIN"),
)


@dataclass(frozen=True, slots=True)
class Connection:
    """The server's end of a mount.

    With auto_unmount, fusermount3 unmounts when no process has `keeper` open any more, at the latest when this process ends. Before that it
    checks, as root, whether the mount is dead. Root cannot do so in an ordinary user's mount without allow_other (docs/facts.md, section 14).
    """

    #: /dev/fuse, from which requests are read: close-on-exec and non-blocking.
    descriptor: int
    #: The socket to fusermount3, which waits for its end; None without auto_unmount.
    keeper: socket.socket | None = None
    #: The process of fusermount3; None without auto_unmount.
    helper: "subprocess.Popen[bytes] | None" = None

    def close(self) -> None:
        """Close the connection. If the mount still exists, its accessors get ENOTCONN; with auto_unmount it is unmounted."""
        # Before the keeper: at its end fusermount3 opens the mount, and would wait for an answer while this descriptor is open.
        os.close(self.descriptor)
        if self.keeper is not None and self.helper is not None:
            self.keeper.close()
            with suppress(subprocess.TimeoutExpired):
                self.helper.wait(_HELPER_END)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The parsed options of a mount."""

    #: The mount's source (fsname=).
    source: str
    #: Flags of mount(2).
    flags: int
    #: Options that make fusermount3 set the same flags.
    words: tuple[str, ...]
    #: Options for the kernel, as data of mount(2).
    data: tuple[str, ...]
    #: Whether fusermount3 is to unmount when this process ends.
    auto_unmount: bool


def mount(mount_point: str, options: frozenset[str]) -> Connection:
    """Mount on a directory. The mount exists at once, but INIT is not answered yet, so accesses of it wait.

    `options`: options of mount(8), and those of mount.fuse3(8) that are not for libfuse. They have no order, so none may contradict
    another. The value of fsname= may contain any character, also commas. Raises MountRefused.
    """
    asked = _understood(options)
    try:
        os.stat(f"{mount_point}/")  # fails unless it is a directory
    except OSError as error:
        fix = _MOUNT_FIXES.get(error.errno or 0, "use a directory that you may enter")
        raise MountRefused(f"{mount_point}: {error.strerror}; {fix}") from None
    descriptor = _open_device()
    try:
        if not asked.auto_unmount and _mounted_directly(mount_point, asked, descriptor):
            os.set_blocking(descriptor, False)
            return Connection(descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return _mount_through_helper(mount_point, asked)


def set_flags(mount_point: str, options: frozenset[str]) -> None:
    """Give a mount that libfuse has made the flags of `options` that libfuse does not know (nosymfollow). Needs root. Raises MountRefused."""
    try:
        syscalls.mount(
            os.fsencode(mount_point),
            os.fsencode(mount_point),
            None,
            syscalls.MS_BIND | syscalls.MS_REMOUNT | _understood(options).flags,
        )
    except OSError as error:
        raise MountRefused(f"{mount_point}: -o nosymfollow: {error.strerror}; use --engine devfuse") from None


def unmount(mount_point: str, wanted: mountinfo.MountId, *, lazily: bool) -> None:
    """Unmount the mount `wanted` at that real path, and no other. `lazily`: also when it is in use (MNT_DETACH in umount2(2)).

    Raises OSError EINVAL where another mount, or none, is on top there; EBUSY where another filesystem is mounted on it, or files are open
    and not `lazily`; otherwise as open(2) and umount2(2) do.
    """
    descriptor = os.open(mount_point, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if mountinfo.id_of_descriptor(descriptor) != wanted:
            raise OSError(errno.EINVAL, "another mount is there, or none", mount_point)
        # A lazy unmount would unmount that filesystem, too.
        for above in mountinfo.mounts_on(wanted.number):
            raise OSError(errno.EBUSY, f"{above.mount_point} is mounted on it", mount_point)
        if lazily:
            # By descriptor: the path may lead to another mount by now.
            syscalls.umount2(b"/proc/self/fd/%d" % descriptor, syscalls.MNT_DETACH)
            return
    except PermissionError:
        if os.geteuid() == 0:
            raise
    finally:
        os.close(descriptor)
    if os.geteuid() == 0:
        # By path: an open descriptor would keep the mount in use.
        syscalls.umount2(os.fsencode(mount_point), _UMOUNT_NOFOLLOW)
        return
    command = [_HELPER, "-u", *(["-z"] if lazily else []), "--", mount_point]
    # In a session of its own: Ctrl-C of the terminal is for this process only, and users may press it twice.
    done = subprocess.run(
        command, check=False, stdin=subprocess.DEVNULL, capture_output=True, start_new_session=True
    )
    if done.returncode:
        said = _last_line(done.stderr)
        number = next((n for n in errno.errorcode if said.endswith(os.strerror(n))), errno.EPERM)
        raise OSError(number, said, mount_point)


def _understood(options: frozenset[str]) -> _Asked:
    flags, words = _DEFAULT_FLAGS, []
    for flag, setting, clearing in _FLAGS:
        if {setting, clearing} <= options:
            raise MountRefused(f"-o {setting},{clearing}: they contradict each other; give one")
        if setting in options:
            flags |= flag
            words.append(setting)
        elif clearing in options and flags & flag:
            flags &= ~flag
            words.append(clearing)
    known = {f"subtype={_SUBTYPE}", "auto_unmount", *(word for _, *pair in _FLAGS for word in pair)}
    taken: dict[str, str] = {}
    for option in sorted(options - known):
        name = option.partition("=")[0]
        if name in taken:
            raise MountRefused(f"-o {option}: another {name} is given too; give one")
        if _TAKEN.fullmatch(option):
            taken[name] = option
        elif name in _REFUSED:
            raise MountRefused(f"-o {option}: {_REFUSED[name]}")
        elif not _IGNORED.fullmatch(option):
            raise MountRefused(f"-o {option}: not an option of this mount; leave it out")
    source = taken.pop("fsname", f"fsname={_SUBTYPE}").removeprefix("fsname=")
    return _Asked(source, flags, tuple(words), tuple(taken.values()), "auto_unmount" in options)


def _open_device() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        if security_modules.may_explain(error):
            raise MountRefused(f"/dev/fuse: {error.strerror}; {security_modules.refusal()}") from None
        command = "chmod 666 /dev/fuse" if error.errno == errno.EACCES else "modprobe fuse"
        raise MountRefused(f"/dev/fuse: {error.strerror}; run {command} as root") from None


def _mounted_directly(mount_point: str, asked: _Asked, descriptor: int) -> bool:
    """Mount by mount(2); returns False where an ordinary user needs fusermount3 for that. Raises MountRefused."""
    ours = f"fd={descriptor},rootmode={stat.S_IFDIR:o},user_id={os.getuid()},group_id={os.getgid()}"
    words = (asked.source, mount_point, mountinfo.FILESYSTEM_TYPE, ",".join((ours, *asked.data)))
    source, target, kind, data = map(os.fsencode, words)
    try:
        syscalls.mount(source, target, kind, asked.flags, data)
    except OSError as error:
        # AppArmor asks before the kernel does: EACCES.
        if error.errno in (errno.EPERM, errno.EACCES) and os.geteuid() != 0:
            return False
        fix = _MOUNT_FIXES.get(error.errno or 0, "see fusehsm doctor")
        if error.errno == errno.EACCES:
            fix = security_modules.refusal()
        elif error.errno == errno.EINVAL and any("context=" in word for word in asked.data):
            fix = "leave out the context: SELinux is off, or does not accept it here"
        raise MountRefused(f"{mount_point}: {error.strerror}; {fix}") from None
    return True


def _mount_through_helper(mount_point: str, asked: _Asked) -> Connection:
    """Mount as mount.c of libfuse does: fusermount3 mounts, and sends the descriptor over the socket that its environment names."""
    program = shutil.which(_HELPER)
    if program is None:
        raise MountRefused(f"{_HELPER}: not found; install the package fuse3")
    source = re.sub(r"[\\,]", r"\\\g<0>", asked.source)
    words = (*asked.words, *asked.data, f"subtype={_SUBTYPE}", f"fsname={source}")
    ours, theirs = socket.socketpair()
    # A file for its messages: with auto_unmount a pipe would have to be kept open.
    with open(os.memfd_create(_HELPER), "w+b") as said:
        with theirs:
            helper = subprocess.Popen(
                [_HELPER, "-o", ",".join(words) + ",auto_unmount" * asked.auto_unmount, "--", mount_point],
                executable=program,
                env={**os.environ, "_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        # Not socket.recv_fds(): in Python 3.11 it drops the flag MSG_CMSG_CLOEXEC.
        _, ancillary, _, _ = ours.recvmsg(1, socket.CMSG_SPACE(4), socket.MSG_CMSG_CLOEXEC)
        if not (ancillary and asked.auto_unmount):
            ours.close()
            helper.wait()
        said.seek(0)
        complaint = said.read()
    if not ancillary:
        text = _last_line(complaint)
        fix = next((fix for pattern, fix in _FIXES if re.search(pattern, text)), "see fusehsm doctor")
        raise MountRefused(f"{mount_point}: {text}; {fix}")
    if complaint:
        log.warning("%s: %s", mount_point, _last_line(complaint))
    if asked.auto_unmount and os.geteuid() != 0 and "allow_other" not in asked.data:
        log.warning("%s: -o auto_unmount may do nothing for ordinary users without allow_other", mount_point)
    (descriptor,) = struct.unpack("=i", ancillary[0][2])
    os.set_blocking(descriptor, False)
    return Connection(descriptor, *((ours, helper) if asked.auto_unmount else ()))


def _last_line(said: bytes) -> str:
    return os.fsdecode(said).strip().rpartition("\n")[2].removeprefix(f"{_HELPER}: ") or f"{_HELPER} failed"
