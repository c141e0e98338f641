"""The `fusehsm` command: words into calls, exceptions into one line and an exit code. Thin on purpose.

Exit codes: 0 done, 1 failed, 2 bad usage. Every command imports what it needs when it runs, so that none waits for another's imports.
"""

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

app = typer.Typer(
    name="fusehsm",
    help="Linux fanotify pre-content events on any kernel: a FUSE overlay that asks a listener before content is touched.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

FAILED, BAD_USAGE = 1, 2
_INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; `arguments` without the program's name. Returns the exit code."""
    try:
        result = app(
            args=None if arguments is None else list(arguments), prog_name="fusehsm", standalone_mode=False
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except ValueError as error:
        return _complain(error, BAD_USAGE)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except OSError as error:
        return _complain(_os_error_line(error), FAILED)
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a bad option, a missing argument
            context = getattr(error, "ctx", None)
            mend = f"see {context.command_path} --help" if context is not None else "see fusehsm --help"
            return _complain(f"{error.format_message().rstrip('.')}; {mend}", BAD_USAGE)
        if _is_one_line(error):
            return _complain(error, FAILED)
        raise


def _complain(what: object, code: int) -> int:
    print(f"fusehsm: {' '.join(str(what).split())}", file=sys.stderr, flush=True)
    return code


def _os_error_line(error: OSError) -> str:
    message = error.strerror or str(error)
    # Ours are whole lines already; the system's have the file beside them.
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
    """Options of `fusehsm` itself; the docstring shown is the application's."""


@app.command()
def mount(
    source: Annotated[str, typer.Argument(metavar="SRC", help="The directory with the files (the backing).")],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="Where to mount the overlay; may be SRC.")
    ],
    foreground: Annotated[
        bool, typer.Option("-f", "--foreground", help="Stay; print `ready` on stderr when the mount answers.")
    ] = False,
    options: Annotated[
        list[str] | None, typer.Option("-o", metavar="OPTS", help="FUSE mount options, separated by commas.")
    ] = None,
    abi: Annotated[
        str, typer.Option(help="Dialect of the events: linux-6.14, patch-v2 or patch-v1.")
    ] = "linux-6.14",
    events: Annotated[str, typer.Option(help="exact, first-access or auto.")] = "auto",
    engine: Annotated[
        str, typer.Option(help="What carries the FUSE requests: pyfuse3, devfuse or auto.")
    ] = "auto",
    handler: Annotated[
        str | None,
        typer.Option(metavar="MODULE:CALLABLE", help="A handler to run in the mount's own process."),
    ] = None,
    unattended: Annotated[
        str | None,
        typer.Option(
            metavar="POLICY",
            help="What happens while nobody listens: allow (default), deny[=ERRNO] (default with --handler) or hold.",
        ),
    ] = None,
    event_timeout: Annotated[
        str | None,
        typer.Option(metavar="SECONDS[=ERRNO]", help="Refuse what is not answered by then (default: never)."),
    ] = None,
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users in, as file modes allow.")
    ] = False,
    cache: Annotated[
        str | None,
        typer.Option(
            help="private (SRC changes only through the mount; default when SRC is DST) or shared (default otherwise)."
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
            help="Keep files out of the page cache also while nobody watches them, so that what is opened before its mark needs nobody's answer.",
        ),
    ] = False,
    lifeline: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> int:
    """Overlay SRC at DST and make events of what is done there. Returns when the mount answers."""
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
            unattended=unattended,
            event_timeout=event_timeout,
            allow_other=allow_other,
            cache=cache,
            log_file=log_file,
            direct=direct,
            lifeline=lifeline,
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
            "--mount", metavar="DIR", help="Overlay DIR in place while the command runs; may be given again."
        ),
    ] = None,
    abi: Annotated[
        str | None,
        typer.Option(help="What the command speaks: linux-6.14 (default), patch-v2 or patch-v1."),
    ] = None,
    events: Annotated[str, typer.Option(help="Of the mounts: exact, first-access or auto.")] = "auto",
    keep: Annotated[bool, typer.Option("--keep", help="Leave the mounts when the command ends.")] = False,
    accessor: Annotated[
        bool,
        typer.Option("--accessor", help="The command is no listener: only have its mmap(2) ask at once."),
    ] = False,
) -> None:
    """Run an unmodified fanotify program: its system calls are answered by the emulator. Exit code: the command's."""
    from fusehsm.supervisor.command import RunOptions
    from fusehsm.supervisor.command import run as do_run

    do_run(
        RunOptions(
            command=tuple(command),
            mounts=tuple(mounts or ()),
            abi=abi,
            events=events,
            keep=keep,
            accessor=accessor,
        )
    )


@app.command()
def umount(destination: Annotated[str, typer.Argument(metavar="DST", help="The mount point.")]) -> None:
    """Unmount and wait for the daemon."""
    from fusehsm.mount import unmount

    unmount(destination)


@app.command()
def trace(
    path: Annotated[str, typer.Argument(metavar="PATH", help="What to watch.")],
    mask: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Events by name (default: the dialect's pre-content events)."),
    ] = None,
    mark: Annotated[
        str, typer.Option(help="What the mark covers: inode, children, mount or filesystem.")
    ] = "mount",
    deny: Annotated[
        str | None, typer.Option(metavar="ERRNO", help="Deny what --match matches with this errno.")
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(metavar="GLOB", help="What --deny denies, by full path (default: everything)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
    backend: Annotated[str, typer.Option(help="Where events come from: auto, kernel or fuse.")] = "auto",
    count: Annotated[int | None, typer.Option(metavar="N", help="End after so many events.", min=1)] = None,
    abi: Annotated[str | None, typer.Option(help="Dialect (default: the mount's).")] = None,
) -> int:
    """Listen and print events; prints `ready` on stderr once its marks stand. Allows what it does not deny."""
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
        str, typer.Argument(metavar="DST", help="Where to make the stubs; made if it is not there.")
    ],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the counts and change nothing.")] = False,
) -> int:
    """Make stubs of all files in a store, with its directories and links. May be run again; never overwrites content."""
    from fusehsm.tier.populate.command import PopulateOptions
    from fusehsm.tier.populate.command import populate as do_populate

    return do_populate(PopulateOptions(store=store, destination=destination, dry_run=dry_run))


@app.command()
def fetch(
    store: Annotated[str, typer.Argument(metavar="STORE", help="What DST was populated from.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="The directory with the stubs.")],
    backend: Annotated[
        str, typer.Option(help="Where events come from: kernel, fuse, or auto (the kernel where it can).")
    ] = "auto",
    block_size: Annotated[
        str, typer.Option(metavar="SIZE", help="What is fetched at a time; a power of two.")
    ] = "1M",
    read_ahead: Annotated[
        str, typer.Option(metavar="SIZE", help="How far to fetch ahead of who reads a file in order; 0: not.")
    ] = "32M",
    jobs: Annotated[int, typer.Option(metavar="N", help="Requests to the store at once.")] = 16,
    deadline: Annotated[
        str,
        typer.Option(metavar="TIME", help="How long to go on asking a store that does not answer."),
    ] = "60s",
    on_error: Annotated[
        str, typer.Option(metavar="ERRNO", help="What to refuse an access with then: EIO or EAGAIN.")
    ] = "EIO",
    limit_rate: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Fetch at most so many bytes a second.")
    ] = None,
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Evict what was used least recently when more is here."),
    ] = None,
    record: Annotated[
        str | None, typer.Option(metavar="LIST", help="Write what is touched, in that order, to a file.")
    ] = None,
    prefetch: Annotated[
        str | None, typer.Option(metavar="LIST", help="Fetch what such a file lists, in that order.")
    ] = None,
    options: Annotated[
        list[str] | None, typer.Option("-o", metavar="OPTS", help="FUSE mount options, if it mounts.")
    ] = None,
    events: Annotated[str, typer.Option(help="Of the mount: exact, first-access or auto.")] = "exact",
    engine: Annotated[str, typer.Option(help="Of the mount: pyfuse3, devfuse or auto.")] = "auto",
    allow_other: Annotated[
        bool, typer.Option("--allow-other", help="Let other users into the mount, as file modes allow.")
    ] = False,
    log_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="Where the mount's server logs.")
    ] = None,
    cache: Annotated[str | None, typer.Option(help="Of the mount: private (default) or shared.")] = None,
    event_timeout: Annotated[
        str | None,
        typer.Option(metavar="SECONDS[=ERRNO]", help="The mount refuses what is not answered by then."),
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="The mount keeps files out of the page cache always.")
    ] = False,
) -> int:
    """Serve DST's stubs in place: what is touched is fetched first. Stays until Ctrl-C; prints `ready` on stderr once accesses are served."""
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
        str | None, typer.Option(metavar="TIME", help="Only what has not been used for so long: 12h, 30d.")
    ] = None,
    free: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Until so much is free, least recently used files first."),
    ] = None,
) -> int:
    """Take content that came from the store off the disk again, of unmodified files that nobody has open. Asks the running fetch."""
    from fusehsm.tier.fetch.evict_command import evict as do_evict

    return do_evict(paths, older_than=older_than, free=free)


@app.command()
def pin(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, or directories with all below.")
    ],
) -> int:
    """Never evict these files (it fetches nothing)."""
    from fusehsm.tier.fetch.evict_command import pin as do_pin

    return do_pin(paths, pinned=True)


@app.command()
def unpin(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="Files, or directories with all below.")
    ],
) -> int:
    """Undo pin."""
    from fusehsm.tier.fetch.evict_command import pin as do_pin

    return do_pin(paths, pinned=False)


@app.command()
def validate(
    store: Annotated[
        str, typer.Argument(metavar="STORE", help="What DST is to agree with, as for populate.")
    ],
    destination: Annotated[
        str, typer.Argument(metavar="DST", help="The directory where the files are read, or its mount.")
    ],
    reads: Annotated[
        int, typer.Option(metavar="N", min=0, help="Random reads of each kind in a file, besides its edges.")
    ] = 8,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Read the same again (default: a new one, shown).")
    ] = None,
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="Files that are read at a time.")] = 4,
    by: Annotated[
        str, typer.Option(metavar="A,B", help="Kinds of reads: pread, mmap, both (one after the other).")
    ] = "pread,mmap,both",
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="After which a read is given up on and reported.")
    ] = 120.0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> int:
    """Read files at random places, by pread(2) and mapped, and compare with the store. Exit code 0 only if all agrees."""
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
        bool, typer.Option("--release", help="Let go what --unattended hold has parked.")
    ] = False,
) -> int:
    """Mounts, their groups, and who waits, on which listener, for how long; for a PATH with stubs, what of each file is here."""
    from fusehsm.commands.status import is_stuck
    from fusehsm.commands.status import status as do_status
    from fusehsm.tier.fetch.status_command import file_status

    if path is not None and not release and not is_stuck(path) and file_status(path, as_json=json):
        return 0

    return do_status(path, as_json=json, release=release)


@app.command()
def doctor(
    path: Annotated[
        str | None,
        typer.Argument(
            metavar="[PATH]", help="A directory whose file system to try (default: the temporary one)."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON: an object with a list of checks.")] = False,
) -> int:
    """What this machine can do, what is missing, and the command that mends it. Exit code 1 if nothing can be mounted."""
    from fusehsm.commands.doctor import doctor as do_doctor

    return do_doctor(path, as_json=json)


@app.command()
def conform(
    workloads: Annotated[
        list[str] | None,
        typer.Argument(metavar="[WORKLOAD]...", help="Families or names, shell patterns too (default: all)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="JSON: one object a workload, one a line.")] = False,
    record: Annotated[
        bool, typer.Option("--record", help="Keep what was seen as the streams that come with the package.")
    ] = False,
    engine: Annotated[str, typer.Option(help="The emulator's: pyfuse3, devfuse or auto.")] = "auto",
    list_: Annotated[bool, typer.Option("--list", help="Show the workloads' names and exit.")] = False,
) -> int:
    """The same workloads on the real kernel and on the emulator, event streams compared. Exit code 0 if only known divergences differ."""
    from fusehsm.conform.command import conform as do_conform
    from fusehsm.conform.command import list_workloads

    if list_:
        list_workloads(workloads or [])
        return 0
    return do_conform(workloads or [], engine=engine, as_json=json, record=record)
