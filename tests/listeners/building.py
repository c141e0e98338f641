"""Makes the programs from their sources, each once a session. What there is no compiler for is not offered, except where it belongs to the set-up."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

SOURCES = Path(__file__).parent
_C = ("gcc", "-O1", "-g", "-w", "-pthread")  # what calls.c does on purpose, compilers warn of
_LISTENER = ("listener.c", "events.c", "marking.c", "waiting.c", "lives.c")
_SOURCES = {"calls": ("calls.c", "calls_io.c", "calls_ends.c"), "hostile": ("hostile.c",)}
_PATIENCE = 120.0  # seconds for one compiler


@functools.cache
def rust_compiler() -> str | None:
    """rustc, also where a user has it for himself; no distribution's set-up brings it along."""
    home = os.path.expanduser("~/.cargo/bin")
    return shutil.which("rustc") or shutil.which("rustc", path=home)


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
    """How to start it: `dynamic`, `static`, `go`, `rust`, `python` (listeners), `pyfanotify`, `calls`, `hostile`.

    Compiled programs lie in `directory`.
    """
    if build in ("python", "pyfanotify"):
        return (sys.executable, "-u", str(SOURCES / f"{build}_listener.py"))
    target = str(directory / f"listeners-{build}")
    environment = {
        **os.environ,
        "PATH": f"{os.environ.get('PATH', '')}:/usr/local/go/bin",
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
