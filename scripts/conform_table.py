"""Write docs/conform.md: the results of `fusehsm conform` with each engine. Exit code 1 if there is a difference that is no known divergence."""

import datetime
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from fusehsm.conform.divergences import ENGINES

# Measured once, by hand: the requests that a daemon reads from /dev/fuse, with strace(1).
UNSENT = """## What FUSE does not send

An experiment on Linux 6.18 shows whether the events of mmap(2) and of empty reads and writes can be recovered. `strace -f -e trace=read,readv` of the
daemon shows every request that it reads from /dev/fuse. Between its calls the accessor made a getxattr(2) of a new name, which always makes a
request. With each engine, with `--events exact` and `--events first-access`, **no request at all** came from: mmap(2), private, shared and with
PROT_NONE; mprotect(2) and mremap(2) of the mapping; read(2), pread(2), write(2) and pwrite(2) of 0 bytes; preadv(2) of no vector; sendfile(2) of
0 bytes and past the end of the file. The first touch of a mapping makes a READ, as does pread(2) of one byte. So a server cannot know of these calls
from /dev/fuse alone, and the divergences "mappings ask when touched" and "empty reads and writes" stay. `fusehsm run` sees mmap(2) in another way
([run.md](run.md)).

## Workload by workload"""
TARGET = Path(__file__).resolve().parent.parent / "docs" / "conform.md"


def compared(engine: str) -> dict[str, dict[str, Any]]:
    """The output of `fusehsm conform --json`, by workload."""
    command = [sys.executable, "-m", "fusehsm", "conform", "--json", "--engine", engine]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode not in (0, 1) or not found:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}")
    return {each["workload"]: each for each in found}


def cell(result: dict[str, Any]) -> str:
    """The table's cell for one engine and one workload."""
    if result["verdict"] != "known divergence":
        return str(result["verdict"])
    return f"known: {', '.join(result['divergences'])}"


def main() -> int:
    """Write the page."""
    results = {engine: compared(engine) for engine in ENGINES}
    first = results[ENGINES[0]]
    rows = [
        f"| {name} | {sum('names' in entry for entry in result['kernel'])} | "
        + " | ".join(cell(results[engine][name]) for engine in ENGINES)
        + " |"
        for name, result in first.items()
    ]
    counts = {
        engine: Counter(result["verdict"] for result in found.values()) for engine, found in results.items()
    }
    again = {
        engine: sum(result["attempts"] > 1 for result in found.values()) for engine, found in results.items()
    }
    said = "; ".join(
        f"{engine}: "
        + ", ".join(f"{number} {verdict}" for verdict, number in counted.items())
        + (f" ({again[engine]} at the second attempt)" if again[engine] else "")
        for engine, counted in counts.items()
    )
    release, today = os.uname().release, datetime.date.today().isoformat()
    TARGET.write_text(
        f"""# The emulator compared with the real kernel

Results of `fusehsm conform` on Linux {release} ({os.uname().machine}, ext4) on {today}, with `--events exact`. Of {len(rows)} workloads:
{said}.

*Identical*: the listener read the same events in the same order, byte for byte (except the numbers of descriptors and processes), each process
has the same part in them, every system call returned the same, and the files have the same content at the end. *Known*: the streams differ as an
entry of the [table of differences](divergences.md) says, and as they were recorded. Where the events change from run to run, they differ as
the entry says, and the results of all calls are the same. `fusehsm conform NAME --json` shows both streams.

The family *listener* is about what a listener sees and can do: files by descriptor and by path, links, holes, locks, ioctls, fills through its own
descriptors while an access waits, threads, and the hand-over of its group. Its listener is a process of its own: on the real kernel in a mount of its
own, on the emulator under `fusehsm run --listener`, which chooses the engine by itself. So both columns show the same for it.

{UNSENT}

| workload | events of the kernel | {" | ".join(ENGINES)} |
| --- | --- |{" --- |" * len(ENGINES)}
{chr(10).join(rows)}
"""
    )
    print(f"{TARGET.relative_to(TARGET.parent.parent)}: {said}")
    return int(any(counted["different"] for counted in counts.values()))


if __name__ == "__main__":
    raise SystemExit(main())
