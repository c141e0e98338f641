"""Where the emulator differs from a real kernel (Linux 6.14 and later; for patch-v1 and patch-v2 from the series as it was posted), and on which
side it errs. None is silent.

One list, from which the README's table is made and against which `fusehsm conform` will judge; each entry names the test that shows it.
Run this module to print the table.
"""

from dataclasses import dataclass
from typing import Final

from fusehsm.linux.kernel_version import kernel_version

ENGINES: Final = ("pyfuse3", "devfuse")


@dataclass(frozen=True, slots=True)
class Divergence:
    """One difference. `name` is short and stays; `difference`, `reason` and `safe` are sentences; `test` is in tests/conform/divergences/;
    `engines` are those that have it, on kernels older than `until` all."""

    name: str
    difference: str
    reason: str
    safe: str
    test: str
    engines: tuple[str, ...] = ENGINES
    until: tuple[int, int] = (0, 0)

    def with_what(self) -> str:
        """The engines, in words."""
        if not any(self.until):
            return ", ".join(self.engines)
        version = ".".join(map(str, self.until))
        return f"{', '.join(self.engines)}; all before Linux {version}"


DIVERGENCES: Final = (
    Divergence(
        name="holes are data",
        difference="SEEK_DATA and SEEK_HOLE find no holes.",
        reason="On a real kernel `cp` of a stub skips its holes: no event, a copy full of zeros.",
        safe="Copies ask for everything.",
        test="test_holes_are_data",
    ),
    Divergence(
        name="mappings ask when touched",
        difference="A mapping's event comes at its first page fault, not at mmap(2); denied, it is SIGBUS and not an error of mmap(2).",
        reason="FUSE tells its server nothing of mmap(2). (Processes under `fusehsm run` are asked for there: docs/run.md.)",
        safe="Nothing is seen that was not asked for; what is mapped and never touched is never fetched.",
        test="test_mappings_ask_when_touched",
    ),
    Divergence(
        name="read-ahead asks",
        difference="posix_fadvise(2), readahead(2) and the kernel's own read-ahead make events.",
        reason="They fill the page cache, from which later reads and mappings are served without asking anybody.",
        safe="More is asked than needed.",
        test="test_read_ahead_asks",
    ),
    Divergence(
        name="files opened before the mark",
        difference="Through a descriptor opened before any mark stood, reads that fill the page cache make events.",
        reason="A real kernel asks nothing there; a cached page would outlive the descriptor and show a stub's zeros to others.",
        safe="More is asked.",
        test="test_files_opened_before_the_mark",
    ),
    Divergence(
        name="empty reads and writes",
        difference="read(2) and write(2) of 0 bytes make no event, nor do sendfile(2), splice(2) and copy_file_range(2) past a file's end.",
        reason="They do not reach a FUSE server.",
        safe="No content is touched.",
        test="test_empty_reads_and_writes",
    ),
    Divergence(
        name="fallocate",
        difference="fallocate(2) fails with EOPNOTSUPP; posix_fallocate(3) writes instead.",
        reason="pyfuse3 has no handler for it.",
        safe="Nothing happens without an event.",
        test="test_fallocate",
        engines=("pyfuse3",),
    ),
    Divergence(
        name="fallocate modes",
        difference="fallocate(2) with FALLOC_FL_COLLAPSE_RANGE, INSERT_RANGE or UNSHARE_RANGE makes no event and fails with EOPNOTSUPP.",
        reason="FUSE refuses them before its server hears of it.",
        safe="Nothing happens; programs that use them fall back to copying.",
        test="test_fallocate_modes",
    ),
    Divergence(
        name="RWF_NOWAIT",
        difference="preadv2(2) with RWF_NOWAIT fails with EOPNOTSUPP; a real kernel makes its event and blocks.",
        reason="FUSE refuses it before its server hears of it.",
        safe="Callers fall back to an ordinary read, which asks.",
        test="test_rwf_nowait",
    ),
    Divergence(
        name="shared mappings (exact)",
        difference="With --events exact, mmap(2) with MAP_SHARED fails with ENODEV.",
        reason="Direct I/O files can be mapped shared from Linux 6.6 on, if asked for in a way that pyfuse3 cannot.",
        safe="An error instead of a mapping; --events first-access has them.",
        test="test_shared_mappings_in_exact_mode",
        engines=("pyfuse3",),
        until=(6, 6),
    ),
    Divergence(
        name="first-access events",
        difference="With --events first-access, events are for what enters the page cache, widened by read-ahead; what is there already makes none.",
        reason="The price of shared mappings and of reads at the page cache's speed.",
        safe="Every byte has been asked for before it is cached.",
        test="test_first_access_events",
    ),
    Divergence(
        name="permission events (first-access)",
        difference="With --events first-access, OPEN_PERM, OPEN_EXEC_PERM and ACCESS_PERM are refused with EOPNOTSUPP.",
        reason="Reads from the page cache do not reach a FUSE server, so not all would be heard.",
        safe="An error instead of events that are missing.",
        test="test_permission_events_in_first_access_mode",
    ),
    Divergence(
        name="opens (first-access)",
        difference="With --events first-access and --cache private, open(2) makes no events in patch-v1 and patch-v2.",
        reason="The kernel opens files without its FUSE server, as quickly as natively.",
        safe="What is then read or written is asked for.",
        test="test_opens_in_first_access_mode",
        engines=("devfuse",),
    ),
    Divergence(
        name="notifications (first-access)",
        difference="With --events first-access, OPEN, ACCESS, MODIFY and CLOSE can be marked and never come.",
        reason="What the page cache serves does not reach a FUSE server, nor do most opens, so listeners would hear of a part and take it for all.",
        safe="Nothing waits for a notification; the kernel's own fanotify and inotify notify on FUSE mounts as on any other.",
        test="test_notifications_in_first_access_mode",
    ),
    Divergence(
        name="notifications of files opened before the mark",
        difference="ACCESS does not come for reads through a descriptor that was opened before a mark asked for it.",
        reason="Such a file is read from the page cache, without its FUSE server.",
        safe="Nothing waits for a notification, and a listener that must not miss a read asks for permission events.",
        test="test_notifications_of_files_opened_before_the_mark",
    ),
    Divergence(
        name="who closes",
        difference="CLOSE_WRITE and CLOSE_NOWRITE give the process that opened the file, also when another one closes it last.",
        reason="The last close of a file comes without its process; who closes which descriptor is told in a way that pyfuse3 cannot ask for.",
        safe="The notification comes, and for the right file.",
        test="test_who_closes",
        engines=("pyfuse3",),
        until=(5, 16),
    ),
    Divergence(
        name="who closes what was marked late",
        difference="CLOSE of directories, and of files opened before the mark, gives who opened; of a file still mapped, who closed its descriptor.",
        reason="The kernel tells its FUSE server who closes only of files, and only if that was asked when they were opened.",
        safe="The notification comes, and for the right file.",
        test="test_who_closes_what_was_marked_late",
    ),
    Divergence(
        name="merging of many",
        difference="Where more than 64 notifications wait to be read, equal ones may come apart that a real kernel would merge into one.",
        reason="So many travel to their listeners ahead of being read, and those that follow later are merged among themselves.",
        safe="Nothing is missing, and programs cannot rely on merging.",
        test="test_many_notifications_are_merged",
    ),
    Divergence(
        name="close(2) does not wait",
        difference="The notification of a close(2) can come a moment after that has returned, but before that of anything its process does then.",
        reason="The kernel tells its FUSE server of the last close without waiting for it.",
        safe="Nothing waits for a notification.",
        test="test_closing_is_told_in_order",
    ),
    Divergence(
        name="pid",
        difference="An event's pid is that of the process that opened the file, also when another one it was handed to reads.",
        reason="pyfuse3 hides who makes a READ or WRITE request.",
        safe="What is asked, and its range, are the same.",
        test="test_pid_is_the_openers",
        engines=("pyfuse3",),
    ),
    Divergence(
        name="mount marks",
        difference="A mark on the mount and a mark on the file system are heard by each other's accesses.",
        reason="All accesses come through one mount, whatever it is bound to elsewhere.",
        safe="More is asked.",
        test="test_mount_marks_cover_bind_mounts",
    ),
    Divergence(
        name="hard links and marks on directories",
        difference="A mark on a directory's children hears a hard-linked file's accesses by its other names too, once the name there is known.",
        reason="FUSE names the file that is opened, not the name.",
        safe="More is asked.",
        test="test_hard_links_and_marks_on_directories",
    ),
    Divergence(
        name="pages in the cache",
        difference="A mapping of bytes that are in the page cache makes no event.",
        reason="The kernel serves it without its FUSE server. Every open(2) of a watched file empties its page cache (exact).",
        safe="An allowed event covered those bytes when they came in.",
        test="test_pages_in_the_cache",
    ),
    Divergence(
        name="sent from the cache",
        difference="sendfile(2), splice(2) and copy_file_range(2) of bytes that are in the page cache make no event.",
        reason="The kernel serves them without its FUSE server, unless it drops those pages when it has answered.",
        safe="An allowed event covered those bytes when they came in.",
        test="test_sent_from_the_cache",
        engines=("pyfuse3",),
    ),
    Divergence(
        name="sent through another descriptor",
        difference="What an open file's first sendfile(2), splice(2) or copy_file_range(2) has read makes no event if another sends it (exact).",
        reason="The first such call goes through the page cache. Every open(2) of a watched file empties it.",
        safe="An allowed event covered those bytes when they came in.",
        test="test_sent_through_another_descriptor",
        engines=("devfuse",),
    ),
    Divergence(
        name="flags of sent files",
        difference="Once sendfile(2), splice(2) or copy_file_range(2) has read a watched file, F_GETFL of its descriptor shows O_DIRECT (exact).",
        reason="Else the kernel would serve the next such call from its page cache, as it does where the mount may not trace the accessor.",
        safe="Such a file has no page cache for O_DIRECT to go past, and wants no alignment.",
        test="test_flags_of_sent_files",
        engines=("devfuse",),
    ),
    Divergence(
        name="calls that fail",
        difference="Calls that fail for their arguments make no event: a bad buffer, a mapping that is not permitted.",
        reason="FUSE refuses them before its server hears of it; a real kernel asks first.",
        safe="No content is touched.",
        test="test_calls_that_fail",
    ),
    Divergence(
        name="O_TMPFILE",
        difference="open(2) with O_TMPFILE fails with EOPNOTSUPP.",
        reason="pyfuse3 has no handler for it, and older kernels no request.",
        safe="Nothing happens without an event; callers make a file with a name instead.",
        test="test_unnamed_files",
        engines=("pyfuse3",),
        until=(6, 1),
    ),
    Divergence(
        name="paths of hard links",
        difference="The event's path is the name of the file that was looked up last, not the one that was used.",
        reason="FUSE names the file that is opened, not the name, and names that the kernel remembers are not looked up again.",
        safe="The same file.",
        test="test_paths_of_hard_links",
    ),
    Divergence(
        name="writers of one file",
        difference="While a write waits for its answer, other writes and truncations of that file wait too, and are asked for after it.",
        reason="FUSE holds the inode's lock while it writes; parallel writes are to be asked for in a way that pyfuse3 cannot.",
        safe="The same events, one after the other; reads do not wait.",
        test="test_writers_of_one_file",
        engines=("pyfuse3",),
        until=(6, 2),
    ),
    Divergence(
        name="writers past the end",
        difference="While a write that makes a file longer or a truncation waits for its answer, other writes and truncations of it wait too.",
        reason="FUSE holds the inode's lock alone while a file's size changes.",
        safe="The same events, one after the other; reads do not wait.",
        test="test_writers_past_the_end",
    ),
    Divergence(
        name="killed before it is read",
        difference="An event whose accessor has been killed is read by its listener all the same; an answer to it is taken and does nothing.",
        reason="Events travel to their listeners ahead of being read.",
        safe="At most a fetch that nobody waits for.",
        test="test_killed_before_it_is_read",
    ),
    Divergence(
        name="the event descriptor's path",
        difference="readlink(2) of an event's descriptor gives the path under SRC; `event.path` is the accessor's.",
        reason="Filling through the mount would ask the listener about itself. With SRC = DST both are the same.",
        safe="The same file.",
        test="test_the_event_descriptors_path",
    ),
    Divergence(
        name="flags of event descriptors",
        difference="With O_CLOEXEC in event_f_flags, F_GETFL of an event's descriptor does not show O_CLOEXEC; F_GETFD shows FD_CLOEXEC.",
        reason="open(2) keeps that bit out of a file's flags; only a kernel that opens for itself leaves it there.",
        safe="The descriptor is closed at exec(3) all the same.",
        test="test_flags_of_event_descriptors",
    ),
    Divergence(
        name="descriptors of directories",
        difference="With O_RDWR or O_WRONLY in event_f_flags, F_GETFL of the descriptor of a directory's event shows O_RDONLY.",
        reason="open(2) opens no directory for writing; only a kernel that opens for itself does.",
        safe="The event comes, the directory can be listed through it, and nobody can write to a directory through either.",
        test="test_descriptors_of_directories",
    ),
    Divergence(
        name="blocks of stubs",
        difference="A watched file without any block on disk shows one block of 512 bytes.",
        reason="`tar -S` takes a file of no blocks for empty of data and stores zeros without reading it.",
        safe="Archives ask for everything; `du` is off by half a KiB for an untouched stub.",
        test="test_blocks_of_stubs",
    ),
    Divergence(
        name="page cache (patch-v1, patch-v2)",
        difference="sendfile(2) and splice(2) from a file ask for whole pages.",
        reason="Those versions ask for exactly the accessor's bytes, and the rest of the page would be cached unasked.",
        safe="More is asked.",
        test="test_page_cache_in_the_old_dialects",
    ),
    Divergence(
        name="copies (patch-v1, patch-v2)",
        difference="copy_file_range(2) asks for whole pages of its source.",
        reason="pyfuse3 has no handler for it, and without one the kernel copies through its page cache.",
        safe="More is asked.",
        test="test_copies_in_the_old_dialects",
        engines=("pyfuse3",),
    ),
    Divergence(
        name="page faults (patch-v1, patch-v2)",
        difference="In a writable shared mapping a page fault asks for PRE_MODIFY (if nobody hears that, PRE_ACCESS), in any other for ACCESS_PERM "
        "and PRE_ACCESS; as posted, a fault that writes asks for the one and a fault that reads for the others.",
        reason="FUSE does not tell its server what the page is wanted for.",
        safe="No page comes in unasked; what is written into a private mapping never reaches the file.",
        test="test_page_faults_in_the_old_dialects",
    ),
    Divergence(
        name="page faults and marks on directories (patch-v1, patch-v2)",
        difference="A mark on a directory's children hears their page faults (PRE_ACCESS and PRE_MODIFY); as posted, it does not.",
        reason="A mapping would show a stub's zeros.",
        safe="More is asked.",
        test="test_page_faults_and_marks_on_directories_in_the_old_dialects",
    ),
    Divergence(
        name="files opened before the mark (patch-v1, patch-v2)",
        difference="Through a descriptor opened while the file was not watched, reads ask for what enters the page cache: whole pages, PRE_ACCESS "
        "alone; as posted, for ACCESS_PERM and for exactly the accessor's bytes, each time.",
        reason="Files that nobody watches have the page cache, which an open file cannot be made to do without later.",
        safe="Every byte has been asked for since it is watched.",
        test="test_files_opened_before_the_mark_in_the_old_dialects",
    ),
    Divergence(
        name="killed with a passed descriptor",
        difference="A killed process that reads through a descriptor which another process opened stays until its event is answered.",
        reason="As for pid: who it is cannot be known, so its death is not noticed.",
        safe="It gets no content; --event-timeout bounds the wait.",
        test="test_killed_with_a_passed_descriptor",
        engines=("pyfuse3",),
    ),
    Divergence(
        name="RENAME_WHITEOUT",
        difference="renameat2(2) with RENAME_WHITEOUT fails with EINVAL.",
        reason="A whiteout is a device node, for overlayfs below; FUSE file systems do not make them.",
        safe="Nothing happens.",
        test="test_rename_whiteout",
    ),
    Divergence(
        name="what ext4 refuses",
        difference="O_DIRECT wants no alignment, and MAP_SHARED ignores MAP_SYNC; ext4 refuses the one with EINVAL, the other with EOPNOTSUPP.",
        reason="What a file system wants is its own affair, and FUSE wants nothing of that.",
        safe="It is asked for as always, and what is written is written.",
        test="test_what_ext4_refuses",
    ),
    Divergence(
        name="requests submitted together",
        difference="The events of requests that one io_submit(2) brings come all at once; on a real kernel each waits for the answer to the last.",
        reason="FUSE begins direct I/O and does not wait for its end.",
        safe="The same events, and each request waits for its own.",
        test="test_requests_submitted_together",
    ),
    Divergence(
        name="asynchronous requests",
        difference="With io_submit(2) and io_uring(7) much makes an event for each piece of it, and appending for where it goes to; a real kernel "
        "makes one for all, and for where it was said to go. What is denied fails as a request, not as io_submit(2).",
        reason="What is asked for is in a system call's arguments, but not of these; and FUSE begins direct I/O and does not wait for its end.",
        safe="The same bytes, and nothing of what is denied.",
        test="test_asynchronous_requests",
    ),
    Divergence(
        name="EAGAIN for io_uring",
        difference="What io_uring(7) is denied with EAGAIN is asked for again and again, until there is another answer; a real kernel asks twice.",
        reason="io_uring repeats a request that fails so, and cannot know why it does.",
        safe="There is no content before it is allowed; every other errno ends it at once.",
        test="test_eagain_for_io_uring",
    ),
    Divergence(
        name="denied while it is mapped",
        difference="mlock(2), and mmap(2) with MAP_POPULATE or MAP_LOCKED, do not return when denied: they ask until they are allowed or killed.",
        reason="The kernel repeats a page fault that fails there, whatever the error.",
        safe="There is no content before it is allowed.",
        test="test_denied_while_it_is_mapped",
    ),
    Divergence(
        name="pages not yet written",
        difference="What is written into a shared mapping reaches SRC at msync(2) or munmap(2), in first-access mode at close(2) too; not at once.",
        reason="It is in the mount's page cache.",
        safe="Whoever reads through the mount sees it at once.",
        test="test_pages_not_yet_written",
    ),
    Divergence(
        name="syncfs",
        difference="syncfs(2), and so `sync -f`, brings nothing of a mount to the disk, and returns 0 all the same.",
        reason="Linux tells only servers of block devices and virtiofs of it (FUSE_SYNCFS); of fsync(2) it tells every server.",
        safe="It is not: use fsync(2), fdatasync(2), msync(2) or O_SYNC, or sync(2), all of which reach the disk.",
        test="test_syncfs",
    ),
    Divergence(
        name="limits",
        difference="A mount carries 128 groups, whose ever, and any number of marks; fs.fanotify.max_user_groups and max_user_marks do not count.",
        reason="Those are for the kernel's own groups and marks.",
        safe="What goes beyond is an error, as on a real kernel; no event is lost.",
        test="test_limits",
    ),
    Divergence(
        name="running programs",
        difference="open(2) for writing of a program that runs fails with ETXTBSY.",
        reason="As without any listener; a real kernel permits it once reads are watched, and so does not know a program that runs.",
        safe="A running program cannot be overwritten; who wants to replace it makes a new file.",
        test="test_running_programs",
    ),
    Divergence(
        name="program start",
        difference="execve(2) makes as many events as pages are read, with other ranges than the kernel's per mapped segment.",
        reason="As for mappings: segments ask when touched.",
        safe="Every byte is asked for before it runs.",
        test="test_program_start",
    ),
)

_BY_NAME: Final = {entry.name: entry for entry in DIVERGENCES}


def applying(name: str, engine: str) -> bool:
    """Whether the emulator with that engine has the divergence of that name on the running kernel. Raises KeyError."""
    entry = _BY_NAME[name]
    return engine in entry.engines or kernel_version() < entry.until


def markdown_table() -> str:
    """The table for the README."""
    rows = [
        f"| {entry.name} | {entry.difference} | {entry.reason} | {entry.safe} | {entry.with_what()} |"
        for entry in DIVERGENCES
    ]
    return "\n".join(
        [
            "| what | how it differs | why | on the safe side, because | with |",
            "| --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


if __name__ == "__main__":
    print(markdown_table())
