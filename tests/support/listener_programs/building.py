"""Makes the programs from their sources, each once a session. The set-up brings the compilers of C and Go along; Rust's is used where it is."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support import harness

SOURCES = Path(__file__).parent
_C = ("gcc", "-O1", "-g", "-w", "-pthread")  # what calls.c does on purpose, compilers warn of
_LISTENER = ("listener.c", "events.c", "marking.c", "waiting.c", "lives.c", "numbers.c")
_SOURCES = {
    "calls": ("calls.c", "calls_io.c", "calls_ends.c"),
    "hostile": ("hostile.c",),
    "own": ("own.c",),
    "races": ("races.c", "races_signals.c", "races_numbers.c"),
}
_PATIENCE = 2 * harness.PATIENCE  # seconds for one compiler
#: The variable with the directory of programs that are made already: compilers take minutes in an emulated machine.
READY_MADE = "FUSEHSM_TESTS_PROGRAMS"


@functools.cache
def rust_compiler() -> str | None:
    """A rustc that works, also where a user has it for himself (rustup's stands there without any compiler behind it, too)."""
    found = shutil.which("rustc") or shutil.which("rustc", path=os.path.expanduser("~/.cargo/bin"))
    if found is None:
        return None
    tried = subprocess.run([found, "--version"], capture_output=True, timeout=_PATIENCE, check=False)
    return found if tried.returncode == 0 else None


def _commands(build: str, target: str) -> list[str]:
    if build == "go":
        return ["go", "build", "-o", target, "listener.go"]
    if build == "rust":
        compiler = rust_compiler()
        assert compiler is not None
        return [compiler, "--edition", "2021", "-C", "opt-level=1", "-o", target, "listener.rs"]
    sources = _SOURCES.get(build, _LISTENER)
    static = ("-static",) if build == "static" else ()
    return [*_C, *static, "-o", target, *sources]


@functools.cache
def program(directory: Path, build: str) -> tuple[str, ...]:
    """How to start it: `dynamic`, `static`, `go`, `rust`, `python` (listeners), `pyfanotify`, `calls`, `hostile`, `races`.

    Compiled programs lie in `directory`.
    """
    if build in ("python", "pyfanotify"):
        return (sys.executable, "-u", str(SOURCES / f"{build}_listener.py"))
    made = Path(os.environ.get(READY_MADE, "/nonexistent"), f"listeners-{build}")
    if made.exists():
        return (str(made),)
    target = str(directory / f"listeners-{build}")
    environment = {
        **os.environ,
        # The Go compiler wants neither a home nor a network.
        "GOCACHE": str(directory / "go-cache"),
        "GO111MODULE": "off",
        "GOTOOLCHAIN": "local",
        "CGO_ENABLED": "0",
    }
    done = subprocess.run(
        _commands(build, target),
        cwd=SOURCES,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return (target,)


Marks = tuple[tuple[str, str, str], ...]  # flags, mask, and the file in the watched directory ("": itself)


def listener_words(
    directory: Path, place: Path, style: str, *arguments: str, build: str = "dynamic", marks: Marks = ()
) -> list[str]:
    """The command line of a listener of `place`."""
    marked = [
        word
        for flags, mask, file in marks
        for word in ("--mark", flags, mask, str(place / file if file else place))
    ]
    return [*program(directory, build), "--style", style, *arguments, *marked, str(place)]


if __name__ == "__main__":
    # Make all programs in a directory, for READY_MADE.
    for each in ("dynamic", "static", "go", *(("rust",) if rust_compiler() else ()), *_SOURCES):
        program(Path(sys.argv[1]), each)
