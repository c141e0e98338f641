"""open_group(): opens a group that watches a path, on a backend that can make events there."""

import contextlib
import errno
import functools
import logging
import operator
import os
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

import trio

from fusehsm.backends.base import AT_FDCWD, Group
from fusehsm.backends.emulated import EmulatedGroup
from fusehsm.backends.kernel import KernelGroup
from fusehsm.fanotify.abi import (
    DIALECTS,
    FAN_CLASS_PRE_CONTENT,
    FAN_CLOEXEC,
    FAN_EVENT_ON_CHILD,
    FAN_MARK_ADD,
    FAN_MARK_FILESYSTEM,
    FAN_MARK_MOUNT,
    FAN_NONBLOCK,
    FAN_UNLIMITED_MARKS,
    FAN_UNLIMITED_QUEUE,
    LINUX_6_14,
    Dialect,
    parse_mask,
)
from fusehsm.linux import syscalls
from fusehsm.linux.mountinfo import Mount, mount_of, mount_of_descriptor, read_mounts

log = logging.getLogger(__name__)

# A full queue allows accesses unasked. So the default queue is unlimited: no stub may be read as zeros.
DEFAULT_FLAGS = FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS
DEFAULT_EVENT_F_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_LARGEFILE

BACKENDS = ("auto", "kernel", "fuse")
# The values of `mark`, each with its fanotify_mark(2) flags and additional mask bits.
MARKS = {
    "inode": (0, 0),
    "children": (0, FAN_EVENT_ON_CHILD),
    "mount": (FAN_MARK_MOUNT, 0),
    "filesystem": (FAN_MARK_FILESYSTEM, 0),
}

# The bits whose meaning depends on the dialect.
_PRE_BITS = functools.reduce(operator.or_, (dialect.pre_content for dialect in DIALECTS.values()))


@dataclass(frozen=True, slots=True)
class _Place:
    """The object to watch."""

    #: Without symbolic links.
    path: str
    #: The mount that it is on.
    mount: Mount
    #: It is a directory.
    directory: bool


def _locate(path: str | os.PathLike[str]) -> _Place:
    target = os.path.realpath(path)
    return _Place(target, mount_of(target), os.path.isdir(target))


@asynccontextmanager
async def open_group(
    path: str | os.PathLike[str],
    mask: int | Iterable[str] | None = None,
    *,
    backend: str = "auto",
    dialect: Dialect | str | None = None,
    flags: int = DEFAULT_FLAGS,
    event_f_flags: int = DEFAULT_EVENT_F_FLAGS,
    mark: str = "mount",
) -> AsyncIterator[Group]:
    """A group with one mark on `path`. The end of the `async with` closes the group and removes a mount that was made for it.

    `mask` is an int, or names without FAN_ ("PRE_ACCESS", "OPEN_PERM"), or None for the dialect's pre-content events (through a
    directory: PRE_ACCESS). `backend` is "fuse" (a mount of fusehsm, from any process), "kernel", or "auto": "fuse" if `path` is on such
    a mount, else "kernel" if it can watch that path. `dialect` defaults to the mount's. `flags` and `event_f_flags` are those of
    fanotify_init(2); FAN_NONBLOCK is always added. `mark` is "inode", "children" (of a directory), "mount" or "filesystem".

    With "mount" on the real kernel, a directory that is not a mount point is first bind-mounted on itself, so that the mark covers that
    tree and never a whole root filesystem. A process that has that directory as its working directory already, or holds it open, still sees
    it without the bind mount and is not watched: use "filesystem" to watch such processes too.

    The events' descriptors make no events. `await group.backing(path)` opens any other file of the mount below the overlay in the same way; on the
    real kernel it is a plain open(2), whose accesses make events.

    Raises OSError with one line that says what is missing and how to get it, ValueError for a word that is not among the choices.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r}: choose one of {', '.join(BACKENDS)}")
    if mark not in MARKS:
        raise ValueError(f"mark {mark!r}: choose one of {', '.join(MARKS)}")
    if isinstance(dialect, str):
        dialect = dialect_by_name(dialect)
    place = await trio.to_thread.run_sync(_locate, path, abandon_on_cancel=True)
    with contextlib.ExitStack() as undo:
        group: Group
        if backend == "fuse" and not place.mount.is_fusehsm:
            raise OSError(
                errno.EINVAL,
                f"{path}: not on a fusehsm mount; make one with `fusehsm mount {path} {path}`",
            )
        if place.mount.is_fusehsm and backend != "kernel":
            group = await EmulatedGroup.connect(place.mount, flags, event_f_flags, dialect)
        else:
            group = await _open_kernel_group(place, mark, dialect, flags, event_f_flags, undo)
        # Close it before the bind mount goes: until then every access below the directory makes an event.
        undo.callback(group.close)
        mark_flags, mask_bits = MARKS[mark]
        wanted = _mask(mask, group.dialect, chosen=dialect is not None, directory=place.directory)
        if mark == "mount" and isinstance(group, EmulatedGroup):
            # Containers see the tree by mounts of their own, and must not read zeros.
            await group.mark_every_mount(FAN_MARK_ADD | mark_flags, wanted | mask_bits, place.path)
        else:
            await group.mark(FAN_MARK_ADD | mark_flags, wanted | mask_bits, AT_FDCWD, place.path)
        yield group


def dialect_by_name(name: str) -> Dialect:
    """The dialect of that name. Raises ValueError with one line that lists the names."""
    try:
        return DIALECTS[name]
    except KeyError:
        raise ValueError(f"dialect {name!r}: choose one of {', '.join(DIALECTS)}") from None


def kernel_can_watch(path: str) -> None:
    """Return if a FAN_PRE_ACCESS mark on `path` works on this kernel. Else raise OSError with the cause in one line."""
    try:
        descriptor = syscalls.fanotify_init(
            FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK, os.O_RDONLY | os.O_CLOEXEC
        )
        try:
            syscalls.fanotify_mark(
                descriptor, FAN_MARK_ADD, LINUX_6_14.pre_access, AT_FDCWD, os.fsencode(path)
            )
        finally:
            os.close(descriptor)
    except OSError as error:
        causes = {
            errno.ENOSYS: "this kernel is built without fanotify",
            errno.EINVAL: "this kernel is older than 6.14 or the path is neither a file nor a directory",
            errno.EPERM: "the kernel's pre-content events need root (CAP_SYS_ADMIN)",
            errno.EOPNOTSUPP: f"{_filesystem_type(path)} has no pre-content events",
            errno.EMFILE: "too many fanotify groups (sysctl fs.fanotify.max_user_groups)",
        }
        cause = causes.get(error.errno or 0, error.strerror)
        raise OSError(error.errno, f"{path}: {cause}; `fusehsm mount {path} {path}` emulates them") from None


async def _open_kernel_group(
    place: "_Place",
    mark: str,
    dialect: Dialect | None,
    flags: int,
    event_f_flags: int,
    undo: contextlib.ExitStack,
) -> KernelGroup:
    target = place.path
    if dialect is not None and dialect is not LINUX_6_14:
        raise OSError(
            errno.EOPNOTSUPP,
            f"{target}: the kernel speaks {LINUX_6_14.name}, not {dialect.name}; `fusehsm mount {target} {target}` emulates it",
        )
    await trio.to_thread.run_sync(kernel_can_watch, target, abandon_on_cancel=True)
    if mark == "mount" and place.mount.mount_point != target:
        undo.enter_context(_bound_on_itself(target))
    return KernelGroup(flags, event_f_flags, LINUX_6_14)


@contextmanager
def _bound_on_itself(target: str) -> Iterator[None]:
    """Bind-mount a directory or file on itself. Mounts below it are bound, too, because it would hide them."""
    path = os.fsencode(target)
    try:
        syscalls.mount(path, path, None, syscalls.MS_BIND | syscalls.MS_REC)
    except OSError as error:
        raise OSError(error.errno, f"{target}: cannot be bind-mounted on itself: {error.strerror}") from None
    # By descriptor: the path may lead to another mount when this one is removed.
    descriptor = os.open(target, os.O_PATH | os.O_CLOEXEC)
    try:
        bound = mount_of_descriptor(descriptor).mount_id
        copies = _tree_of(bound)
        try:
            yield
        finally:
            _unbind(target, descriptor, _tree_of(bound) - copies)
    finally:
        os.close(descriptor)


def _unbind(target: str, descriptor: int, strangers: set[int]) -> None:
    """Unmount the bind mount and the copies of mounts that came with it. `strangers`: mounts that others have made in it."""
    if strangers:
        # Those mounts would go, too. Without the group the bind mount has no effect.
        log.warning("%s: left bind-mounted on itself, because others have mounted something in it", target)
        return
    path = b"/proc/self/fd/%d" % descriptor
    with contextlib.suppress(OSError):  # another process has unmounted it already
        # Where mounts are shared (systemd makes them so), the originals would be unmounted with their copies.
        syscalls.mount(b"none", path, None, syscalls.MS_PRIVATE | syscalls.MS_REC)
        syscalls.umount2(path, syscalls.MNT_DETACH)


def _tree_of(root: int) -> set[int]:
    """The numbers of a mount and of all mounts below it."""
    found = {root}
    mounts = list(read_mounts())
    while more := {m.mount_id for m in mounts if m.parent_id in found} - found:
        found |= more
    return found


def _mask(mask: int | Iterable[str] | None, dialect: Dialect, *, chosen: bool, directory: bool) -> int:
    if mask is None:
        # FAN_PRE_MODIFY cannot be set through the path of a directory.
        return dialect.pre_access if directory else dialect.pre_content
    if not isinstance(mask, int):
        return parse_mask(mask, dialect)
    if mask & _PRE_BITS and not chosen and dialect is not LINUX_6_14:
        raise OSError(
            errno.EINVAL,
            f"mask {mask:#x} means different events in different dialects; say dialect={dialect.name!r} or give names",
        )
    return mask


def _filesystem_type(path: str) -> str:
    try:
        return mount_of(path).filesystem_type
    except OSError:
        return "its filesystem"
