"""`fusehsm conform`: run the workloads on the real kernel and on the emulator, and print a row for each."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fusehsm.conform import installed
from fusehsm.conform.accessor import Zygote
from fusehsm.conform.divergences import applying, limits
from fusehsm.conform.perform import Comparison, Performer, Verdict
from fusehsm.conform.scene import PATIENCE
from fusehsm.conform.sides import NoKernelEvents, Side, emulated_side, ext4_image, kernel_side
from fusehsm.conform.stream import SHIPPED, Recording, ended_early, recorded_name, to_json
from fusehsm.conform.workload import Workload
from fusehsm.conform.workloads import BYTES, WORKLOADS, chosen, sample
from fusehsm.daemon.options import check_choice
from fusehsm.engines.choice import ENGINES, resolved
from fusehsm.linux.signals import Interrupted, Interruption, interruptible

_STYLES = {
    Verdict.IDENTICAL: "green",
    Verdict.COVERED: "green",
    Verdict.KNOWN: "yellow",
    Verdict.DIFFERENT: "bold red",
    Verdict.LEFT_OUT: "dim",
    Verdict.NOT_HERE: "dim",
    Verdict.NOT_TRIED: "dim",
}
_ALWAYS_COUNTED = (Verdict.IDENTICAL, Verdict.KNOWN, Verdict.DIFFERENT)
_IMAGE_MIB = 1024
_EVENTS = ("exact", "first-access")
_SIGNALLED = (
    128  # plus the signal's number: the exit code that a shell reports for a program that a signal has ended
)


def conform(
    patterns: Sequence[str],
    *,
    engine: str = "auto",
    events: str = "exact",
    number: int | None = None,
    patience: float = PATIENCE,
    attempts: int = 2,
    as_json: bool = False,
    record: bool = False,
) -> int:
    """Compare the workloads. Returns the exit code: 0 if every difference is a known divergence, else 1.

    A workload whose programs are not installed is not tried. Where a recording takes the kernel's place, a stream that differs and comes from
    another version of a program than the recorded one counts as not tried, too.

    `events`: the mount's event mode; first-access is compared by coverage.py. `number`: a fixed sample of so many workloads (None: all).
    `patience`: seconds for one workload. `attempts`: how often a workload that differs runs. `record`: save the streams as those that are
    shipped with the package. After a signal it unmounts everything and returns 128 plus the signal's number. Raises ValueError for a pattern
    that fits no workload, an unknown engine or event mode, or a recording of another mode than exact; NoKernelEvents if `record` is given and
    the kernel has no pre-content events, and OSError if nothing can be mounted or if the emulator dies or hangs.
    """
    workloads = sample(chosen(patterns or (BYTES if events == "first-access" else ())), number)
    if engine not in ENGINES:
        raise ValueError(f"no engine is called {engine}; there are {', '.join(ENGINES)}")
    check_choice("--events", events, _EVENTS)
    if record and events != "exact":
        raise ValueError("--record: only exact events are recorded; leave --events out")
    try:
        with interruptible() as interruption:
            mode = _Mode(engine, events, patience, attempts)
            seen = _seen(workloads, mode, interruption, as_json=as_json, record=record)
    except Interrupted as interrupted:
        print(f"fusehsm: ended by {interrupted}", file=sys.stderr)
        return _SIGNALLED + interrupted.number
    return int(any(comparison.verdict is Verdict.DIFFERENT for comparison in seen))


def list_workloads(patterns: Sequence[str], number: int | None = None) -> None:
    """Print the workloads' names. `number`: those of a sample. Raises ValueError for a pattern that fits no workload."""
    for workload in sample(chosen(patterns), number):
        print(workload.key)


@dataclass(frozen=True, slots=True)
class _Mode:
    """The emulator's side, and the time for it."""

    engine: str
    events: str
    patience: float
    attempts: int


def _seen(
    workloads: list[Workload], mode: _Mode, interruption: Interruption, *, as_json: bool, record: bool
) -> list[Comparison]:
    recording = Recording.load() if SHIPPED.exists() else Recording()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusehsm-conform-")))
        directory.chmod(0o755)
        kernel, backing = _kernel(stack, directory, recording, record)
        emulated = stack.enter_context(
            emulated_side(backing, directory / "emulated", resolved(mode.engine), "--events", mode.events)
        )
        zygote = Zygote()
        stack.callback(zygote.close)
        stack.callback(interruption.ignore)
        performer = Performer(
            zygote, interruption, mode.patience, mode.attempts, first_access=mode.events == "first-access"
        )
        comparisons = _compare(performer, workloads, kernel, emulated, recording, anew=record)
        seen = _report_json(comparisons) if as_json else _report(comparisons, kernel, recording)
        if record:
            _keep(seen, recording, emulated.engine)
    return seen


def _kernel(
    stack: ExitStack, directory: Path, recording: Recording, record: bool
) -> tuple[Side | None, Path]:
    """The real kernel's side (None: a recording takes its place), and a directory for the emulator's files, on ext4 if possible.

    The two are on different file systems. On a common one, a mark of the whole file system would hear the emulator close files of the
    workload before.
    """
    backing = directory / "backing"
    try:
        try:
            backing = stack.enter_context(ext4_image(backing, _IMAGE_MIB))
            place = stack.enter_context(ext4_image(directory / "kernel", _IMAGE_MIB))
        except OSError as error:
            raise NoKernelEvents(f"no ext4 for the real kernel's side: {error}") from None
        return kernel_side(place), backing
    except NoKernelEvents as error:
        if record or not recording.kernel:
            raise
        print(
            f"fusehsm: {error}; comparing with what Linux {recording.release} did on {recording.date}",
            file=sys.stderr,
        )
        return None, backing


def _compare(
    performer: Performer,
    workloads: list[Workload],
    kernel: Side | None,
    emulated: Side,
    recording: Recording,
    *,
    anew: bool,
) -> Iterator[Comparison]:
    for number, workload in enumerate(workloads, 1):
        if workload.needs is not None and performer.lacks(workload.needs, emulated.backing):
            yield Comparison(workload, [], [], (), left_out=Verdict.NOT_HERE)
            continue
        missing = installed.missing(workload.programs)
        if missing:
            yield Comparison(workload, [], [], (), not_tried=f"{missing} is not installed")
            continue
        wanted = (
            performer.perform(workload, kernel) if kernel is not None else recording.kernel.get(workload.key)
        )
        if wanted is None:
            continue  # the workload is newer than the recording
        if workload.needs_root and os.geteuid() != 0:
            yield Comparison(workload, wanted, [], (), left_out=Verdict.LEFT_OUT)
            continue
        comparison = performer.compare(
            workload,
            wanted,
            emulated,
            # In first-access mode all rows of the workload count, also those that this engine does not have in exact mode.
            tuple(
                name
                for name in workload.divergences
                if performer.first_access or applying(name, emulated.engine)
            ),
            None
            if anew
            else recording.of_emulator(emulated.engine, workload.key, limits(workload.divergences)),
        )
        if not anew:
            comparison = _regarding_programs(comparison, recording, is_recorded=kernel is None)
        yield comparison
        trouble = _trouble(comparison, emulated, performer)
        if trouble:
            left = len(workloads) - number
            raise OSError(f"{trouble}; {left} workload{'s' * (left != 1)} not compared")


def _regarding_programs(comparison: Comparison, recording: Recording, *, is_recorded: bool) -> Comparison:
    """The comparison, if its programs are the recorded ones. Other programs make other events, so the recorded streams are no measure.

    `is_recorded`: the kernel's stream is a recorded one.
    """
    workload = comparison.workload
    if comparison.verdict is not Verdict.DIFFERENT or ended_early(comparison.emulated) or workload.unsteady:
        return comparison
    other = installed.other(workload.programs, recording.programs.get(workload.key, ()))
    if not other:
        return comparison
    if is_recorded:
        return replace(comparison, not_tried=other, first=None, attempts=1)
    return replace(comparison, workload=replace(workload, unsteady=True))


def _trouble(comparison: Comparison, emulated: Side, performer: Performer) -> str:
    """The reason to stop, in one line; "" if the emulator still serves."""
    if emulated.emulator is None or not ended_early(comparison.emulated):
        return ""
    return emulated.emulator.trouble(performer.zygote)


def _report(comparisons: Iterator[Comparison], kernel: Side | None, recording: Recording) -> list[Comparison]:
    console = Console(highlight=False, soft_wrap=True)
    seen = []
    for comparison in comparisons:
        seen.append(comparison)
        verdict = comparison.verdict
        names = ", ".join(comparison.divergences)
        reason = names if verdict is Verdict.KNOWN else comparison.not_tried
        what = f"{verdict.value}: {reason}" if reason else verdict.value
        attempt = f"  ({_attempts(comparison)})" if comparison.attempts > 1 else ""
        console.print(f"{comparison.workload.key:<60} [{_STYLES[verdict]}]{escape(what)}[/]{attempt}")
        shown = comparison.difference() if verdict is Verdict.DIFFERENT else []
        for line in (*shown, *comparison.first_difference()):
            console.print(f"    {escape(line)}")
    found = [comparison.verdict for comparison in seen]
    counts = ", ".join(
        f"{found.count(verdict)} {verdict.value}"
        for verdict in Verdict
        if verdict in _ALWAYS_COUNTED or verdict in found
    )
    whom = "this kernel" if kernel is not None else f"Linux {recording.release}"
    again = sum(comparison.attempts > 1 for comparison in seen)
    twice = f"; {again} took a second attempt" if again else ""
    console.print(f"{len(seen)} workloads, compared with {whom}: {counts}{twice}")
    return seen


def _attempts(comparison: Comparison) -> str:
    """At which of several attempts the verdict was found."""
    number = comparison.attempts
    if comparison.verdict is Verdict.DIFFERENT:
        return "at both attempts" if number == 2 else f"at all {number} attempts"
    return "at the second attempt" if number == 2 else f"at attempt {number}"


def _report_json(comparisons: Iterator[Comparison]) -> list[Comparison]:
    """Print one JSON object a line."""
    seen = []
    for comparison in comparisons:
        seen.append(comparison)
        value = {
            "workload": comparison.workload.key,
            "verdict": comparison.verdict.value,
            "divergences": comparison.divergences,
            "not_tried": comparison.not_tried,
            "difference": comparison.difference(),
            "attempts": comparison.attempts,
            "first_difference": comparison.first_difference(),
            "kernel": to_json(comparison.kernel),
            "emulated": to_json(comparison.emulated),
        }
        print(json.dumps(value), flush=True)
    return seen


def _keep(seen: list[Comparison], recording: Recording, engine: str) -> None:
    """Save the streams. A workload that ended early is not measured: its earlier recording stays."""
    recording.of_this_kernel()
    recording.keep_only({workload.key for workload in WORKLOADS})
    for comparison in seen:
        if comparison.not_tried or ended_early(comparison.kernel) or ended_early(comparison.emulated):
            continue
        key = comparison.workload.key
        recording.kernel[key] = comparison.kernel
        recording.programs.pop(key, None)
        if comparison.workload.programs and not comparison.workload.unsteady:
            recording.programs[key] = tuple(map(installed.version, comparison.workload.programs))
        recording.emulated.pop(recorded_name(engine, key), None)
        if comparison.divergences and not comparison.workload.unsteady:
            recording.emulated[recorded_name(engine, key)] = comparison.emulated
    recording.save()
