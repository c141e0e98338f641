"""Opening the fsspec filesystem of a URL, with the options that stores need."""

import errno
from typing import Any, Final

import fsspec
from fsspec.core import url_to_fs

from fusehsm.tier.stores.base import StoreError
from fusehsm.tier.stores.fsspec import PATIENCE, store_error, without_password

# NAME of `pip install 'fusehsm[NAME]'` (pyproject.toml), by protocol.
_EXTRAS: Final = {
    "http": "http",
    "https": "http",
    "sftp": "sftp",
    "ssh": "sftp",
    "s3": "s3",
    "s3a": "s3",
    "gs": "gcs",
    "gcs": "gcs",
    "abfs": "azure",
    "az": "azure",
    "adl": "azure",
    "smb": "smb",
    "git": "git",
}
_INSIDE_ANOTHER: Final = frozenset(("zip", "tar", "libarchive"))


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL, and the path in it. Raises as open_store()."""
    shown_url = without_password(url)
    options: dict[str, Any] = {}
    for part in url.split("::"):
        protocol = part.partition("://")[0] if "://" in part else "file"
        _require_package(protocol, shown_url)
        if protocol in ("http", "https"):
            options[protocol] = _http_options()
        if protocol in ("s3", "s3a"):
            from fusehsm.tier.stores.s3 import options as s3_options

            options[protocol] = s3_options()
    protocol = url.partition("://")[0]
    if protocol in _INSIDE_ANOTHER and "::" not in url:
        raise ValueError(f"{shown_url}: names no archive; write {protocol}://::file:///path/to/archive")
    try:
        if protocol in ("sftp", "ssh"):
            from fusehsm.tier.stores.sftp import connect

            return connect(url)
        filesystem, path = url_to_fs(url, **options)
    except (StoreError, ValueError) as error:
        if isinstance(error, StoreError) or protocol in ("sftp", "ssh"):
            raise
        raise store_error(error, shown_url, "cannot be opened") from error
    except TypeError as error:
        raise ValueError(f"{shown_url}: lacks something that its kind of store needs: {error}") from error
    except Exception as error:
        raise store_error(error, shown_url, "cannot be opened") from error
    # No cache of lists: it would hide changes of the store.
    filesystem.dircache.use_listings_cache = False
    return filesystem, path


def _http_options() -> dict[str, Any]:
    import aiohttp

    timeout = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
    # "identity": sizes and ranges must be those of the file, not of a compressed form.
    return {"client_kwargs": {"timeout": timeout, "headers": {"Accept-Encoding": "identity"}}}


def _require_package(protocol: str, url: str) -> None:
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or protocol
        what = f"fusehsm[{_EXTRAS[protocol]}]" if protocol in _EXTRAS else missing
        raise StoreError(
            errno.ENOPKG,
            f"{protocol} needs the package {missing}, which is not installed; run: pip install '{what}'",
            url,
        ) from None
    except ValueError:
        raise ValueError(
            f"{url}: unknown protocol {protocol}; see fsspec's documentation for the known ones"
        ) from None
