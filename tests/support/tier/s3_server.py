"""A real object store for tests, on loopback: OpenStack Swift, whose proxy speaks S3.

    with swift(place) as s3:
        s3.make_bucket("bucket")
        s3.upload(directory, "bucket", "some/prefix")
        fusehsm("populate", "s3://bucket/some/prefix", target, env=s3.environment)

Nothing of it outlives the `with`. Several machines' worth of clients may use one at a time.
"""

import os
import pwd
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import botocore.session
from botocore.config import Config

from tests.support.requirements import require
from tests.support.tier.servers import free_port, free_ports, started, wait_for

_KEY: Final = "tests:somebody"
_SECRET: Final = "a-secret-of-the-tests"
_SCRIPTS: Final = Path(sysconfig.get_path("scripts"))
_AT_ONCE: Final = 8  # uploads

# One device, one replica, one zone. Run in a process of its own: swift's modules change the whole interpreter.
RINGS = """
import sys
from swift.common.ring import RingBuilder
for kind, port in zip(("account", "container", "object"), map(int, sys.argv[2:])):
    builder = RingBuilder(2, 1, 0)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": port, "device": "d", "weight": 1})
    builder.rebalance()
    builder.get_ring().save(f"{sys.argv[1]}/{kind}.ring.gz")
"""

SWIFT = """
[swift-hash]
swift_hash_path_suffix = tests
[storage-policy:0]
name = one
default = yes
"""

STORAGE = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {place}
devices = {place}/devices
mount_check = false
disable_fallocate = true
fallocate_reserve = 0
workers = 0
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""

PROXY = """
[DEFAULT]
bind_ip = 127.0.0.1
bind_port = {port}
user = {user}
swift_dir = {place}
workers = 0
[pipeline:main]
pipeline = catch_errors gatekeeper cache listing_formats bulk s3api tempauth copy slo dlo symlink proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
[filter:catch_errors]
use = egg:swift#catch_errors
[filter:gatekeeper]
use = egg:swift#gatekeeper
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:{cache_port}
[filter:listing_formats]
use = egg:swift#listing_formats
[filter:bulk]
use = egg:swift#bulk
[filter:s3api]
use = egg:swift#s3api
max_bucket_listing = 100
[filter:tempauth]
use = egg:swift#tempauth
user_tests_somebody = {secret} .admin
user_tests_stranger = {secret}
[filter:slo]
use = egg:swift#slo
[filter:copy]
use = egg:swift#copy
[filter:dlo]
use = egg:swift#dlo
[filter:symlink]
use = egg:swift#symlink
"""


@dataclass(frozen=True)
class S3:
    """A running object store. `endpoint`: its URL. `access_key`: whose requests these are."""

    place: Path
    endpoint: str
    cache_port: int
    access_key: str = _KEY
    secret_key: str = field(default=_SECRET, repr=False)

    @property
    def environment(self) -> Mapping[str, str]:
        """The environment in which s3://BUCKET/PREFIX is this store, and in which no setting of the user counts."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def set_environment(self, setenv: Callable[[str, str], None]) -> None:
        """Make s3:// mean this store wherever `setenv` (pytest's MonkeyPatch.setenv) sets variables."""
        for name, value in self.environment.items():
            setenv(name, value)

    @cached_property
    def client(self) -> Any:
        """botocore's client, for any number of threads."""
        return botocore.session.Session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            config=Config(max_pool_connections=_AT_ONCE),
        )

    def make_bucket(self, name: str) -> str:
        """Make an empty bucket, and return its URL."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def put(self, bucket: str, key: str, content: bytes = b"", **more: Any) -> None:
        """Make or replace an object; `more` goes to put_object (Metadata, ...)."""
        self.client.put_object(Bucket=bucket, Key=key, Body=content, **more)

    def put_many(self, bucket: str, contents: Mapping[str, bytes]) -> None:
        """put(), several at a time."""
        with ThreadPoolExecutor(_AT_ONCE) as threads:
            for _ in threads.map(lambda key: self.put(bucket, key, contents[key]), contents):
                pass

    def put_parts(self, bucket: str, key: str, parts: list[bytes]) -> None:
        """Make an object in several parts, each but the last of 5 MiB at least."""
        where = {"Bucket": bucket, "Key": key}
        upload = {**where, "UploadId": self.client.create_multipart_upload(**where)["UploadId"]}
        made = [
            {
                "PartNumber": number,
                "ETag": self.client.upload_part(**upload, PartNumber=number, Body=part)["ETag"],
            }
            for number, part in enumerate(parts, 1)
        ]
        self.client.complete_multipart_upload(**upload, MultipartUpload={"Parts": made})

    def upload(self, directory: Path, bucket: str, prefix: str = "") -> None:
        """An object for every file below `directory`, and for every empty directory a marker (a key that ends in a slash)."""
        contents: dict[str, bytes] = {}
        for place, directories, files in os.walk(directory):
            within = os.path.join(prefix, os.path.relpath(place, directory)).removesuffix("/.")
            within = "" if within == "." else within
            for name in files:
                contents[os.path.join(within, name)] = Path(place, name).read_bytes()
            if within and not directories and not files:
                contents[within + "/"] = b""
        self.put_many(bucket, contents)

    @contextmanager
    def another_door(self) -> Iterator["tuple[S3, subprocess.Popen[str]]"]:
        """The same store at another endpoint, whose process a test may kill."""
        with _proxy(self.place, self.cache_port) as (endpoint, process):
            yield S3(self.place, endpoint, self.cache_port), process


@contextmanager
def swift(place: Path) -> Iterator[S3]:
    """Swift with one replica on one device, which is a directory in `place`; needs extended attributes there."""
    cache = shutil.which("memcached")
    require(cache is not None, "needs memcached")
    require((_SCRIPTS / "swift-proxy-server").exists(), "needs swift (run scripts/bootstrap.sh tests)")
    (place / "devices" / "d").mkdir(parents=True)
    (place / "swift.conf").write_text(SWIFT)
    kinds = ("account", "container", "object")
    cache_port, *ports = free_ports(1 + len(kinds))
    subprocess.run([sys.executable, "-c", RINGS, str(place), *map(str, ports)], check=True)
    with ExitStack() as stack:
        listening = ["-l", "127.0.0.1", "-p", str(cache_port), "-U", "0"]
        stack.enter_context(started([str(cache), *listening, "-m", "16", "-u", _user()], place / "cache.log"))
        # All at once: what takes long is that each loads its modules.
        storage = [
            (stack.enter_context(_server(place, kind, port, STORAGE)), kind, port)
            for kind, port in zip(kinds, ports, strict=True)
        ]
        endpoint, _ = stack.enter_context(_proxy(place, cache_port))
        for process, kind, port in storage:
            wait_for(process, port, place / f"{kind}-{port}.log")
        yield S3(place, endpoint, cache_port)


@contextmanager
def _proxy(place: Path, cache_port: int) -> "Iterator[tuple[str, subprocess.Popen[str]]]":
    port = free_port()
    with _server(place, "proxy", port, PROXY, cache_port) as process:
        wait_for(process, port, place / f"proxy-{port}.log")
        yield f"http://127.0.0.1:{port}", process


@contextmanager
def _server(
    place: Path, kind: str, port: int, text: str, cache_port: int = 0
) -> "Iterator[subprocess.Popen[str]]":
    name = place / f"{kind}-{port}"
    values = {"kind": kind, "port": port, "place": place, "user": _user(), "secret": _SECRET}
    name.with_suffix(".conf").write_text(text.format(**values, cache_port=cache_port))
    command = [sys.executable, str(_SCRIPTS / f"swift-{kind}-server"), str(name.with_suffix(".conf")), "-v"]
    with started(command, name.with_suffix(".log")) as process:
        yield process


def _user() -> str:
    """Ourselves: all of them want to become somebody when root starts them."""
    return pwd.getpwuid(os.geteuid()).pw_name
