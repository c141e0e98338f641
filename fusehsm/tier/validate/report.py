"""The findings of validate: counts, a line for each as it comes, and the summary as text or JSON. Safe for several threads."""

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fusehsm.text import shown
from fusehsm.tier.stores.base import Entry
from fusehsm.tier.text import size_text
from fusehsm.tier.validate.reader import TIMEOUT, Difference, Failure, Outcome

Tell = Callable[[str, str], None]


@dataclass(slots=True)
class Differing:
    """Reads of one kind that saw other bytes in a file than the store has. The fields here and below are keys of the JSON report."""

    # Below the destination.
    path: str
    # Name of the step.
    kind: str
    # The lowest offset of a byte that differs.
    offset: int
    # The read that saw this byte saw only zeros in its page.
    zeros: bool
    # Number of such reads.
    reads: int = 1


@dataclass(slots=True)
class Failed:
    """A file or directory that could not be read."""

    # Below the destination.
    path: str
    # Name of the step, "open", "store" (its content), or "list" (a directory).
    kind: str
    # Name of an errno or a signal, or TIMEOUT.
    error: str
    # Number of such failures.
    reads: int = 1
    # The cause, if it says more than the name.
    why: str | None = None


@dataclass(frozen=True, slots=True)
class Unlike:
    """A path whose type, size or target is not the same."""

    # Below the destination.
    path: str
    # "type", "size" or "target".
    what: str
    # The value in the store.
    store: str | int | None
    # The value in the destination.
    destination: str | int | None


@dataclass(slots=True)
class FileFindings:
    """The findings in one file."""

    # Below the destination.
    path: str
    # Number of reads by way.
    reads: Counter[str] = field(default_factory=Counter)
    # Bytes compared.
    compared: int = 0
    # Differences by step.
    differences: dict[str, Differing] = field(default_factory=dict)
    # Failures by step and error.
    failures: dict[tuple[str, str], Failed] = field(default_factory=dict)

    def add(self, by: str, outcome: Outcome) -> None:
        """Add the outcome of one read."""
        self.reads[by] += 1
        self.compared += outcome.compared
        for problem in outcome.problems:
            if isinstance(problem, Failure):
                self.fail(problem.step, problem.error)
            else:
                self._differ(problem)

    def fail(self, kind: str, error: str, why: str | None = None) -> None:
        """Add one error of this kind."""
        if (known := self.failures.get((kind, error))) is not None:
            known.reads += 1
        else:
            self.failures[kind, error] = Failed(self.path, kind, error, why=why)

    def _differ(self, seen: Difference) -> None:
        known = self.differences.get(seen.step)
        if known is None:
            self.differences[seen.step] = Differing(self.path, seen.step, seen.offset, seen.zeros)
            return
        known.reads += 1
        if seen.offset < known.offset:
            known.offset, known.zeros = seen.offset, seen.zeros


@dataclass(slots=True)
class Report:
    """The findings of a run."""

    # Called with a path and a line for each finding.
    tell: Tell
    # Seconds for one read, for the messages.
    timeout: float
    # Number of files read.
    files: int = 0
    # Number of reads by way.
    reads: Counter[str] = field(default_factory=Counter)
    # Bytes compared.
    compared: int = 0
    # Files with other bytes.
    differences: list[Differing] = field(default_factory=list)
    # Files and directories that could not be read.
    errors: list[Failed] = field(default_factory=list)
    # Paths of another type, size or target.
    unlike: list[Unlike] = field(default_factory=list)
    # Paths that only the store has.
    only_in_store: list[str] = field(default_factory=list)
    # Paths that only the destination has.
    only_in_destination: list[str] = field(default_factory=list)
    # Files that changed in the store while they were read.
    changed_in_store: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def problems(self) -> int:
        """The number of findings."""
        return (
            len(self.differences)
            + len(self.errors)
            + len(self.unlike)
            + len(self.only_in_store)
            + len(self.only_in_destination)
            + len(self.changed_in_store)
        )

    def add_file(self, found: FileFindings, *, changed: bool) -> None:
        """Add a file that has been read. `changed`: it changed in the store meanwhile, so its differences do not count."""
        with self._lock:
            self.files += 1
            self.reads += found.reads
            self.compared += found.compared
            if changed:
                self.changed_in_store.append(found.path)
                self.tell(found.path, "has changed in the store meanwhile; validate again")
            else:
                for difference in found.differences.values():
                    self.differences.append(difference)
                    self.tell(found.path, _difference_line(difference))
            for failure in found.failures.values():
                self._fail(failure)

    def fail(self, failure: Failed) -> None:
        """Add an error that is not of a read."""
        with self._lock:
            self._fail(failure)

    def _fail(self, failure: Failed) -> None:
        self.errors.append(failure)
        self.tell(failure.path, _failure_line(failure, self.timeout))

    def add_missing(self, theirs: Entry | None, ours: Entry | None) -> None:
        """Add a path that one side lacks."""
        with self._lock:
            if theirs is not None:
                self.only_in_store.append(theirs.path)
                self.tell(theirs.path, f"only in the store ({theirs.kind.value})")
            elif ours is not None:
                self.only_in_destination.append(ours.path)
                self.tell(ours.path, f"not in the store ({ours.kind.value})")

    def add_unlike(
        self, path: str, what: str, store: str | int | None, destination: str | int | None
    ) -> None:
        """Add a difference of type, size or target."""
        with self._lock:
            self.unlike.append(Unlike(path, what, store, destination))
            here, there = (
                shown(value) if isinstance(value, str) else value for value in (destination, store)
            )
            self.tell(path, f"has another {what}: {here}, in the store {there}")

    def errors_by_name(self) -> dict[str, int]:
        """The number of failures by error."""
        counts: Counter[str] = Counter()
        for failure in self.errors:
            counts[failure.error] += failure.reads
        return dict(sorted(counts.items()))

    def as_json(self) -> dict[str, Any]:
        """The report's part of the `--json` output; the command adds its own."""

        def in_order(found: Sequence[Any]) -> list[dict[str, Any]]:
            return [asdict(one) for one in sorted(found, key=lambda one: (one.path, asdict(one).get("kind")))]

        return {
            "valid": not self.problems,
            "files": self.files,
            "reads": dict(self.reads),
            "bytes": self.compared,
            "differences": in_order(self.differences),
            "errors": in_order(self.errors),
            "errors_by_name": self.errors_by_name(),
            "unlike": in_order(self.unlike),
            "only_in_store": self.only_in_store,
            "only_in_destination": self.only_in_destination,
            "changed_in_store": sorted(self.changed_in_store),
        }

    def problems_text(self) -> str:
        """The counts of findings in words; "" if there are none."""
        parts = [
            (len({found.path for found in self.differences}), "{} with other bytes"),
            (len({found.path for found in self.errors}), "{} with errors" + self._errors_text()),
            (len({found.path for found in self.unlike}), "{} of another type, size or target"),
            (len(self.only_in_store), "{} only in the store"),
            (len(self.only_in_destination), "{} not in the store"),
            (len(self.changed_in_store), "{} changed in the store meanwhile"),
        ]
        return ", ".join(text.format(f"{count:,}") for count, text in parts if count)

    def counts_text(self) -> str:
        """The counts of files, reads and bytes in words."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.reads.items()))
        total = self.reads.total()
        files = f"{self.files:,} {'file' if self.files == 1 else 'files'}"
        what = f" ({kinds})" if kinds else ""
        return f"{files}, {total:,} {'read' if total == 1 else 'reads'}{what}, {size_text(self.compared)} compared"

    def _errors_text(self) -> str:
        return " (" + ", ".join(f"{name} {count:,}" for name, count in self.errors_by_name().items()) + ")"


def progress_line(reads: int, size: int, problems: int, seconds: float) -> str:
    """The line on a terminal. `size` in bytes."""
    line = f"{reads:,} reads ({reads / max(seconds, 1e-3):,.0f} a second), {size_text(size)}"
    return f"{line}, {problems:,} problems" if problems else line


def _times(reads: int) -> str:
    return f" ({reads:,} reads)" if reads > 1 else ""


def _difference_line(found: Differing) -> str:
    what = "zeros where the store has data" if found.zeros else "other bytes than the store"
    return f"{found.kind}: {what}, from byte {found.offset:,}{_times(found.reads)}"


def _failure_line(failure: Failed, timeout: float) -> str:
    if failure.error == TIMEOUT:
        return f"{failure.kind}: no answer within {timeout:g} s; the rest of the file was not read"
    why = f": {failure.why}" if failure.why else ""
    return f"{failure.kind}: {failure.error}{_times(failure.reads)}{why}"
