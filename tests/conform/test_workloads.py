"""Every workload of `fusehsm conform`: the real kernel as it was recorded, and the emulator as the real kernel."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from fusehsm.conform import command, installed
from fusehsm.conform.accessor import Zygote
from fusehsm.conform.divergences import ENGINES, applying, limits
from fusehsm.conform.executable import SIZE, image, write_executable
from fusehsm.conform.perform import Comparison, Performer, Verdict
from fusehsm.conform.scene import Scene
from fusehsm.conform.sides import NoKernelEvents, Side, emulated_side, kernel_side
from fusehsm.conform.stream import (
    SHIPPED,
    UNFINISHED,
    Did,
    Heard,
    Recording,
    Stream,
    arranged,
    ended_early,
    from_json,
    lines,
    shown,
    to_json,
)
from fusehsm.conform.workload import Workload, one_call
from fusehsm.conform.workloads import WORKLOADS, chosen
from tests.support.harness import NOBODY, PATIENCE, environment, fuse_device_for_everybody, fusehsm
from tests.support.requirements import require

UNDER_RUN = chosen(["listener"])
ON_A_MOUNT = [workload for workload in WORKLOADS if workload not in UNDER_RUN]


def key(workload: Workload) -> str:
    return workload.key


def require_programs(workload: Workload) -> None:
    missing = installed.missing(workload.programs)
    require(not missing, f"needs {missing}")


def of_other_programs(workload: Workload, recording: Recording) -> bool:
    """Whether this machine has other versions of the workload's programs than the recording."""
    return workload.key in recording.programs and bool(
        installed.other(workload.programs, recording.programs[workload.key])
    )


@pytest.fixture(scope="session")
def recording() -> Recording:
    return Recording.load()


@pytest.fixture(scope="module")
def performer() -> Iterator[Performer]:
    zygote = Zygote()
    yield Performer(zygote)
    zygote.close()


@pytest.fixture(scope="module")
def real(kernel_events: Path, session_directory: Path) -> Side:
    place = kernel_events / "conform-kernel"
    place.mkdir()
    return kernel_side(place)


@pytest.fixture(scope="module")
def emulated(ext4: Path, session_directory: Path, engine: str) -> Iterator[Side]:
    place, path = ext4 / f"conform-{engine}", session_directory / f"conform-{engine}"
    with emulated_side(place, path, engine, "--events", "exact") as side:
        yield side


@pytest.mark.kernel
@pytest.mark.parametrize("workload", WORKLOADS, ids=key)
def test_the_kernel_as_recorded(
    workload: Workload, real: Side, performer: Performer, recording: Recording
) -> None:
    require_programs(workload)
    stream = performer.perform(workload, real)
    assert not ended_early(stream), lines(stream)
    if not workload.unsteady and not of_other_programs(workload, recording):
        assert lines(stream) == lines(recording.kernel[workload.key])


Compare = Callable[[Workload], None]


@pytest.fixture
def compare(
    emulated: Side, performer: Performer, recording: Recording, request: pytest.FixtureRequest
) -> Compare:
    """compare(workload) holds the emulator against the kernel.

    With the exception of known divergences, which must show: an entry of the table that is none any more has to go.
    """

    def compare(workload: Workload) -> None:
        # Tests of any engine name none; a mount has this one then.
        engine = emulated.engine if emulated.engine in ENGINES else "devfuse"
        if workload.needs is not None and performer.lacks(workload.needs, emulated.backing):
            pytest.skip(f"this kernel has no {workload.needs.name}")
        known = tuple(name for name in workload.divergences if applying(name, engine))
        require_programs(workload)
        kernel = recording.kernel[workload.key]
        is_other = of_other_programs(workload, recording)
        if workload.unsteady or is_other:
            # What was recorded once is no measure.
            workload = replace(workload, unsteady=True)
            kernel = performer.perform(workload, request.getfixturevalue("real"))
        comparison = performer.compare(
            workload,
            kernel,
            emulated,
            known,
            recording.of_emulator(engine, workload.key, limits(workload.divergences)),
        )
        wanted = Verdict.KNOWN if known else Verdict.IDENTICAL
        # With pyfuse3, whose pids are the openers', a stream may happen to be right. Another version of a program may avoid the divergence.
        excused = comparison.verdict is Verdict.IDENTICAL and (engine == "pyfuse3" or is_other)
        assert comparison.verdict is wanted or excused, "\n".join(comparison.difference())

    return compare


@pytest.mark.fuse
@pytest.mark.parametrize("workload", ON_A_MOUNT, ids=key)
def test_the_emulator_as_the_kernel(workload: Workload, compare: Compare) -> None:
    compare(workload)


@pytest.mark.fuse
@pytest.mark.root
@pytest.mark.any_engine
@pytest.mark.parametrize("workload", UNDER_RUN, ids=key)
def test_a_listener_under_fusehsm_run_as_on_the_kernel(workload: Workload, compare: Compare) -> None:
    """`fusehsm run` takes the engine that it finds best, so once is enough."""
    compare(workload)


def test_there_are_workloads_enough() -> None:
    assert len(WORKLOADS) >= 120
    assert len({workload.key for workload in WORKLOADS}) == len(WORKLOADS)


def test_the_recording_is_of_these_workloads(recording: Recording) -> None:
    assert recording.kernel.keys() == {workload.key for workload in WORKLOADS}
    assert tuple(map(int, recording.release.split(".")[:2])) >= (6, 14)
    divergent = {workload.key for workload in WORKLOADS if workload.divergences and not workload.unsteady}
    assert {name.partition(": ")[2] for name in recording.emulated} <= divergent
    using = {workload.key: workload for workload in WORKLOADS if workload.programs and not workload.unsteady}
    assert recording.programs.keys() == using.keys()
    for key, versions in recording.programs.items():
        assert len(versions) == len(using[key].programs)


# Verdicts


HEARD = Heard("group 1", "PRE_ACCESS", "accessor", "file", 0, 4096, "00", "ALLOW")
OTHER = Heard("group 1", "PRE_ACCESS", "accessor", "file", 4096, 4096, "01", "ALLOW")
DID = Did("accessor", "pread", "b''")
END = Did(UNFINISHED, "ended", "too late")


@pytest.mark.parametrize(
    ("kernel", "emulator", "divergences", "expected", "verdict"),
    [
        ([HEARD], [HEARD], (), None, Verdict.IDENTICAL),
        ([HEARD], [OTHER], (), None, Verdict.DIFFERENT),
        ([HEARD], [], (), None, Verdict.DIFFERENT),
        ([HEARD, OTHER], [OTHER, HEARD], (), None, Verdict.DIFFERENT),
        ([HEARD], [OTHER], ("pid",), None, Verdict.KNOWN),
        ([HEARD], [OTHER], ("pid",), [OTHER], Verdict.KNOWN),
        ([HEARD], [OTHER], ("pid",), [], Verdict.DIFFERENT),
        ([HEARD], [HEARD], ("pid",), [OTHER], Verdict.IDENTICAL),
        ([END], [END], (), None, Verdict.DIFFERENT),
        ([END], [END], ("pid",), None, Verdict.DIFFERENT),
        ([HEARD], [END], ("pid",), None, Verdict.DIFFERENT),
        ([HEARD], [HEARD, END], ("pid",), [HEARD, END], Verdict.DIFFERENT),
        ([END], [HEARD], ("pid",), [HEARD], Verdict.DIFFERENT),
    ],
)
def test_verdicts(
    kernel: Stream, emulator: Stream, divergences: tuple[str, ...], expected: Stream | None, verdict: Verdict
) -> None:
    workload = one_call("family", "name", "stat")
    comparison = Comparison(workload, kernel, emulator, divergences, expected)
    assert comparison.verdict is verdict
    assert bool(comparison.difference()) is (verdict is not Verdict.IDENTICAL)


@pytest.mark.parametrize(
    ("emulator", "divergences", "verdict"),
    [
        ([HEARD, DID], ("pid",), Verdict.IDENTICAL),
        ([OTHER, OTHER, DID], ("pid",), Verdict.KNOWN),
        ([OTHER, DID], (), Verdict.DIFFERENT),
        ([HEARD, Did("accessor", "pread", "EIO")], ("pid",), Verdict.DIFFERENT),
        ([HEARD, DID, DID], ("pid",), Verdict.DIFFERENT),
        ([HEARD, DID, END], ("pid",), Verdict.DIFFERENT),
    ],
)
def test_verdicts_of_what_is_never_the_same(
    emulator: Stream, divergences: tuple[str, ...], verdict: Verdict
) -> None:
    """What is heard changes; what calls do must not."""
    workload = replace(one_call("family", "name", "stat"), unsteady=True)
    assert Comparison(workload, [HEARD, DID], emulator, divergences).verdict is verdict


def test_a_second_attempt_is_shown() -> None:
    workload = one_call("family", "name", "stat")
    assert Comparison(workload, [HEARD], [HEARD], ()).first_difference() == []
    found = Comparison(workload, [HEARD], [HEARD], (), first=[OTHER]).first_difference()
    assert f"+{OTHER.line()}" in found


def test_groups_that_may_change_places_do_so_for_one_event_only() -> None:
    first, second, third = (replace(HEARD, group=f"group {number}") for number in (1, 2, 3))
    later = replace(OTHER, group="group 1")
    assert arranged([second, first, DID], ("group 1", "group 2"), at_once=False) == [first, second, DID]
    assert arranged([third, second, first], ("group 1", "group 3"), at_once=False) == [first, second, third]
    kept: Stream = [second, DID, first, later, second]
    assert arranged(kept, ("group 1", "group 2"), at_once=False) == kept
    assert arranged([second, first], (), at_once=False) == [second, first]


def test_what_happens_at_once_is_sorted_between_two_results() -> None:
    assert arranged([OTHER, HEARD, DID, OTHER, HEARD], (), at_once=True) == [HEARD, OTHER, DID, HEARD, OTHER]


def test_streams_survive_json() -> None:
    stream: Stream = [
        HEARD,
        Heard("g", "OPEN_PERM", "child 1", "x", None, None, "18", ""),
        Heard("g", "OPEN_PERM", "child 1", "x", None, None, "20", "ALLOW", pidfd="child 1"),
        Did("a", "b", "EIO"),
    ]
    assert from_json(json.loads(json.dumps(to_json(stream)))) == stream


def test_what_calls_return_is_shown_the_same_every_time() -> None:
    assert shown(b"short") == "b'short'"
    assert shown(bytes(100)).startswith("100 bytes ")
    assert shown((1, [bytes(100), "x"])) == f"(1, ({shown(bytes(100))}, 'x'))"
    assert shown(bytes(100)) != shown(bytes(99) + b"x")


def test_a_damaged_recording_says_so(tmp_path: Path) -> None:
    (tmp_path / "kernel.json").write_text('{"kernel": 7}')
    with pytest.raises(ValueError, match="not a recording"):
        Recording.load(tmp_path / "kernel.json")


@pytest.mark.kernel
def test_a_workload_that_never_ends_is_given_up(
    real: Side, performer: Performer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(performer, "patience", 0.5)

    async def script(scene: Scene) -> None:
        path = scene.file()
        await scene.listen(scene.everywhere(), lazy=True)
        await scene.call("pread_path", path, 100, 0)

    (end,) = performer.perform(Workload("family", "endless", script), real)
    assert end == Did(UNFINISHED, "ended", "too late")


@pytest.mark.kernel
def test_a_workload_that_fails_says_how(real: Side, performer: Performer) -> None:
    async def script(scene: Scene) -> None:
        raise LookupError("what is wrong")

    stream = performer.perform(Workload("family", "broken", script), real)
    assert lines(stream) == ["the workload: ended = LookupError: what is wrong"]


# Programs of this machine


USING = one_call("family", "using", "pread_path", 100, 0)


def without_kernel(
    workload: Workload, monkeypatch: pytest.MonkeyPatch, *versions: str, stream: Stream | None = None
) -> None:
    """Let `fusehsm conform` be about this workload only, with a recording of it in the kernel's place."""

    def no_kernel(directory: Path) -> Side:
        raise NoKernelEvents("not wanted here")

    recording = Recording.load()
    recording.kernel[workload.key] = stream or []
    if versions:
        recording.programs[workload.key] = versions
    monkeypatch.setattr(command, "chosen", lambda patterns: [workload])
    monkeypatch.setattr(command, "kernel_side", no_kernel)
    monkeypatch.setattr(Recording, "load", lambda: recording)


@pytest.mark.fuse
@pytest.mark.any_engine
def test_without_its_programs_a_workload_is_not_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = replace(USING, programs=("cat", "no-such-program"))
    without_kernel(workload, monkeypatch)
    assert command.conform([]) == 0
    row, total = capsys.readouterr().out.splitlines()
    assert row.split(maxsplit=1) == ["family/using", "not tried: no-such-program is not installed"]
    assert total.endswith(": 0 identical, 0 known divergence, 0 different, 1 not tried")
    assert command.conform([], as_json=True) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["verdict"] == "not tried"
    assert value["not_tried"] == "no-such-program is not installed"
    assert value["difference"] == value["emulated"] == []


@pytest.mark.fuse
@pytest.mark.any_engine
def test_another_version_of_a_program_is_no_difference(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the kernel's events, that is: only there a recording takes the kernel's place."""
    workload = replace(USING, programs=("cat",))
    without_kernel(workload, monkeypatch, "cat: cat (GNU coreutils) 0.1")
    assert command.conform([]) == 0
    row = capsys.readouterr().out.splitlines()[0]
    assert row.split(maxsplit=1)[1] == (
        f"not tried: cat is “{installed.version('cat')}” here and “cat: cat (GNU coreutils) 0.1” in the recording"
    )


@pytest.mark.fuse
@pytest.mark.any_engine
def test_the_recorded_program_is_a_measure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = replace(USING, programs=("cat",))
    without_kernel(workload, monkeypatch, installed.version("cat"))
    assert command.conform([]) == 1
    assert capsys.readouterr().out.split()[:2] == ["family/using", "different"]


@pytest.mark.fuse
@pytest.mark.any_engine
def test_another_program_that_does_the_same_is_identical(
    emulated: Side, performer: Performer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload = replace(USING, programs=("cat",))
    stream = performer.perform(workload, emulated)
    without_kernel(workload, monkeypatch, "cat: cat (GNU coreutils) 0.1", stream=stream)
    assert command.conform([]) == 0
    assert capsys.readouterr().out.split()[:2] == ["family/using", "identical"]


@pytest.mark.fuse
@pytest.mark.any_engine
def test_a_program_is_hidden_by_the_path(tmp_path: Path) -> None:
    for tool in ("mkfs.ext4", "mount", "umount", "fusermount3"):
        found = shutil.which(tool) or shutil.which(tool, path="/usr/sbin:/sbin")
        if found is not None:
            (tmp_path / tool).symlink_to(found)
    done = fusehsm("conform", "programs/wc", env=environment(PATH=str(tmp_path)))
    assert done.returncode == 0, done.stdout + done.stderr
    row, _ = done.stdout.splitlines()
    assert row.split(maxsplit=1) == ["programs/wc", "not tried: wc is not installed"]


def test_a_program_is_known_by_its_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, script in {
        "fusehsm-says": "echo; echo $(basename $0) 3.1",
        "fusehsm-fails": "echo 3; exit 1",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "fusehsm-link").symlink_to("fusehsm-says")
    size = (tmp_path / "fusehsm-fails").stat().st_size
    assert installed.version("fusehsm-says") == "fusehsm-says: fusehsm-says 3.1"
    assert installed.version("fusehsm-link") == "fusehsm-says: fusehsm-link 3.1"
    assert installed.version("fusehsm-fails") == f"fusehsm-fails: {size} bytes"
    assert installed.version("fusehsm-missing") == ""
    assert installed.missing(["fusehsm-says", "/etc/passwd"]) == ""
    assert installed.missing(["fusehsm-says", "/no/such/file", "fusehsm-missing"]) == "/no/such/file"


def test_the_own_executable_runs(tmp_path: Path) -> None:
    program = tmp_path / "program"
    for code in (0, 1, 77):
        write_executable(program, code)
        assert subprocess.run([program], timeout=PATIENCE, check=False).returncode == code
        assert program.stat().st_size == SIZE
    write_executable(program, None)
    with subprocess.Popen([program]) as process, pytest.raises(subprocess.TimeoutExpired):
        try:
            process.wait(0.2)
        finally:
            process.kill()


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_own_executable_has_one_size_everywhere(machine: str) -> None:
    assert {len(image(machine, code)) for code in (0, 255, None)} == {SIZE}


# The command


def test_workloads_are_chosen_by_family_and_pattern() -> None:
    assert {workload.family for workload in chosen(["reading"])} == {"reading"}
    assert [workload.key for workload in chosen(["reading/pread-1@*"])] == ["reading/pread-1@4095"]
    assert chosen([]) == list(WORKLOADS)
    with pytest.raises(ValueError, match="no workload is called nonsense"):
        chosen(["reading", "nonsense"])


@pytest.mark.fuse
@pytest.mark.kernel
@pytest.mark.any_engine
def test_the_command() -> None:
    done = fusehsm("conform", "reading/pread-*", "reading/nothing")
    assert done.returncode == 0, done.stdout + done.stderr
    *rows, total = done.stdout.splitlines()
    assert rows[0].split() == ["reading/pread-100@10", "identical"]
    assert rows[-1].split(maxsplit=1) == ["reading/nothing", "known divergence: empty reads and writes"]
    assert total == (
        f"{len(rows)} workloads, compared with this kernel: {len(rows) - 1} identical, 1 known divergence, 0 different"
    )


@pytest.mark.fuse
@pytest.mark.kernel
@pytest.mark.any_engine
def test_the_command_in_json() -> None:
    done = fusehsm("conform", "--json", "writing/append")
    assert done.returncode == 0
    value = json.loads(done.stdout)
    assert value["workload"] == "writing/append"
    assert value["verdict"] == "identical"
    assert value["kernel"] == value["emulated"]
    assert [entry["names"] for entry in value["kernel"] if "names" in entry] == ["OPEN_PERM", "PRE_ACCESS"]


def test_the_names_of_all_workloads() -> None:
    done = fusehsm("conform", "--list")
    assert done.stdout.split() == [workload.key for workload in WORKLOADS]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            ["nonsense"],
            "fusehsm: no workload is called nonsense; `fusehsm conform --list` shows their names\n",
        ),
        (["--engine", "steam"], "fusehsm: no engine is called steam; there are pyfuse3, devfuse, auto\n"),
    ],
)
def test_bad_usage(arguments: list[str], complaint: str) -> None:
    done = fusehsm("conform", *arguments)
    assert (done.returncode, done.stderr) == (2, complaint)


@pytest.mark.fuse
@pytest.mark.kernel
@pytest.mark.any_engine
def test_a_difference_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A difference that no divergence lists: the workload of a listed one, with its divergence taken away."""
    (nothing,) = chosen(["reading/nothing"])
    monkeypatch.setattr(
        command, "chosen", lambda patterns: [Workload(nothing.family, nothing.name, nothing.script)]
    )
    assert command.conform([], engine="auto", as_json=False, record=False) == 1
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split(maxsplit=1) == ["reading/nothing", "different  (at both attempts)"]
    assert any(line.lstrip().startswith("-group 1 hears PRE_ACCESS 0+0 of file") for line in printed)


@pytest.mark.fuse
@pytest.mark.any_engine
def test_without_such_a_kernel_the_recording_counts() -> None:
    """An ordinary user cannot listen on the real kernel."""
    if os.geteuid() == 0:
        with fuse_device_for_everybody():
            done = fusehsm("conform", "reading", "writing/append*", uid=NOBODY)
    else:
        done = fusehsm("conform", "reading", "writing/append*")
    assert done.returncode == 0, done.stdout + done.stderr
    recording = Recording.load(SHIPPED)
    assert f"comparing with what Linux {recording.release} did on {recording.date}" in done.stderr
    assert f"compared with Linux {recording.release}" in done.stdout.splitlines()[-1]


@pytest.mark.fuse
@pytest.mark.any_engine
def test_an_ordinary_user_cannot_record() -> None:
    uid = NOBODY if os.geteuid() == 0 else None
    done = fusehsm("conform", "--record", "reading/pread-100@10", uid=uid)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
