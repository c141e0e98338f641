"""Archives that somebody else has made: a member that makes no sense is left out with a line, and costs neither time nor memory."""

import io
import stat
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fusehsm.tier.stores.base import Entry, StoreError
from fusehsm.tier.stores.open import open_store
from tests.support.harness import fusehsm

pytestmark = [pytest.mark.any_engine]

_DEEP = 3_000
_ORDINARY = "ordinary"


def _tar(path: Path, member: tarfile.TarInfo, content: bytes = b"x") -> str:
    """A tar file with that member, and an ordinary one after it."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info in (member, tarfile.TarInfo(_ORDINARY)):
            if info.isreg():
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return f"tar://::file://{path}"


def _zip(path: Path, info: zipfile.ZipInfo, size: int) -> str:
    """A zip file with a member of so many zeros, and an ordinary one."""
    info.compress_type = zipfile.ZIP_DEFLATED
    with zipfile.ZipFile(path, "w", compresslevel=1) as archive:
        archive.writestr(info, bytes(size))
        archive.writestr(_ORDINARY, "x")
    return f"zip://::file://{path}"


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system = 3
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


def _entries(url: str) -> tuple[dict[str, Entry], dict[str | None, str]]:
    """The entries by path, and the lines about what is left out."""
    errors: list[StoreError] = []
    with open_store(url) as store:
        entries = {entry.path: entry for entry in store.tree(errors.append)}
    return entries, {error.filename: error.strerror or "" for error in errors}


@pytest.mark.parametrize(
    "told", ["inf", "-inf", "nan", "sNaN", "soon", "", "9" * 5000, "1e999999", "1e-999999", "1e400", "-1e30"]
)
def test_what_is_no_time_is_none(tmp_path: Path, told: str) -> None:
    member = tarfile.TarInfo("odd")
    member.pax_headers = {"mtime": told}
    entries, errors = _entries(_tar(tmp_path / "a.tar", member))
    assert errors == {}
    assert entries["odd"].mtime_ns in (None, 0)
    assert entries[_ORDINARY].mtime_ns == 0
    assert entries["odd"].size == 1


def test_a_time_is_exact(tmp_path: Path) -> None:
    member = tarfile.TarInfo("odd")
    member.pax_headers = {"mtime": "1234567890.123456789"}
    assert _entries(_tar(tmp_path / "a.tar", member))[0]["odd"].mtime_ns == 1234567890_123456789


@pytest.mark.parametrize("date", [(1980, 0, 0, 0, 0, 0), (2107, 15, 31, 31, 63, 62)])
def test_a_day_that_no_calendar_has_is_no_time(tmp_path: Path, date: tuple[int, ...]) -> None:
    info = zipfile.ZipInfo("odd")
    info.date_time = date  # type: ignore[assignment]
    entries, errors = _entries(_zip(tmp_path / "a.zip", info, 1))
    assert (entries["odd"].mtime_ns, errors) == (None, {})


def _names() -> Iterator[tuple[str, str]]:
    yield "too many components", "a/" * _DEEP + "x"
    yield "too long", "/".join(["a" * 255] * 100)


@pytest.mark.parametrize("name", [name for _, name in _names()], ids=[what for what, _ in _names()])
def test_a_name_that_is_too_deep_is_left_out(tmp_path: Path, name: str) -> None:
    entries, errors = _entries(_tar(tmp_path / "a.tar", tarfile.TarInfo(name)))
    assert set(entries) == {_ORDINARY}
    ((path, why),) = errors.items()
    assert path is not None
    assert name.startswith(path.removesuffix("..."))
    assert why.startswith("is left out: its name has more than ")


def test_many_deep_names_do_not_take_all_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for number in range(100):
            archive.addfile(tarfile.TarInfo(f"{number}/" + "a/" * 2000 + "x"))
    with pytest.raises(StoreError, match="too many directories"):
        _entries(f"tar://::file://{path}")


def test_a_long_link_in_a_zip_file_is_not_read(tmp_path: Path) -> None:
    url = _zip(tmp_path / "a.zip", _link("odd"), 64 << 20)
    tracemalloc.start()
    try:
        entries, errors = _entries(url)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert set(entries) == {_ORDINARY}
    assert errors == {"odd": "is left out: it is a symbolic link with an impossible target"}
    assert peak < 16 << 20


@pytest.mark.parametrize("target", ["", "a" * 5000])
def test_a_link_that_leads_to_nothing_possible_is_left_out(tmp_path: Path, target: str) -> None:
    member = tarfile.TarInfo("odd")
    member.type = tarfile.SYMTYPE
    member.pax_headers = {"linkpath": target}
    entries, errors = _entries(_tar(tmp_path / "a.tar", member))
    assert (set(entries), set(errors)) == ({_ORDINARY}, {"odd"})


@pytest.mark.parametrize(("uid", "gid"), [(-1, 5), (1 << 40, 5), (5, (1 << 32) - 1)])
def test_an_owner_that_nobody_can_be_is_none(tmp_path: Path, uid: int, gid: int) -> None:
    member = tarfile.TarInfo("odd")
    member.pax_headers = {"uid": str(uid), "gid": str(gid)}
    entry = _entries(_tar(tmp_path / "a.tar", member))[0]["odd"]
    assert (entry.uid, entry.gid) == (uid if uid == 5 else None, gid if gid == 5 else None)


def test_populate_says_a_line_and_makes_the_others(
    tmp_path: Path, target: Path, places: Callable[[str], Path]
) -> None:
    _tar(tmp_path / "a.tar", tarfile.TarInfo("a/" * _DEEP + "x"))
    done = fusehsm("populate", tmp_path / "a.tar", target)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith("is left out: its name has more than 2,048 components")
    assert (target / _ORDINARY).stat().st_size == 1
