"""What tests stand on: an ext4 image, mounts, accessors; nothing skipped silently; nothing left behind."""

import faulthandler
import itertools
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from fusehsm.conform.accessor import Accessor, Zygote
from fusehsm.conform.sides import ext4_image
from tests.support import engines, fuzzing, guardian, harness, leftovers, tiers
from tests.support.harness import Guardian, Mount
from tests.support.kernel_and_mount import World
from tests.support.notification_groups import TakeNotes, note_taker
from tests.support.posix_trees import WATCHED, State, Tree, allowing_everything, expect_same
from tests.support.requirements import IN_CI, require, require_fuse, require_pre_content_kernel

# A test that takes longer loses its mounts' daemons, so that it fails instead of hanging; none comes near it.
LONGEST_TEST = float(os.environ.get("FUSEHSM_TESTS_LONGEST", "180"))  # seconds

# pytest shows the whole difference of two values where CI is set, and of 50 kB that takes minutes.
if "CI" in os.environ:
    os.environ[IN_CI] = os.environ.pop("CI")

# No test of how long something takes: an emulated machine has no time limit for an example, nor for making one.
hypothesis.settings.register_profile(
    "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any-speed")

MakeMount = Callable[..., Mount]
MakeAccessor = Callable[..., Accessor]


# It needs a kernel with AppArmor, so it runs only where its name is given: `make oldkernel ARGS=tests/test_security_modules.py`.
collect_ignore = ["test_security_modules.py"]

# Engines


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ours."""
    engines.add_option(parser)
    fuzzing.add_options(parser)
    parser.addoption(
        "--sequences",
        type=int,
        default=0,
        metavar="N",
        help="try N new sequences (test_sequences.py) instead of the same few",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test that mounts for each engine."""
    engines.generate(metafunc)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose the engines, and mark what each test needs, before `-m` chooses by marks."""
    engines.modify_items(config, items)
    tiers.mark(items)


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest) -> str:
    """The engine that this test's mounts have."""
    return engines.of(request)


# Skips and leftovers


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """In CI a test that cannot run has failed."""
    outcome: Any = yield
    report = outcome.get_result()
    if report.skipped and os.environ.get(IN_CI) and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"{item.nodeid}: in CI nothing may be skipped: {reason}"


def pytest_configure(config: pytest.Config) -> None:
    """Let every temporary file lie where leftovers are looked for, reachable by other users."""
    if _only_distributes(config):
        return
    # A background job of a shell ignores it, and so would every process that a test ends with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    directory = Path(tempfile.mkdtemp(prefix="fusehsm-tests-"))
    directory.chmod(0o755)
    config.stash[_DIRECTORY] = directory
    tempfile.tempdir = str(directory)
    os.environ["TMPDIR"] = str(directory)
    config.stash[_GUARDIAN] = Guardian(directory, LONGEST_TEST * 1.25)
    # Not what pytest puts there while a test runs.
    faulthandler.register(guardian.SHOW, os.fdopen(os.dup(2), "w"), all_threads=True)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tell the guardian that the tests go on, and require what this one needs."""
    item.config.stash[_GUARDIAN].say(item.nodeid)
    tiers.enter(item)


@pytest.hookimpl(hookwrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
    """Tell the guardian what goes on after a test."""
    what = "clearing up after" if nextitem else "clearing up after all tests, the last of which was"
    item.config.stash[_GUARDIAN].say(f"{what} {item.nodeid}")
    yield
    item.config.stash[_GUARDIAN].say("")


_DIRECTORY = pytest.StashKey[Path]()
_GUARDIAN = pytest.StashKey[Guardian]()
_LEFT = pytest.StashKey[list[str]]()


def _only_distributes(config: pytest.Config) -> bool:
    """Whether this is the process that hands tests out to others (pytest-xdist, -n), each a session of its own."""
    return bool(config.getoption("numprocesses", None)) and not hasattr(config, "workerinput")


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Take note of what one of them has left behind."""
    node.config.stash.setdefault(_LEFT, []).extend(getattr(node, "workeroutput", {}).get("left", []))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail when the session leaves anything behind, and remove it."""
    if _only_distributes(session.config):
        if session.config.stash.get(_LEFT, []):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        return
    session.config.stash[_GUARDIAN].say("looking for what was left behind")
    directory = session.config.stash[_DIRECTORY]
    left = leftovers.leftovers(harness.SESSION, directory)
    for leftover in left:
        leftover.remove()
    session.config.stash[_LEFT] = [leftover.what for leftover in left]
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["left"] = session.config.stash[_LEFT]
    if left:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    leftovers.remove_tree(directory)
    session.config.stash[_GUARDIAN].end()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Say what was left behind."""
    for what in config.stash.get(_LEFT, []):
        terminalreporter.write_line(f"LEFT BEHIND: {what}", red=True)


# Places


@pytest.fixture(scope="session")
def session_directory(pytestconfig: pytest.Config) -> Path:
    """A directory that every user may enter, and that goes with the session."""
    return pytestconfig.stash[_DIRECTORY]


@pytest.fixture(scope="session")
def ext4(session_directory: Path) -> Iterator[Path]:
    """The root of an ext4 image of 4 GiB (sparse), mounted for the session. Needs root."""
    require(
        os.geteuid() == 0, "needs root"
    )  # not require_root(): `places` takes it where it can be had, also for tests that need no root
    with ext4_image(session_directory / "ext4", 4096) as root:
        yield root


@pytest.fixture(scope="session")
def kernel_events(ext4: Path) -> Path:
    """`ext4`, on a kernel that makes pre-content events there."""
    require_pre_content_kernel()
    return ext4


@pytest.fixture(scope="session")
def numbers() -> Iterator[int]:
    """For names that do not repeat in a session."""
    return itertools.count(1)


@pytest.fixture(scope="session")
def places(
    session_directory: Path, numbers: Iterator[int], request: pytest.FixtureRequest
) -> Callable[[str], Path]:
    """Makes a new empty directory: on the ext4 image as root, else in the session's directory; its name begins with the word given."""
    root = request.getfixturevalue("ext4") if os.geteuid() == 0 else session_directory

    def make(word: str) -> Path:
        place: Path = root / f"{word}-{next(numbers)}"
        place.mkdir()
        return place

    return make


@pytest.fixture
def backing(places: Callable[[str], Path]) -> Path:
    """A new directory to be a mount's SRC."""
    return places("backing")


@pytest.fixture
def mount_point(session_directory: Path, numbers: Iterator[int]) -> Path:
    """A new empty directory to be a mount's DST."""
    return _new_mount_point(session_directory, numbers)


def _new_mount_point(session_directory: Path, numbers: Iterator[int]) -> Path:
    place = session_directory / f"mount-{next(numbers)}"
    place.mkdir()
    return place


# Mounts


@pytest.fixture(scope="session")
def fuse() -> None:
    """For tests that mount in their own way: /dev/fuse is usable."""
    require_fuse()


def _mount_maker(
    stack: ExitStack,
    places: Callable[[str], Path],
    session_directory: Path,
    numbers: Iterator[int],
    engine: str = "",
) -> MakeMount:
    def make(*arguments: str, source: Path | None = None, path: Path | None = None, **more: Any) -> Mount:
        source = source or places("backing")
        path = path or _new_mount_point(session_directory, numbers)
        chosen = ("--engine", engine) if engine else ()
        return stack.enter_context(Mount(source, path, *chosen, *arguments, **more))

    return make


@pytest.fixture
def make_mount(
    fuse: None, places: Callable[[str], Path], session_directory: Path, numbers: Iterator[int], engine: str
) -> Iterator[MakeMount]:
    """make_mount(*arguments, source=..., path=..., cwd=..., env=..., uid=...) -> Mount that answers; all go with the test."""
    with ExitStack() as stack:
        yield _mount_maker(stack, places, session_directory, numbers, engine)


@pytest.fixture(scope="module")
def make_shared_mount(
    fuse: None, places: Callable[[str], Path], session_directory: Path, numbers: Iterator[int], engine: str
) -> Iterator[MakeMount]:
    """make_mount, for mounts that a module's tests share."""
    with ExitStack() as stack:
        yield _mount_maker(stack, places, session_directory, numbers, engine)


@pytest.fixture(scope="module")
def make_engine_mount(
    fuse: None, places: Callable[[str], Path], session_directory: Path, numbers: Iterator[int]
) -> Iterator[MakeMount]:
    """make_shared_mount, for fixtures that name the engine among the arguments."""
    with ExitStack() as stack:
        yield _mount_maker(stack, places, session_directory, numbers)


@pytest.fixture(scope="module")
def mounted(make_shared_mount: MakeMount, request: pytest.FixtureRequest) -> Mount:
    """One mount for a module's tests; indirect parameters are the arguments of `fusehsm mount`: [("--events", "exact"), ...]."""
    arguments: tuple[str, ...] = getattr(request, "param", ())
    return make_shared_mount(*arguments)


# The worlds of one expectation


@pytest.fixture(scope="module", params=engines.parameters("kernel"))
def whole_world(request: pytest.FixtureRequest) -> World:
    """The real kernel's events on ext4, then `fusehsm mount --events exact` with each engine."""
    _, engine = request.param
    if not engine:
        root: Path = request.getfixturevalue("kernel_events")
        place = request.getfixturevalue("places")("kernel")
        assert place.is_relative_to(root)
        return World("kernel", place, place)
    make_mount: MakeMount = request.getfixturevalue("make_engine_mount")
    mount = make_mount("--engine", engine, "--events", "exact", "--allow-other")
    return World("emulator", mount.source, mount.path, mount.pid, engine=engine)


@pytest.fixture
def world(whole_world: World, numbers: Iterator[int]) -> World:
    """All worlds, one after the other: an empty directory for the test in each."""
    return whole_world.inside(f"test-{next(numbers)}")


@pytest.fixture
def notes(world: World, make_accessor: MakeAccessor) -> TakeNotes:
    """`async with notes(*marks, flags=..., event_f_flags=...)`: a group that is read when the test says so (tests/support/notification_groups.py)."""
    return note_taker(world, make_accessor())


# The worlds of one POSIX expectation


POSIX_WORLDS: dict[str, tuple[str, ...]] = {
    "private": ("--cache", "private"),
    "shared": ("--cache", "shared"),
    # With a listener on the whole mount that allows everything.
    "exact": ("--events", "exact"),
    "first-access": ("--events", "first-access"),
}


@pytest.fixture(scope="module", params=engines.parameters("native", words=POSIX_WORLDS))
def posix_world(request: pytest.FixtureRequest, places: Callable[[str], Path]) -> Iterator[Tree]:
    """A plain directory, then each kind of mount over another, with each engine."""
    world, engine = request.param
    backing = places(f"posix-{world}")
    backing.chmod(0o755)
    if not engine:
        yield Tree(world, backing, backing)
        return
    make_mount: MakeMount = request.getfixturevalue("make_engine_mount")
    mount = make_mount("--engine", engine, *POSIX_WORLDS[world], "--allow-other", source=backing)
    tree = Tree(world, backing, mount.path, mount.pid, engine)
    if world not in WATCHED:
        yield tree
    else:
        with allowing_everything(mount.path):
            yield tree
    assert mount.process.poll() is None, "the daemon has died"
    assert not [line for line in mount.log.lines if "Traceback" in line or " failed" in line], mount.log.lines


@pytest.fixture(scope="module")
def posix_states() -> dict[str, State]:
    """What each test's directory held at its end in the plain world, which comes first."""
    return {}


@pytest.fixture
def tree(
    posix_world: Tree,
    posix_states: dict[str, State],
    numbers: Iterator[int],
    request: pytest.FixtureRequest,
) -> Iterator[Tree]:
    """An empty directory for the test in each world; afterwards all worlds must hold the same."""
    test = request.node.name.replace(posix_world.name, "*")
    name = f"test-{next(numbers)}"
    (posix_world.backing / name).mkdir(mode=0o755)
    place = replace(posix_world, backing=posix_world.backing / name, path=posix_world.path / name)
    yield place
    held = place.check()
    if place.is_native:
        posix_states[test] = held
    elif test in posix_states:
        expect_same(held, posix_states[test])


# Accessors


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process that accessors are forked from."""
    zygote = Zygote()
    yield zygote
    zygote.close()


@pytest.fixture
def make_accessor(zygote: Zygote) -> Iterator[MakeAccessor]:
    """make_accessor(uid=..., gid=...) -> Accessor; all go with the test."""
    with ExitStack() as stack:
        yield lambda **who: stack.enter_context(Accessor(zygote, **who))


@pytest.fixture
def accessor(make_accessor: MakeAccessor) -> Accessor:
    """A process that does to files what it is told."""
    return make_accessor()


@pytest.fixture
def fuzz_plan(request: pytest.FixtureRequest) -> fuzzing.Plan:
    """Which cases this fuzzer tries (tests/support/fuzzing.py)."""
    return fuzzing.plan_of(request)


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    with harness.watchdog(LONGEST_TEST):
        yield


@pytest.fixture(scope="session", autouse=True)
def _open_files() -> None:
    """Tests that hold many accessors need descriptors, as many as are allowed."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
