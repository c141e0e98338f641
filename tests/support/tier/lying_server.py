"""A web server that lies: about lengths, ranges, ETags, dates, encodings, redirects; it also speaks enough of S3 to list a bucket.

Each lie can be noticed by who looks: bytes are wrong only where a header, the number of bytes, or the version tells so.
"""

import http.server
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

from tests.support.tier.trees import content_of

FILES = {
    "one": content_of(50_000),
    "two": content_of(5000, 2),
    "empty": b"",
    "sub/three": content_of(300_000, 3),
}
BUCKET = "bucket"
_DATE = "Tue, 14 Nov 2023 22:13:20 GMT"
_NUMBERS = (
    "",
    "-1",
    "0",
    "10",
    "1e9",
    "\u0663",
    "9" * 30,
    "9" * 5000,
    "0x10",
    "18446744073709551616",
    "5, 5",
    " 7",
)
_RANGES = (
    "bytes 0-3/*",
    "bytes 5-2/10",
    "bytes */10",
    "bytes",
    "",
    "bytes 0-" + "9" * 5000 + "/*",
    "bytes -1-3/4",
    "items 0-3/8",
)
_DATES = (
    "",
    "never",
    "Tue, 99 Nov 2023 22:13:20 GMT",
    "Thu, 01 Jan 99999 00:00:00 GMT",
    "Mon, 01 Jan 0001 00:00:00 GMT",
    "1",
    "\u0663",
)
_WHERE = (
    "{same}",
    "{same}/",
    "/nowhere",
    "http://127.0.0.1:9/",
    "file:///etc/passwd",
    "ftp://127.0.0.1/",
    "//",
    "",
    "http://[",
    "two",
    "/bucket/two",
)
_STATUS = (100, 200, 204, 206, 301, 304, 400, 403, 404, 412, 416, 299, 999, 500)


@dataclass
class Answer:
    """What is about to be sent."""

    status: int
    headers: dict[str, str]
    body: bytes
    #: Close the connection after so many bytes of the body; None: as the headers say.
    cut: int | None = None
    #: Is anything in it a lie?
    lied: bool = False


Lie = Callable[[Answer, random.Random], None]


def _short(answer: Answer, choose: random.Random) -> None:
    answer.cut = choose.randrange(len(answer.body) + 1)


def _long(answer: Answer, choose: random.Random) -> None:
    answer.body += b"more" * choose.choice((1, 5000))
    answer.headers["Content-Length"] = str(len(answer.body))
    if answer.status == 200:
        answer.headers["ETag"] = '"longer"'  # nothing else tells that the file is not so long


def _length(answer: Answer, choose: random.Random) -> None:
    answer.headers["Content-Length"] = choose.choice(_NUMBERS)


def _no_length(answer: Answer, choose: random.Random) -> None:
    answer.headers.pop("Content-Length", None)


def _range(answer: Answer, choose: random.Random) -> None:
    answer.headers["Content-Range"] = choose.choice(_RANGES)
    answer.status = 206


def _other_range(answer: Answer, choose: random.Random) -> None:
    told = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", answer.headers.get("Content-Range", ""))
    if told:
        first, last, total = map(int, told.groups())
        by = choose.choice((1, 4096))
        answer.headers["Content-Range"] = f"bytes {first + by}-{last + by}/{total}"


def _status(answer: Answer, choose: random.Random) -> None:
    answer.status = choose.choice(_STATUS)


def _etag(answer: Answer, choose: random.Random) -> None:
    answer.headers["ETag"] = choose.choice(('"other"', "", "W/", '"' + "e" * 5000 + '"', "\u00ff"))


def _no_etag(answer: Answer, choose: random.Random) -> None:
    answer.headers.pop("ETag", None)


def _date(answer: Answer, choose: random.Random) -> None:
    answer.headers["Last-Modified"] = choose.choice(_DATES)


def _encoding(answer: Answer, choose: random.Random) -> None:
    answer.headers["Content-Encoding"] = choose.choice(("gzip", "deflate", "br", "identity", "none"))


def _chunks(answer: Answer, choose: random.Random) -> None:
    del answer.headers["Content-Length"]
    answer.headers["Transfer-Encoding"] = "chunked"
    body, pieces = answer.body, []
    for start in range(0, len(body), 1000):
        piece = body[start : start + 1000]
        pieces.append(b"%x\r\n%b\r\n" % (len(piece), piece))
    answer.body = b"".join(pieces) + b"0\r\n\r\n"
    if "Content-Type" in answer.headers:
        return  # a list: aiohttp waits for five minutes for the end of broken chunks
    match choose.randrange(4):
        case 0:
            answer.cut = choose.randrange(len(answer.body))
        case 1:
            answer.body = choose.choice((b"-1\r\n", b"ffffffffffffffff\r\n", b"z\r\n", b"\r\n", b"9" * 9000))
        case 2:
            answer.body = answer.body.replace(b"\r\n0\r\n", b"\r\n")


def _redirect(answer: Answer, choose: random.Random) -> None:
    answer.status = choose.choice((301, 302, 303, 307, 308))
    answer.headers["Location"] = choose.choice(_WHERE)


def _flood(answer: Answer, choose: random.Random) -> None:
    for number in range(choose.choice((5, 300))):
        answer.headers[f"X-{number}"] = "v" * choose.choice((1, 70_000))


def _rubbish(answer: Answer, choose: random.Random) -> None:
    """No HTTP at all; a status line of another kind."""
    answer.status = choose.choice((-1, -2, -3))


LIES: tuple[Lie, ...] = (
    _short,
    _short,
    _long,
    _length,
    _no_length,
    _range,
    _other_range,
    _status,
    _etag,
    _no_etag,
    _date,
    _encoding,
    _chunks,
    _redirect,
    _flood,
    _rubbish,
)


@dataclass
class Liar:
    """A running server. `lies` are told in each answer, as `choose` has it; `left`: in so many answers, then it is honest."""

    url: str
    lies: list[Lie] = field(default_factory=list)
    choose: random.Random = field(default_factory=random.Random)
    #: How many answers are lies still.
    left: int = 0
    #: What was answered last, for a message.
    said: list[str] = field(default_factory=list)

    def distort(self, answer: Answer) -> None:
        """Lie, if it is time to."""
        if self.left > 0:
            self.left -= 1
            answer.lied = True
            for lie in self.lies:
                with suppress(KeyError):
                    lie(answer, self.choose)
        shown = {name: value[:80] for name, value in list(answer.headers.items())[:8]}
        self.said.append(f"{answer.status} {shown} {len(answer.body)} bytes, cut {answer.cut}")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    liar: Liar

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        answer = self._honest()
        self.liar.distort(answer)
        self._send(answer)

    def _honest(self) -> Answer:
        there = urlsplit(self.path)
        path = unquote(there.path).lstrip("/").removeprefix(f"{BUCKET}/")
        if "list-type=2" in there.query:
            return _page(_bucket(unquote(there.query)), "application/xml")
        if path in FILES:
            return self._file(path, FILES[path])
        if path in ("", "sub/", BUCKET):
            return _page(_directory(path), "text/html")
        return Answer(404, {"Content-Length": "0"}, b"")

    def _file(self, path: str, content: bytes) -> Answer:
        headers = {
            "ETag": f'"{path}-{len(content)}"',
            "Last-Modified": _DATE,
            "Content-Length": str(len(content)),
            "Accept-Ranges": "bytes",
        }
        if (wanted := self.headers.get("If-Match")) and wanted != headers["ETag"]:
            return Answer(412, {"Content-Length": "0"}, b"")
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return Answer(200, headers, content)
        first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if first >= len(content):
            return Answer(416, {"Content-Length": "0", "Content-Range": f"bytes */{len(content)}"}, b"")
        body = content[first : last + 1]
        headers |= {"Content-Range": f"bytes {first}-{last}/{len(content)}", "Content-Length": str(len(body))}
        return Answer(206, headers, body)

    def _send(self, answer: Answer) -> None:
        if answer.status < 0:
            self.close_connection = True
            self.wfile.write((b"", b"\0\xff" * 100, b"HTTP/9.9 two hundred\r\n\r\n")[answer.status])
            return
        lines = [
            f"HTTP/1.1 {answer.status} Said",
            *(f"{name}: {value}" for name, value in answer.headers.items()),
        ]
        self.wfile.write("\r\n".join(lines).encode("utf-8") + b"\r\n\r\n")
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.cut])
        # A client that waits for more than there is gets the end instead.
        self.close_connection |= answer.lied

    def log_message(self, format: str, *arguments: object) -> None:
        """Nowhere."""


def _page(text: str, kind: str) -> Answer:
    body = text.encode()
    return Answer(200, {"Content-Type": kind, "Content-Length": str(len(body))}, body)


def _directory(path: str) -> str:
    below = path.removeprefix(BUCKET)
    names = {
        name[len(below) :].split("/")[0] + "/" * ("/" in name[len(below) :])
        for name in FILES
        if name.startswith(below)
    }
    return "".join(f'<a href="{name}">{name}</a>' for name in sorted(names))


def _bucket(query: str) -> str:
    prefix = "".join(re.findall(r"prefix=([^&]*)", query))
    keys = [
        f"<Contents><Key>{escape(name)}</Key><LastModified>2023-11-14T22:13:20.000Z</LastModified>"
        f"<ETag>&quot;{name}-{len(content)}&quot;</ETag><Size>{len(content)}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for name, content in FILES.items()
        if name.startswith(prefix) and "/" not in name[len(prefix) :]
    ]
    below = "" if prefix else "<CommonPrefixes><Prefix>sub/</Prefix></CommonPrefixes>"
    return (
        '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{prefix}</Prefix><KeyCount>{len(keys)}</KeyCount><MaxKeys>1000</MaxKeys>"
        f"<IsTruncated>false</IsTruncated>{''.join(keys)}{below}</ListBucketResult>"
    )


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error of this server."""

    def finish_request(self, request: socket.socket, client_address: object) -> None:  # type: ignore[override]
        # A client that sends nothing more does not keep a thread for ever.
        request.settimeout(20)
        super().finish_request(request, client_address)


@contextmanager
def lying_server() -> Iterator[Liar]:
    """The server, on loopback, honest at first."""
    handler = type("Handler", (_Handler,), {})
    with _Server(("127.0.0.1", 0), handler) as server:
        liar = Liar(f"http://127.0.0.1:{server.server_address[1]}")
        handler.liar = liar  # type: ignore[attr-defined]
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield liar
        finally:
            server.shutdown()
