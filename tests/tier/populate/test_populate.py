"""`fusehsm populate`: stubs like the store's files, nothing overwritten, nothing outside of the destination, one line for what is wrong."""

import errno
import os
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from io import BytesIO
from pathlib import Path

import pytest

from fusehsm.tier.populate.create import Outcome, Planter
from fusehsm.tier.populate.lookup import UNFINISHED
from fusehsm.tier.stores.base import Entry, Kind, StoreError
from fusehsm.tier.stubs.tree import Namespace
from tests.conftest import MakeMount
from tests.support.harness import NOBODY, fusehsm
from tests.support.requirements import require_root
from tests.support.tier.populated import plant
from tests.support.tier.trees import (
    Telling,
    changes_since,
    content_of,
    describe,
    expect_stubs,
)

pytestmark = pytest.mark.any_engine


def test_a_populated_tree_is_like_the_store_and_all_stubs(source: Path, target: Path) -> None:
    done = fusehsm("populate", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    line, _ = done.stdout.splitlines()
    assert line.startswith(
        f"populated {target}: 7 files of 1.1 TB, 3 directories, 2 symbolic links; 12 new; "
    )
    assert describe(target) == describe(source)
    expect_stubs(target)


def test_a_second_run_changes_nothing(source: Path, target: Path) -> None:
    plant(source, target)
    before = changes_since(target)
    done = fusehsm("populate", source, target)
    assert (done.returncode, done.stderr) == (0, "")
    assert "; 12 right; " in done.stdout
    assert changes_since(target) == before


def test_a_dry_run_changes_nothing(source: Path, target: Path) -> None:
    place = target / "new"
    done = fusehsm("populate", "--dry-run", source, place)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(
        f"dry run, nothing was changed in {place}: 7 files of 1.1 TB, 3 directories"
    )
    assert "; 12 new; " in done.stdout
    assert not place.exists()
    place.mkdir()
    plant(source, place)
    (source / "sub" / "new").write_bytes(b"x")
    (source / "a file").write_bytes(content_of(7))
    (place / "empty").unlink()
    (place / "empty").write_bytes(b"mine")
    before = changes_since(place)
    done = fusehsm("populate", "--dry-run", source, place)
    assert done.returncode == 1
    assert "was a stub" not in done.stderr
    assert (
        done.stderr
        == f"fusehsm: {place}/empty: is not a stub but a file with other content; remove or rename it\n"
    )
    assert "; 1 new, 1 updated, 10 right, 1 failed; " in done.stdout
    assert changes_since(place) == before


def test_what_has_changed_in_the_store_is_brought_up_to_date(source: Path, target: Path) -> None:
    assert plant(source, target)[1] == []
    (source / "a file").write_bytes(content_of(70_000, 5))  # also under its other name
    (source / "sub" / "b#?%&.bin").chmod(0o600)
    (source / "sub" / "b#?%&.bin").rename(source / "sub" / "moved")
    (source / "empty").write_bytes(b"no more")
    (source / "sub" / "another name").unlink()
    (source / "sub" / "another name").write_bytes(b"a file of its own")
    os.link(source / "sub" / "sp\u00e4t", source / "twin")
    (source / "hollow").chmod(0o2750)
    outcomes, complaints = plant(source, target)
    assert complaints == []
    changed = {path for path, outcome in outcomes.items() if outcome is not Outcome.RIGHT}
    assert changed == {"a file", "sub/moved", "empty", "sub/another name", "twin", "sub", "hollow"} - (
        {"sub"} if outcomes["sub"] is Outcome.RIGHT else set()
    )
    (target / "sub" / "b#?%&.bin").unlink()  # populate removes nothing
    os.utime(target / "sub", ns=(0, (source / "sub").stat().st_mtime_ns))
    expected = describe(source)
    found = describe(target)
    differing = {path for path in expected if expected[path] != found[path]}
    assert differing == set()
    expect_stubs(target)


CONTENT: dict[str, Callable[[Path], object]] = {
    "written": lambda path: path.write_bytes(b"mine"),
    "written in the middle": lambda path: _write_at(path, 5000),
    "truncated": lambda path: os.truncate(path, 100),
    "touched": lambda path: os.utime(path),
    "made anew as a hole": lambda path: _replace_by_hole(path),
    "copied with its mark": lambda path: _copy_over(path),
    "a directory": lambda path: _instead(path, os.mkdir),
    "a symbolic link": lambda path: _instead(path, partial(os.symlink, "a file")),
    "a FIFO": lambda path: _instead(path, os.mkfifo),
}


def _instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def _write_at(path: Path, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"mine")


def _replace_by_hole(path: Path) -> None:
    size = path.stat().st_size
    path.unlink()
    path.touch()
    os.truncate(path, size)


def _copy_over(path: Path) -> None:
    subprocess.run(["cp", "-a", "--sparse=always", path, f"{path}.copy"], check=True)
    assert any(namespace.stub in os.listxattr(f"{path}.copy") for namespace in Namespace)
    os.rename(f"{path}.copy", path)


@pytest.mark.parametrize("how", CONTENT)
def test_what_is_no_stub_is_left_alone_and_the_rest_goes_on(source: Path, target: Path, how: str) -> None:
    plant(source, target)
    path = target / "sub" / "b#?%&.bin"
    CONTENT[how](path)
    (target / "sub" / "sp\u00e4t").unlink()
    before = {path: described for path, described in changes_since(target).items() if b"b#" in path}
    done = fusehsm("populate", source, target)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"fusehsm: {path}: ")
    assert line.endswith("; remove or rename it")
    assert "; 1 new, 10 right, 1 failed; " in done.stdout
    after = {path: described for path, described in changes_since(target).items() if b"b#" in path}
    assert after == before
    assert (target / "sub" / "sp\u00e4t").exists()


def test_content_that_was_filled_in_is_kept(source: Path, target: Path) -> None:
    plant(source, target)
    path = target / "a file"
    before = path.stat()
    path.write_bytes(content_of(100_000))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as whoever fills stubs leaves it
    outcomes, complaints = plant(source, target)
    assert (outcomes["a file"], complaints) == (Outcome.KEPT, [])
    assert path.read_bytes() == content_of(100_000)
    (source / "a file").write_bytes(content_of(100_000, 2))
    outcomes, complaints = plant(source, target)
    assert outcomes["a file"] is Outcome.FAILED
    assert "another version" in complaints[0][1]
    assert path.read_bytes() == content_of(100_000)


def test_an_empty_file_that_was_there_is_kept(source: Path, target: Path) -> None:
    (target / "empty").touch(mode=0o600)
    outcomes, complaints = plant(source, target)
    assert (outcomes["empty"], complaints) == (Outcome.KEPT, [])
    assert os.listxattr(target / "empty") == []


def test_special_files_are_left_out(source: Path, target: Path) -> None:
    os.mkfifo(source / "pipe")
    done = fusehsm("populate", source, target)
    assert "1 left out" in done.stdout
    assert not (target / "pipe").exists()


# Nothing outside of the destination


def test_links_that_were_planted_lead_nowhere(source: Path, target: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(b"precious")
    (target / "sub").symlink_to(outside)
    (target / "a file").symlink_to(outside / "file")
    (target / "sparse").symlink_to(outside / "not there")
    (target / UNFINISHED).symlink_to(outside / "file")
    before = changes_since(outside)
    done = fusehsm("populate", source, target)
    assert done.returncode == 1
    assert changes_since(outside) == before
    assert sorted(line.split(": ")[1].removeprefix(f"{target}/") for line in done.stderr.splitlines()) == [
        UNFINISHED,
        "a file",
        "sparse",
        "sub",
    ]
    assert "is a symbolic link here and a directory in the store; remove or rename it" in done.stderr


NAMES = ["../up", "/tmp/absolute", "fine/../up", "..", "fine/../../up", UNFINISHED, "sub/" + UNFINISHED]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_names_that_lead_elsewhere_are_refused(target: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"hostile.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name in [*NAMES, "fine/file"]:
                archive.writestr(name, "x")
    else:
        with tarfile.open(path, "w") as tar:
            for name in [*NAMES, "fine/file"]:
                member = tarfile.TarInfo(name)
                member.size = 1
                tar.addfile(member, BytesIO(b"x"))
    place = target / "inside"
    done = fusehsm("populate", path, place)
    assert done.returncode == 1
    complaints = done.stderr.splitlines()
    assert len(complaints) == len(NAMES)
    assert all("rename it there" in line for line in complaints)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*")) == [
        "inside",
        "inside/fine",
        "inside/fine/file",
        "inside/sub",
    ]


@pytest.mark.parametrize("path", ["", "a//b", "a/", "a\0b", "/a", ".", "a/./b", "a/..", "n" * 256])
def test_no_store_can_name_anything_else(target: Path, path: str) -> None:
    complaints: list[str] = []
    fd = os.open(target, os.O_RDONLY)
    planter = Planter(fd, lambda _, why: complaints.append(why))
    try:
        assert planter.plant(Entry("a", Kind.DIRECTORY)) is Outcome.NEW
        assert planter.plant(Entry(path, Kind.FILE, size=1)) is Outcome.FAILED
    finally:
        planter.close()
        os.close(fd)
    assert len(complaints) == 1
    assert os.listdir(target) == ["a"]
    assert os.listdir(target / "a") == []


@pytest.mark.parametrize(
    "entry",
    [
        Entry("x", Kind.FILE, size=1 << 70),
        Entry("x", Kind.FILE, size=-1),
        Entry("x", Kind.FILE),
        Entry("x", Kind.FILE, size=1, mtime_ns=1 << 100),
        Entry("x", Kind.SYMLINK),
        Entry("x", Kind.SYMLINK, target="t" * 5000),
        Entry("x", Kind.SYMLINK, target="nul\0"),
    ],
)
def test_impossible_entries_are_complained_of(target: Path, entry: Entry) -> None:
    complaints: list[str] = []
    fd = os.open(target, os.O_RDONLY)
    planter = Planter(fd, lambda _, why: complaints.append(why))
    try:
        assert planter.plant(entry) is Outcome.FAILED
        assert planter.plant(Entry("y", Kind.FILE, size=1)) is Outcome.NEW
    finally:
        planter.close()
        os.close(fd)
    assert len(complaints) == 1
    assert os.listdir(target) == ["y"]


def test_a_store_that_lists_a_file_before_its_directory_is_an_error(target: Path) -> None:
    fd = os.open(target, os.O_RDONLY)
    planter = Planter(fd, lambda _, why: None)
    try:
        with pytest.raises(StoreError, match="an entry of this directory before the directory"):
            planter.plant(Entry("a/b", Kind.FILE, size=1))
    finally:
        planter.close()
        os.close(fd)


def test_an_archive_gives_nobody_the_rights_of_root(target: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        program = zipfile.ZipInfo("program")
        program.create_system, program.external_attr = 3, 0o106755 << 16
        archive.writestr(program, "x")
    plant(tmp_path / "x.zip", target)
    assert (target / "program").stat().st_mode & 0o7777 == 0o755


# File systems and mounts


def test_where_files_cannot_be_made_without_a_name(source: Path, target: Path) -> None:
    (target / UNFINISHED).touch()  # a run that was killed has left it
    os.truncate(target / UNFINISHED, 1000)
    _, complaints = plant(source, target, unnamed=False)
    assert complaints == []
    assert describe(target) == describe(source)
    expect_stubs(target)


def test_somebody_elses_file_with_our_name_is_left_alone(source: Path, target: Path) -> None:
    (target / UNFINISHED).write_bytes(b"content")
    _, complaints = plant(source, target)
    assert [path for path, _ in complaints] == [UNFINISHED]
    assert (target / UNFINISHED).read_bytes() == b"content"


def test_file_systems_without_attributes_are_refused(source: Path) -> None:
    done = fusehsm("populate", source, "/proc")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("fusehsm: /proc: ")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for eight files."""
    require_root()
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "nr_inodes=9", "none", place], check=True)
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_ends_it(source: Path, small_disk: Path) -> None:
    for _ in range(2):
        done = fusehsm("populate", source, small_disk)
        assert (done.returncode, done.stdout) == (1, "")
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"fusehsm: {small_disk}/")
        assert line.endswith(
            ": No space left on device; fix that and run populate again; the stubs made so far are right"
        )
    subprocess.run(["mount", "-o", "remount,nr_inodes=100", small_disk], check=True)
    assert plant(source, small_disk)[1] == []
    assert describe(small_disk) == describe(source)


def test_a_mount_hides_the_marks_and_takes_none(source: Path, backing: Path, make_mount: MakeMount) -> None:
    plant(source, backing)
    mount = make_mount(source=backing)
    path = mount.path / "sub" / "b#?%&.bin"
    assert os.listxattr(path) == []
    for namespace in Namespace:
        with pytest.raises(OSError) as caught:
            os.getxattr(path, namespace.stub)
        assert caught.value.errno == errno.ENODATA
        with pytest.raises(OSError) as caught:
            os.removexattr(path, namespace.stub)
        assert caught.value.errno == errno.ENODATA
        with pytest.raises(OSError) as caught:
            os.setxattr(path, f"{namespace.value}other", b"x")
        assert caught.value.errno == errno.EOPNOTSUPP
    os.setxattr(path, "user.mine", b"x")
    assert os.listxattr(path) == ["user.mine"]
    done = fusehsm("populate", source, mount.path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"fusehsm: {mount.path}: lies on a mount of fusehsm; unmount it first")
    # A copy is no stub.
    subprocess.run(["cp", "-a", path, mount.path / "copy"], check=True)
    assert os.listxattr(backing / "copy") == ["user.mine"]


@pytest.mark.root
def test_an_ordinary_user(source: Path, places: Callable[[str], Path]) -> None:
    above = places("ordinary")
    above.chmod(0o777)
    source.chmod(0o755)
    (source / "sub" / "deep").chmod(0o555)
    target = above / "target"
    for _ in range(2):
        done = fusehsm("populate", source, target, uid=NOBODY)
        assert (done.returncode, done.stderr) == (0, "")
    assert "12 right" in done.stdout
    expected = describe(source, Telling(owners=False))
    found = describe(target, Telling(owners=False))
    kind, size, mode, *rest = expected[b"empty"]
    assert mode == 0o4711
    assert found == {**expected, b"empty": (kind, size, 0o711, *rest)}
    # Also into directories that he may not write to, and over stubs that he may not read.
    (source / "sub" / "deep" / "more").write_bytes(b"x")
    (source / "a file").chmod(0o000)
    done = fusehsm("populate", source, target, uid=NOBODY)
    assert (done.returncode, done.stderr) == (0, "")
    (source / "a file").write_bytes(b"shorter")
    done = fusehsm("populate", source, target, uid=NOBODY)
    assert (done.returncode, done.stderr) == (0, "")
    assert (target / "a file").stat().st_mode & 0o777 == 0
    assert (target / "a file").stat().st_size == 7
    assert (target / "sub" / "deep").stat().st_mode & 0o777 == 0o555
