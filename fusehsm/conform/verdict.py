"""What the comparison of two streams comes to."""

import difflib
import enum
from dataclasses import dataclass

from fusehsm.conform.stream import UNFINISHED, Did, Stream, lines
from fusehsm.conform.workload import Workload


class Verdict(enum.Enum):
    """IDENTICAL; KNOWN: as an entry of the table of divergences says; DIFFERENT: nobody knows why, or no more as the entry says;
    LEFT_OUT: it needs root, and who runs it is not."""

    IDENTICAL = "identical"
    KNOWN = "known divergence"
    DIFFERENT = "different"
    LEFT_OUT = "left out: needs root"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One workload's two streams, and what they come to. `expected`: what the emulator was last seen to do where it is known to differ."""

    workload: Workload
    kernel: Stream
    emulated: Stream
    divergences: tuple[str, ...]
    expected: Stream | None = None
    left_out: bool = False

    @property
    def verdict(self) -> Verdict:
        """A divergence excuses the stream that was recorded with it, and where none was, any."""
        if self.left_out:
            return Verdict.LEFT_OUT
        if any(isinstance(entry, Did) and entry.who == UNFINISHED for entry in self.kernel):
            return Verdict.DIFFERENT  # whatever the emulator did: the workload is broken
        if lines(self.kernel) == lines(self.emulated):
            return Verdict.IDENTICAL
        if not self.divergences:
            return Verdict.DIFFERENT
        steady = self._steady
        return Verdict.KNOWN if steady is None or lines(steady) == lines(self.emulated) else Verdict.DIFFERENT

    @property
    def _steady(self) -> Stream | None:
        """What the emulator must do; None where that is not known."""
        return None if self.workload.unsteady or not self.divergences else self.expected

    def difference(self) -> list[str]:
        """Lines for people: what only the kernel has (-), what only the emulator has (+), and what is around it."""
        wanted, name = self.kernel, "the kernel"
        if self._steady is not None and self.verdict is Verdict.DIFFERENT:
            wanted, name = self._steady, f"recorded with the divergence {', '.join(self.divergences)}"
        return list(
            difflib.unified_diff(lines(wanted), lines(self.emulated), name, "the emulator", lineterm="", n=3)
        )
