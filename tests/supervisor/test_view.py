"""`fusehsm run --listener`: the command sees what is below the overlay, and all others see the overlay."""

import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fusehsm.conform.accessor import Accessor
from fusehsm.linux.syscalls import MNT_DETACH, MS_BIND, mount, umount2
from tests.support import harness
from tests.support.harness import NOBODY, fuse_device_for_everybody, fusehsm
from tests.support.kernel_and_run import RUN, STEP, Program, mounts_at, standing
from tests.support.listener_programs.building import listener_words
from tests.support.listener_steps import NOTE, PAGE, SIZE, make_files, planned
from tests.support.requirements import require, require_root

pytestmark = [pytest.mark.any_engine, pytest.mark.fuse]

#: Waits until the file named by $1 is there, so that a test decides when the command ends.
UNTIL = 'until test -e "$1"; do sleep 0.02; done'


@pytest.fixture
def place(places: Callable[[str], Path], fuse: None) -> Iterator[Path]:
    """A directory of stubs that only the test's command is to see without an overlay."""
    place = places("view")
    make_files(place)
    with standing("run", place):
        yield place


def run(*words: str | Path, **more: object) -> "subprocess.CompletedProcess[str]":
    """`fusehsm run --listener` to its end. Its note about mounts is left out of what it said."""
    with harness.start([*RUN, "--listener", *map(str, words)], **more) as process:
        try:
            output, complaint = process.communicate(timeout=STEP)
        except BaseException:
            process.kill()
            raise
    said = "".join(line for line in complaint.splitlines(keepends=True) if NOTE not in line)
    return subprocess.CompletedProcess(words, process.returncode, output, said)


def shell(place: Path, script: str, *words: str | Path) -> list[str]:
    """A shell with a view of the place, which is $0 of the script."""
    return [*RUN, "--listener", "--mount", str(place), "--", "sh", "-c", script, str(place), *map(str, words)]


@contextmanager
def standing_still(place: Path, script: str, tmp_path: Path) -> Iterator[None]:
    """A shell that has done its script and stays until the end of the body."""
    with Program(shell(place, f"{script}; echo ready; {UNTIL}", tmp_path / "end")) as running:
        running.wait_ready()
        yield
        (tmp_path / "end").touch()
        assert running.end() == 0


def listening(directory: Path, *places: Path, marks: tuple[tuple[str, str, str], ...] = ()) -> list[str]:
    """A listener of the first place, with a view of all of them."""
    words = listener_words(
        directory, places[0], "blocking", marks=marks or (("add|mount", "PRE_ACCESS", ""),)
    )
    mounts = [word for each in places for word in ("--mount", str(each))]
    return [*RUN, "--listener", *mounts, "--", *words]


def read(accessor: Accessor, path: Path, size: int, offset: int = 0) -> object:
    """What a process outside of the view reads there."""
    return accessor.call("pread_path", str(path), size, offset, timeout=STEP)


def end(running: Program, *places: Path) -> None:
    """End it as a service manager does, and wait until its mounts are gone."""
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(STEP)
    assert not any(map(mounts_at, places))


# What the command sees


def test_the_command_sees_the_files_themselves(place: Path) -> None:
    """The same device, inode and file system as before the overlay, while all others see the overlay."""
    wanted = os.stat(place / "stub")
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", str(place)], text=True)
    done = run("--mount", place, "--", "sh", "-c", 'stat -c "%d %i" "$0/stub"; stat -f -c %T "$0"', place)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{wanted.st_dev} {wanted.st_ino}\n{kind}"
    assert mounts_at(place) == 0


def test_all_others_see_the_overlay(place: Path, accessor: Accessor, tmp_path: Path) -> None:
    with standing_still(place, "true", tmp_path):
        assert mounts_at(place) == 1
        assert read(accessor, place / "stub", 10) == bytes(10)
    assert mounts_at(place) == 0


def test_its_own_accesses_make_no_events(place: Path, session_directory: Path) -> None:
    """A process of its namespace reads a marked file while the listener gives no answer."""
    require_root()
    with Program(listening(session_directory, place)) as listener:
        listener.wait_ready()
        pid = listener.command_pid
        os.kill(pid, signal.SIGSTOP)
        try:
            # With its root directory, which in a chroot is not the namespace's.
            enter = ["nsenter", f"--target={pid}", "--mount", "--root"]
            inside = [*enter, "head", "-c", "10", str(place / "stub")]
            assert subprocess.run(inside, capture_output=True, timeout=STEP, check=True).stdout == bytes(10)
        finally:
            os.kill(pid, signal.SIGCONT)


def test_the_working_directory_may_be_inside(place: Path) -> None:
    (place / "below").mkdir(exist_ok=True)
    done = run(
        "--mount", place, "--", "sh", "-c", "stat -f -c %T .; pwd; touch made", cwd=str(place / "below")
    )
    kind = subprocess.check_output(["stat", "-f", "-c", "%T", str(place)], text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{kind}{place}/below\n", "")
    assert (place / "below" / "made").exists()


def test_what_it_makes_is_there_for_others(place: Path, accessor: Accessor, tmp_path: Path) -> None:
    """Within the second for which the kernel may keep names of a shared backing."""
    with standing_still(place, 'echo made > "$0/new"', tmp_path):
        assert read(accessor, place / "new", 10) == b"made\n"


# Marks and fills


@pytest.mark.parametrize(
    "mark",
    [
        ("add", "PRE_ACCESS", "stub"),
        ("add", "PRE_ACCESS|CHILD", ""),
        ("add|mount", "PRE_ACCESS", "stub"),
        ("add|filesystem", "PRE_ACCESS", ""),
    ],
    ids=["file", "children", "mount", "filesystem"],
)
def test_a_mark_on_what_it_sees_is_one_on_the_overlay(
    mark: tuple[str, str, str], place: Path, session_directory: Path, accessor: Accessor
) -> None:
    """Also for a file that no process has looked up through the overlay."""
    with Program(listening(session_directory, place, marks=(mark,))) as listener:
        listener.wait_ready()
        assert read(accessor, place / "stub", PAGE) == planned(0, PAGE)


def test_in_a_chroot(place: Path, session_directory: Path, tmp_path: Path) -> None:
    """Seen from outside of its namespace, the files of a listener in a chroot have longer paths than it knows."""
    require_root()
    enter = 'mount --rbind / "$0" && exec chroot "$0" "$@"'
    listener = listening(session_directory, place, marks=(("add", "PRE_ACCESS", "stub"),))
    with Program(["unshare", "--mount", "sh", "-c", enter, str(tmp_path), *listener]) as running:
        running.wait_ready()
        inside = ["nsenter", f"--target={running.process.pid}", "--mount", "--root", "head", "-c", str(PAGE)]
        done = subprocess.run([*inside, place / "stub"], capture_output=True, timeout=STEP, check=True)
        assert done.stdout == planned(0, PAGE)


def test_a_mark_on_a_file_with_the_number_of_an_earlier_one(
    place: Path, session_directory: Path, accessor: Accessor
) -> None:
    """The overlay may still know the earlier file by that number."""
    file, go = place / "again", place / "go"
    script = f'echo early; until test -e "{go}"; do sleep 0.02; done; rm "{file}"; truncate -s 4096 "{file}"; exec "$@"'
    words = listener_words(session_directory, place, "blocking", marks=(("add", "PRE_ACCESS", "again"),))
    for _ in range(5):  # an inode number need not be used again at once
        file.write_bytes(bytes(PAGE))
        with Program(shell(place, script, *words)) as listener:
            listener.output.wait_for(lambda line: line == "early", STEP)
            assert read(accessor, file, 10) == bytes(10)
            go.touch()
            listener.wait_ready()
            assert read(accessor, file, PAGE) == planned(0, PAGE)
            end(listener, place)
        go.unlink()


def test_a_file_system_mark_hears_no_other_directory(
    place: Path, places: Callable[[str], Path], session_directory: Path, accessor: Accessor
) -> None:
    """The divergence: on the kernel the whole file system is heard."""
    other = places("other")
    (other / "stub").write_bytes(bytes(PAGE))
    with Program(
        listening(session_directory, place, marks=(("add|filesystem", "PRE_ACCESS", ""),))
    ) as listener:
        listener.wait_ready()
        assert read(accessor, other / "stub", PAGE) == bytes(PAGE)
        assert read(accessor, place / "stub", PAGE) == planned(0, PAGE)


def test_two_directories_and_one_within_the_other(
    place: Path, session_directory: Path, accessor: Accessor
) -> None:
    """In any order: each is heard by the mark on it, and what lies in both by the inner one."""
    inner = place / "inner"
    inner.mkdir()
    make_files(inner)
    for first, second in ((place, inner), (inner, place)):
        with Program(listening(session_directory, first, second)) as listener:
            listener.wait_ready()
            assert mounts_at(place) == 1
            assert mounts_at(inner) == 1
            assert read(accessor, first / "stub", PAGE) == planned(0, PAGE)
            end(listener, place, inner)
        for stub in (place / "stub", inner / "stub"):
            os.truncate(stub, 0)
            os.truncate(stub, SIZE)


def test_mounts_below_are_served_and_filled(
    place: Path, places: Callable[[str], Path], session_directory: Path, accessor: Accessor
) -> None:
    """Others see the mount below through the overlay, the listener sees it itself."""
    require_root()
    elsewhere = places("elsewhere")
    make_files(elsewhere)
    below = place / "mounted"
    below.mkdir()
    mount(bytes(elsewhere), bytes(below), None, MS_BIND)
    try:
        with Program(listening(session_directory, place)) as listener:
            listener.wait_ready()
            assert read(accessor, below / "stub", PAGE) == planned(0, PAGE)
            assert (elsewhere / "stub").read_bytes()[:PAGE] == planned(0, PAGE)
            end(listener, place)
    finally:
        umount2(bytes(below), MNT_DETACH)


def test_a_marked_bind_mount_of_the_command_is_there_for_others(
    place: Path, session_directory: Path, accessor: Accessor
) -> None:
    """As a listener does that gives its users a way of their own. The mark hears that way and no other."""
    require_root()
    (place / "way").mkdir()
    words = listener_words(session_directory, place, "blocking", marks=(("add|mount", "PRE_ACCESS", "way"),))
    script = 'mount --bind "$0/below" "$0/way" && exec "$@"'
    with Program(shell(place, script, *words)) as listener:
        listener.wait_ready()
        assert mounts_at(place / "way") == 1
        assert read(accessor, place / "below" / "inner", 10) == bytes(10)
        assert read(accessor, place / "way" / "inner", 10) == planned(0, 10)
        end(listener, place, place / "way")


def test_other_mounts_of_the_command_stay_its_own(place: Path, accessor: Accessor, tmp_path: Path) -> None:
    require_root()
    (place / "way").mkdir()
    with standing_still(place, 'mount -t tmpfs none "$0/way" && touch "$0/way/file"', tmp_path):
        assert accessor.call(lambda path: os.listdir(path), str(place / "way"), timeout=STEP) == []


# Namespaces, users, refusals


def test_where_mounts_are_shared(place: Path, tmp_path: Path) -> None:
    """As systemd makes them: what the command mounts elsewhere reaches the others, what its view consists of does not."""
    require_root()
    watched, elsewhere = place / "below", place / "elsewhere"
    elsewhere.mkdir()
    inside = f'mount -t tmpfs none "{elsewhere}" && echo kept > "{elsewhere}/file"; {UNTIL}; stat -f -c %T "{watched}"'
    command = shell(watched, inside, tmp_path / "end")
    outside = f"""
        {shlex.join(command)} &
        until test -e "{elsewhere}/file"; do sleep 0.05; done
        stat -f -c %T "{watched}"
        grep -c " {watched} " /proc/self/mountinfo
        touch "{tmp_path}/end"
        wait
        umount "{elsewhere}"
        grep -c " {watched} " /proc/self/mountinfo
    """
    shared = ["unshare", "--mount", "--propagation", "shared", "sh", "-c", outside]
    with Program(shared) as running:
        running.process.wait(3 * STEP)
        kind = subprocess.check_output(["stat", "-f", "-c", "%T", str(place)], text=True).strip()
        assert running.lines[0] in ("fuse", "fuseblk")  # as the version of stat(1) calls it
        assert running.lines[1:] == ["1", kind, "0"]
        assert running.complaints.wait_for_end(STEP) == []
    assert mounts_at(watched) == 0


def test_an_ordinary_user(places: Callable[[str], Path], session_directory: Path, accessor: Accessor) -> None:
    """In a user namespace of its own, where its own id stays what it is."""
    require_root()
    probe = subprocess.run(["unshare", "--user", "true"], user=NOBODY, stderr=subprocess.DEVNULL, check=False)
    require(
        probe.returncode == 0, "needs user namespaces of ordinary users, which the kernel refuses in a chroot"
    )
    place = places("user")
    make_files(place)
    for path in (place, *place.rglob("*")):
        os.chown(path, NOBODY, NOBODY)
    words = listener_words(session_directory, place, "blocking", marks=(("add", "PRE_ACCESS", "stub"),))
    program, environment, who = harness.command_of(NOBODY)
    command = [
        *program,
        "run",
        "--listener",
        "--mount",
        str(place),
        "--",
        "sh",
        "-c",
        'id -u; exec "$@"',
        "-",
        *words,
    ]
    with (
        fuse_device_for_everybody(),
        standing("run", place),
        Program(command, env=harness.environment(**environment), **who) as listener,
    ):
        listener.wait_ready()
        assert listener.output.lines[0] == str(NOBODY)
        reader = subprocess.run(
            ["head", "-c", str(PAGE), str(place / "stub")],
            capture_output=True,
            timeout=STEP,
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            check=False,
        )
        assert reader.stdout == planned(0, PAGE)


def test_an_ordinary_user_without_namespaces(places: Callable[[str], Path]) -> None:
    """The line names the setting that forbids them."""
    require_root()
    place = places("user")
    os.chown(place, NOBODY, NOBODY)
    program, environment, who = harness.command_of(NOBODY)
    # In a namespace of its own, so that the setting is no other process's.
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    inside = ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", forbid, "-"]
    with (
        fuse_device_for_everybody(),
        harness.start(
            [*inside, *program, "run", "--listener", "--mount", str(place), "--", "true"],
            env=harness.environment(**environment),
            **who,
        ) as running,
    ):
        output, complaint = running.communicate(timeout=STEP)
    assert output == ""
    assert complaint == (
        "fusehsm: fusehsm run: --listener: ordinary users may not make user namespaces here; as root, run sysctl "
        "user.max_user_namespaces=10000, or run it as root, or leave --listener out; the kernel never allows them in a chroot\n"
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--", "true"), "--mount DIR"),
        (("--accessor", "--mount", "{place}", "--", "true"), "leave one of them out"),
    ],
    ids=["no-directory", "accessor"],
)
def test_options_that_do_not_go_together(words: tuple[str, ...], said: str, place: Path) -> None:
    done = run(*(word.format(place=place) for word in words))
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert said in line


def test_without_the_right_to_a_namespace(place: Path) -> None:
    """As in a container: one line, and nothing is mounted."""
    require_root()
    words = [*RUN, "--listener", "--mount", str(place), "--", "true"]
    done = subprocess.run(
        ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", *words],
        capture_output=True,
        text=True,
        timeout=STEP,
        env=harness.environment(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert "mount namespaces are forbidden here" in line
    assert mounts_at(place) == 0


def test_kept_mounts_go_on_with_what_the_view_showed(
    place: Path, places: Callable[[str], Path], accessor: Accessor
) -> None:
    """Mounts below the directory, too, although the command's namespace has ended."""
    require_root()
    elsewhere, below = places("elsewhere"), place / "mounted"
    (elsewhere / "file").write_bytes(b"here")
    below.mkdir()
    mount(bytes(elsewhere), bytes(below), None, MS_BIND)
    try:
        done = run("--keep", "--mount", place, "--", "true")
        assert (done.returncode, done.stderr) == (0, "")
        assert mounts_at(place) == 1
        assert read(accessor, below / "file", 10) == b"here"
        assert fusehsm("umount", place).returncode == 0
    finally:
        umount2(bytes(below), MNT_DETACH)
