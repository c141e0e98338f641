"""--log-file is never another user's file, and what others have named cannot write lines of its own into a log."""

import io
import logging
import os
from pathlib import Path

import pytest

from fusehsm.text import LineFormatter
from tests.support.harness import NOBODY, fusehsm
from tests.support.requirements import require_root

HOSTILE = "a\nfusehsm: done\x1b]0;owned\x07\u202e\udcff\r"


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def logger(log: io.StringIO) -> logging.Logger:
    handler = logging.StreamHandler(log)
    handler.setFormatter(LineFormatter("fusehsm: %(message)s"))
    made = logging.Logger("of the test")
    made.addHandler(handler)
    return made


def test_a_record_is_one_line(logger: logging.Logger, log: io.StringIO) -> None:
    logger.warning("%s: cannot be opened", HOSTILE)
    logger.warning(f"{HOSTILE}: %d bytes", 7)
    first, second = log.getvalue().splitlines()
    name = r"a\nfusehsm: done\x1b]0;owned\x07\u202e\xff\r"
    assert (first, second) == (f"fusehsm: {name}: cannot be opened", f"fusehsm: {name}: 7 bytes")


def test_a_traceback_has_its_own_lines(logger: logging.Logger, log: io.StringIO) -> None:
    try:
        raise FileNotFoundError(2, "no such file", HOSTILE)
    except OSError:
        logger.exception("failed")
    lines = log.getvalue().splitlines()
    assert lines[:2] == ["fusehsm: failed", "Traceback (most recent call last):"]
    assert all(line.isprintable() for line in lines)


@pytest.mark.fuse
@pytest.mark.any_engine
@pytest.mark.parametrize("kind", ["link", "hard link", "another's", "fifo"])
def test_a_log_file_that_is_refused(
    fuse: None, backing: Path, mount_point: Path, tmp_path: Path, kind: str
) -> None:
    log, victim = tmp_path / "log", tmp_path / "victim"
    victim.write_text("as it was")
    if kind == "link":
        log.symlink_to(victim)
        cause = (
            "Too many levels of symbolic links; give a --log-file that you may write, and no symbolic link"
        )
    elif kind == "hard link":
        os.link(victim, log)
        cause = "the file has another name, too; give a --log-file of your own"
    elif kind == "fifo":
        os.mkfifo(log)
        cause = "No such device or address; give a --log-file that you may write, and no symbolic link"
    else:
        require_root()
        log.write_text("as it was")
        os.chown(log, NOBODY, NOBODY)
        cause = "the file belongs to another user; give a --log-file of your own"
    done = fusehsm("mount", "--log-file", log, backing, mount_point)
    assert done.returncode == 1
    assert done.stderr == f"fusehsm: {log}: {cause}\n"
    assert not os.path.ismount(mount_point)
    assert victim.read_text() == "as it was"


@pytest.mark.fuse
@pytest.mark.any_engine
def test_a_log_file(fuse: None, backing: Path, mount_point: Path, tmp_path: Path) -> None:
    """A new one is for its owner alone; an old one is continued, and keeps its mode."""
    new, old = tmp_path / "new", tmp_path / "old"
    old.write_text("before\n")
    old.chmod(0o644)
    for log in (new, old):
        done = fusehsm("mount", "--log-file", log, backing, mount_point)
        assert (done.returncode, done.stderr) == (0, "")
        assert fusehsm("umount", mount_point).returncode == 0
    assert (new.stat().st_mode & 0o777, old.stat().st_mode & 0o777) == (0o600, 0o644)
    assert old.read_text().startswith("before\n")


@pytest.mark.parametrize(
    "words",
    [
        ("mount", HOSTILE, "{place}"),
        ("mount", "{place}", HOSTILE),
        ("mount", "--log-file", f"/nowhere/{HOSTILE}", "{place}", "{place}"),
        ("mount", "-o", HOSTILE, "{place}", "{place}"),
        ("mount", "--abi", HOSTILE, "{place}", "{place}"),
        ("mount", "--handler", HOSTILE, "{place}", "{place}"),
        ("umount", HOSTILE),
        ("trace", HOSTILE),
        ("status", HOSTILE),
        ("run", "--mount", HOSTILE, "--", "true"),
        ("run", "--", HOSTILE),
        ("populate", HOSTILE, "{place}"),
        ("populate", f"ftp://{HOSTILE}/", "{place}"),
        ("fetch", HOSTILE, "{place}"),
        ("fetch", "{place}", HOSTILE),
        ("evict", HOSTILE),
        ("pin", HOSTILE),
        ("unpin", HOSTILE),
        ("validate", HOSTILE, "{place}"),
        ("conform", HOSTILE),
        (HOSTILE,),
    ],
    ids=lambda words: "-".join(word for word in words if HOSTILE not in word).replace("/", ""),
)
def test_every_command_complains_in_lines_of_its_own(tmp_path: Path, words: tuple[str, ...]) -> None:
    done = fusehsm(*(word.replace("{place}", str(tmp_path)) for word in words), cwd=tmp_path)
    assert done.returncode != 0
    lines = done.stderr.splitlines()
    assert lines
    assert all(line.isprintable() for line in lines), lines
    assert not any(line.startswith("fusehsm: done") for line in lines), lines
