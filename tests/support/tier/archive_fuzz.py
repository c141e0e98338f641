"""Archives made by somebody else: tar and zip files with odd members, then damaged anywhere; and what `fusehsm populate` and a store make of one.

`python -m tests.support.tier.archive_fuzz [FLAW]` waits with all modules loaded. For each line [ARCHIVE, DST, LOG, MEMORY] of JSON it forks a process
that populates DST and reads what the store then has; the answer is a line with its exit code, negative for a signal.
"""

import io
import json
import os
import random
import resource
import signal
import sys
import tarfile
import warnings
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import fsspec.implementations.local
import fsspec.implementations.tar
import fsspec.implementations.zip  # noqa: F401

from fusehsm.cli import main as fusehsm
from fusehsm.tier.stores.base import Kind
from fusehsm.tier.stores.open import open_store
from tests.support import flawed

MEMORY = 400 << 20  # bytes of address space beyond what a process has when it begins
SECONDS = 20  # of processor time
NONSENSE = 77  # exit code: content that the archive does not have
_LARGEST_READ = 1 << 20  # bytes
_BLOCK = 512  # bytes of a tar header

_NAMES = (
    "file",
    "directory/file",
    "directory",
    "directory/link/file",
    "directory/link",
    "link",
    "link/file",
    "../outside/file",
    "/outside",
    "directory/../../outside/file",
    "a\nb\x1b[31m",
    "\udcff",
    "n" * 255,
    "n" * 300,
    "/".join(["deep"] * 60),
    ".",
    "",
    "file/below",
    "./directory//file",
    ".fusehsm",
)
_TARGETS = (
    "file",
    "..",
    "../outside",
    "../../outside/file",
    "/etc",
    "link",
    "",
    "t" * 4000,
    "directory/file",
    "\n",
)
_KINDS = (tarfile.REGTYPE,) * 6 + (
    tarfile.DIRTYPE,
    tarfile.SYMTYPE,
    tarfile.LNKTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.FIFOTYPE,
    b"Z",
)
_NUMBERS = ("0", "-1", "1", "4294967295", "18446744073709551616", "1e30", "nan", "-9", "1" * 40, "x", "")


def make(choose: random.Random) -> tuple[str, bytes]:
    """An archive: the ending of its name, and its bytes."""
    if choose.random() < 0.5:
        data, ending = _tar(choose), "tar"
        damage = _damage_tar
    else:
        data, ending = _zip(choose), "zip"
        damage = _damage
    if choose.random() < 0.7:
        data = damage(bytearray(data), choose)
    return ending, data


def _content(choose: random.Random) -> bytes:
    return choose.randbytes(choose.choice((0, 1, 511, 512, 5000, 40_000)))


def _tar(choose: random.Random) -> bytes:
    written = io.BytesIO()
    form = choose.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=written, mode="w", format=form) as archive:
        for _ in range(choose.randrange(1, 12)):
            member = tarfile.TarInfo(choose.choice(_NAMES))
            member.type = choose.choice(_KINDS)
            member.mode = choose.choice((0o644, 0o4755, 0o7777, 0, 0o1777, 0o200000))
            member.uid, member.gid = choose.choice((0, 1000, 54321)), choose.choice((0, 1000, 54321))
            member.mtime = choose.choice((0, 1, 1_700_000_000, 1_700_000_000.5, (1 << 33) - 1))
            content = _content(choose) if member.type == tarfile.REGTYPE else b""
            member.size = len(content)
            if member.type in (tarfile.SYMTYPE, tarfile.LNKTYPE):
                member.linkname = choose.choice(_TARGETS)
            if form == tarfile.PAX_FORMAT and choose.random() < 0.3:
                key = choose.choice(
                    (
                        "mtime",
                        "size",
                        "uid",
                        "path",
                        "linkpath",
                        "GNU.sparse.map",
                        "GNU.sparse.size",
                        "hdrcharset",
                    )
                )
                member.pax_headers = {key: choose.choice((*_NUMBERS, *_NAMES[:8], "0,10,5,5"))}
            with suppress(ValueError, UnicodeError):  # a name that this format cannot have
                archive.addfile(member, io.BytesIO(content))
    return written.getvalue()


def _zip(choose: random.Random) -> bytes:
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", choose.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for _ in range(choose.randrange(1, 12)):
            name = choose.choice(_NAMES)
            member = zipfile.ZipInfo(
                name, (choose.choice((1980, 2024, 2107)), choose.randrange(1, 13), 28, 23, 59, 58)
            )
            kind = choose.choice((0o100000, 0o100000, 0o100000, 0o40000, 0o120000, 0o20000, 0o10000))
            member.external_attr = (kind | choose.choice((0o644, 0o4755, 0o7777, 0))) << 16
            member.create_system = choose.choice((0, 3, 3, 3))
            content = os.fsencode(choose.choice(_TARGETS)) if kind == 0o120000 else _content(choose)
            with suppress(UnicodeError), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of names that are there already
                archive.writestr(member, content, compress_type=archive.compression)
    return written.getvalue()


def _damage(data: bytearray, choose: random.Random) -> bytes:
    for _ in range(choose.choice((1, 1, 2, 8))):
        place = choose.randrange(len(data))
        match choose.randrange(5):
            case 0:
                data[place] ^= 1 << choose.randrange(8)
            case 1:
                data[place : place + 4] = choose.choice((b"\xff" * 4, b"\0" * 4, b"\xff\xff\xff\x7f"))
            case 2:
                del data[place : place + choose.choice((1, 100, 10_000))]
            case 3:
                data[place:place] = data[: choose.choice((1, 100, 1024))]
            case 4:
                # The lists at a zip file's end are what is read first.
                near = max(0, len(data) - choose.randrange(1, 400))
                data[near : near + 1] = bytes((choose.randrange(256),))
        if not data:
            return b""
    return bytes(data)


def _damage_tar(data: bytearray, choose: random.Random) -> bytes:
    """Damage a header and correct its checksum, or damage anything."""
    if choose.random() < 0.4 or len(data) < _BLOCK:
        return _damage(data, choose)
    start = choose.randrange(len(data) // _BLOCK) * _BLOCK
    header = data[start : start + _BLOCK]
    # name, mode, uid, size, mtime, type, link name, device numbers, prefix
    place, length = choose.choice(
        ((0, 100), (100, 8), (108, 8), (124, 12), (136, 12), (156, 1), (157, 100), (329, 16), (345, 155))
    )
    header[place : place + length] = choose.choice(
        (
            choose.randbytes(length),
            b"\x80" + b"\xff" * (length - 1),  # a number of base 256
            b"\xff" * length,
            b"7" * length,
            bytes(length),
        )
    )[:length]
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[start : start + _BLOCK] = header
    return bytes(data)


# What reads it


def url_of(archive: Path) -> str:
    """The store."""
    return f"{archive.suffix[1:]}://::file://{archive}"


def _read_all(archive: Path) -> bool:
    """Whether all that the store gives is content of the archive."""
    data = archive.read_bytes()
    try:
        store = open_store(url_of(archive))
    except (OSError, ValueError):
        return True  # refused
    with store:
        for entry in store.tree(lambda error: None):
            if entry.kind is not Kind.FILE or entry.size is None or entry.version is None:
                continue
            try:
                got = store.read(entry.path, 0, min(entry.size, _LARGEST_READ), entry.version)
            except OSError:
                continue
            whole = len(got) == entry.size
            if archive.suffix == ".zip":
                good = not (whole and got) or f"{zlib.crc32(got):08x}" in entry.version
            else:
                # A sparse file's data are somewhere in it, with zeros in between.
                good = (
                    got in data or not got.strip(b"\0") or b"GNU.sparse" in data or b"S" in data[156::_BLOCK]
                )
            if not good:
                print(f"not of the archive: {entry.path!r}", file=sys.stderr)
                return False
    return True


def _try(archive: Path, target: str, log: str, memory: int) -> int:
    for number, flags in ((1, os.O_WRONLY), (2, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)):
        os.dup2(os.open(log if number == 2 else os.devnull, flags, 0o644), number)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    allowed = pages * resource.getpagesize() + memory
    resource.setrlimit(resource.RLIMIT_AS, (allowed, allowed))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    code = fusehsm(["populate", url_of(archive), target])
    return code if _read_all(archive) else NONSENSE


def main() -> None:
    if len(sys.argv) > 1:
        flawed.FLAWS[sys.argv[1]]()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    for line in sys.stdin:
        archive, target, log, memory = json.loads(line)
        child = os.fork()
        if not child:
            code = 99
            try:
                code = _try(Path(archive), target, log, memory)
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
