"""`fusehsm validate` of files at rest: what it finds, and how it says so."""

import functools
import json
import os
import shutil
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fusehsm.linux.syscalls import PAGE_SIZE
from fusehsm.tier.stores.local import LocalStore
from fusehsm.tier.validate.command import Crew, ValidateOptions, validate
from fusehsm.tier.validate.plan import BY, SMALL, WINDOW, plan, windows
from fusehsm.tier.validate.report import Report, progress_line
from tests.conftest import MakeMount
from tests.support import harness
from tests.support.harness import NOBODY, fusehsm
from tests.support.tier.servers import Served
from tests.support.tier.terminal import on_a_terminal
from tests.support.tier.trees import content_of, make_small_tree

pytestmark = pytest.mark.any_engine

LARGE = 5_001_217  # bytes: more than a window, and a last page of one byte


@functools.cache
def large_content() -> bytes:
    return content_of(LARGE)


@pytest.fixture
def copy(source: Path, places: Callable[[str], Path]) -> Path:
    """A complete copy of `source`, which gets a large file, too."""
    (source / "large").write_bytes(large_content())
    there = places("copies") / "copy"
    subprocess.run(["cp", "-a", "--sparse=always", source, there], check=True)
    return there


ReportOf = Callable[..., Any]


@pytest.fixture
def report_of(capfd: pytest.CaptureFixture[str]) -> ReportOf:
    """report_of(store, destination, ...) is the JSON report; the rest are options."""

    def run(store: object, destination: Path, **options: Any) -> Any:
        code = validate(ValidateOptions(str(store), str(destination), json=True, **options))
        output, complaint = capfd.readouterr()
        report = json.loads(output)
        assert (code, complaint) == (0 if report["valid"] else 1, "")
        return report

    return run


# What agrees


def test_a_complete_tree(source: Path, copy: Path) -> None:
    done = fusehsm("validate", source, copy, "--seed", "7")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{copy} agrees with the store; 8 files, ")
    assert done.stdout.endswith("; --seed 7\n")


def test_special_files_have_no_content(source: Path, copy: Path, report_of: ReportOf) -> None:
    os.mkfifo(source / "fifo")
    os.mkfifo(source / "another")
    os.mkfifo(copy / "another")
    assert report_of(source, copy)["valid"]


def test_from_a_web_server(nginx: Served, places: Callable[[str], Path], report_of: ReportOf) -> None:
    there = nginx.place(f"validate-{os.urandom(4).hex()}")
    make_small_tree(there.directory)
    (there.directory / "large").write_bytes(large_content())
    copy = places("copies") / "copy"
    shutil.copytree(there.directory, copy)
    report = report_of(there.url, copy)
    assert (report["valid"], report["files"]) == (True, 6)
    with open(copy / "large", "r+b") as file:
        file.seek(LARGE - 1)
        file.write(b"\xff")
    assert {found["path"] for found in report_of(there.url, copy)["differences"]} == {"large"}


# What differs


def test_one_byte_in_the_last_page(source: Path, copy: Path, report_of: ReportOf) -> None:
    with open(copy / "large", "r+b") as file:
        file.seek(LARGE - 1)
        file.write(b"\xff")
    report = report_of(source, copy)
    places = {(found["path"], found["offset"], found["zeros"]) for found in report["differences"]}
    assert places == {("large", LARGE - 1, False)}
    kinds = {found["kind"] for found in report["differences"]}
    assert {"pread", "mmap"} < kinds
    assert any("after" in kind for kind in kinds)
    assert any("before" in kind for kind in kinds)
    done = fusehsm("validate", source, copy, "--by", "mmap")
    assert done.returncode == 1
    assert f"{copy}/large: mmap: other bytes than the store, from byte {LARGE - 1:,}" in done.stderr
    assert done.stdout.startswith(f"{copy} differs: 1 with other bytes; 8 files, ")


def test_a_hole_is_told_as_zeros(source: Path, copy: Path, report_of: ReportOf) -> None:
    (copy / "a file").unlink()
    with open(copy / "a file", "wb") as file:
        file.seek(PAGE_SIZE)
        file.write(content_of(100_000)[PAGE_SIZE:])
    report = report_of(source, copy)
    assert {(found["path"], found["zeros"]) for found in report["differences"]} == {("a file", True)}
    assert min(found["offset"] for found in report["differences"]) == 0


def test_what_lies_beyond_the_end_of_a_mapping(source: Path, copy: Path, report_of: ReportOf) -> None:
    """Longer files have another size, so only a mapping can show bytes there; they are zeros."""
    report = report_of(source, copy, by=("mmap",), reads=0)
    # First and last byte, and across the end, of which a small file's last page has more than the file.
    assert report["valid"]
    assert report["bytes"] > 3 * report["files"]


def test_other_trees(source: Path, copy: Path, report_of: ReportOf) -> None:
    (copy / "a file").unlink()
    (copy / "mine").write_bytes(b"mine")
    (copy / "empty").write_bytes(b"not any more")
    (copy / "link").unlink()
    (copy / "link").symlink_to("elsewhere")
    shutil.rmtree(copy / "hollow")
    (copy / "hollow").symlink_to(source / "sub")
    report = report_of(source, copy)
    assert report["only_in_store"] == ["a file"]
    assert report["only_in_destination"] == ["mine"]
    assert report["unlike"] == [
        {"path": "empty", "what": "size", "store": 0, "destination": 12},
        {"path": "hollow", "what": "type", "store": "directory", "destination": "symbolic link"},
        {"path": "link", "what": "target", "store": "../out/of/here", "destination": "elsewhere"},
    ]
    done = fusehsm("validate", source, copy)
    assert f"{copy}/empty: has another size: 12, in the store 0" in done.stderr
    wanted = "differs: 3 of another type, size or target, 1 only in the store, 1 not in the store; "
    assert wanted in done.stdout


def test_names_of_any_kind(source: Path, copy: Path, report_of: ReportOf) -> None:
    name = os.fsdecode(b"a\nb\xff\x1b[31m")
    for place, content in ((source, b"x"), (copy, b"y")):
        (place / name).write_bytes(content)
    assert {found["path"] for found in report_of(source, copy)["differences"]} == {name}
    (line,) = fusehsm("validate", source, copy, "--by", "pread", "--reads", "0").stderr.splitlines()
    beginning = f"fusehsm: {copy}/a\\nb\\xff\\x1b[31m: pread: other bytes than the store, from byte 0"
    assert line.startswith(beginning)


def test_names_that_lead_elsewhere(
    tmp_path: Path, places: Callable[[str], Path], report_of: ReportOf
) -> None:
    here = places("copy")
    (here / "good").write_bytes(b"good")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("../outside", "good"):
            archive.writestr(name, b"good")
    report = report_of(tmp_path / "x.zip", here)
    assert report["files"] == 1
    assert all("outside" in failure["path"] for failure in report["errors"])
    assert report["differences"] == report["unlike"] == []


def test_content_that_the_store_cannot_give(
    tmp_path: Path, places: Callable[[str], Path], report_of: ReportOf
) -> None:
    here = places("copy")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("bad", "good"):
            archive.writestr(name, name.encode() * 1000)
            (here / name).write_bytes(name.encode() * 1000)
    packed = bytearray((tmp_path / "x.zip").read_bytes())
    packed[packed.index(b"badbad") + 10] ^= 1
    (tmp_path / "x.zip").write_bytes(packed)
    report = report_of(tmp_path / "x.zip", here)
    assert [(failure["path"], failure["kind"]) for failure in report["errors"]] == [("bad", "store")]
    assert report["files"] == 2


@pytest.mark.root
def test_a_directory_that_cannot_be_listed(source: Path, copy: Path) -> None:
    """What it holds is not said to be missing."""
    for place in (copy.parent, copy, source):
        place.chmod(0o755)
    shutil.rmtree(copy / "hollow")
    (copy / "hollow").mkdir()
    for path in [*source.rglob("*"), *copy.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)
    (copy / "sub").chmod(0o444)  # its names can be read, what they are cannot be looked up
    done = fusehsm("validate", source, copy, "--json", uid=NOBODY)
    report = json.loads(done.stdout)
    assert (done.returncode, report["only_in_store"], report["only_in_destination"]) == (1, [], [])
    assert {(failure["kind"], failure["error"]) for failure in report["errors"]} == {("list", "EACCES")}
    (copy / "sub").chmod(0)
    report = json.loads(fusehsm("validate", source, copy, "--json", uid=NOBODY).stdout)
    assert [failure["path"] for failure in report["errors"]] == ["sub"]
    assert (report["only_in_store"], report["only_in_destination"]) == ([], [])


@pytest.mark.parametrize("how", ["changed", "removed"])
def test_files_that_change_in_the_store_meanwhile(source: Path, copy: Path, how: str) -> None:
    lines: list[tuple[str, str]] = []
    report = Report(lambda path, what: lines.append((path, what)), 60.0)
    root_fd = os.open(copy, os.O_PATH)
    with LocalStore(str(source)) as store:
        entries = {entry.path: entry for entry in store.tree()}
        if how == "changed":
            (source / "large").write_bytes(b"another")
        else:
            (source / "large").unlink()
        crew = Crew(store, root_fd, report, ValidateOptions(str(source), str(copy), jobs=2), 1)
        for name in ("a file", "large"):
            assert crew.take(entries[name])
        while not crew.is_done():
            pass
        crew.close()
    os.close(root_fd)
    assert lines == [("large", "has changed in the store meanwhile; validate again")]
    assert (report.files, report.problems, report.changed_in_store) == (2, 1, ["large"])


# The seed, and which ranges it makes


def test_the_seed_repeats_the_reads(source: Path, copy: Path, report_of: ReportOf) -> None:
    (copy / "large").write_bytes(content_of(LARGE, 2))
    keys = ("reads", "bytes", "differences")
    first = report_of(source, copy)
    again = report_of(source, copy, seed=first["seed"], jobs=1)
    assert [again[key] for key in keys] == [first[key] for key in keys]
    other = report_of(source, copy, seed=first["seed"] + 1)
    assert other["bytes"] != first["bytes"]


@pytest.mark.parametrize("size", [1, 10, PAGE_SIZE, PAGE_SIZE + 1, SMALL, SMALL + 1, LARGE, 1 << 40])
def test_which_ranges_are_read(size: int) -> None:
    for seed in range(20):
        reads = plan("a\udcff", size, seed=seed, reads=8, by=BY)
        for way in BY:
            ranges = {(read.offset, read.length) for read in reads if read.by == way}
            assert ranges >= {(0, 1), (size - 1, 1)}
            assert any(offset + length > size for offset, length in ranges)
            assert ((0, size) in ranges) or size > SMALL
            assert all(0 <= offset < size and length > 0 for offset, length in ranges)
        found = windows(reads, size)
        assert sorted((r for w in found for r in w.reads), key=repr) == sorted(reads, key=repr)
        for window in found:
            assert 0 < window.length <= WINDOW
            for read in window.reads:
                assert window.offset <= read.offset
                assert min(read.offset + read.length, size) <= window.offset + window.length
    first_ways = {plan("x", size, seed=seed, reads=8, by=BY)[0].steps for seed in range(60)}
    assert len(first_ways) == 4


def test_empty_files_are_only_read() -> None:
    assert [read.by for read in plan("x", 0, seed=1, reads=8, by=BY)] == ["pread"]
    assert plan("x", 0, seed=1, reads=8, by=("mmap",)) == []


# What it prints


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["none", "there"], 1, "none: No such file or directory"),
        (["store", "none"], 1, "none: No such file or directory"),
        (["store", "file"], 1, "file: Not a directory"),
        (["store", "there", "--by", "read"], 2, "--by read: choose among pread, mmap, both"),
        (["store", "there", "--timeout", "0"], 2, "--timeout 0: give a number of seconds, more than 0"),
        (["store", "there", "--jobs", "0"], 2, None),
        (["store"], 2, "Missing argument 'DST'; see fusehsm validate --help"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: list[str], code: int, line: str | None) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    done = fusehsm("validate", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    (said,) = done.stderr.splitlines()
    assert line is None or said == f"fusehsm: {line}"


def test_progress_on_a_terminal(source: Path, copy: Path) -> None:
    shown, output = on_a_terminal([*harness.COMMAND, "validate", str(source), str(copy), "--reads", "300"])
    assert b"reads (" in shown
    assert " agrees with the store; 8 files, " in output


def test_how_progress_reads() -> None:
    assert progress_line(1234567, 10**12, 0, 10) == "1,234,567 reads (123,457 a second), 1.0 TB"
    assert progress_line(1, 5, 2, 0) == "1 reads (1,000 a second), 5 B, 2 problems"


@pytest.mark.fuse
def test_a_directory_that_is_never_answered_for(places: Callable[[str], Path], make_mount: MakeMount) -> None:
    """Opening it makes an event in patch-v2, which is held while there is no listener."""
    store = places("store")
    (store / "file").write_bytes(b"content")
    mount = make_mount("--abi", "patch-v2", "--unattended", "hold", "--allow-other")
    started = time.monotonic()
    done = harness.fusehsm("validate", "--timeout", "1", store, mount.path)
    assert (done.returncode, time.monotonic() - started < harness.PATIENCE / 2) == (1, True)
    assert "no answer within 1 s when its directories were listed" in done.stderr
