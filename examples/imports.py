"""Import a good part of the standard library and print where every module came from, as JSON {path: sha256}.

Run with PYTHONHOME set to a tree whose lib/pythonX.Y holds the standard library, with -S, so that no site-packages come
in, and -P, so that this directory does not: then every module that is not built into the interpreter is read from that
tree.
"""

import hashlib
import importlib
import json
import sys

NAMES = (
    "argparse asyncio bz2 concurrent.futures configparser csv ctypes curses.ascii datetime decimal difflib email.message "
    "fractions gzip html.parser http.client imaplib inspect ipaddress logging.handlers mailbox multiprocessing.pool "
    "pickle pydoc sqlite3 statistics tarfile tomllib unittest.mock urllib.request uuid wsgiref.simple_server "
    "xml.etree.ElementTree xmlrpc.client zipfile zoneinfo"
)


def use() -> str:
    """Do a little with what was imported, so that the parts loaded on demand come in as well."""
    context = sys.modules["decimal"].Context(prec=50)
    root = sys.modules["xml.etree.ElementTree"].fromstring("<a><b>1</b></a>")
    done = sys.modules["asyncio"].run(sys.modules["asyncio"].sleep(0, "done"))
    return f"{context.sqrt(2)} {root.find('b').text} {done}"


def files_of(module: object) -> list[str]:
    """The source or extension that a module came from and, where it may have one, its compiled form."""
    spec = getattr(module, "__spec__", None)  # typing.io is in sys.modules and has none
    return (
        [path for path in (spec.origin, spec.cached) if path]
        if spec is not None and spec.has_location
        else []
    )


def main() -> None:
    """Print {path: sha256} of every file that a loaded module came from, and under "" what use() found."""
    for name in NAMES.split():
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:  # an interpreter built without curses or sqlite
            print(f"imports: {name}: {error}; left out", file=sys.stderr)
    hashes = {"": use()}
    for path in sorted({path for module in list(sys.modules.values()) for path in files_of(module)}):
        try:
            with open(path, "rb") as file:
                hashes[path] = hashlib.sha256(file.read()).hexdigest()
        except FileNotFoundError:  # a compiled form that was never written
            continue
    json.dump(hashes, sys.stdout)


if __name__ == "__main__":
    main()
