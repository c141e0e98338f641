"""The `fusehsm` command line: it turns arguments into calls, and exceptions into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 bad usage. Each command imports its modules when it runs, so no command waits for the imports of another.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from fusehsm.text import shown

app = typer.Typer(
    name="fusehsm",
    help="Linux fanotify pre-content events on any kernel: a FUSE overlay that asks a listener before content is touched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FAILED, BAD_USAGE = 1, 2
_INTERRUPTED = 130  # as a shell reports the end of a program by Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return the exit code. `arguments` do not include the program's name; None: those of the process."""
    try:
        result = app(
            args=None if arguments is None else list(arguments), prog_name="fusehsm", standalone_mode=False
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except ValueError as error:
        return _complain(error, BAD_USAGE)
    except BrokenPipeError:
        # The reader of our output has closed it. Without this, Python would report the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _complain(_os_error_line(error), FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # an error of typer: a bad option, a missing argument
            context = getattr(error, "ctx", None)
            fix = f"see {context.command_path} --help" if context is not None else "see fusehsm --help"
            return _complain(f"{error.format_message().rstrip('.')}; {fix}", BAD_USAGE)
        if _is_one_line(error):
            return _complain(error, FAILED)
        raise


def _complain(what: object, code: int) -> int:
    print(f"fusehsm: {shown(' '.join(str(what).split()))}", file=sys.stderr, flush=True)
    return code


def _os_error_line(error: OSError) -> str:
    message = error.strerror or str(error)
    # An error of fusehsm has a whole line as its message. An error of the system has the file's name apart.
    return message if error.filename is None else f"{os.fsdecode(error.filename)}: {message}"


def _is_one_line(error: Exception) -> bool:
    from fusehsm.daemon.options import MountError

    return isinstance(error, MountError)


def _show_version(wanted: bool) -> None:
    if wanted:
        from fusehsm.version import VERSION

        print(f"fusehsm {VERSION}")
        raise typer.Exit


@app.callback()
def _every_command(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True),
    ] = False,
) -> None:
    """Options of `fusehsm` itself. --help shows the text of the application and not this one."""


@app.command()
def mount(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The directory with the files (the backing).")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="Where to mount the overlay; may be SRC.")
    ],
    foreground: Annotated[
        bool,
        typer.Option("-f", "--foreground", help="Do not daemonise; print `ready` on stderr when it answers."),
    ] = False,
    options: Annotated[
        list[str] | None,
        typer.Option(
            "-o",
            metavar="OPTS",
            help="FUSE mount options, separated by commas. noexec, nosuid, nodev, nosymfollow and ro are taken over from the mounts of SRC and "
            "DST; root's mount in place has suid and dev where SRC has them, all others nosuid and nodev.",
        ),
    ] = None,
    abi: Annotated[
        str, typer.Option(help="Dialect of the events: linux-6.14, patch-v2 or patch-v1.")
    ] = "linux-6.14",
    events: Annotated[
        str,
        typer.Option(
            help="exact (for each system call), first-access (for each page-cache fill), per-file (exact where a group needs it) or auto."
        ),
    ] = "auto",
    engine: Annotated[
        str, typer.Option(help="The engine for FUSE requests: pyfuse3, devfuse or auto.")
    ] = "auto",
    handler: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CALLABLE", help="A handler to run in the mount's own process."),
    ] = None,
    handler_path: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Look for the handler's module in this directory, too, after Python's own path.",
        ),
    ] = None,
    unattended: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="For accesses without a listener: allow (default), deny[=ERRNO] (default with --handler) or hold.",
        ),
    ] = None,
    event_timeout: Annotated[
        str | None,
        typer.Option(metavar="SECONDS[=ERRNO]", help="Deny an access that waits longer (default: off)."),
    ] = None,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users in; file modes decide their rights.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            help="private (SRC changes only through the mount; default when SRC is DST) or shared (default otherwise)."
        ),
    ] = None,
    locks: Annotated[
        str | None,
        typer.Option(
            help="shared (locks on files are locks on SRC; default where the engine is devfuse and the kernel tells of each open) or local."
        ),
    ] = None,
    log_file: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Where the server logs (default: the system's log, with -f stderr)."
        ),
    ] = None,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct",
            help="Keep files out of the page cache also while no mark watches them. "
            "Descriptors that were opened before the mark then make no events, as on the kernel.",
        ),
    ] = False,
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
    backing: Annotated[int | None, typer.Option(hidden=True)] = None,
    event_root: Annotated[int | None, typer.Option("--event-root", hidden=True)] = None,
    tell_holes: Annotated[bool, typer.Option("--tell-holes", hidden=True)] = False,
) -> int:
    """Overlay SRC at DST, and make events of the accesses there. Returns when the mount answers."""
    from fusehsm.daemon.options import MountOptions
    from fusehsm.mount import mount as do_mount

    return do_mount(
        MountOptions(
            source=source,
            destination=destination,
            foreground=foreground,
            options=tuple(options or ()),
            abi=abi,
            events=events,
            engine=engine,
            handler=handler,
            handler_path=handler_path,
            unattended=unattended,
            event_timeout=event_timeout,
            allow_other=allow_other,
            cache=cache,
            locks=locks,
            log_file=log_file,
            direct=direct,
            lifeline=lifeline,
            backing=backing,
            event_root=event_root,
            tell_holes=tell_holes,
        )
    )


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND...", help="The program and its arguments.")
    ],
    mounts: Annotated[
        list[str] | None,
        typer.Option(
            "--mount", metavar="DIR", help="Overlay DIR in place while the command runs; repeatable."
        ),
    ] = None,
    abi: Annotated[
        str | None,
        typer.Option(help="The command's dialect: linux-6.14 (default), patch-v2 or patch-v1."),
    ] = None,
    events: Annotated[
        str,
        typer.Option(
            help="The mounts' events: exact, per-file, first-access or auto; see fusehsm mount --help."
        ),
    ] = "auto",
    locks: Annotated[
        str | None, typer.Option(help="The mounts' locks: shared or local; see fusehsm mount --help.")
    ] = None,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave the mounts in place when the command ends.")
    ] = False,
    accessor: Annotated[
        bool,
        typer.Option(
            "--accessor", help="The command is not a listener; its mmap(2) makes the event at once."
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", help="No line about a file of which the command allows a read of a hole."),
    ] = False,
    deadlock_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="If the command waits for itself: after so long, deny the access that it waits for, with EDEADLK (0: never).",
        ),
    ] = 5.0,
    listener: Annotated[
        bool,
        typer.Option(
            "--listener",
            help="The command is a daemon that fills files: it sees each DIR without the overlay, and its own accesses make no events.",
        ),
    ] = False,
    any_descriptor: Annotated[
        bool,
        typer.Option(
            "--any-descriptor",
            help="Groups work at every descriptor number (dup3, SCM_RIGHTS, pidfd_getfd); all reads and writes of the command become slower.",
        ),
    ] = False,
) -> None:
    """Run an unmodified fanotify program; the emulator answers its system calls. The exit code is the command's."""
    from fusehsm.supervisor.command import run as do_run
    from fusehsm.supervisor.options import RunOptions

    do_run(
        RunOptions(
            command=tuple(command),
            mounts=tuple(mounts or ()),
            abi=abi,
            events=events,
            locks=locks,
            keep=keep,
            accessor=accessor,
            listener=listener,
            any_descriptor=any_descriptor,
            quiet=quiet,
            deadlock_timeout=deadlock_timeout,
        )
    )


@app.command()
def umount(destination: Annotated[str, typer.Argument(metavar="DST", help="The mount point.")]) -> None:
    """Unmount DST and wait until its daemon has ended."""
    from fusehsm.mount import unmount

    unmount(destination)


@app.command()
def trace(
    path: Annotated[str, typer.Argument(metavar="PATH", help="The file or directory to watch.")],
    mask: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Events by name (default: the dialect's pre-content events)."),
    ] = None,
    mark: Annotated[
        str, typer.Option(help="The objects that the mark covers: inode, children, mount or filesystem.")
    ] = "mount",
    deny: Annotated[
        str | None,
        typer.Option(metavar="ERRNO", help="Deny the events of files that --match matches with this errno."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="Full paths that --deny applies to (default: all)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    backend: Annotated[str, typer.Option(help="The source of the events: auto, kernel or fuse.")] = "auto",
    count: Annotated[int | None, typer.Option(metavar="N", help="End after N events.", min=1)] = None,
    abi: Annotated[str | None, typer.Option(help="The dialect (default: the mount's).")] = None,
) -> int:
    """Listen to events and print them. Prints `ready` on stderr when the marks are set. Allows every event that --deny does not deny."""
    from fusehsm.commands.trace import TraceOptions
    from fusehsm.commands.trace import trace as do_trace

    return do_trace(
        TraceOptions(
            path=path,
            mask=None if mask is None else tuple(mask.split(",")),
            mark=mark,
            deny=deny,
            match=match,
            json=json,
            backend=backend,
            count=count,
            abi=abi,
        )
    )


@app.command()
def populate(
    store: Annotated[
        str,
        typer.Argument(metavar="STORE", help="A directory, a zip or tar file, or a URL that fsspec opens."),
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="The directory for the stubs; made if it does not exist.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the counts and change nothing.")] = False,
) -> int:
    """Make stubs of all files in a store, with its directories and links. It can be run again; it never overwrites content."""
    from fusehsm.tier.populate.command import PopulateOptions
    from fusehsm.tier.populate.command import populate as do_populate

    return do_populate(PopulateOptions(store=store, destination=destination, dry_run=dry_run))


@app.command()
def fetch(
    store: Annotated[str, typer.Argument(metavar="STORE", help="The store that DST was populated from.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The directory with the stubs.")],
    backend: Annotated[
        str,
        typer.Option(help="The source of the events: kernel, fuse, or auto (the kernel if it can)."),
    ] = "auto",
    block_size: Annotated[
        str, typer.Option(metavar="SIZE", help="The unit of fetching; a power of two.")
    ] = "1M",
    read_ahead: Annotated[
        str,
        typer.Option(metavar="SIZE", help="How far to fetch ahead of a sequential reader; 0: no read-ahead."),
    ] = "32M",
    jobs: Annotated[int, typer.Option(metavar="N", help="Requests to the store at the same time.")] = 16,
    deadline: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long to retry while the store does not answer."),
    ] = "60s",
    on_error: Annotated[
        str,
        typer.Option(metavar="ERRNO", help="The errno for the access after --deadline: EIO or EAGAIN."),
    ] = "EIO",
    limit_rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fetch at most SIZE a second.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Evict least recently used files when stubs take more on the disk."
        ),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Write each first use of a block, in order, to the file LIST."),
    ] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Fetch the blocks that the file LIST names, in its order."),
    ] = None,
    options: Annotated[
        list[str] | None,
        typer.Option("-o", metavar="OPTS", help="FUSE mount options of the mount, if there is one."),
    ] = None,
    events: Annotated[
        str, typer.Option(help="The mount's events: exact, per-file, first-access or auto.")
    ] = "auto",
    engine: Annotated[str, typer.Option(help="The mount's engine: pyfuse3, devfuse or auto.")] = "auto",
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users into the mount; file modes decide.")
    ] = False,
    log_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the mount's server logs.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="The mount's cache: private (default) or shared.")] = None,
    event_timeout: Annotated[
        str | None,
        typer.Option(metavar="SECONDS[=ERRNO]", help="The mount denies an access that waits longer."),
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="The mount keeps all files out of the page cache.")
    ] = False,
) -> int:
    """Serve the stubs in DST: fetch content before an access goes on. Stays until Ctrl-C; prints `ready` on stderr when it serves accesses."""
    from fusehsm.tier.fetch.command import FetchOptions
    from fusehsm.tier.fetch.command import fetch as do_fetch

    mount_arguments = ["--events", events, "--engine", engine, "--unattended", f"deny={on_error}"]
    mount_arguments += [word for value in options or () for word in ("-o", value)]
    mount_arguments += ["--allow-other"] * allow_other
    mount_arguments += ["--direct"] * direct
    for option, value in (("--log-file", log_file), ("--cache", cache), ("--event-timeout", event_timeout)):
        mount_arguments += [] if value is None else [option, value]
    return do_fetch(
        FetchOptions(
            store=store,
            destination=destination,
            backend=backend,
            block_size=block_size,
            read_ahead=read_ahead,
            jobs=jobs,
            deadline=deadline,
            on_error=on_error,
            limit_rate=limit_rate,
            max_size=max_size,
            record=record,
            prefetch=prefetch,
            mount_arguments=tuple(mount_arguments),
        )
    )


@app.command()
def evict(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, or directories with all below.")
    ],
    older_than: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="Only files that were not used for this time: 12h, 30d."),
    ] = None,
    free: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Stop when SIZE is free on the disk; least recently used files first."
        ),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Ask the fetch of this user (default: yours, or root's)."),
    ] = None,
) -> int:
    """Take content that came from the store off the disk again, of unmodified files that no process has open. The running fetch does it."""
    from fusehsm.tier.fetch.evict import evict as do_evict
    from fusehsm.tier.fetch.protocol import user_number

    return do_evict(paths, older_than=older_than, free=free, user=user_number(user))


@app.command()
def pin(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, or directories with all below.")
    ],
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Ask the fetch of this user (default: yours, or root's)."),
    ] = None,
) -> int:
    """Keep these files from being evicted. It fetches nothing."""
    from fusehsm.tier.fetch.evict import pin as do_pin
    from fusehsm.tier.fetch.protocol import user_number

    return do_pin(paths, pinned=True, user=user_number(user))


@app.command()
def unpin(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, or directories with all below.")
    ],
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Ask the fetch of this user (default: yours, or root's)."),
    ] = None,
) -> int:
    """Undo `pin`: these files can be evicted again."""
    from fusehsm.tier.fetch.evict import pin as do_pin
    from fusehsm.tier.fetch.protocol import user_number

    return do_pin(paths, pinned=False, user=user_number(user))


@app.command()
def validate(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="The store to compare DST with, as for populate.")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="The directory with the files, or its mount.")
    ],
    reads: Annotated[
        int, typer.Option(metavar="N", min=0, help="Random reads of each kind in a file, besides its edges.")
    ] = 8,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help="Repeat the reads of this seed (default: a new seed, shown)."),
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Files to read at the same time.")] = 4,
    by: Annotated[
        str, typer.Option(metavar="A,B", help="Kinds of reads: pread, mmap, both (one after the other).")
    ] = "pread,mmap,both",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time after which a read ends and is reported.")
    ] = 120.0,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of lines.")] = False,
) -> int:
    """Read files at random places, by pread(2) and mapped, and compare them with the store. Exit code 0 only if all content agrees."""
    from fusehsm.tier.validate.command import ValidateOptions
    from fusehsm.tier.validate.command import validate as do_validate

    return do_validate(
        ValidateOptions(
            store=store,
            destination=destination,
            reads=reads,
            seed=seed,
            jobs=jobs,
            by=tuple(dict.fromkeys(by.split(","))),
            timeout=timeout,
            json=json,
        )
    )


@app.command()
def status(
    path: Annotated[
        str | None, typer.Argument(metavar="[PATH]", help="A path on a mount (default: all mounts).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON: a list with one object a mount.")] = False,
    release: Annotated[
        bool, typer.Option("--release", help="Let the accesses go that --unattended hold keeps waiting.")
    ] = False,
    user: Annotated[
        str | None,
        typer.Option(metavar="USER", help="Ask the fetch of this user (default: yours, or root's)."),
    ] = None,
) -> int:
    """Show mounts, their groups, and which access waits for which listener, for how long.

    For a PATH with stubs: show how much of each file is here.
    """
    from fusehsm.commands.status import is_stuck
    from fusehsm.commands.status import status as do_status
    from fusehsm.tier.fetch.protocol import user_number
    from fusehsm.tier.fetch.status_command import file_status

    asked = user_number(user)
    if (
        path is not None
        and not release
        and not is_stuck(path)
        and file_status(path, as_json=json, user=asked)
    ):
        return 0

    return do_status(path, as_json=json, release=release)


@app.command()
def doctor(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATH]", help="A directory on the file system to check (default: the temporary one)."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON: an object with a list of checks.")] = False,
) -> int:
    """Show what this machine can do, what is missing, and the command that fixes it. Exit code 1 if nothing can be mounted."""
    from fusehsm.commands.doctor import doctor as do_doctor

    return do_doctor(path, as_json=json)


@app.command()
def conform(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD]...", help="Families, names or shell patterns (default: all)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line and workload.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Save the kernel's streams as those that come with the package.")
    ] = False,
    engine: Annotated[str, typer.Option(help="The emulator's engine: pyfuse3, devfuse or auto.")] = "auto",
    events: Annotated[
        str,
        typer.Option(
            help="The emulator's event mode: exact or first-access. In first-access, every byte that the kernel asks for must be asked for."
        ),
    ] = "exact",
    sample: Annotated[
        int | None, typer.Option(metavar="N", help="Only a fixed sample of N of the workloads.")
    ] = None,
    patience: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long one workload may take; more on a slow machine.")
    ] = 30.0,
    attempts: Annotated[
        int, typer.Option(metavar="N", min=1, help="How often a workload that differs may run.")
    ] = 2,
    list_: Annotated[bool, typer.Option("--list", help="Show the workloads' names and exit.")] = False,
) -> int:
    """Run workloads on the real kernel and on the emulator, and compare their event streams.

    Exit code 0 if every difference is a known divergence.
    """
    from fusehsm.conform.command import conform as do_conform
    from fusehsm.conform.command import list_workloads

    if list_:
        list_workloads(workloads or [], sample)
        return 0
    return do_conform(
        workloads or [],
        engine=engine,
        events=events,
        number=sample,
        patience=patience,
        attempts=attempts,
        as_json=json,
        record=record,
    )
