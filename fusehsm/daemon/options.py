"""Checks the options of `fusehsm mount` and reports every error before anything is mounted."""

from __future__ import annotations

import errno
import importlib
import os
import re
import stat
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fusehsm.daemon import restrictions
from fusehsm.engines.choice import ENGINES, maps_direct_files_shared, resolved
from fusehsm.fanotify.abi import DIALECTS
from fusehsm.fanotify.policy import EventTimeout, UnattendedPolicy
from fusehsm.linux import mountinfo, security_modules

if TYPE_CHECKING:
    from fusehsm.handler import Handler

# SELinux's options, and a category of a context, or a range of them.
_CONTEXT = re.compile("(fs|def|root)?context=")
_CATEGORY = re.compile(r'c[0-9]+(\.c[0-9]+)?"?')

EVENT_MODES = ("exact", "per-file", "first-access", "auto")
CACHES = ("private", "shared")
LOCKS = ("shared", "local")
#: The beginning of a line about what cannot be had here, although the mount works.
NOTE = "fusehsm: note: "


class MountError(Exception):
    """An error of one line for the user: thing, cause, fix."""


@dataclass(frozen=True, slots=True)
class MountOptions:
    """The command line of `fusehsm mount`; None for an option that was not given."""

    #: SRC as given.
    source: str
    #: DST as given.
    destination: str
    #: Serve in this process; do not become a daemon.
    foreground: bool = False
    #: Further FUSE mount options; each word may hold several, with commas.
    options: tuple[str, ...] = ()
    #: The name of the default dialect.
    abi: str = "linux-6.14"
    #: One of EVENT_MODES.
    events: str = "auto"
    #: One of the engines, or "auto".
    engine: str = "auto"
    #: MODULE:CALLABLE.
    handler: str | None = None
    #: A directory to look for the handler's module in; None: only where Python looks.
    handler_path: str | None = None
    #: The answer to accesses while no pre-content group is there, as text.
    unattended: str | None = None
    #: The longest wait for an answer, as text.
    event_timeout: str | None = None
    #: Other users may use the mount.
    allow_other: bool = False
    #: One of CACHES.
    cache: str | None = None
    #: One of LOCKS; None: shared where that costs nothing.
    locks: str | None = None
    #: The path of the log.
    log_file: str | None = None
    #: Keep files out of the page cache also while no mark watches them.
    direct: bool = False
    #: The descriptor of a socket: the mount ends when no process holds its other end any more.
    lifeline: int | None = None
    #: A descriptor of the directory to serve, which is SRC as another mount shows it; None: SRC by its path.
    backing: int | None = None
    #: A descriptor of SRC as the listener's mount shows it: event descriptors are opened there.
    event_root: int | None = None
    #: Report each file of which a listener allows a range that is a hole.
    tell_holes: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """The checked options, as they apply on this machine."""

    #: The real path of SRC.
    source: str
    #: The real path of DST.
    destination: str
    #: The event mode: "exact", "per-file" or "first-access".
    events: str
    #: The backing changes only through the mount (--cache private).
    private: bool
    #: Locks on files are locks on SRC; None: where that costs nothing.
    shares_locks: bool | None
    #: The handler to run in the mount's process.
    handler: Handler | None
    #: The answer to accesses while no pre-content group is there.
    unattended: UnattendedPolicy
    #: The longest wait for an answer; None for no limit.
    event_timeout: EventTimeout | None
    #: All mount options for FUSE.
    fuse_options: frozenset[str]


def check_choice(option: str, value: str, choices: Collection[str]) -> None:
    """Raise ValueError, with one line, for a value of a command line's option that is not among the choices."""
    if value not in choices:
        raise ValueError(f"{option} {value}: not known; choose {', '.join(choices)}")


def checked(options: MountOptions) -> Plan:
    """Check the options. Raises MountError for what this machine lacks, ValueError for bad usage; each is one line."""
    if options.abi not in DIALECTS:
        raise ValueError(f"--abi {options.abi}: not a dialect; choose {', '.join(DIALECTS)}")
    for name, value, choices in (
        ("--events", options.events, EVENT_MODES),
        ("--engine", options.engine, ENGINES),
        ("--cache", options.cache or "private", CACHES),
        ("--locks", options.locks or "local", LOCKS),
    ):
        check_choice(name, value, choices)
    if options.locks == "shared" and resolved(options.engine) == "pyfuse3":
        raise ValueError("--locks shared: pyfuse3 does not hand locks on; use --engine devfuse")
    default_policy = "deny=EIO" if options.handler else "allow"
    unattended = UnattendedPolicy.parse(options.unattended or default_policy)
    event_timeout = EventTimeout.parse(options.event_timeout) if options.event_timeout else None
    source, destination = directories(options.source, options.destination)
    _check_fuse(options)
    in_place = source == destination
    return Plan(
        source=source,
        destination=destination,
        events=_events(options),
        private=options.cache == "private" or (options.cache is None and in_place),
        shares_locks=None if options.locks is None else options.locks == "shared",
        handler=_import_handler(options.handler, options.handler_path) if options.handler else None,
        unattended=unattended,
        event_timeout=event_timeout,
        fuse_options=_fuse_options(options, source, destination),
    )


def note_about(events: str, engine: str) -> str:
    """What cannot be had with this event mode and engine on this kernel, in one line for the start; "" if everything can."""
    if events != "exact" or maps_direct_files_shared(engine):
        return ""
    return "with --events exact, mmap(MAP_SHARED) of a watched file fails with ENODEV here; leave --events out to allow it"


def _events(options: MountOptions) -> str:
    """The event mode, with auto replaced. Files of exact mode cannot be mapped shared everywhere; then auto keeps exact for those that need it."""
    if options.events != "auto":
        return options.events
    return "exact" if maps_direct_files_shared(options.engine) else "per-file"


def directories(source: str, destination: str) -> tuple[str, str]:
    """The real paths of SRC and DST. Raises MountError for directories that cannot be overlaid."""
    for what, path in (("SRC", source), ("DST", destination)):
        try:
            is_directory = stat.S_ISDIR(os.stat(path).st_mode)
            os.statvfs(path)  # a dead mount's attributes may be cached; statvfs(2) is not
        except FileNotFoundError:
            raise MountError(f"{path}: {what} does not exist; create it with mkdir -p") from None
        except OSError as error:
            if error.errno == errno.ENOTCONN:
                raise MountError(
                    f"{path}: a mount whose server has died is here; run fusehsm umount {path}"
                ) from None
            raise MountError(f"{path}: {error.strerror}; {what} must be a directory you may enter") from None
        if not is_directory:
            raise MountError(f"{path}: {what} is not a directory; give a directory")
    if not os.access(source, os.R_OK | os.X_OK):
        raise MountError(f"{source}: {os.strerror(errno.EACCES)}; SRC must be a directory you may read")
    real_source, real_destination = os.path.realpath(source), os.path.realpath(destination)
    if real_destination == "/":
        # To unmount it would unmount everything.
        raise MountError(f"{destination}: DST must not be the root directory; use a directory below it")
    for mount_ in mountinfo.read_mounts():
        if mount_.is_fusehsm and mount_.mount_point == real_destination:
            raise MountError(
                f"{destination}: already a fusehsm mount; run fusehsm umount {destination} first"
            )
    if real_source != real_destination:
        inside = os.path.commonpath((real_source, real_destination))
        if inside == real_source:
            raise MountError(
                f"{destination}: DST lies inside SRC {source}; mount SRC on itself or use a DST outside of it"
            )
        if inside == real_destination:
            raise MountError(
                f"{source}: SRC lies inside DST {destination}, which would hide it; use a DST outside of it"
            )
    return real_source, real_destination


def _check_fuse(options: MountOptions) -> None:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            fix = "run modprobe fuse as root"
        elif security_modules.may_explain(error):
            fix = security_modules.refusal()
        elif error.errno == errno.EACCES:
            fix = "run chmod 666 /dev/fuse as root"
        else:
            fix = "see fusehsm doctor"
        raise MountError(f"/dev/fuse: {error.strerror}; {fix}") from None
    if os.geteuid() != 0:
        _check_rights(options)


def _check_rights(options: MountOptions) -> None:
    """Check the further needs of an ordinary user: fusermount3, write permission, user_allow_other. Raises MountError."""
    if not any(os.access(os.path.join(folder, "fusermount3"), os.X_OK) for folder in os.get_exec_path()):
        raise MountError("fusermount3: not found; install the package fuse3")
    if not os.access(options.destination, os.W_OK):
        raise MountError(
            f"{options.destination}: you may not write to it; an ordinary user mounts only on directories that they own"
        )
    if options.allow_other and not _user_allow_other():
        raise MountError(
            "--allow-other: /etc/fuse.conf does not allow it; put the line user_allow_other there"
        )


def _user_allow_other() -> bool:
    with suppress(OSError):
        return any(
            line.strip() == "user_allow_other" for line in Path("/etc/fuse.conf").read_text().splitlines()
        )
    return False


def _fuse_options(options: MountOptions, source: str, destination: str) -> frozenset[str]:
    # A comma would end the option, and pyfuse3 takes ASCII only. Another source shows as "fusehsm" in the list of mounts.
    shown = source if source.isascii() and not set(source) & set(",\\") else "fusehsm"
    given = {word for option in options.options for word in _words(option)}
    _check_contexts(given, options)
    below = source if options.backing is None else options.backing
    inherited = restrictions.options(below, destination, given, in_place=source == destination)
    chosen = given | inherited | {"default_permissions", "subtype=fusehsm"}
    if not any(option.startswith("fsname=") for option in given):
        chosen.add(f"fsname={shown}")
    return frozenset(chosen | ({"allow_other"} if options.allow_other else set()))


def _words(option: str) -> list[str]:
    """The words of a list with commas. A comma in double quotes is part of its word, as in mount(8): context="...:s0:c1,c2"."""
    return [word for word in re.findall(r'(?:"[^"]*"|[^,])+', option) if word]


def _check_contexts(given: set[str], options: MountOptions) -> None:
    """Check SELinux's options. Raises ValueError for a context that was cut at its commas, or that the engine cannot hand on."""
    contexts = sorted(word for word in given if _CONTEXT.match(word))
    cut = sorted(word for word in given if _CATEGORY.fullmatch(word))
    if contexts and cut:
        name, _, value = contexts[0].partition("=")
        raise ValueError(
            f"-o {cut[0]}: looks like a part of {name}={value}; put a context that has commas into double quotes, and all into "
            f"single ones: -o '{name}=\"{value.strip(chr(34))},{cut[0]}\"'"
        )
    with_commas = [word for word in contexts if "," in word]
    if with_commas and resolved(options.engine) == "pyfuse3":
        raise ValueError(f"-o {with_commas[0]}: libfuse splits it at its commas; use --engine devfuse")


def _import_handler(name: str, path: str | None) -> Handler:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f"--handler {name}: not MODULE:CALLABLE; examples.mirror:handler is one")
    # Not the working directory by itself: others may write there. And at the end, so that no file there is taken for a library.
    if path is not None:
        sys.path.append(os.path.abspath(path))
    try:
        found: object = importlib.import_module(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except (Exception, SystemExit) as error:
        raise MountError(
            f"--handler {name}: cannot be imported ({type(error).__name__}: {error}); name its directory with --handler-path DIR"
        ) from None
    if not callable(found):
        raise MountError(f"--handler {name}: not callable; name a function")
    return cast("Handler", found)
