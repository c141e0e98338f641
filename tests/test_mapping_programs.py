"""Programs that map files shared, on files that a listener watches.

Before Linux 6.6, and with pyfuse3, a file with exact events cannot be mapped shared. So `--events auto` is per-file there, and these tests name it to
have the same on every kernel. Each program works on a mount whose other files have exact events, and on what `fusehsm fetch` serves by default.
A program that is not installed is not tried. `make oldkernel` installs them.
"""

import os
import shutil
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from tests.conftest import MakeMount
from tests.support.async_listener import listening
from tests.support.harness import NOBODY, PATIENCE, fusehsm
from tests.support.tier.fetching import fetching

pytestmark = [pytest.mark.fuse, pytest.mark.root]

POSTGRES = sorted(Path("/usr/lib/postgresql").glob("*/bin"))


def run(
    *command: str | Path,
    place: Path,
    uid: int = 0,
    words: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """The program's output. It must succeed; `uid` runs it, with `words` as its input."""
    variables = {**os.environ, "HOME": str(place), "LC_ALL": "C", **(environment or {})}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=place,
        env=variables,
        user=uid,
        group=uid,
        extra_groups=[],
        input=words,
        capture_output=True,
        text=True,
        timeout=PATIENCE * 4,
        check=False,
    )
    assert done.returncode == 0, f"{command}: {done.returncode}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
    return done.stdout


@dataclass(frozen=True)
class Program:
    """What is made natively, and what is then done on the mount."""

    name: str
    needs: tuple[str | Path, ...]
    make: Callable[[Path], None]
    use: Callable[[Path], None]


GIT: Mapping[str, str] = {
    "GIT_CONFIG_COUNT": "2",
    "GIT_CONFIG_KEY_0": "safe.directory",
    "GIT_CONFIG_VALUE_0": "*",
    "GIT_CONFIG_KEY_1": "user.name",
    "GIT_CONFIG_VALUE_1": "tests",
    "EMAIL": "tests@example.org",
}


def make_repository(place: Path) -> None:
    for number in range(20):
        (place / f"file-{number}").write_text(f"line of {number}\n" * 500)
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"], ["gc", "-q"]):
        run("git", *command, place=place, environment=GIT)


def use_git(place: Path) -> None:
    assert len(run("git", "log", "-p", place=place, environment=GIT)) > 100_000
    (place / "file-3").write_text("new\n")
    run("git", "commit", "-qam", "second", place=place, environment=GIT)
    run("git", "gc", "-q", place=place, environment=GIT)
    run("git", "fsck", "--full", "--strict", place=place, environment=GIT)
    assert run("git", "status", "--porcelain", place=place, environment=GIT) == ""


def make_table(place: Path) -> None:
    (place / "table").write_bytes(bytes(range(256)) * 256)


def use_python(place: Path) -> None:
    text = (
        "import mmap; file = open('table', 'r+b'); m = mmap.mmap(file.fileno(), 0)\n"
        "assert m[:256] == bytes(range(256)); m[5000:5003] = b'new'; m.flush(); m.close(); file.close()\n"
        "assert open('table', 'rb').read()[5000:5003] == b'new'\n"
    )
    run(sys.executable, "-c", text, place=place)


def make_jar(place: Path) -> None:
    (place / "Hello.java").write_text(
        'public class Hello { public static void main(String[] a) { System.out.println("hello"); } }\n'
    )
    run("javac", "Hello.java", place=place)
    with zipfile.ZipFile(place / "hello.jar", "w") as jar:
        jar.writestr("META-INF/MANIFEST.MF", "Manifest-Version: 1.0\nMain-Class: Hello\n\n")
        jar.write(place / "Hello.class", "Hello.class")


def use_java(place: Path) -> None:
    assert run("java", "-jar", "hello.jar", place=place) == "hello\n"


def make_sources(place: Path) -> None:
    (place / "hello.c").write_text('#include <stdio.h>\nint main(void) { puts("hello"); return 0; }\n')
    run("gcc", "-c", "hello.c", place=place)


def use_gold(place: Path) -> None:
    run("gcc", "-fuse-ld=gold", "-o", "hello", "hello.o", place=place)
    assert run(place / "hello", place=place) == "hello\n"


def make_database(place: Path) -> None:
    with sqlite3.connect(place / "database") as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE numbers (number INTEGER)")
        database.executemany("INSERT INTO numbers VALUES (?)", ((number,) for number in range(2000)))
    database.close()


def use_sqlite(place: Path) -> None:
    text = (
        "import sqlite3; a = sqlite3.connect('database'); b = sqlite3.connect('database')\n"
        "assert a.execute('PRAGMA journal_mode').fetchone() == ('wal',)\n"
        "a.execute('INSERT INTO numbers VALUES (7)'); a.commit()\n"
        "assert b.execute('SELECT count(*) FROM numbers').fetchone() == (2001,)\n"
        "assert a.execute('PRAGMA integrity_check').fetchone() == ('ok',)\n"
    )
    run(sys.executable, "-c", text, place=place)


def postgres(place: Path, *words: str | Path, sql: str = "") -> str:
    return run(POSTGRES[-1] / words[0], *words[1:], place=place, uid=NOBODY, words=sql)


def make_cluster(place: Path) -> None:
    os.chown(place, NOBODY, NOBODY)
    postgres(place, "initdb", "--no-sync", "--auth=trust", "--username=tests", "-D", place / "data")
    with (place / "data" / "postgresql.conf").open("a") as settings:
        # Its shared memory is files of the data directory then.
        settings.write("dynamic_shared_memory_type = mmap\nlisten_addresses = ''\nshared_buffers = 1MB\n")


def use_postgres(place: Path) -> None:
    # The path of a socket must be short.
    sockets = Path("/tmp", f"fusehsm-tests-postgres-{os.getpid()}")
    sockets.mkdir(mode=0o777)
    sockets.chmod(0o777)
    data = place / "data"
    try:
        options = f"-k {sockets} -c max_parallel_workers_per_gather=2 -c min_parallel_table_scan_size=0"
        postgres(place, "pg_ctl", "-D", data, "-w", "-t", "600", "-l", data / "log", "-o", options, "start")
        try:
            sql = "CREATE TABLE t AS SELECT generate_series(1, 5000) AS n; SET parallel_setup_cost = 0; SELECT sum(n) FROM t;"
            said = postgres(
                place,
                "psql",
                "-h",
                sockets,
                "-U",
                "tests",
                "-At",
                "-v",
                "ON_ERROR_STOP=1",
                "postgres",
                sql=sql,
            )
            assert said.split()[-1] == "12502500"
        finally:
            postgres(place, "pg_ctl", "-D", data, "-w", "-t", "600", "-m", "fast", "stop")
    finally:
        shutil.rmtree(sockets)


PROGRAMS = [
    Program("git", ("git",), make_repository, use_git),
    Program("python", (sys.executable,), make_table, use_python),
    Program("sqlite", (sys.executable,), make_database, use_sqlite),
    Program("gold", ("gcc", "ld.gold"), make_sources, use_gold),
    Program("java", ("java", "javac"), make_jar, use_java),
    Program("postgres", (POSTGRES[-1] / "initdb" if POSTGRES else "initdb",), make_cluster, use_postgres),
]
INSTALLED = [program for program in PROGRAMS if all(shutil.which(need) for need in program.needs)]


@pytest.fixture(scope="module")
def made(session_directory: Path) -> Callable[[Program], Path]:
    """made(program) -> the directory that it works on; made once, natively."""
    places: dict[str, Path] = {}

    def make(program: Program) -> Path:
        if program.name not in places:
            place = session_directory / f"made-{program.name}"
            place.mkdir(mode=0o755)
            program.make(place)
            places[program.name] = place
        return places[program.name]

    return make


@pytest.mark.parametrize("program", INSTALLED, ids=lambda program: program.name)
async def test_on_a_mount_beside_files_with_exact_events(
    program: Program, made: Callable[[Program], Path], make_mount: MakeMount
) -> None:
    mount = make_mount("--events", "per-file", "--allow-other")
    subprocess.run(["cp", "-a", made(program), mount.source / "work"], check=True, timeout=PATIENCE)
    (mount.source / "exact").write_bytes(bytes(8192))
    async with (
        listening(mount.path) as everywhere,
        listening(mount.path / "exact", ("OPEN_PERM", "ACCESS_PERM", "PRE_ACCESS"), mark="inode") as listener,
    ):
        await trio.to_thread.run_sync(program.use, mount.path / "work", abandon_on_cancel=True)
        assert everywhere.heard
        assert listener.heard == []
        for _ in range(2):
            reading = [sys.executable, "-c", "import os; os.pread(os.open('exact', os.O_RDONLY), 10, 0)"]
            await trio.run_process(reading, cwd=mount.path)
            assert listener.briefly() == [
                ("OPEN_PERM", None, None),
                ("PRE_ACCESS", 0, 4096),
                ("ACCESS_PERM", None, None),
            ]


@pytest.mark.parametrize("program", INSTALLED, ids=lambda program: program.name)
def test_on_stubs_that_fetch_serves(
    program: Program, made: Callable[[Program], Path], places: Callable[[str], Path], engine: str
) -> None:
    place = places("mapped")
    place.chmod(0o755)
    done = fusehsm("populate", made(program), place)
    assert done.returncode == 0, done.stderr
    with fetching(made(program), place, "--backend", "fuse", "--engine", engine, "--allow-other") as served:
        program.use(place)
        served.end()
