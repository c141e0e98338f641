"""`fusehsm conform`: the workloads on the real kernel and on the emulator, one row each."""

import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from fusehsm.conform.accessor import Zygote
from fusehsm.conform.ext4 import ext4_image
from fusehsm.conform.perform import Performer
from fusehsm.conform.recording import SHIPPED, Recording
from fusehsm.conform.sides import NoKernelEvents, Side, emulated_side, kernel_side
from fusehsm.conform.stream import to_json
from fusehsm.conform.verdict import Comparison, Verdict
from fusehsm.conform.workload import Workload
from fusehsm.conform.workloads import chosen
from fusehsm.divergences import applying
from fusehsm.engines.choice import ENGINES, resolved

_STYLES = {
    Verdict.IDENTICAL: "green",
    Verdict.KNOWN: "yellow",
    Verdict.DIFFERENT: "bold red",
    Verdict.LEFT_OUT: "dim",
}
_IMAGE_MIB = 1024


def conform(patterns: Sequence[str], *, engine: str, as_json: bool, record: bool) -> int:
    """Compare; 0 when nothing differs but what is known to. `record`: keep the streams as what is shipped with the package.

    Raises ValueError for a pattern that no workload fits or an engine that is none, NoKernelEvents with `record` where the kernel has none,
    OSError where nothing can be mounted.
    """
    workloads = chosen(patterns)
    if engine not in ENGINES:
        raise ValueError(f"no engine is called {engine}; there are {', '.join(ENGINES)}")
    recording = Recording.load() if SHIPPED.exists() else Recording()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fusehsm-conform-")))
        directory.chmod(0o755)
        kernel, backing = _kernel(stack, directory, recording, record)
        emulated = stack.enter_context(
            emulated_side(backing, directory / "emulated", resolved(engine), "--events", "exact")
        )
        zygote = Zygote()
        stack.callback(zygote.close)
        comparisons = _compare(Performer(zygote), workloads, kernel, emulated, recording, anew=record)
        seen = _report_json(comparisons) if as_json else _report(comparisons, kernel, recording)
        if record:
            _keep(seen, recording, emulated.engine)
    return int(any(comparison.verdict is Verdict.DIFFERENT for comparison in seen))


def list_workloads(patterns: Sequence[str]) -> None:
    """Print the names. Raises ValueError for a pattern that no workload fits."""
    for workload in chosen(patterns):
        print(workload.key)


def _kernel(
    stack: ExitStack, directory: Path, recording: Recording, record: bool
) -> tuple[Side | None, Path]:
    """The real kernel's side, None where it has to be a recording; and a directory for the emulator's files, on ext4 where that can be.

    Not on the same one: a mark on the whole of it would hear the emulator close what it has open of the workload before.
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
    for workload in workloads:
        wanted = (
            performer.perform(workload, kernel) if kernel is not None else recording.kernel.get(workload.key)
        )
        if wanted is None:
            continue  # newer than the recording
        if workload.needs_root and os.geteuid() != 0:
            yield Comparison(workload, wanted, [], (), left_out=True)
            continue
        yield performer.compare(
            workload,
            wanted,
            emulated,
            tuple(name for name in workload.divergences if applying(name, emulated.engine)),
            None if anew else recording.emulated.get(f"{emulated.engine}: {workload.key}"),
        )


def _report(comparisons: Iterator[Comparison], kernel: Side | None, recording: Recording) -> list[Comparison]:
    console = Console(highlight=False, soft_wrap=True)
    seen = []
    for comparison in comparisons:
        seen.append(comparison)
        verdict = comparison.verdict
        names = ", ".join(comparison.divergences)
        what = f"{verdict.value}: {names}" if verdict is Verdict.KNOWN else verdict.value
        console.print(f"{comparison.workload.key:<60} [{_STYLES[verdict]}]{escape(what)}[/]")
        if verdict is Verdict.DIFFERENT:
            for line in comparison.difference():
                console.print(f"    {escape(line)}")
    found = [comparison.verdict for comparison in seen]
    counts = ", ".join(
        f"{found.count(verdict)} {verdict.value}"
        for verdict in Verdict
        if verdict is not Verdict.LEFT_OUT or verdict in found
    )
    whom = "this kernel" if kernel is not None else f"Linux {recording.release}"
    console.print(f"{len(seen)} workloads, held against {whom}: {counts}")
    return seen


def _report_json(comparisons: Iterator[Comparison]) -> list[Comparison]:
    """One object a line."""
    seen = []
    for comparison in comparisons:
        seen.append(comparison)
        value = {
            "workload": comparison.workload.key,
            "verdict": comparison.verdict.value,
            "divergences": comparison.divergences,
            "difference": comparison.difference(),
            "kernel": to_json(comparison.kernel),
            "emulated": to_json(comparison.emulated),
        }
        print(json.dumps(value), flush=True)
    return seen


def _keep(seen: list[Comparison], recording: Recording, engine: str) -> None:
    recording.of_this_kernel()
    for comparison in seen:
        key = comparison.workload.key
        recording.kernel[key] = comparison.kernel
        recording.emulated.pop(f"{engine}: {key}", None)
        if comparison.divergences and not comparison.workload.unsteady:
            recording.emulated[f"{engine}: {key}"] = comparison.emulated
    recording.save()
