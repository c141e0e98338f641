"""open_store(): opens the store that the user's text names."""

import errno
import os
from typing import Final

from fusehsm.text import shown
from fusehsm.tier.stores.base import Store
from fusehsm.tier.stores.local import LocalStore

_ARCHIVES: Final = {
    ".zip": "zip",
    ".tar": "tar",
    ".tgz": "tar",
    ".tar.gz": "tar",
    ".tar.bz2": "tar",
    ".tar.xz": "tar",
}


def open_store(url_or_path: str) -> Store:
    """The store at a path (a directory, or a zip or tar file) or at any URL that fsspec opens, chains (zip://::https://...) included.

    Open it in the process that uses it: connections and fsspec's thread do not survive fork(2). Raises ValueError for a URL with an unknown protocol
    or without a necessary part. Raises OSError if the store cannot be opened: ENOPKG, with the command to install it, if a package is missing.
    """
    path = url_or_path.removeprefix("file://")
    if "://" not in path:
        if os.path.isdir(path) or not os.path.exists(path):
            return LocalStore(path)
        protocol = next((_ARCHIVES[ending] for ending in _ARCHIVES if path.lower().endswith(ending)), None)
        if protocol is None:
            raise NotADirectoryError(
                errno.ENOTDIR, "is no directory, nor a zip or tar file; name one of these", path
            )
        url_or_path = f"{protocol}://::file://{os.path.abspath(path)}"
    # Imported late: fsspec loads slowly, and a local directory does not need it.
    from fusehsm.tier.stores.filesystems import filesystem_of
    from fusehsm.tier.stores.fsspec import FsspecStore, without_password

    protocol = url_or_path.partition("://")[0]
    filesystem, root = filesystem_of(url_or_path)
    name = without_password(url_or_path)
    match protocol:
        case "http" | "https":
            from fusehsm.tier.stores.http import HttpStore

            return HttpStore(name, filesystem, root)
        case "sftp" | "ssh":
            from fusehsm.tier.stores.sftp import SftpStore

            return SftpStore(name, filesystem, root)
        case "s3" | "s3a":
            from fusehsm.tier.stores.s3 import S3Store

            return S3Store(name, filesystem, root)
        case "git":
            from fusehsm.tier.stores.git import GitStore

            return GitStore(name, filesystem, root)
        case "zip":
            from fusehsm.tier.stores.archive import ZipStore

            return ZipStore(name, filesystem, root, url_or_path)
        case "tar":
            from fusehsm.tier.stores.archive import TarStore

            return TarStore(name, filesystem, root, url_or_path)
    return FsspecStore(name, filesystem, root)


def expect_apart(store: Store, destination: str) -> None:
    """Raise ValueError if one of store (a local directory) and destination lies in the other: stubs would be filled from stubs."""
    if not isinstance(store, LocalStore):
        return
    here, there = os.path.realpath(destination), os.path.realpath(store.root)
    if os.path.commonpath((here, there)) in (here, there):
        raise ValueError(
            f"{shown(destination)}: the store and the destination lie one in the other; choose another destination"
        )
