"""The results of the benchmark: as values, as a table and as JSON."""

import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.table import Table


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on the ratio of one case to another."""

    #: The name of the case.
    case: str
    #: The name of the case to divide by.
    versus: str
    #: The upper bound of the ratio; None: no bound.
    at_most: float | None = None
    #: The lower bound of the ratio; None: no bound.
    at_least: float | None = None


@dataclass(frozen=True, slots=True)
class Quantity:
    """One measured quantity, in several cases."""

    #: The letter of the part.
    part: str
    #: The name in tables.
    name: str
    #: The unit of the values.
    unit: str
    #: The values of each case; `values[case][i]` is of the i-th repetition.
    values: Mapping[str, Sequence[float]]
    #: The case to divide by; a name that is no case: no ratios.
    baseline: str
    targets: Sequence[Target] = ()
    #: The upper bound of a case's own median, by case.
    limits: Mapping[str, float] | None = None

    def ratios(self, case: str, versus: str) -> list[float]:
        """`case` divided by `versus`, for each repetition. Disturbances of both by the machine cancel out."""
        return [mine / other for mine, other in zip(self.values[case], self.values[versus], strict=True)]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A target and its result."""

    #: The target in words.
    text: str
    #: The measured ratio or median.
    measured: float
    met: bool


def interleave(
    repetitions: int, cases: Mapping[str, Callable[[], float]], note: Callable[[str], None]
) -> dict[str, list[float]]:
    """Measure every case once in each repetition. Each repetition begins with another case."""
    names = list(cases)
    values: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(repetitions):
        shift = repetition % len(names)
        for name in names[shift:] + names[:shift]:
            note(f"{name} ({repetition + 1} of {repetitions})")
            values[name].append(cases[name]())
    return values


def verdicts(quantity: Quantity) -> list[Verdict]:
    """A verdict for each target whose two cases were measured, and for each limit."""
    found = []
    for target in quantity.targets:
        if target.case not in quantity.values or target.versus not in quantity.values:
            continue
        measured = statistics.median(quantity.ratios(target.case, target.versus))
        name = f"({quantity.part}) {quantity.name}: {target.case} / {target.versus}"
        if target.at_most is not None:
            found.append(Verdict(f"{name} at most {target.at_most:g}", measured, measured <= target.at_most))
        if target.at_least is not None:
            found.append(
                Verdict(f"{name} at least {target.at_least:g}", measured, measured >= target.at_least)
            )
    for case, limit in (quantity.limits or {}).items():
        if case in quantity.values:
            measured = statistics.median(quantity.values[case])
            text = f"({quantity.part}) {quantity.name}: {case} under {limit:g} {quantity.unit}"
            found.append(Verdict(text, measured, measured < limit))
    return found


def number(value: float) -> str:
    """The text of a number: three significant digits and no exponent."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def table_of(quantities: Sequence[Quantity], repetitions: int) -> Table:
    """A table of medians, their spread (least to greatest) and their ratios to the baseline."""
    title = f"medians of {repetitions} interleaved repetitions; Linux {platform.release()}, {os.cpu_count()} cores"
    table = Table(title=title)
    for heading in ("", "what", "case"):
        table.add_column(heading)
    for heading in ("median", "least … greatest", "unit", "ratio", "least … greatest"):
        table.add_column(heading, justify="right" if heading != "unit" else "left")
    for quantity in quantities:
        for index, (case, values) in enumerate(quantity.values.items()):
            ratio = ["", ""]
            if quantity.baseline in quantity.values:
                ratios = quantity.ratios(case, quantity.baseline)
                ratio = [number(statistics.median(ratios)), f"{number(min(ratios))} … {number(max(ratios))}"]
            head = (quantity.part, quantity.name) if index == 0 else ("", "")
            spread = f"{number(min(values))} … {number(max(values))}"
            last = index == len(quantity.values) - 1
            cells = (*head, case, number(statistics.median(values)), spread, quantity.unit, *ratio)
            table.add_row(*cells, end_section=last)
    return table


def targets_of(found: Sequence[Verdict]) -> Table:
    """A table of the targets and their results."""
    table = Table(title="targets")
    table.add_column("target")
    table.add_column("measured", justify="right")
    table.add_column("met")
    for verdict in found:
        table.add_row(verdict.text, number(verdict.measured), "yes" if verdict.met else "NO")
    return table


def as_json(
    quantities: Sequence[Quantity], left_out: Sequence[str], repetitions: int, load: float
) -> dict[str, Any]:
    """All results with all single values, for JSON. `load` is the load average before the benchmark."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "load_before": load,
        "repetitions": repetitions,
        "left_out": list(left_out),
        "quantities": [
            {
                "part": quantity.part,
                "name": quantity.name,
                "unit": quantity.unit,
                "baseline": quantity.baseline,
                "cases": {
                    case: {"median": statistics.median(values), "values": list(values)}
                    for case, values in quantity.values.items()
                },
            }
            for quantity in quantities
        ],
        "targets": [
            {"target": verdict.text, "measured": verdict.measured, "met": verdict.met}
            for quantity in quantities
            for verdict in verdicts(quantity)
        ],
    }
