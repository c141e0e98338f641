/* Calls on copies of groups, on what has a group's number, and at a group's end. */
#define _GNU_SOURCE
#include "calls.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

/* Copies with numbers that the program chose. */
void calls_placed(void)
{
	int group = marked_group(PRE);

	ROW("placed-dup2", dup2(group, 310));
	ROW("placed-read", read(310, buffer, sizeof(buffer)));
	row_queued("placed-fionread", 310);
	ROW("placed-mark", fanotify_mark(310, FAN_MARK_ADD, P, AT_FDCWD, in("folder")));
	ROW("placed-dup2-again", dup2(group, 310));
	struct reader reader = start_reading(group, "file");
	close(group);
	ROW("placed-read-event", read(310, buffer, sizeof(buffer)));
	row_answer("placed-answered", 310, event_fd_at(0), FAN_DENY | ENOSPC << 24);
	row_reader("placed-reader", reader);
	ROW("placed-close", close(310));
	ROW("placed-read-closed", read(310, buffer, sizeof(buffer)));
}

/* Other files with the numbers that groups have, or had. */
void calls_foreign(void)
{
	int group = marked_group(PRE), file = open(in("folder/mine"), O_RDWR), high = fcntl(file, F_DUPFD, 960);

	need(file >= 0 && high >= 960, "folder/mine");
	ROW("foreign-read", read(high, buffer, sizeof(buffer)));
	ROW("foreign-seek", lseek(high, 2, SEEK_SET));
	ROW("foreign-write", write(high, "12", 2));
	row_queued("foreign-fionread", high);
	ROW("foreign-flags", fcntl(high, F_GETFL) & ~O_LARGEFILE);
	ROW("foreign-mark", fanotify_mark(high, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	ROW_FD("foreign-dup", dup(high));
	ROW("foreign-close", close(high));

	ROW("over-seek", lseek(file, 0, SEEK_SET));
	ROW("over-dup2", dup2(file, group) == group ? 0 : -1);
	ROW("over-read", read(group, buffer, sizeof(buffer)));
	ROW("over-seek-end", lseek(group, 0, SEEK_END));
	ROW("over-mark", fanotify_mark(group, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	struct pollfd wanted = {.fd = group, .events = POLLIN | POLLOUT};
	ROW("over-poll", poll(&wanted, 1, 0));
	ROW("over-revents", wanted.revents);
	close(group);

	group = marked_group(PRE);
	ROW("range-close", close_range(group, group, 0));
	ROW("range-read", read(group, buffer, sizeof(buffer)));
	close(file);
}

/* Groups that go while somebody waits for them, and many at a time. */
void calls_ends(void)
{
	int group = marked_group(PRE), groups[60];

	struct reader read_one = start_reading(group, "file"), queued = start_reading(group, "other");
	need(read(group, buffer, EVENT) == EVENT, "read");
	ROW("end-close", close(group));
	row_reader("end-unanswered-reader", read_one);
	row_reader("end-queued-reader", queued);
	close(event_fd_at(0));

	group = marked_group(PRE);
	int copy = dup(group);
	need(copy >= 0, "dup");
	struct reader last = {fork()};
	need(last.pid >= 0, "fork");
	if (!last.pid) { /* of all copies, a child's is the last to go */
		close(group);
		usleep(100000);
		_exit(0);
	}
	close(copy);
	struct reader reader = start_reading(group, "file");
	close(group);
	row_reader("end-in-a-child", last);
	row_reader("end-in-a-child-reader", reader);

	/* Whose event it is, the number alone tells; numbers are each process's own. The event that was read first is answered first. */
	group = marked_group(PRE);
	read_one = start_reading(group, "file");
	need(read(group, buffer, sizeof(buffer)) == EVENT, "read");
	queued = start_reading(group, "other");
	last.pid = fork();
	need(last.pid >= 0, "fork");
	if (!last.pid) {
		int same = event_fd_at(0);
		close(same);
		need(read(group, buffer, sizeof(buffer)) == EVENT && event_fd_at(0) == same, "the same number");
		_exit(answer(group, same, FAN_DENY | EIO << 24, 8) == 8 ? 0 : errno);
	}
	row_reader("end-same-number-denied", last);
	row_reader("end-same-number-read-first", read_one);
	row_answer("end-same-number-allowed", group, event_fd_at(0), FAN_ALLOW);
	row_reader("end-same-number-read-second", queued);
	close(event_fd_at(0));
	close(group);

	int made = 0;
	for (int i = 0; i < 60; i++) {
		groups[i] = fanotify_init(PRE, O_RDONLY);
		made += groups[i] >= 0 && !fanotify_mark(groups[i], FAN_MARK_ADD, P, AT_FDCWD, in("file"));
	}
	ROW("end-sixty-groups", made);
	for (int i = 0; i < 60; i++)
		close(groups[i]);
	reader.pid = fork();
	need(reader.pid >= 0, "fork");
	if (!reader.pid) {
		int file = open(in("file"), O_RDONLY);
		_exit(pread(file, buffer, 1, 0) == 1 ? 0 : errno);
	}
	row_reader("end-nobody-asks", reader);
}
