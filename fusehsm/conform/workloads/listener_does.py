"""What a listener does while an access waits: fills through descriptors of its own, changes of metadata, work in threads and children, accesses of
its own, and the hand-over of its group. On the emulator it runs under `fusehsm run --listener`.
"""

import mmap
import os
import select
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from fusehsm.conform.executable import write_executable
from fusehsm.conform.listener import LOOK, READ, Call, listening, stubs
from fusehsm.conform.listener import listener_row as row
from fusehsm.conform.listener_worker import PAGE, Listener, content, fill, in_child
from fusehsm.conform.scene import SIZE, Scene
from fusehsm.conform.workload import Workload

# These functions run in the listener's process. They can use the names of listener_worker.py, and no others of this module. On the real kernel the
# listener's accesses through other descriptors than the event's and `own` make events for itself, so it does not read or write through them.

# Fills


def fill_by_own(listener: Listener, start: int, count: int) -> None:
    event = listener.hear()
    listener.do("fill by own", fill, listener.own, start, count)
    listener.say("the same by event", os.pread(event.fd, count, start) == content(start, count))
    listener.answer(event)


def fill_by_both(listener: Listener, start: int, count: int) -> None:
    event = listener.hear()
    half = count // 2
    listener.do("fill by own", fill, listener.own, start, half)
    listener.do("fill by event", fill, event.fd, start + half, count - half)
    listener.answer(event)


def fill_in_pieces(listener: Listener) -> None:
    event = listener.hear()
    for start in range(0, 16384, 1000):
        fill(event.fd if start % 3000 else listener.own, start, 1000)
    os.fsync(listener.own)
    listener.answer(event)


def fill_in_thread(listener: Listener) -> None:
    event = listener.hear()
    own = listener.own
    thread = threading.Thread(target=lambda: fill(own, 0, 2 * PAGE))
    thread.start()
    thread.join()
    listener.answer(event)


def fill_in_child(listener: Listener) -> None:
    event = listener.hear()
    own = listener.own
    listener.say("fill by a child", in_child(lambda: fill(own, 0, 2 * PAGE) and None))
    listener.answer(event)


def fill_by_vectors(listener: Listener) -> None:
    event = listener.hear()
    listener.do("fill", os.pwritev, listener.own, [content(0, PAGE), content(PAGE, PAGE)], 0)
    source = os.memfd_create("source")
    os.pwrite(source, content(2 * PAGE, PAGE), 0)
    os.lseek(listener.own, 2 * PAGE, os.SEEK_SET)
    listener.do("sendfile", os.sendfile, listener.own, source, 0, PAGE)
    listener.answer(event)


def fill_by_mapping(listener: Listener) -> None:
    own = mmap.mmap(listener.own, 4 * PAGE)
    event = listener.hear()
    own[0 : 2 * PAGE] = content(0, 2 * PAGE)
    own.flush()
    own.close()
    listener.answer(event)


# Metadata


def change_by_event(listener: Listener) -> None:
    event = listener.hear()
    fill(event.fd, 0, 2 * PAGE)
    listener.do("utimes", lambda: os.utime(event.fd, ns=(10**18, 10**18 + 7)))
    listener.do("chmod", os.fchmod, event.fd, 0o640)
    listener.do("chown", os.fchown, event.fd, 7, 8)
    listener.do("setxattr", os.setxattr, event.fd, "user.word", b"said")
    listener.answer(event)


def change_by_path(listener: Listener) -> None:
    event = listener.hear()
    fill(listener.own, 0, 2 * PAGE)
    path = listener.path()
    listener.do("utimes", lambda: os.utime(path, ns=(10**18, 10**18 + 7)))
    listener.do("chmod", os.chmod, path, 0o640)
    listener.do("chown", os.chown, path, 7, 8)
    listener.do("setxattr", os.setxattr, path, "user.word", b"said")
    listener.answer(event)


def change_names(listener: Listener) -> None:
    event = listener.hear()
    fill(listener.own, 0, 2 * PAGE)
    listener.do("link", os.link, listener.path(), listener.path("linked"))
    listener.do("rename", os.rename, listener.path(), listener.path("renamed"))
    listener.do("mkdir", os.mkdir, listener.path("file"))
    listener.answer(event)


def replace(listener: Listener) -> None:
    event = listener.hear()
    fill(listener.own, 0, 2 * PAGE)
    new = os.open(listener.path("new"), os.O_RDWR | os.O_CREAT, 0o644)
    listener.do("write to a new file", os.write, new, b"new")
    listener.do("rename over it", os.rename, listener.path("new"), listener.path())
    listener.say("links", os.fstat(event.fd).st_nlink)
    listener.answer(event)


# Threads and processes


def read_in_threads(listener: Listener) -> None:
    event = listener.hear()
    fill(event.fd, 0, 16384)
    found = []

    def read(descriptor: int, start: int) -> None:
        found.append(os.pread(descriptor, PAGE, start) == content(start, PAGE))

    threads = [
        threading.Thread(target=read, args=(descriptor, page * PAGE))
        for page in range(4)
        for descriptor in (event.fd, listener.own)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    listener.say("reads in threads", found)
    listener.answer(event)


def answer_in_threads(listener: Listener) -> None:
    both = threading.Barrier(2)

    def serve() -> None:
        event = listener.hear()
        both.wait()
        fill(event.fd, 0, 2 * PAGE)
        listener.say("answer", "ALLOW")
        both.wait()
        listener.answer(event, silently=True)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def access_itself(listener: Listener, kind: str) -> None:
    done, finished = os.pipe()
    path, own = listener.path(), listener.own
    found: list[object] = []

    def access() -> None:
        if kind == "read":
            found.append(os.pread(os.open(path, os.O_RDONLY), 10, 0))
        elif kind == "write":
            found.append(os.pwrite(os.open(path, os.O_WRONLY), b"new", 0))
        elif kind == "O_TRUNC":
            found.append(os.fstat(os.open(path, os.O_RDWR | os.O_TRUNC)).st_size)
        else:
            os.ftruncate(own, 5000)
            found.append(os.fstat(own).st_size)
        os.close(finished)

    thread = threading.Thread(target=access)
    thread.start()
    waiting = select.poll()
    waiting.register(listener.group, select.POLLIN)
    waiting.register(done, select.POLLIN | select.POLLHUP)
    while not any(descriptor == done for descriptor, _ in waiting.poll()):
        listener.answer(listener.hear())
    thread.join()
    listener.say(kind, found)


def serve_silently(listener: Listener) -> None:
    listener.ended(silently=True)


def serve_in_child(listener: Listener) -> None:
    child = os.fork()
    if child == 0:
        for _ in range(2):
            event = listener.hear()
            fill(event.fd, 0, 2 * PAGE)
            listener.answer(event)
        os._exit(0)
    os.close(listener.group)
    os.waitpid(child, 0)
    os.read(0, 1)
    os._exit(0)


def serve_in_turns(listener: Listener) -> None:
    event = listener.hear()

    def answer() -> None:
        fill(event.fd, 0, 2 * PAGE)
        listener.answer(event)

    in_child(answer)
    os.close(event.fd)


def serve_what_was_sent(listener: Listener) -> None:
    ours, theirs = socket.socketpair()
    group = listener.group
    child = os.fork()
    if child == 0:
        os.close(group)
        # Under `fusehsm run` a received group works if it gets one of its reserved numbers.
        filled = [os.open("/dev/null", os.O_RDONLY)]
        while filled[-1] < group - 1:
            filled.append(os.dup(0))
        _, received, _, _ = socket.recv_fds(theirs, 1, 1)
        for descriptor in filled:
            os.close(descriptor)
        listener.group = received[0]
        event = listener.hear()
        fill(event.fd, 0, 2 * PAGE)
        listener.answer(event)
        os._exit(0)
    socket.send_fds(ours, [b"x"], [group])
    os.waitpid(child, 0)


# These functions run in an accessor. They can use the names that accessor_worker.py gives them, and no others of this module.


def truncate_open_file(path: str, size: int) -> int:
    descriptor = os.open(path, os.O_RDWR)
    os.ftruncate(descriptor, size)
    return os.fstat(descriptor).st_size


def append(path: str, data: bytes) -> int:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    return os.write(descriptor, data)


def send(path: str, count: int) -> bytes:
    target = os.memfd_create("target")
    os.sendfile(target, os.open(path, os.O_RDONLY), 0, count)
    return os.pread(target, count, 0)


def map_and_touch(path: str, place: int) -> bytes:
    # Private: exact mode has no shared mappings before Linux 6.6, which other workloads show.
    with mmap.mmap(os.open(path, os.O_RDONLY), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        return mapping[place : place + 10]


def execute(path: str) -> int:
    child = os.fork()
    if child == 0:
        try:
            os.execve(path, [path], {})
        except OSError as error:
            os._exit(200 + (error.errno or 0))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def program(place: Path) -> None:
    """Make "file" an executable, and "other" a stub."""
    stubs(place)
    write_executable(place / "file")


def at_once(name: str, act: Callable[..., object], *arguments: object) -> Workload:
    """A workload: two accessors read at the same time."""

    async def script(scene: Scene) -> None:
        stubs(scene.backing)
        accessors = [scene.accessor(), scene.accessor()]
        async with listening(scene, act, *arguments) as place:
            calls = [
                scene.start("pread_path", str(place / "file"), 100, 10, by=accessor) for accessor in accessors
            ]
            for call, accessor in zip(calls, accessors, strict=True):
                await scene.end(call, "pread_path", accessor)

    return Workload("listener", name, script, at_once=True, needs_root=True)


WRITE_PAST_END: Call = ("pwrite_path", b"new", 3 * SIZE)
WHOLE: Call = ("read_file",)
FILLED = (0, 2 * PAGE)
ITSELF = "accesses of the listener"
WORKLOADS = [
    row("fill while a read waits", fill_by_own, *FILLED),
    row("fill while a whole file is read", fill_by_own, 0, SIZE, calls=(WHOLE,)),
    row("fill while a write waits", fill_by_own, *FILLED, calls=(("pwrite_path", b"new", 5000), READ)),
    row("fill while a write past the end waits", fill_by_own, *FILLED, calls=(WRITE_PAST_END, READ)),
    row("fill while an append waits", fill_by_own, *FILLED, calls=((append, b"new"), READ)),
    row("fill while a truncation waits", fill_by_own, *FILLED, calls=(("truncate", 5000), READ)),
    row("fill while a truncation to nothing waits", fill_by_own, *FILLED, calls=(("truncate", 0), READ)),
    row("fill while a growing truncation waits", fill_by_own, *FILLED, calls=(("truncate", 3 * SIZE), READ)),
    row("fill while an ftruncate waits", fill_by_own, *FILLED, calls=((truncate_open_file, 5000), READ)),
    row("fill while a sendfile waits", fill_by_own, *FILLED, calls=((send, 100),)),
    row("fill while a mapping waits", fill_by_own, *FILLED, calls=((map_and_touch, 5000),)),
    row("fill by both", fill_by_both, *FILLED, calls=(LOOK,)),
    row("fill by both while a write past the end waits", fill_by_both, *FILLED, calls=(WRITE_PAST_END, READ)),
    row("fill in pieces", fill_in_pieces, calls=(WHOLE,)),
    row("fill in a thread", fill_in_thread),
    row("fill in a child", fill_in_child),
    row("fill by vectors", fill_by_vectors, calls=(WHOLE,)),
    row("fill by a mapping", fill_by_mapping),
    row("attributes by event", change_by_event, calls=(LOOK,)),
    row("attributes by path", change_by_path, calls=(LOOK,)),
    row("attributes while a write waits", change_by_path, calls=(("pwrite_path", b"new", 100), LOOK)),
    row("attributes while a truncation waits", change_by_path, calls=(("truncate", 5000), LOOK)),
    row("names", change_names, calls=(LOOK,)),
    row("names while a write waits", change_names, calls=(("pwrite_path", b"new", 100),)),
    row("another file in its place", replace, calls=(LOOK, LOOK)),
    row("reads in threads", read_in_threads),
    at_once("answers in threads", answer_in_threads),
    *(
        row(f"its own {kind}", access_itself, kind, calls=(), differs=ITSELF)
        for kind in ("read", "write", "ftruncate")
    ),
    row("its own O_TRUNC", access_itself, "O_TRUNC", calls=()),
    row("a program that it has open", serve_silently, calls=((execute,),), make=program),
    row(
        "a program that is not watched and that it has open",
        serve_silently,
        calls=((execute,),),
        make=program,
        mark="other",
        differs="programs that are open for writing",
    ),
    row("a child serves", serve_in_child, calls=(READ, READ)),
    row("a child answers", serve_in_turns),
    row("the group is sent", serve_what_was_sent),
]
