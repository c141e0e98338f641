"""What `fusehsm conform` makes of trouble: an emulator that dies or hangs, signals, strangers, workloads that come to nothing."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from fusehsm.conform import command
from fusehsm.conform.accessor import Zygote
from fusehsm.conform.perform import Comparison, Performer
from fusehsm.conform.scene import Scene
from fusehsm.conform.sides import Emulator, NoKernelEvents, Side, emulated_side, kernel_side
from fusehsm.conform.stream import UNFINISHED, Did, Heard, Recording, Stream, lines
from fusehsm.conform.workload import Workload, one_call
from fusehsm.conform.workloads import WORKLOADS, chosen
from fusehsm.daemon.child import ForegroundMount
from fusehsm.linux import mountinfo
from tests.support.harness import COMMAND, PATIENCE, environment, start

HEARD = Heard("group 1", "PRE_ACCESS", "accessor", "file", 0, 4096, "00", "ALLOW")
END = Did(UNFINISHED, "ended", "too late")


@pytest.fixture(scope="module")
def performer() -> Iterator[Performer]:
    zygote = Zygote()
    yield Performer(zygote)
    zygote.close()


@pytest.fixture
def emulated(fuse: None, tmp_path: Path, engine: str) -> Iterator[Side]:
    """One for each test: they do it harm."""
    with emulated_side(tmp_path / "backing", tmp_path / "mount", engine, "--events", "exact") as side:
        yield side


async def read(scene: Scene) -> None:
    path = scene.file()
    await scene.listen(scene.everywhere())
    await scene.call("pread_path", path, 100, 0)


def harming(number: int) -> Workload:
    """A workload that sends the daemon that signal, and then goes on."""

    async def script(scene: Scene) -> None:
        path = scene.file()
        await scene.listen(scene.everywhere())
        assert scene.side.emulator is not None
        os.kill(scene.side.emulator.pid, number)
        await scene.call("pread_path", path, 100, 0)

    return Workload("family", "harming", script)


# An emulator that dies or hangs


@pytest.mark.fuse
@pytest.mark.any_engine
def test_a_stopped_daemon_is_told_from_a_slow_one(
    emulated: Side, performer: Performer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And killed, so that what follows fails at once."""
    monkeypatch.setattr(performer, "patience", 0.5)
    monkeypatch.setattr("fusehsm.conform.sides._ANSWERS_WITHIN", 0.5)
    stream = performer.perform(harming(signal.SIGSTOP), emulated)
    assert stream[-1] == Did(UNFINISHED, "ended", "the emulator does not answer")
    began = time.monotonic()
    stream = performer.perform(Workload("family", "next", read), emulated)
    assert time.monotonic() - began < 5
    assert stream[-1] == Did(UNFINISHED, "ended", "the emulator has ended with exit code -9")


@pytest.mark.fuse
@pytest.mark.any_engine
def test_a_daemon_that_is_killed_is_no_divergence(emulated: Side, performer: Performer) -> None:
    stream = performer.perform(harming(signal.SIGKILL), emulated)
    assert stream[-1] == Did(UNFINISHED, "ended", "the emulator has ended with exit code -9")


@pytest.mark.fuse
@pytest.mark.any_engine
def test_a_daemon_that_serves_is_no_trouble(emulated: Side, performer: Performer) -> None:
    assert emulated.emulator is not None
    assert emulated.emulator.trouble(performer.zygote) == ""


def test_what_a_daemon_said_before_it_died_is_shown(performer: Performer, tmp_path: Path) -> None:
    code = "import sys; print('one', file=sys.stderr); print('two', file=sys.stderr); sys.exit(3)"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as daemon:
        daemon.wait(PATIENCE)
        assert daemon.stderr is not None
        said: deque[str] = deque()
        reader = threading.Thread(target=said.extend, args=(map(str.strip, daemon.stderr),))
        reader.start()
        trouble = Emulator(ForegroundMount(daemon, reader), tmp_path, said).trouble(performer.zygote)
    assert trouble == "the emulator has ended with exit code 3; it said: one / two"


@pytest.mark.fuse
@pytest.mark.any_engine
def test_without_its_daemon_the_command_ends(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the row that it died in, and how many have not been compared."""
    workloads = [*chosen(["reading/nothing"]), harming(signal.SIGKILL), *chosen(["reading/pread-100@10"])]
    monkeypatch.setattr(command, "chosen", lambda patterns: workloads)
    recording = Recording.load()
    recording.kernel["family/harming"] = []
    monkeypatch.setattr(Recording, "load", lambda: recording)
    monkeypatch.setattr(command, "kernel_side", _no_kernel)
    with pytest.raises(OSError, match="has ended with exit code -9; 1 workload not compared"):
        command.conform([], engine="auto", as_json=False, record=False)
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("r", "f"))]
    assert [row[0] for row in rows] == ["reading/nothing", "family/harming"]
    assert rows[1][1] == "different"


def _no_kernel(directory: Path) -> Side:
    raise NoKernelEvents("not wanted here")


# Signals


@pytest.mark.fuse
@pytest.mark.kernel
@pytest.mark.any_engine
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
@pytest.mark.parametrize("moment", ["first mount", "second mount", "first row"])
def test_a_signal_ends_it_and_leaves_nothing(moment: str, number: signal.Signals, tmp_path: Path) -> None:
    process = start([*COMMAND, "conform"], env=environment(TMPDIR=str(tmp_path)))
    assert process.stdout is not None
    with process:
        if moment == "first row":
            process.stdout.readline()
        else:
            wait_for_mounts(tmp_path, 1 if moment == "first mount" else 2)
        process.send_signal(number)
        _, complaint = process.communicate(timeout=PATIENCE)
    assert (process.returncode, complaint) == (128 + number, f"fusehsm: ended by {number.name}\n")
    assert mounts_under(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    assert str(tmp_path) not in subprocess.run(["losetup", "-a"], capture_output=True, text=True).stdout


def mounts_under(place: Path) -> list[str]:
    return [m.mount_point for m in mountinfo.read_mounts() if m.mount_point.startswith(f"{place}/")]


def wait_for_mounts(place: Path, number: int) -> None:
    end = time.monotonic() + PATIENCE
    while len(mounts_under(place)) < number:
        assert time.monotonic() < end
        time.sleep(0.005)


# Who it is


async def read_by_a_stranger(scene: Scene) -> None:
    path = scene.file()
    await scene.listen(scene.everywhere())
    await trio.run_process(["cat", path], capture_stdout=True)


@pytest.mark.kernel
def test_a_process_that_no_accessor_has_started_is_a_stranger(
    kernel_events: Path, tmp_path: Path, performer: Performer
) -> None:
    place = kernel_events / "strangers"
    place.mkdir()
    stream = performer.perform(Workload("family", "strange", read_by_a_stranger), kernel_side(place))
    assert {entry.by for entry in stream if isinstance(entry, Heard)} == {"stranger 1"}


def test_pidfds_are_of_those_who_did_it() -> None:
    kernel = Recording.load().kernel
    inherited = [e for e in kernel["processes/inherited-with-REPORT_PIDFD"] if isinstance(e, Heard)]
    assert [(entry.by, entry.pidfd) for entry in inherited] == [
        ("accessor", "accessor"),
        ("child 1", "child 1"),
        ("child 1", "child 1"),
    ]


# Recordings


def kept(kernel: Stream, emulated: Stream, path: Path, monkeypatch: pytest.MonkeyPatch) -> Recording:
    """A recording in which those streams of a workload were to be kept, read again."""
    workload = WORKLOADS[0]
    recording = Recording(kernel={workload.key: [HEARD], "family/gone": [HEARD]})
    comparison = Comparison(workload, kernel, emulated, ("pid",))
    with monkeypatch.context() as patch:
        save = Recording.save
        patch.setattr(Recording, "save", lambda self: save(self, path))
        command._keep([comparison], recording, "devfuse")
    return Recording.load(path)


def test_a_workload_that_ended_early_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = WORKLOADS[0].key
    broken: list[tuple[Stream, Stream]] = [([END], [END]), ([HEARD, HEARD], [END]), ([END], [HEARD])]
    for kernel, emulated in broken:
        recording = kept(kernel, emulated, tmp_path / "kernel.json", monkeypatch)
        assert lines(recording.kernel[key]) == lines([HEARD])
        assert recording.emulated == {}
        assert "family/gone" not in recording.kernel
    recording = kept([HEARD, HEARD], [HEARD], tmp_path / "kernel.json", monkeypatch)
    assert lines(recording.kernel[key]) == lines([HEARD, HEARD])
    assert lines(recording.emulated[f"devfuse: {key}"]) == lines([HEARD])


def test_a_recording_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kernel.json"
    Recording(release="6.18").save(path)

    def fail(source: str, target: Path) -> None:
        raise OSError("no room")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="no room"):
        Recording(release="7.0").save(path)
    assert list(tmp_path.iterdir()) == [path]
    assert Recording.load(path).release == "6.18"


def test_names_are_as_a_shell_takes_them() -> None:
    for workload in WORKLOADS:
        assert not set(workload.key) & set(" '\"\\$`!*?[](){}<>|&;~#"), workload.key
    assert one_call("family", "somebody's name", "stat").key == "family/somebodys-name"
