"""Run one workload on both sides and compare the two streams."""

import difflib
import enum
import itertools
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import trio

from fusehsm.conform import coverage
from fusehsm.conform.accessor import Accessor, AccessorTimeout, Zygote
from fusehsm.conform.scene import PATIENCE, scene
from fusehsm.conform.sides import Side
from fusehsm.conform.stream import UNFINISHED, Did, Stream, arranged, ended_early, lines, results
from fusehsm.conform.workload import Need, Workload
from fusehsm.linux.signals import Interruption

# The comparison of two streams


class Verdict(enum.Enum):
    """The result of a comparison."""

    #: The two streams are equal.
    IDENTICAL = "identical"
    #: Every byte was asked for, and the calls did the same: the most that first-access mode can be (coverage.py).
    COVERED = "every byte asked for"
    #: They differ as an entry of the table of divergences says.
    KNOWN = "known divergence"
    #: They differ without an entry, or otherwise than recorded with the entry.
    DIFFERENT = "different"
    #: The workload needs root, and the user is not root.
    LEFT_OUT = "left out: needs root"
    #: The kernel does not have what the workload is about (Workload.needs).
    NOT_HERE = "not on this kernel"
    #: This machine's programs decide, and not the emulator: one is missing, or is not the recorded one.
    NOT_TRIED = "not tried"


@dataclass(frozen=True, slots=True)
class Comparison:
    """The two streams of one workload, and the data for a verdict."""

    workload: Workload
    #: The real kernel's stream.
    kernel: Stream
    #: The emulator's stream, of the last run.
    emulated: Stream
    #: The divergences of this workload that this engine and kernel have.
    divergences: tuple[str, ...]
    #: The emulator's recorded stream, for a workload with a divergence.
    expected: Stream | None = None
    #: The reason for which the workload did not run: LEFT_OUT or NOT_HERE.
    left_out: Verdict | None = None
    #: The cause of Verdict.NOT_TRIED; "": the workload was tried.
    not_tried: str = ""
    #: The emulator's stream of the run before the last, if that differed and the workload ran again.
    first: Stream | None = None
    #: How often the workload ran.
    attempts: int = 1
    #: With `--events first-access`: the largest size in bytes of each file. None: the events must be the kernel's.
    sizes: Mapping[str, int] | None = None

    @property
    def verdict(self) -> Verdict:
        """The result of the comparison.

        A divergence excuses the stream that was recorded with it, or every stream if none was recorded. For an unsteady workload it
        excuses the events but not the results. An early end is always DIFFERENT: on the kernel's side the workload is broken, on the
        emulator's side the emulator has died or hangs.
        """
        if self.left_out is not None:
            return self.left_out
        if self.not_tried:
            return Verdict.NOT_TRIED
        if ended_early(self.kernel) or ended_early(self.emulated):
            return Verdict.DIFFERENT
        if lines(self.kernel) == lines(self.emulated):
            return Verdict.IDENTICAL
        if self.sizes is not None:
            if not coverage.faults(self.kernel, self.emulated, self.sizes):
                return Verdict.COVERED
            return Verdict.KNOWN if self.divergences else Verdict.DIFFERENT
        if not self.divergences:
            return Verdict.DIFFERENT
        if self.workload.unsteady:
            excused = results(self.kernel) == results(self.emulated)
        else:
            excused = self.expected is None or lines(self.expected) == lines(self.emulated)
        return Verdict.KNOWN if excused else Verdict.DIFFERENT

    def difference(self) -> list[str]:
        """A unified diff: lines of the kernel only (-), lines of the emulator only (+), and their context."""
        faults = [] if self.sizes is None else coverage.faults(self.kernel, self.emulated, self.sizes)
        wanted, name = self.kernel, "the kernel"
        is_news = self.verdict is Verdict.DIFFERENT and not ended_early(self.kernel)
        if is_news and self.divergences and self.expected is not None and not self.workload.unsteady:
            wanted, name = self.expected, f"recorded with the divergence {', '.join(self.divergences)}"
        found = _difference(wanted, self.emulated, name)
        if not found and self.verdict is Verdict.DIFFERENT:
            return ["both sides ended early:", *(f" {line}" for line in lines(self.kernel))]
        return faults + found

    def first_difference(self) -> list[str]:
        """The difference between the last run and the one before it, as a unified diff; empty after one run."""
        return [] if self.first is None else _difference(self.emulated, self.first, "the last attempt")


def _difference(wanted: Stream, emulated: Stream, name: str) -> list[str]:
    return list(difflib.unified_diff(lines(wanted), lines(emulated), name, "the emulator", lineterm="", n=3))


@dataclass(slots=True)
class Performer:
    """Runs workloads, each in a directory of its own."""

    zygote: Zygote
    #: Ends the run when a signal comes; None: no signals are watched.
    interruption: Interruption | None = None
    #: Seconds for one workload.
    patience: float = PATIENCE
    #: How often a workload that differs may run.
    attempts: int = 2
    #: Compare what first-access mode can do, and not event by event.
    first_access: bool = False
    #: The largest size in bytes of each file of the last workload, by its path in the stream.
    sizes: dict[str, int] = field(default_factory=dict)
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    _lacking: dict[str, bool] = field(default_factory=dict)

    def perform(self, workload: Workload, side: Side) -> Stream:
        """Run a workload and return its stream. If it ends early, the last entry is the cause. Raises Interrupted."""
        try:
            stream = trio.run(self._perform, workload, side)
        except BaseExceptionGroup as group:
            raise _first(group) from None
        if self.interruption is not None:
            self.interruption.check()
        if side.emulator is not None and (ended_early(stream) or side.emulator.has_ended):
            trouble = side.emulator.trouble(self.zygote)
            if trouble:
                stream.append(Did(UNFINISHED, "ended", trouble))
        return stream

    def compare(
        self,
        workload: Workload,
        kernel: Stream,
        emulated: Side,
        divergences: tuple[str, ...],
        expected: Stream | None,
    ) -> Comparison:
        """Run a workload on the emulator and compare the streams. If they differ, run it again.

        On a busy or slow machine an accessor can be preempted in the middle of a request. Then /proc does not show it waiting, and the
        emulator makes one event more than the kernel. This seldom happens twice.
        """
        stream = self.perform(workload, emulated)
        sizes = self.sizes if self.first_access else None
        comparison = Comparison(workload, kernel, stream, divergences, expected, sizes=sizes)
        for attempts in range(2, self.attempts + 1):
            if comparison.verdict is not Verdict.DIFFERENT or ended_early(comparison.emulated):
                break
            stream = self.perform(workload, emulated)
            comparison = replace(comparison, emulated=stream, first=comparison.emulated, attempts=attempts)
        return comparison

    def lacks(self, need: Need, directory: Path) -> bool:
        """Whether the kernel lacks something, tried on a file that is made in `directory` and removed. `directory` is not on a mount of fusehsm."""
        if need.name not in self._lacking:
            path = directory / f"need-{next(self._numbers)}"
            path.write_bytes(bytes(20000))
            result: object
            with Accessor(self.zygote) as accessor:
                try:
                    result = accessor.call(need.act, str(path), *need.arguments)
                except OSError as error:
                    result = error
            path.unlink()
            self._lacking[need.name] = need.lacking(result)
        return self._lacking[need.name]

    async def _perform(self, workload: Workload, side: Side) -> Stream:
        async with trio.open_nursery() as nursery:
            if self.interruption is not None:
                nursery.start_soon(self.interruption.watch)
            stream = await self._stream(workload, side)
            nursery.cancel_scope.cancel()
        return arranged(stream, workload.interchangeable, at_once=workload.at_once)

    async def _stream(self, workload: Workload, side: Side) -> Stream:
        stream: Stream = []
        name = f"workload-{next(self._numbers)}"
        try:
            async with scene(side, name, self.zygote, self.patience) as made:
                stream, self.sizes = made.stream, made.sizes
                await workload.script(made)
                if self.first_access and not side.is_kernel:
                    made.measure()
        except Exception as raised:
            error = _first(raised)
            late = isinstance(error, trio.TooSlowError | AccessorTimeout)
            stream.append(
                Did(UNFINISHED, "ended", "too late" if late else f"{type(error).__name__}: {error}")
            )
        finally:
            shutil.rmtree(side.backing / name, ignore_errors=True)
        return stream


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
