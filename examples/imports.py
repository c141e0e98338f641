"""Import a large part of the standard library and print the files of all modules, as JSON {path: sha256}.

Set PYTHONHOME to a tree whose lib/pythonX.Y has the standard library. Use -S, which excludes site-packages, and -P, which excludes this directory.
Then every module that is not built into the interpreter is read from that tree.
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
    """Use some of the imported modules, so that their parts that load on demand are loaded too."""
    context = sys.modules["decimal"].Context(prec=50)
    root = sys.modules["xml.etree.ElementTree"].fromstring("<a><b>1</b></a>")
    done = sys.modules["asyncio"].run(sys.modules["asyncio"].sleep(0, "done"))
    return f"{context.sqrt(2)} {root.find('b').text} {done}"


def files_of(module: object) -> list[str]:
    """The source or extension file of a module and, if it can have one, its byte-code file."""
    spec = getattr(module, "__spec__", None)  # typing.io is in sys.modules and has none
    return (
        [path for path in (spec.origin, spec.cached) if path]
        if spec is not None and spec.has_location
        else []
    )


def main() -> None:
    """Print {path: sha256} of the files of all loaded modules, and under "" the result of use()."""
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
        except FileNotFoundError:  # a byte-code file that was never written
            continue
    json.dump(hashes, sys.stdout)


if __name__ == "__main__":
    main()
