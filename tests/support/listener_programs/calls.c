/*
 * Wrong and unusual calls on fanotify groups, each with what it returned:
 *
 *	calls DIRECTORY TMPFS
 *
 * prints `name = result errno`, a line a call. DIRECTORY holds what test_calls.py has made there. Two runs that differ in a line have met
 * two kernels. Expectations are not its business.
 */
#define _GNU_SOURCE
#include "calls.h"

#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *directory, *tmpfs;

void row(const char *name, long result)
{
	int error = errno;

	if (result == -1)
		printf("%s = -1 %s\n", name, strerrorname_np(error));
	else
		printf("%s = %ld\n", name, result);
	fflush(stdout);
}

void row_fd(const char *name, int fd)
{
	int error = errno;

	if (fd >= 0) {
		close(fd);
		printf("%s = descriptor\n", name);
		fflush(stdout);
	} else {
		errno = error;
		row(name, fd);
	}
}

void need(int condition, const char *what)
{
	if (!condition) {
		perror(what);
		exit(1);
	}
}

int new_group(unsigned int flags)
{
	int group = fanotify_init(flags, O_RDONLY | O_LARGEFILE | O_CLOEXEC);

	need(group >= 0, "fanotify_init");
	return group;
}

/* The path of something in the directory; good until some more are asked for. */
const char *in(const char *name)
{
	static char paths[8][PATH_MAX];
	static int next;

	next = (next + 1) % 8;
	snprintf(paths[next], PATH_MAX, "%s/%s", directory, name);
	return paths[next];
}

struct reader start_reading(int group, const char *name)
{
	int queued = 0;

	need(!ioctl(group, FIONREAD, &queued), "FIONREAD");
	struct reader reader = {fork()};
	need(reader.pid >= 0, "fork");
	if (!reader.pid) {
		char byte;
		close(group);
		alarm(20);
		int file = open(in(name), O_RDONLY);
		_exit(file < 0 || pread(file, &byte, 1, 0) < 0 ? errno : 0);
	}
	for (int before = queued; queued == before; usleep(500))
		need(!ioctl(group, FIONREAD, &queued), "FIONREAD");
	return reader;
}

void row_reader(const char *name, struct reader reader)
{
	int status;

	need(waitpid(reader.pid, &status, 0) == reader.pid, "waitpid");
	errno = WEXITSTATUS(status);
	row(name, WIFSIGNALED(status) ? 1000 + WTERMSIG(status) : errno ? -1 : 0);
}

void calls_init(void)
{
	static const struct {
		const char *name;
		unsigned int flags, event_f_flags;
	} rows[] = {
		{"plain", FAN_CLASS_PRE_CONTENT, O_RDONLY},
		{"content", FAN_CLASS_CONTENT, O_RDWR},
		{"notif", FAN_CLASS_NOTIF, O_RDONLY},
		{"everything", FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | FAN_NONBLOCK | FAN_UNLIMITED_QUEUE | FAN_UNLIMITED_MARKS |
				       FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR,
		 O_RDWR | O_APPEND | O_NONBLOCK | O_NOATIME | O_CLOEXEC | O_DSYNC},
		{"audit", FAN_CLASS_PRE_CONTENT | FAN_ENABLE_AUDIT, O_RDONLY},
		{"two-classes", FAN_CLASS_PRE_CONTENT | FAN_CLASS_CONTENT, O_RDONLY},
		{"fid", FAN_CLASS_PRE_CONTENT | FAN_REPORT_FID, O_RDONLY},
		{"names", FAN_CLASS_CONTENT | FAN_REPORT_DFID_NAME, O_RDONLY},
		{"pidfd-and-tid", FAN_CLASS_PRE_CONTENT | FAN_REPORT_PIDFD | FAN_REPORT_TID, O_RDONLY},
		{"unknown-flag", FAN_CLASS_PRE_CONTENT | 0x8000, O_RDONLY},
		{"high-flag", FAN_CLASS_PRE_CONTENT | 0x80000000, O_RDONLY},
		{"access-mode-3", FAN_CLASS_PRE_CONTENT, O_ACCMODE},
		{"create", FAN_CLASS_PRE_CONTENT, O_RDONLY | O_CREAT},
		{"direct", FAN_CLASS_PRE_CONTENT, O_RDONLY | O_DIRECT},
		{"path", FAN_CLASS_PRE_CONTENT, O_PATH},
	};
	char name[64];

	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++) {
		snprintf(name, sizeof(name), "init-%s", rows[i].name);
		ROW_FD(name, fanotify_init(rows[i].flags, rows[i].event_f_flags));
	}
}

/* A path that ends where the readable memory does, its NUL included or not. */
static char *path_at_the_edge(const char *path, int with_end)
{
	long page = sysconf(_SC_PAGESIZE);
	char *memory = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	size_t size = strlen(path) + !!with_end;

	need(memory != MAP_FAILED, "mmap");
	need(!mprotect(memory + page, page, PROT_NONE), "mprotect");
	memcpy(memory + page - size, path, size);
	return memory + page - size;
}

void calls_mark(void)
{
	int pre = new_group(FAN_CLASS_PRE_CONTENT), content = new_group(FAN_CLASS_CONTENT), notif = new_group(FAN_CLASS_NOTIF);
	int file = open(in("file"), O_RDONLY), folder = open(directory, O_RDONLY | O_DIRECTORY);
	int file_path = open(in("file"), O_PATH), folder_path = open(directory, O_PATH | O_DIRECTORY);
	int closed = dup(file), ends[2];
	char long_name[300], endless[PATH_MAX + 10], through_proc[64];

	need(file >= 0 && folder >= 0 && file_path >= 0 && folder_path >= 0 && !pipe(ends), "open");
	close(closed);
	memset(long_name, 'x', sizeof(long_name));
	long_name[sizeof(long_name) - 1] = 0;
	memset(endless, '/', sizeof(endless));
	need(!chdir(directory), "chdir");

	ROW("mark-no-mask", fanotify_mark(pre, FAN_MARK_ADD, 0, AT_FDCWD, in("file")));
	ROW("mark-unknown-event", fanotify_mark(pre, FAN_MARK_ADD, P | 0x80000, AT_FDCWD, in("file")));
	ROW("mark-event-above-32-bits", fanotify_mark(pre, FAN_MARK_ADD, P | 1ull << 40, AT_FDCWD, in("file")));
	ROW("mark-directories", fanotify_mark(pre, FAN_MARK_ADD, P | FAN_ONDIR, AT_FDCWD, directory));
	ROW("mark-create", fanotify_mark(pre, FAN_MARK_ADD, FAN_CREATE, AT_FDCWD, directory));
	ROW("mark-no-command", fanotify_mark(pre, 0, P, AT_FDCWD, in("file")));
	ROW("mark-two-commands", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_REMOVE, P, AT_FDCWD, in("file")));
	ROW("mark-unknown-flag", fanotify_mark(pre, FAN_MARK_ADD | 0x800, P, AT_FDCWD, in("file")));
	ROW("mark-class-content", fanotify_mark(content, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	ROW("mark-class-notif", fanotify_mark(notif, FAN_MARK_ADD, FAN_OPEN_PERM, AT_FDCWD, in("file")));
	ROW("mark-not-marked-remove", fanotify_mark(pre, FAN_MARK_REMOVE, P, AT_FDCWD, in("file")));
	ROW("mark-null-and-file", fanotify_mark(pre, FAN_MARK_ADD, P, file, NULL));
	ROW("mark-null-and-file-remove", fanotify_mark(pre, FAN_MARK_REMOVE, P, file, NULL));
	ROW("mark-null-and-directory", fanotify_mark(pre, FAN_MARK_ADD, P | FAN_EVENT_ON_CHILD, folder, NULL));
	ROW("mark-null-and-o-path", fanotify_mark(pre, FAN_MARK_ADD, P, file_path, NULL));
	ROW("mark-null-and-cwd", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, NULL));
	ROW("mark-null-and-minus-one", fanotify_mark(pre, FAN_MARK_ADD, P, -1, NULL));
	ROW("mark-null-and-closed", fanotify_mark(pre, FAN_MARK_ADD, P, closed, NULL));
	ROW("mark-null-and-group", fanotify_mark(pre, FAN_MARK_ADD, P, pre, NULL));
	ROW("mark-null-and-pipe", fanotify_mark(pre, FAN_MARK_ADD, P, ends[0], NULL));
	ROW("mark-empty-and-directory", fanotify_mark(pre, FAN_MARK_ADD, P, folder, ""));
	ROW("mark-empty-and-cwd", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, ""));
	ROW("mark-relative-to-directory", fanotify_mark(pre, FAN_MARK_ADD, P, folder, "file"));
	ROW("mark-relative-to-o-path", fanotify_mark(pre, FAN_MARK_ADD, P, folder_path, "other"));
	ROW("mark-relative-to-file", fanotify_mark(pre, FAN_MARK_ADD, P, file, "file"));
	ROW("mark-relative-to-closed", fanotify_mark(pre, FAN_MARK_ADD, P, closed, "file"));
	ROW("mark-relative-to-cwd", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, "file"));
	ROW("mark-absolute-and-closed", fanotify_mark(pre, FAN_MARK_ADD, P, closed, in("file")));
	ROW("mark-dot", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, "."));
	ROW("mark-through-proc-self-cwd", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, "/proc/self/cwd/file"));
	snprintf(through_proc, sizeof(through_proc), "/proc/self/fd/%d", file);
	ROW("mark-through-proc-self-fd", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, through_proc));
	snprintf(through_proc, sizeof(through_proc), "/proc/thread-self/fd/%d/file", folder);
	ROW("mark-through-proc-thread-self", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, through_proc));
	ROW("mark-dot-dot", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, "folder/../file"));
	ROW("mark-missing", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("missing")));
	ROW("mark-below-a-file", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("file/file")));
	ROW("mark-file-with-slash", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("file/")));
	ROW("mark-long-name", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in(long_name)));
	ROW("mark-endless-path", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, endless));
	ROW("mark-bad-pointer", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, BAD));
	ROW("mark-path-up-to-the-edge", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, path_at_the_edge(in("file"), 1)));
	ROW("mark-path-over-the-edge", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, path_at_the_edge(in("file"), 0)));
	ROW("mark-onlydir-file", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_ONLYDIR, P, AT_FDCWD, in("file")));
	ROW("mark-onlydir-folder", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_ONLYDIR, P, AT_FDCWD, in("folder")));
	ROW("mark-onlydir-file-descriptor", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_ONLYDIR, P, file, NULL));
	ROW("mark-link", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("link")));
	ROW("mark-link-itself", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_DONT_FOLLOW, P, AT_FDCWD, in("link")));
	ROW("mark-link-to-nowhere", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("nowhere")));
	ROW("mark-fifo", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("fifo")));
	ROW("mark-tmpfs", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, tmpfs));
	ROW("mark-tmpfs-missing", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, "/dev/shm/no such file"));
	ROW("mark-proc", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, "/proc/self/status"));
	ROW("mark-proc-mount", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_OPEN_PERM, AT_FDCWD, "/proc"));
	ROW("mark-pipe-through-proc", fanotify_mark(pre, FAN_MARK_ADD, P, ends[0], "/proc/self/fd"));
	ROW("mark-group-minus-one", fanotify_mark(-1, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	ROW("mark-group-closed", fanotify_mark(closed, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	ROW("mark-group-file", fanotify_mark(file, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	ROW("mark-group-pipe", fanotify_mark(ends[0], FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	ROW("mark-flush-missing", fanotify_mark(pre, FAN_MARK_FLUSH, 0, AT_FDCWD, in("missing")));
	ROW("mark-flush-bad-pointer", fanotify_mark(pre, FAN_MARK_FLUSH, 0, AT_FDCWD, BAD));
	ROW("mark-flushed-remove", fanotify_mark(pre, FAN_MARK_REMOVE, P, AT_FDCWD, in("file")));
	ROW("mark-flush-onlydir", fanotify_mark(pre, FAN_MARK_FLUSH | FAN_MARK_ONLYDIR, 0, AT_FDCWD, NULL));
	ROW("mark-directories-after-all", fanotify_mark(pre, FAN_MARK_ADD, FAN_OPEN_PERM | FAN_ONDIR, AT_FDCWD, in("folder")));
	ROW("mark-pre-access-after-directories", fanotify_mark(pre, FAN_MARK_ADD, P, AT_FDCWD, in("folder")));
	ROW("mark-ignore-folder", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_IGNORE, P, AT_FDCWD, in("folder")));
	ROW("mark-ignore-both-ways", fanotify_mark(pre, FAN_MARK_ADD | FAN_MARK_IGNORE | FAN_MARK_IGNORED_MASK, P, AT_FDCWD, in("file")));
	ROW("mark-ignore-nothing-remove", fanotify_mark(pre, FAN_MARK_REMOVE | FAN_MARK_IGNORE, P, AT_FDCWD, in("other")));
	close(pre);
	close(content);
	close(notif);
}

int main(int argc, char **argv)
{
	need(argc == 3, "calls DIRECTORY TMPFS");
	directory = argv[1];
	tmpfs = argv[2];
	alarm(60); /* a call that never returns ends here, after the line of the one before */
	calls_init();
	calls_mark();
	calls_read();
	calls_readv();
	calls_write();
	calls_descriptor();
	calls_poll();
	calls_copies();
	calls_placed();
	calls_foreign();
	calls_ends();
	return 0;
}
