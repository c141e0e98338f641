"""The list of all known differences between the emulator and a real kernel, each with its reason and its safe side.

For linux-6.14 the real kernel is Linux 6.14 and later; for patch-v1 and patch-v2 it is the series as it was posted. docs/divergences.md and the
README's summary are made from this list, and `fusehsm conform` judges by it. Each entry names the test that shows it.

Run this module to print docs/divergences.md. With `--summary` it prints the README's list.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from fusehsm.linux.syscalls import kernel_version

ENGINES: Final = ("pyfuse3", "devfuse")


class Topic(Enum):
    """The sections of docs/divergences.md, in the order in which a user meets them."""

    STUBS = "Stubs and file systems as other programs see them"
    MAPPINGS = "Mapped files and running programs"
    CACHE = "Accesses that go through the page cache"
    FIRST_ACCESS = "First-access mode"
    EVENTS = "What an event says, and who hears it"
    WAITING = "Who waits for whom"
    CALLS = "Calls that fail, or make no event"
    ASYNCHRONOUS = "Asynchronous I/O"
    NOTIFICATIONS = "Notifications"
    UNDER_RUN = "Groups under `fusehsm run`"
    OLD_DIALECTS = "The dialects patch-v1 and patch-v2"


@dataclass(frozen=True, slots=True)
class Divergence:
    """One difference."""

    topic: Topic
    """The section that it belongs to."""
    name: str
    """A short name. It stays: workloads, tests and recordings refer to it."""
    difference: str
    """One sentence: the emulator's behaviour."""
    reason: str
    """One sentence: the reason."""
    safe: str
    """One sentence: the reason why no accessor gets a byte without an allowed event, or why no program is misled."""
    test: str
    """The test in tests/conform/divergences/ that shows it."""
    engines: tuple[str, ...] = ENGINES
    """The engines that have it on every kernel."""
    until: tuple[int, int] = (0, 0)
    """All engines have it on kernels older than this (major, minor); (0, 0): no such kernel."""

    def with_what(self) -> str:
        """The engines that have it, as text."""
        if not any(self.until):
            return ", ".join(self.engines)
        older = f"all before Linux {'.'.join(map(str, self.until))}"
        return f"{', '.join(self.engines)}; {older}" if self.engines else older


DIVERGENCES: Final = (
    Divergence(
        topic=Topic.STUBS,
        name="holes are data",
        difference="SEEK_DATA and SEEK_HOLE report that a watched file has no holes, and only with devfuse its listener sees them.",
        reason="A program that skips holes, such as `cp`, would copy a stub as zeros without any event, as it does on a real kernel.",
        safe="A copy asks for every byte.",
        test="test_holes_are_data",
    ),
    Divergence(
        topic=Topic.STUBS,
        name="blocks of stubs",
        difference="A watched file without any block on disk reports one block of 512 bytes.",
        reason="`tar -S` takes a file without blocks for a file without data and stores zeros without a read.",
        safe="An archive asks for every byte, and `du` shows half a KiB for a stub without content.",
        test="test_blocks_of_stubs",
    ),
    Divergence(
        topic=Topic.STUBS,
        name="blocks of stubs for the listener",
        difference="stat(2) of such a file's path shows one block to its listener, too, while fstat(2) of an event's descriptor shows none.",
        reason="The kernel caches the attributes of a file for all processes, so `tar -S` would get the listener's answer as well.",
        safe="`fusehsm run` reports a hole that a listener allows, and with `--listener` the number is the file's own.",
        test="test_blocks_of_stubs_for_the_listener",
    ),
    Divergence(
        topic=Topic.STUBS,
        name="file system id",
        difference="statvfs(3) gives 0 for f_fsid.",
        reason="The answer of a FUSE server to STATFS has no room for it.",
        safe="No content is touched.",
        test="test_file_system_id",
    ),
    Divergence(
        topic=Topic.STUBS,
        name="locks",
        difference="Locks through the mount (flock(2), fcntl(2)) exclude only each other, and not those of an event's descriptor or in SRC.",
        reason="pyfuse3 has no handler for them, so the kernel keeps them by itself.",
        safe="No content is touched, and processes that use the mount exclude each other.",
        test="test_locks",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.STUBS,
        name="locks (first-access)",
        difference="With `--events first-access` and `--cache private`, and without `--locks shared`, locks through the mount exclude only "
        "each other.",
        reason="The kernel opens and closes files there without its FUSE server, which would not see the end of a lock.",
        safe="No content is touched, and processes that use the mount exclude each other.",
        test="test_locks_by_default",
    ),
    Divergence(
        topic=Topic.STUBS,
        name="locks and other descriptors",
        difference="A process's fcntl(2) locks stay when it closes another descriptor of the file, and end when it closes that which it has locked.",
        reason="Only FLUSH would tell it, which makes every close(2) wait for a writer of the file whose event waits.",
        safe="A lock is held for longer, and never for less long.",
        test="test_locks_and_other_descriptors",
        engines=("devfuse",),
    ),
    Divergence(
        topic=Topic.STUBS,
        name="locks of directories",
        difference="flock(2) of a directory through the mount excludes only processes that use the mount.",
        reason="The kernel does not hand it on to a FUSE server.",
        safe="Directories have no content.",
        test="test_locks_of_directories",
    ),
    Divergence(
        topic=Topic.STUBS,
        name="file handles",
        difference="open_by_handle_at(2) fails with ESTALE once the kernel has forgotten the file, so a mount cannot be exported by NFS.",
        reason="A file handle of a FUSE mount has the number of a node, from which the backing's file is not found again without its name.",
        safe="The caller gets an error, and never another file.",
        test="test_file_handles",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="mappings ask when touched",
        difference="A mapping makes its event at the first page fault and not at mmap(2), so a denial is SIGBUS and not an error of mmap(2).",
        reason="The kernel sends a FUSE server no request for mmap(2), but processes under `fusehsm run` ask at mmap(2) ([run.md](run.md)).",
        safe="No process sees a byte without an allowed event, and a mapping that is never touched fetches nothing.",
        test="test_mappings_ask_when_touched",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="shared mappings (exact)",
        difference="With `--events exact`, mmap(2) with MAP_SHARED fails with ENODEV.",
        reason="Direct I/O files can be mapped shared from Linux 6.6 on if the FUSE server asks for it, and pyfuse3 cannot ask.",
        safe="The accessor gets an error and no mapping, and `--events first-access` has shared mappings.",
        test="test_shared_mappings_in_exact_mode",
        engines=("pyfuse3",),
        until=(6, 6),
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="pages in the cache",
        difference="A mapping of bytes that are in the page cache makes no event.",
        reason="The kernel serves those pages without its FUSE server until the next open(2) of the watched file empties its page cache (exact).",
        safe="An allowed event covered those bytes when they came in.",
        test="test_pages_in_the_cache",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="pages not yet written",
        difference="Bytes that are written to a shared mapping reach SRC at msync(2) or munmap(2), in first-access mode also at "
        "close(2), and not at once.",
        reason="They are in the page cache of the mount.",
        safe="Every process that reads through the mount sees them at once.",
        test="test_pages_not_yet_written",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="denied while it is mapped",
        difference="mlock(2), and mmap(2) with MAP_POPULATE or MAP_LOCKED, do not return when they are denied: they ask again until they "
        "are allowed or killed.",
        reason="The kernel repeats a page fault that fails there, for every error.",
        safe="There is no content before it is allowed.",
        test="test_denied_while_it_is_mapped",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="program start",
        difference="execve(2) makes its events for the pages that are read, and not for each mapped segment.",
        reason="Segments are mappings, and mappings ask when they are touched.",
        safe="Every byte is asked for before it runs.",
        test="test_program_start",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="programs that are read again",
        difference="execve(2) of a program whose second read is denied reads it a second time, with events like those of the first.",
        reason="Kernels with loadable modules look for one that knows the program's format, and then try again, which Linux 6.14 ended.",
        safe="The listener is asked again, and the errno of execve(2) is the same.",
        test="test_what_older_kernels_do",
        engines=(),
        until=(6, 14),
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="running programs",
        difference="open(2) of a running program for writing fails with ETXTBSY, and so does execve(2) of a program that is open for writing.",
        reason="This is the kernel's rule without a listener, and a real kernel drops it when reads of the program are watched.",
        safe="A running program cannot be overwritten, and a new file can replace it.",
        test="test_running_programs",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="programs that are open for writing",
        difference="execve(2) of a file that a process has open for writing below the mount, as a listener under `fusehsm run --listener` does, "
        "works, while a real kernel refuses it with ETXTBSY if reads of the file are not watched.",
        reason="The kernel counts the writers of the mount's file and of the file below it separately.",
        safe="The program is read through the mount, so it asks as always.",
        test="test_programs_that_are_open_for_writing",
    ),
    Divergence(
        topic=Topic.MAPPINGS,
        name="space for mappings",
        difference="A store into a shared mapping that finds no space is an error of msync(2) or fsync(2), and no SIGBUS.",
        reason="FUSE asks its server for space only when the kernel writes the page back.",
        safe="The page is written with the rights of who has opened the file, or of its owner where the kernel tells of no open, and takes no "
        "space that is kept for root.",
        test="test_space_for_mappings",
    ),
    Divergence(
        topic=Topic.CACHE,
        name="read-ahead asks",
        difference="posix_fadvise(2), readahead(2) and the kernel's own read-ahead make events.",
        reason="They fill the page cache, which serves later reads and mappings without an event.",
        safe="The listener is asked for more.",
        test="test_read_ahead_asks",
    ),
    Divergence(
        topic=Topic.CACHE,
        name="files opened before the mark",
        difference="Reads that fill the page cache make events also through a descriptor that was opened before the mark.",
        reason="A cached page outlives the descriptor and would show a stub's zeros to others, although a real kernel makes no event there.",
        safe="The listener is asked for more.",
        test="test_files_opened_before_the_mark",
    ),
    Divergence(
        topic=Topic.CACHE,
        name="sent from the cache",
        difference="sendfile(2), splice(2) and copy_file_range(2) of bytes that are in the page cache make no event.",
        reason="The kernel serves them without its FUSE server, unless the server dropped those pages after an earlier answer.",
        safe="An allowed event covered those bytes when they came in.",
        test="test_sent_from_the_cache",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.CACHE,
        name="sent through another descriptor",
        difference="The bytes of an open file's first sendfile(2), splice(2) or copy_file_range(2) make no event when another descriptor "
        "sends them (exact).",
        reason="That first call goes through the page cache, which the next open(2) of the watched file empties.",
        safe="An allowed event covered those bytes when they came in.",
        test="test_sent_through_another_descriptor",
        engines=("devfuse",),
    ),
    Divergence(
        topic=Topic.CACHE,
        name="flags of sent files",
        difference="F_GETFL of a watched file's descriptor shows O_DIRECT after sendfile(2), splice(2) or copy_file_range(2) has read "
        "from it (exact).",
        reason="Without O_DIRECT the kernel serves the next such call from its page cache, as it does where the mount may not trace the accessor.",
        safe="O_DIRECT has no effect there: the file has no page cache to go past and needs no alignment.",
        test="test_flags_of_sent_files",
        engines=("devfuse",),
    ),
    Divergence(
        topic=Topic.CACHE,
        name="reads after a denial",
        difference="When a read into the page cache was denied and no listener can be asked about the file any more, the first read of the "
        "same bytes by each other thread within a second is denied with the same errno.",
        reason="Reads of one page wait for each other in the kernel, and those that have waited behind the denied one cannot be told from new ones.",
        safe="A listener that denies all that waits and closes its group lets no access pass.",
        test="test_reads_after_a_denial",
    ),
    Divergence(
        topic=Topic.CACHE,
        name="opened while a page waits",
        difference="A file that is opened while a page of it waits for a listener is read through the page cache at first, so reads of pages that "
        "are there make no event, a read of the page that waits waits with it, and with pyfuse3 each page of a read makes one.",
        reason="In the other mode mmap(2) would drop the pages and wait for the one that is locked, with the process's memory locked.",
        safe="No page is there that was not asked for, pages of older events are dropped before, and every other page is asked for.",
        test="test_opened_while_a_page_waits",
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="first-access events",
        difference="With `--events first-access`, an event is for what enters the page cache, widened by read-ahead, and bytes that are "
        "there already make none.",
        reason="This is the price of shared mappings and of reads at the speed of the page cache.",
        safe="Every byte is asked for before it is cached.",
        test="test_first_access_events",
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="files opened before the mark for notifications (per-file)",
        difference="With `--events per-file`, reads of a file that was opened while groups asked only for its pre-content events make no "
        "FAN_ACCESS for a group that asks for it later, if they are served by the page cache.",
        reason="The kernel decides at open(2) whether a file uses the page cache.",
        safe="Nothing waits for a notification, and the next open(2) has them.",
        test="test_files_opened_before_the_mark_for_notifications",
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="eviction through an event (first-access)",
        difference="With `--events first-access` and `--cache private`, content that a listener evicts or replaces through an event's descriptor, "
        "which is open on SRC, is still read from the page cache.",
        reason="The mount does not see such a change, so a listener calls `fusehsm.drop(path)` after it, or uses `fusehsm.leased(path)`.",
        safe="Accessors get the bytes that an allowed event covered, and never those of a hole.",
        test="test_eviction_through_an_event_in_first_access_mode",
        engines=("devfuse",),
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="content longer than the stub (first-access)",
        difference="With `--events first-access`, the read that makes the event of a stub ends where the stub ended, although its listener has made "
        "the file longer.",
        reason="For a read from the page cache the kernel has looked up the size before it asks for the first page.",
        safe="The accessor gets a short read of right bytes, and the next read gets the rest.",
        test="test_content_longer_than_the_stub_in_first_access_mode",
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="permission events (first-access)",
        difference="With `--events first-access`, OPEN_PERM, OPEN_EXEC_PERM and ACCESS_PERM are refused with EOPNOTSUPP.",
        reason="Reads from the page cache do not reach a FUSE server, so a listener would miss some of these events.",
        safe="The listener gets an error instead of a part of the events.",
        test="test_permission_events_in_first_access_mode",
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="opens (first-access)",
        difference="With `--events first-access` and `--cache private`, open(2) makes no events in patch-v1 and patch-v2.",
        reason="The kernel opens files without its FUSE server, as fast as natively.",
        safe="All later reads and writes make events.",
        test="test_opens_in_first_access_mode",
        engines=("devfuse",),
    ),
    Divergence(
        topic=Topic.FIRST_ACCESS,
        name="notifications (first-access)",
        difference="With `--events first-access`, OPEN, ACCESS, MODIFY and CLOSE can be marked and never come.",
        reason="Reads from the page cache and most opens do not reach a FUSE server, so a listener would hear only a part of them.",
        safe="No access waits for a notification, and the kernel's own fanotify and inotify notify on FUSE mounts as on any other.",
        test="test_notifications_in_first_access_mode",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="pages of every mount",
        difference="What enters the page cache is accessed by every mount: sendfile(2), splice(2), touched mappings, and in first-access mode "
        "each read.",
        reason="The page cache belongs to the file, and shows its pages by every mount.",
        safe="The event comes although the mount is not marked, or is marked to be ignored.",
        test="test_pages_of_every_mount",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="unknown mounts",
        difference="An access whose mount cannot be told is heard by the marks on every mount, and no mount's ignore mark counts: io_uring, an "
        "open(2) through /proc/PID/fd, and with pyfuse3 a read of a file that was opened before the mark.",
        reason="FUSE names the file and not the mount, which the accessor's system call must tell.",
        safe="Events are more, never fewer.",
        test="test_unknown_mounts",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="the event descriptor's path",
        difference="readlink(2) of an event's descriptor gives the path under SRC, and `event.path` is the accessor's path under DST.",
        reason="A fill through the mount would make events for its own listener, and with SRC = DST both paths are the same.",
        safe="Both paths lead to the same file.",
        test="test_the_event_descriptors_path",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="pid",
        difference="The pid of an event is that of the process that opened the file, also when another process reads through the same open file.",
        reason="pyfuse3 hides the process that makes a READ or WRITE request.",
        safe="The events and their ranges are the same.",
        test="test_pid_is_the_openers",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="mount marks",
        difference="A mark on the mount that fusehsm made hears the accesses by every mount of its tree: bind mounts, clones, and copies in "
        "other mount namespaces.",
        reason="A container sees the tree by a mount of its own, where it would read a stub's zeros, as it does on the real kernel.",
        safe="The listener is asked for more, and a mark on another mount or an ignore mark on any means that one mount.",
        test="test_mount_marks_cover_bind_mounts",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="hard links and marks on directories",
        difference="A mark on a directory's children also hears accesses to a hard-linked file by its other names, once the name in that "
        "directory is known.",
        reason="A FUSE request names the file and not the name that was used.",
        safe="The listener is asked for more.",
        test="test_hard_links_and_marks_on_directories",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="paths of hard links",
        difference="The path of an event is the name of the file that was looked up last, and not always the name that was used.",
        reason="A FUSE request names the file and not the name that was used, and the kernel does not look up a name that it has cached.",
        safe="All names lead to the same file.",
        test="test_paths_of_hard_links",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="flags of event descriptors",
        difference="With O_CLOEXEC in event_f_flags, F_GETFL of an event's descriptor does not show O_CLOEXEC, but F_GETFD shows FD_CLOEXEC.",
        reason="open(2) removes that bit from the flags of a file, and only the kernel's internal open keeps it.",
        safe="exec(3) closes the descriptor all the same.",
        test="test_flags_of_event_descriptors",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="descriptors of directories",
        difference="With O_RDWR or O_WRONLY in event_f_flags, F_GETFL of the descriptor of a directory's event shows O_RDONLY.",
        reason="open(2) opens no directory for writing, and only the kernel's own open does.",
        safe="The event comes, its descriptor lists the directory, and no process can write to a directory through either.",
        test="test_descriptors_of_directories",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="limits",
        difference="A mount carries 128 groups of all users together and any number of marks, and fs.fanotify.max_user_groups and "
        "max_user_marks have no effect.",
        reason="Those two limit the kernel's own groups and marks.",
        safe="One group too many is an error, as on a real kernel, and no event is lost.",
        test="test_limits",
    ),
    Divergence(
        topic=Topic.EVENTS,
        name="accesses of the listener",
        difference="Under `fusehsm run --listener` the listener's own accesses, and those of its children, make no events.",
        reason="They use the files below the overlay, and no FUSE server is asked.",
        safe="The listener knows what it has filled, and every other process asks.",
        test="test_accesses_of_the_listener",
    ),
    Divergence(
        topic=Topic.WAITING,
        name="mapping a file that was opened before",
        difference="If a file was open before a page fault of another process in it began to wait, mmap(2) of it waits for that page's answer "
        "and cannot be killed.",
        reason="For a file whose reads make exact events the kernel drops all cached pages in mmap(2) and waits for those that are locked, "
        "and it sends its FUSE server no request for mmap(2).",
        safe="An open(2) in that time gives a descriptor that does not wait, `--event-timeout` bounds the wait, and no content is touched.",
        test="test_mapping_a_file_that_was_opened_before",
    ),
    Divergence(
        topic=Topic.WAITING,
        name="writers of one file",
        difference="While a write waits for its answer, other writes and truncations of the same file wait too and are asked for after it.",
        reason="FUSE holds the inode's lock during a write unless its server asks for parallel writes, and pyfuse3 cannot ask.",
        safe="The same events come one after the other, and reads do not wait.",
        test="test_writers_of_one_file",
        engines=("pyfuse3",),
        until=(6, 2),
    ),
    Divergence(
        topic=Topic.WAITING,
        name="closing beside a writer",
        difference="While a write waits for its answer, close(2) of any descriptor of the same file waits too.",
        reason="At close(2), older kernels take the inode's lock, which the writer holds, also where the server has said that it needs no FLUSH "
        "(FOPEN_NOFLUSH, since Linux 5.16).",
        safe="It ends with the write's answer, and no content is touched.",
        test="test_what_older_kernels_do",
        engines=(),
        until=(5, 16),
    ),
    Divergence(
        topic=Topic.WAITING,
        name="writers past the end",
        difference="While a truncation or a write that makes a file longer waits for its answer, other writes and truncations of the "
        "same file wait too.",
        reason="FUSE holds the inode's lock alone while the size of a file changes.",
        safe="The same events come one after the other, and reads do not wait.",
        test="test_writers_past_the_end",
    ),
    Divergence(
        topic=Topic.WAITING,
        name="killed before it is read",
        difference="A listener also reads an event whose accessor was killed meanwhile, and its answer is accepted and has no effect.",
        reason="The mount sends events to a listener before the listener reads them.",
        safe="At most, the listener fetches content that no process waits for.",
        test="test_killed_before_it_is_read",
    ),
    Divergence(
        topic=Topic.WAITING,
        name="killed with a passed descriptor",
        difference="A killed process that reads through a descriptor which another process opened stays until its event is answered.",
        reason="pyfuse3 hides the process that reads, so the mount does not notice its end.",
        safe="The process gets no content, and `--event-timeout` bounds the wait.",
        test="test_killed_with_a_passed_descriptor",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.CALLS,
        name="empty reads and writes",
        difference="read(2) and write(2) of 0 bytes make no event, nor do sendfile(2), splice(2) and copy_file_range(2) past the end of a file.",
        reason="They do not reach a FUSE server.",
        safe="No content is touched.",
        test="test_empty_reads_and_writes",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="calls that fail",
        difference="A call that fails because of its arguments, such as a bad buffer or a mapping that is not permitted, makes no event.",
        reason="FUSE refuses it without a request to its server, while a real kernel makes the event first.",
        safe="No content is touched.",
        test="test_calls_that_fail",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="RWF_NOWAIT",
        difference="preadv2(2) with RWF_NOWAIT fails with EOPNOTSUPP, while a real kernel makes its event and blocks.",
        reason="FUSE refuses it without a request to its server.",
        safe="Callers fall back to an ordinary read, which makes an event.",
        test="test_rwf_nowait",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="ioctls of files",
        difference="ioctl(2) of a file or directory fails with ENOTTY, also that of `lsattr` and `chattr`.",
        reason="pyfuse3 has no handler for it.",
        safe="Nothing is changed, and no content is touched.",
        test="test_ioctls_of_files",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.CALLS,
        name="maps of extents",
        difference="ioctl(2) with FS_IOC_FIEMAP fails with EOPNOTSUPP.",
        reason="It does not reach a FUSE server.",
        safe="Programs that look for holes in this way read everything instead.",
        test="test_maps_of_extents",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="zeros by fallocate",
        difference="fallocate(2) with FALLOC_FL_ZERO_RANGE fails with EOPNOTSUPP.",
        reason="Older kernels do not hand it on to a FUSE server (fs/fuse/file.c, since Linux 5.14).",
        safe="Nothing happens without an event.",
        test="test_what_older_kernels_do",
        engines=(),
        until=(5, 14),
    ),
    Divergence(
        topic=Topic.CALLS,
        name="fallocate",
        difference="fallocate(2) fails with EOPNOTSUPP, and posix_fallocate(3) writes instead.",
        reason="pyfuse3 has no handler for it.",
        safe="Nothing happens without an event.",
        test="test_fallocate",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.CALLS,
        name="fallocate modes",
        difference="fallocate(2) with FALLOC_FL_COLLAPSE_RANGE, INSERT_RANGE or UNSHARE_RANGE makes no event and fails with EOPNOTSUPP.",
        reason="FUSE refuses them without a request to its server.",
        safe="Nothing happens, and programs that use them fall back to copying.",
        test="test_fallocate_modes",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="O_TMPFILE",
        difference="open(2) with O_TMPFILE fails with EOPNOTSUPP.",
        reason="pyfuse3 has no handler for it, and older kernels have no request for it.",
        safe="Nothing happens without an event, and callers make a file with a name instead.",
        test="test_unnamed_files",
        engines=("pyfuse3",),
        until=(6, 1),
    ),
    Divergence(
        topic=Topic.CALLS,
        name="RENAME_WHITEOUT",
        difference="renameat2(2) with RENAME_WHITEOUT fails with EINVAL.",
        reason="A whiteout is a device node that overlayfs makes in its layers, and FUSE file systems do not make them.",
        safe="Nothing happens.",
        test="test_rename_whiteout",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="what ext4 refuses",
        difference="O_DIRECT needs no alignment and MAP_SHARED ignores MAP_SYNC, while ext4 fails with EINVAL and EOPNOTSUPP.",
        reason="Each file system has such rules of its own, and FUSE has none.",
        safe="The access makes its event as always, and writes take effect.",
        test="test_what_ext4_refuses",
    ),
    Divergence(
        topic=Topic.CALLS,
        name="syncfs",
        difference="syncfs(2), and so `sync -f`, brings nothing of a mount to the disk and returns 0 all the same.",
        reason="Linux reports it (FUSE_SYNCFS) only to servers of block devices and of virtiofs, and fsync(2) to every server.",
        safe="It is not: use fsync(2), fdatasync(2), msync(2), O_SYNC or sync(2), all of which reach the disk.",
        test="test_syncfs",
    ),
    Divergence(
        topic=Topic.ASYNCHRONOUS,
        name="requests submitted together",
        difference="The requests of one io_submit(2) make their events all at once, while on a real kernel each waits for "
        "the answer to the one before.",
        reason="FUSE begins direct I/O and does not wait for its end.",
        safe="The events are the same, and each request waits for its own answer.",
        test="test_requests_submitted_together",
    ),
    Divergence(
        topic=Topic.ASYNCHRONOUS,
        name="asynchronous requests",
        difference="A large request of io_submit(2) or io_uring(7) makes an event for each piece, the event of an appending one has its real "
        "offset, and a denial fails the request and not io_submit(2).",
        reason="The arguments of such a request are not those of a system call, and FUSE begins direct I/O and does not wait for its end.",
        safe="The events cover the same bytes, and nothing that is denied is transferred.",
        test="test_asynchronous_requests",
    ),
    Divergence(
        topic=Topic.ASYNCHRONOUS,
        name="EAGAIN for io_uring",
        difference="A request of io_uring(7) that is denied with EAGAIN asks again until it gets another answer, while a real kernel asks twice.",
        reason="io_uring repeats a request that fails with EAGAIN and cannot know the cause.",
        safe="There is no content before it is allowed, and every other errno ends the request at once.",
        test="test_eagain_for_io_uring",
    ),
    Divergence(
        topic=Topic.NOTIFICATIONS,
        name="notifications of files opened before the mark",
        difference="ACCESS does not come for reads through a descriptor that was opened before a mark asked for it.",
        reason="Such a file is read from the page cache, without its FUSE server.",
        safe="No access waits for a notification, and a listener that must not miss a read marks permission events.",
        test="test_notifications_of_files_opened_before_the_mark",
    ),
    Divergence(
        topic=Topic.NOTIFICATIONS,
        name="who closes",
        difference="CLOSE_WRITE and CLOSE_NOWRITE name the process that opened the file, also when another process closes it last.",
        reason="The last close of a file reaches the server without its process, and pyfuse3 cannot ask for a request at each close.",
        safe="The notification comes, and for the right file.",
        test="test_who_closes",
        engines=("pyfuse3",),
        until=(5, 16),
    ),
    Divergence(
        topic=Topic.NOTIFICATIONS,
        name="who closes what was marked late",
        difference="CLOSE of a directory, or of a file opened before the mark, names the process that opened it, and CLOSE of a file "
        "that is still mapped names the process that closed its descriptor.",
        reason="The kernel names the closing process only for files, and only if the FUSE server asked for it when they were opened.",
        safe="The notification comes, and for the right file.",
        test="test_who_closes_what_was_marked_late",
    ),
    Divergence(
        topic=Topic.NOTIFICATIONS,
        name="merging of many",
        difference="When more than 64 notifications wait to be read, equal ones that a real kernel merges into one may come as several.",
        reason="The mount sends the first 64 to the listener before it reads them, and merges later ones among themselves.",
        safe="Nothing is missing, and programs cannot rely on merging.",
        test="test_many_notifications_are_merged",
    ),
    Divergence(
        topic=Topic.NOTIFICATIONS,
        name="close(2) does not wait",
        difference="The notification of a close(2) can come a moment after the call has returned, but before any event of a later call of "
        "its process.",
        reason="The kernel tells its FUSE server of the last close without waiting for it.",
        safe="No access waits for a notification.",
        test="test_closing_is_told_in_order",
    ),
    Divergence(
        topic=Topic.UNDER_RUN,
        name="groups outside of the tree",
        difference="A group that a process outside of the tree of `fusehsm run` receives (SCM_RIGHTS, pidfd_getfd(2)) cannot be read, written or "
        "marked there, and each of these calls fails with EINVAL.",
        reason="A seccomp filter holds for the processes that begin with it, and no other process can get it.",
        safe="The receiver gets an error and neither an event nor a byte, and accessors wait as long as any process holds the group.",
        test="test_groups_outside_of_the_tree",
    ),
    Divergence(
        topic=Topic.OLD_DIALECTS,
        name="page cache (patch-v1, patch-v2)",
        difference="sendfile(2) and splice(2) from a file ask for whole pages.",
        reason="These dialects ask for exactly the accessor's bytes, so the rest of the page would be cached without an event.",
        safe="The listener is asked for more.",
        test="test_page_cache_in_the_old_dialects",
    ),
    Divergence(
        topic=Topic.OLD_DIALECTS,
        name="copies (patch-v1, patch-v2)",
        difference="copy_file_range(2) asks for whole pages of its source.",
        reason="pyfuse3 has no handler for it, so the kernel copies through its page cache.",
        safe="The listener is asked for more.",
        test="test_copies_in_the_old_dialects",
        engines=("pyfuse3",),
    ),
    Divergence(
        topic=Topic.OLD_DIALECTS,
        name="page faults (patch-v1, patch-v2)",
        difference="A page fault makes PRE_MODIFY in a writable shared mapping (PRE_ACCESS if no group hears PRE_MODIFY), and ACCESS_PERM "
        "and PRE_ACCESS in any other mapping, for reads and for writes.",
        reason="In the series as posted this depends on whether the fault reads or writes, and FUSE does not tell its server.",
        safe="No page comes in without an event, and bytes written to a private mapping never reach the file.",
        test="test_page_faults_in_the_old_dialects",
    ),
    Divergence(
        topic=Topic.OLD_DIALECTS,
        name="page faults and marks on directories (patch-v1, patch-v2)",
        difference="A mark on a directory's children hears the children's page faults (PRE_ACCESS and PRE_MODIFY), while in the series as "
        "posted it does not.",
        reason="Otherwise a mapping would show a stub's zeros.",
        safe="The listener is asked for more.",
        test="test_page_faults_and_marks_on_directories_in_the_old_dialects",
    ),
    Divergence(
        topic=Topic.OLD_DIALECTS,
        name="files opened before the mark (patch-v1, patch-v2)",
        difference="Reads through a descriptor that was opened while the file was not watched make PRE_ACCESS alone, for the whole pages "
        "that enter the page cache, and not each time ACCESS_PERM and PRE_ACCESS for exactly the accessor's bytes.",
        reason="A file that is not watched uses the page cache, and FUSE cannot change this for a file that is open.",
        safe="Every byte is asked for from the mark on.",
        test="test_files_opened_before_the_mark_in_the_old_dialects",
    ),
)

#: The entries in the README.
MOST_IMPORTANT: Final = (
    "holes are data",
    "mappings ask when touched",
    "read-ahead asks",
    "first-access events",
    "writers past the end",
)

_BY_NAME: Final = {entry.name: entry for entry in DIVERGENCES}

_INTRODUCTION: Final = """\
# What differs from a real kernel

This page is generated from `fusehsm/conform/divergences.py`; [howto-divergence.md](howto-divergence.md) explains how to add a row.

`fusehsm conform` runs more than 700 workloads twice: on an ext4 image with the real kernel's events, and on the emulator. It compares the events
that a listener reads, byte for byte, and the results of the system calls. If the kernel has no such events, or the user is not root, it compares
with streams that were recorded on Linux 6.18. [conform.md](conform.md) has the result. Every known difference is a row below. A test in
`tests/conform/divergences/` shows each row on the real kernel and on the emulator.

The last column names the engines (`--engine`) that have the difference. *Exact* and *first-access* are the modes of `--events`
([mount.md](mount.md#exact-and-first-access)).
"""
_TABLE_HEAD: Final = """\
| name | how it differs | why | on the safe side, because | with |
| --- | --- | --- | --- | --- |
"""


def applying(name: str, engine: str) -> bool:
    """Whether the emulator with this engine has the divergence `name` on the running kernel. Raises KeyError for an unknown name."""
    entry = _BY_NAME[name]
    return engine in entry.engines or kernel_version() < entry.until


def limits(names: Iterable[str]) -> set[tuple[int, int]]:
    """The kernels (major, minor) before which those divergences hold with all engines, as far as the running kernel is older."""
    return {_BY_NAME[name].until for name in names if kernel_version() < _BY_NAME[name].until}


def markdown_page() -> str:
    """The whole of docs/divergences.md."""
    sections = [f"\n## {topic.value}\n\n{_TABLE_HEAD}{_rows(topic)}" for topic in Topic]
    return _INTRODUCTION + "".join(sections)


def markdown_summary() -> str:
    """The list in the README."""
    return "".join(f"* **{name}**: {_BY_NAME[name].difference}\n" for name in MOST_IMPORTANT)


def _rows(topic: Topic) -> str:
    return "".join(
        f"| {entry.name} | {entry.difference} | {entry.reason} | {entry.safe} | {entry.with_what()} |\n"
        for entry in DIVERGENCES
        if entry.topic is topic
    )


if __name__ == "__main__":
    print(markdown_summary() if "--summary" in sys.argv else markdown_page(), end="")
