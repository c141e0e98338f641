"""`fusehsm populate` from stores of all kinds, and what it prints."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from fusehsm.tier.text import progress_line, size_text
from tests.support import harness
from tests.support.harness import NOBODY, fusehsm
from tests.support.tier.servers import Served
from tests.support.tier.terminal import on_a_terminal
from tests.support.tier.trees import Telling, changes_since, describe, expect_stubs, make_small_tree

pytestmark = pytest.mark.any_engine


# Other stores


def test_from_a_web_server(nginx: Served, target: Path) -> None:
    there = nginx.place(f"populate-{os.urandom(4).hex()}")
    make_small_tree(there.directory)
    done = fusehsm("populate", there.url, target)
    assert (done.returncode, done.stderr) == (0, "")
    telling = Telling(modes=False, owners=False, times=1_000_000_000, directory_times=False)
    assert describe(target, telling) == describe(there.directory, telling)
    expect_stubs(target)
    before = changes_since(target)
    assert "8 right" in fusehsm("populate", there.url, target).stdout
    assert changes_since(target) == before
    (there.directory / "a file").write_bytes(b"other")
    done = fusehsm("populate", there.url, target)
    assert "1 updated, 7 right" in done.stdout
    assert (target / "a file").stat().st_size == 5


def test_from_a_host_with_ssh(sshd: Served, target: Path) -> None:
    there = sshd.place(f"populate-{os.urandom(4).hex()}")
    make_small_tree(there.directory)
    (there.directory / "link").symlink_to("a file")
    (there.directory / "a file").chmod(0o604)
    done = fusehsm("populate", there.url, target)
    assert (done.returncode, done.stderr) == (0, "")
    telling = Telling(times=1_000_000_000)
    assert describe(target, telling) == describe(there.directory, telling)
    assert "9 right" in fusehsm("populate", there.url, target).stdout


def test_from_a_tar_file(source: Path, target: Path, tmp_path: Path) -> None:
    (source / "sparse").unlink()
    subprocess.run(["tar", "--format=posix", "-C", source, "-cf", tmp_path / "x.tar", "."], check=True)
    done = fusehsm("populate", tmp_path / "x.tar", target)
    assert (done.returncode, done.stderr) == (0, "")
    assert describe(target) == describe(source)
    assert "11 right" in fusehsm("populate", tmp_path / "x.tar", target).stdout


# What it prints


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (["none", "new"], 1, "none: No such file or directory"),
        (["gs://x/y", "new"], 1, "gs://x/y: gs needs the package gcsfs, which is not installed; run: pip install 'fusehsm[gcs]'"),
        (["nonsense://x", "new"], 2, "nonsense://x: unknown protocol nonsense; see fsspec's documentation for the known ones"),
        (["store", "store/in"], 2, "store/in: the store and the destination lie one in the other; choose another destination"),
        (["store", "."], 2, ".: the store and the destination lie one in the other; choose another destination"),
        (["store", "none/new"], 1, "none/new: No such file or directory"),
        (["store", "store/file"], 2, None),
        (["store", "file"], 1, "file: Not a directory"),
        (["store"], 2, "Missing argument 'DST'; see fusehsm populate --help"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(tmp_path: Path, words: list[str], code: int, line: str | None) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "file").touch()
    done = fusehsm("populate", *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    (said,) = done.stderr.splitlines()
    assert line is None or said == f"fusehsm: {line}"
    assert not (tmp_path / "new").exists()


def test_its_last_line_says_that_nobody_serves_the_stubs(source: Path, target: Path) -> None:
    last = f"nobody serves {target} yet: stubs read as zeros until `fusehsm fetch {source} {target}` runs\n"
    assert last not in fusehsm("populate", "--dry-run", source, target).stdout
    assert fusehsm("populate", source, target).stdout.endswith(last)
    shutil.rmtree(source)
    source.mkdir()
    (source / "empty").touch()
    empty = target.with_name("nothing that could be missing")
    assert "zeros" not in fusehsm("populate", source, empty).stdout


def test_odd_names_are_shown_in_one_line(source: Path, target: Path) -> None:
    name = os.fsdecode(b"a\nb\xff\x1b[31m")
    (source / name).write_bytes(b"x")
    (target / name).write_bytes(b"mine")
    done = fusehsm("populate", source, target)
    assert (
        done.stderr
        == f"fusehsm: {target}/a\\nb\\xff\\x1b[31m: is not a stub but a file with other content; remove or rename it\n"
    )


@pytest.mark.root
def test_a_directory_that_cannot_be_listed_is_told(source: Path, places: Callable[[str], Path]) -> None:
    above = places("unlisted")
    above.chmod(0o777)
    source.chmod(0o755)
    (source / "hollow").chmod(0)
    done = fusehsm("populate", source, above / "new", uid=NOBODY)
    assert done.returncode == 1
    assert "hollow: cannot be listed in" in done.stderr
    assert (above / "new" / "sub" / "deep").is_dir()


def test_progress_on_a_terminal(source: Path, target: Path) -> None:
    shown, output = on_a_terminal([*harness.COMMAND, "populate", str(source), str(target)])
    assert b"entries (" in shown
    assert output.startswith("populated ")


def test_how_progress_reads() -> None:
    assert progress_line(1234567, 10**12, 0, 10) == "1,234,567 entries (123,457 a second), 1.0 TB"
    assert progress_line(1, 5, 2, 0) == "1 entries (1,000 a second), 5 B, 2 failed"
    assert [size_text(size) for size in (0, 999, 1000, 10**6, 10**15)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "1.0 MB",
        "1.0 PB",
    ]
