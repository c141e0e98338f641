"""Write docs/old-kernels.md from what `make oldkernel` has measured: build/oldkernel/results/KERNEL/PART/, a file for each run.

With `--record` it first saves the emulator's streams of workloads whose divergence holds on older kernels only, as `fusehsm conform --record` does
for the running one. A later run of a workload counts instead of an earlier one.
"""

import datetime
import json
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from fusehsm.conform.divergences import DIVERGENCES
from fusehsm.conform.perform import Comparison
from fusehsm.conform.stream import Recording, from_json, recorded_name
from fusehsm.conform.workloads import WORKLOADS

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "build" / "oldkernel" / "results"
PAGE = ROOT / "docs" / "old-kernels.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
#: The parts that compare streams, with their engine.
COMPARING = {"conform": "devfuse", "pyfuse3": "pyfuse3", "first-access": "devfuse"}
TESTING = ("programs", "listeners", "core")
UNTIL = {entry.name: entry.until for entry in DIVERGENCES}
ENGINES_OF = {entry.name: entry.engines for entry in DIVERGENCES}
BY_KEY = {workload.key: workload for workload in WORKLOADS}
RECORDING = Recording.load()
KNOWN, DIFFERENT, NOT_RUN = "known divergence", "different", "not run"

Result = dict[str, Any]


def version(kernel: str) -> tuple[int, int]:
    """Its major and minor number."""
    major, minor = kernel.split(".")[:2]
    return int(major), int(minor)


def runs(kernel: str, part: str, ending: str) -> list[Path]:
    """The files of all runs, the oldest first."""
    return sorted((RESULTS / kernel / part).glob(f"*.{ending}"))


def judged(kernel: str, part: str, result: Result) -> Result:
    """The result with its verdict by the table of divergences and the recording as they are now, which may be newer than the run."""
    workload, engine = BY_KEY[result["workload"]], COMPARING[part]
    if part == "first-access" or result["verdict"] not in (KNOWN, DIFFERENT):
        return result
    older = [name for name in workload.divergences if version(kernel) < UNTIL[name]]
    holding = tuple(name for name in workload.divergences if name in older or engine in ENGINES_OF[name])
    expected = RECORDING.of_emulator(engine, workload.key, (UNTIL[name] for name in older))
    kernels_own, emulated = from_json(result["kernel"]), from_json(result["emulated"])
    comparison = Comparison(workload, kernels_own, emulated, holding, expected)
    return {**result, "verdict": comparison.verdict.value, "divergences": holding}


def compared(kernel: str, part: str) -> dict[str, Result]:
    """The last result of each workload, in the order of the workloads."""
    found: dict[str, Result] = {}
    paths = runs(kernel, part, "json") + (runs(kernel, "view", "json") if part == "conform" else [])
    for path in paths:
        for line in path.read_text().splitlines():
            result = json.loads(line)
            if result["workload"] in BY_KEY:
                found[result["workload"]] = judged(kernel, part, result)
    return {workload.key: found[workload.key] for workload in WORKLOADS if workload.key in found}


def tested(kernel: str, part: str) -> str:
    """pytest's last line of the last run: how many passed, failed and were skipped."""
    logs = runs(kernel, part, "log")
    said = (
        re.findall(r"(\d+) (passed|failed|errors?|skipped)\b", logs[-1].read_text()[-2000:]) if logs else []
    )
    return ", ".join(f"{number} {word}" for number, word in said) or NOT_RUN


def limit(kernel: str, result: Result) -> tuple[int, int] | None:
    """The kernel before which the workload's divergence holds, if it holds on this one for that reason."""
    names = BY_KEY[result["workload"]].divergences
    return min((UNTIL[name] for name in names if version(kernel) < UNTIL[name]), default=None)


def record() -> None:
    """Save the streams. Raises SystemExit where two kernels before the same limit have different ones."""
    recording, seen = RECORDING, dict[str, str]()
    for kernel in kernels():
        for part, engine in COMPARING.items():
            for key, result in compared(kernel, part).items():
                before = limit(kernel, result)
                if part == "first-access" or before is None or result["verdict"] == "identical":
                    continue
                name, stream = recorded_name(engine, key, before), from_json(result["emulated"])
                if name in seen and recording.emulated[name] != stream:
                    raise SystemExit(f"{name}: not the same on Linux {seen[name]} and {kernel}")
                recording.emulated[name], seen[name] = stream, kernel
    recording.save()
    print(f"recorded: {len(seen)} streams of older kernels")


def kernels() -> list[str]:
    """The kernels that were measured, the newest first."""
    return sorted((path.name for path in RESULTS.iterdir()), key=version, reverse=True)


def cell(result: Result | None) -> str:
    """The table's cell for one kernel and one workload."""
    if result is None:
        return NOT_RUN
    if result["verdict"] != KNOWN:
        return str(result["verdict"])
    return f"known: {', '.join(result['divergences'])}"


def summary(kernel: str) -> str:
    """The row of one kernel."""
    cells = []
    for part in COMPARING:
        counts = Counter(result["verdict"] for result in compared(kernel, part).values())
        cells.append(
            ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items())) or NOT_RUN
        )
    return " | ".join((kernel, *cells, *(tested(kernel, part) for part in TESTING)))


def measured() -> str:
    """The generated part of the page."""
    names = kernels()
    newest, older = names[0], names[1:]
    results = {kernel: compared(kernel, "conform") for kernel in names}
    rows = []
    for key, result in results[newest].items():
        cells = {kernel: cell(results[kernel].get(key)) for kernel in older}
        if any(text not in (cell(result), NOT_RUN) for text in cells.values()):
            rows.append(f"| {key} | {cell(result)} | " + " | ".join(cells[kernel] for kernel in older) + " |")
    heads = ("kernel", *COMPARING, *TESTING)
    return "\n".join(
        (
            f"Measured until {datetime.date.today().isoformat()}. `conform`: all workloads, devfuse, exact events. `pyfuse3`: a sample of 100.",
            "`first-access`: a sample of 100; every byte that the kernel asks for must be asked for, and nothing beyond its read-ahead.",
            "The other columns are tests of pytest ([scripts/oldkernel-part](../scripts/oldkernel-part)).",
            "",
            f"| {' | '.join(heads)} |",
            f"|{' --- |' * len(heads)}",
            *(f"| {summary(kernel)} |" for kernel in names),
            "",
            f"Every workload whose result is not that of Linux {newest}:",
            "",
            f"| workload | {' | '.join(names)} |",
            f"| --- |{' --- |' * len(names)}",
            *rows,
        )
    )


def main() -> int:
    """Write the page. Exit code 1 if a workload is different on a kernel."""
    if "--record" in sys.argv:
        record()
    text = PAGE.read_text()
    head, rest = text.split(BEGIN, 1)
    PAGE.write_text(f"{head}{BEGIN}\n{measured()}\n{END}{rest.split(END, 1)[1]}")
    different = [
        f"{kernel}, {part}: {key}"
        for kernel in kernels()
        for part in COMPARING
        for key, result in compared(kernel, part).items()
        if result["verdict"] == DIFFERENT
    ]
    print("\n".join(different) or "nothing is different")
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
