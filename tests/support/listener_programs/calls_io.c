/* Calls on a group's descriptor. */
#define _GNU_SOURCE
#include "calls.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <termios.h>
#include <unistd.h>

char buffer[4096] __attribute__((aligned(8)));

int marked_group(unsigned int flags)
{
	int group = new_group(flags);

	for (const char *const *name = (const char *const[]){"file", "other", "third", NULL}; *name; name++)
		need(!fanotify_mark(group, FAN_MARK_ADD, P, AT_FDCWD, in(*name)), *name);
	return group;
}

int event_fd_at(size_t place)
{
	return ((struct fanotify_event_metadata *)(buffer + place))->fd;
}

ssize_t answer(int group, int fd, unsigned int response, size_t size)
{
	struct {
		struct fanotify_response response;
		char more[64];
	} bytes = {.response = {fd, response}};

	return write(group, &bytes, size);
}

void row_answer(const char *name, int group, int fd, unsigned int response)
{
	ROW(name, answer(group, fd, response, sizeof(struct fanotify_response)));
}

void row_queued(const char *name, int group)
{
	int queued = -7;

	ROW(name, ioctl(group, FIONREAD, &queued) ? -1 : queued);
}

void calls_read(void)
{
	long page = sysconf(_SC_PAGESIZE);
	char *edge = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int group = marked_group(PRE);

	need(edge != MAP_FAILED && !mprotect(edge + page, page, PROT_NONE), "mprotect");
	ROW("read-empty", read(group, buffer, sizeof(buffer)));
	ROW("read-empty-nothing", read(group, buffer, 0));
	ROW("read-empty-bad-pointer", read(group, BAD, sizeof(buffer)));
	ROW("read-empty-kernel-pointer", read(group, (void *)-4096, sizeof(buffer)));
	row_queued("fionread-empty", group);
	ROW("fionread-bad-pointer", ioctl(group, FIONREAD, BAD));
	ROW("ioctl-unknown", ioctl(group, TCGETS, buffer));

	struct reader reader = start_reading(group, "file");
	row_queued("fionread-one", group);
	ROW("read-nothing", read(group, buffer, 0));
	ROW("read-one-byte", read(group, buffer, 1));
	ROW("read-metadata-only", read(group, buffer, 24));
	ROW("read-one-byte-short", read(group, buffer, EVENT - 1));
	row_queued("fionread-still-one", group);
	ROW("read-just-enough", read(group, buffer, EVENT));
	row_queued("fionread-read", group);
	ROW("read-again", read(group, buffer + EVENT, EVENT));
	row_answer("read-answered", group, event_fd_at(0), FAN_ALLOW);
	row_reader("read-reader", reader);

	reader = start_reading(group, "file");
	ROW("read-bad-pointer", read(group, BAD, sizeof(buffer)));
	row_reader("read-bad-pointer-reader", reader);
	reader = start_reading(group, "file");
	ROW("read-over-the-edge", read(group, edge + page - 30, EVENT));
	row_reader("read-over-the-edge-reader", reader);
	reader = start_reading(group, "file");
	ROW("read-up-to-the-edge", read(group, edge + page - EVENT, sizeof(buffer)));
	row_answer("read-up-to-the-edge-answered", group, ((struct fanotify_event_metadata *)(edge + page - EVENT))->fd, FAN_ALLOW);
	row_reader("read-up-to-the-edge-reader", reader);

	struct reader readers[] = {start_reading(group, "file"), start_reading(group, "other"), start_reading(group, "third")};
	row_queued("fionread-three", group);
	ROW("read-two-and-a-half", read(group, buffer, 2 * EVENT + EVENT / 2));
	row_queued("fionread-one-of-three", group);
	ROW("read-third", read(group, buffer + 2 * EVENT, sizeof(buffer) - 2 * EVENT));
	for (int i = 2; i >= 0; i--)
		row_answer("read-three-answered", group, event_fd_at(i * EVENT), FAN_ALLOW);
	for (int i = 0; i < 3; i++)
		row_reader("read-three-reader", readers[i]);
	close(group);
}

static void interrupted(int number)
{
	(void)number;
}

/* A full first part is no reason to return: the kernel reads again for the second, and waits there with an event in its hands. */
static void calls_readv_waiting(void)
{
	int group = marked_group(FAN_CLASS_PRE_CONTENT);
	struct iovec parts[] = {{buffer, EVENT}, {buffer + EVENT, EVENT}};
	struct sigaction action = {.sa_handler = interrupted}, before;
	struct itimerval soon = {.it_value = {0, 200000}}, left;
	struct reader reader = start_reading(group, "file");

	need(!sigaction(SIGALRM, &action, &before) && !setitimer(ITIMER_REAL, &soon, NULL), "setitimer");
	ROW("readv-until-interrupted", readv(group, parts, 2));
	need(!getitimer(ITIMER_REAL, &left), "getitimer");
	ROW("readv-was-interrupted", !left.it_value.tv_usec);
	need(!sigaction(SIGALRM, &before, NULL), "sigaction");
	alarm(60);
	row_answer("readv-until-interrupted-answered", group, event_fd_at(0), FAN_ALLOW);
	row_reader("readv-until-interrupted-reader", reader);
	close(group);
}

void calls_readv(void)
{
	int group = marked_group(PRE);
	struct iovec whole = {buffer, sizeof(buffer)}, parts[3];

	ROW("readv-empty", readv(group, &whole, 1));
	ROW("readv-no-parts", readv(group, &whole, 0));
	ROW("readv-minus-one-parts", readv(group, &whole, -1));
	ROW("readv-too-many-parts", readv(group, &whole, 5000));
	ROW("readv-bad-parts", readv(group, BAD, 1));
	parts[0] = (struct iovec){buffer, (size_t)-1};
	ROW("readv-negative-size", readv(group, parts, 1));
	parts[0] = (struct iovec){BAD, 0};
	ROW("readv-empty-of-nothing", readv(group, parts, 1));
	ROW("preadv2-at-position", preadv2(group, &whole, 1, -1, 0));
	ROW("preadv2-at-zero", preadv2(group, &whole, 1, 0, 0));
	ROW("preadv2-without-waiting", preadv2(group, &whole, 1, -1, RWF_NOWAIT));

	struct reader readers[] = {start_reading(group, "file"), start_reading(group, "other"), start_reading(group, "third")};
	parts[0] = (struct iovec){buffer, 0};
	parts[1] = (struct iovec){buffer, 20};
	ROW("readv-nothing-then-too-little", readv(group, parts, 2));
	parts[0] = (struct iovec){buffer, EVENT - 1};
	parts[1] = (struct iovec){buffer + EVENT, sizeof(buffer) - EVENT};
	ROW("readv-too-little-then-enough", readv(group, parts, 2));
	parts[0] = (struct iovec){buffer, 0};
	parts[1] = (struct iovec){buffer, EVENT};
	parts[2] = (struct iovec){buffer, 20};
	ROW("readv-nothing-enough-too-little", readv(group, parts, 3));
	row_queued("readv-queued", group);
	parts[0] = (struct iovec){buffer, EVENT + 20};
	parts[1] = (struct iovec){buffer + 2 * EVENT, 1000};
	ROW("readv-more-than-one-each", readv(group, parts, 2));
	row_queued("readv-queued-then", group);
	row_answer("readv-answered", group, event_fd_at(0), FAN_ALLOW);
	parts[0] = (struct iovec){buffer, EVENT};
	parts[1] = (struct iovec){buffer + EVENT, EVENT};
	ROW("readv-one-each", readv(group, parts, 2));
	row_answer("readv-answered", group, event_fd_at(0), FAN_ALLOW);
	row_answer("readv-answered", group, event_fd_at(EVENT), FAN_ALLOW);
	for (int i = 0; i < 3; i++)
		row_reader("readv-reader", readers[i]);
	close(group);
	calls_readv_waiting();
}

struct audit_rule {
	struct fanotify_response response;
	unsigned char type, pad;
	uint16_t length;
	uint32_t rule, subject, object;
};

static void row_probe(const char *name, int group, int fd, unsigned int response, size_t size)
{
	struct {
		struct audit_rule rule;
		char more[8];
	} probe = {{{fd, response}, 1, 0, 16, 0, 0, 0}, ""};

	ROW(name, write(group, &probe, size));
}

void calls_write(void)
{
	int group = marked_group(PRE), content = new_group(FAN_CLASS_CONTENT), file = open(in("file"), O_RDONLY);
	struct iovec parts[2];

	need(file >= 0, "file");
	row_answer("write-no-event", group, file, FAN_ALLOW);
	row_answer("write-standard-output", group, 1, FAN_ALLOW);
	row_answer("write-minus-one", group, -1, FAN_ALLOW);
	row_answer("write-minus-five", group, -5, FAN_DENY);
	ROW("write-bad-pointer", write(group, BAD, 8));
	row_probe("probe-info", group, FAN_NOFD, FAN_ALLOW | FAN_INFO, 24);
	row_probe("probe-errno", group, FAN_NOFD, FAN_DENY | FAN_INFO | EIO << 24, 24);
	row_probe("probe-bad-errno", group, FAN_NOFD, FAN_DENY | FAN_INFO | ENOENT << 24, 24);
	row_probe("probe-errno-of-content", content, FAN_NOFD, FAN_DENY | FAN_INFO | EIO << 24, 24);
	row_probe("probe-content", content, FAN_NOFD, FAN_DENY | FAN_INFO, 24);
	row_probe("probe-without-info", group, FAN_NOFD, FAN_DENY | EIO << 24, 8);
	row_probe("probe-short-record", group, FAN_NOFD, FAN_ALLOW | FAN_INFO, 20);
	row_probe("probe-long-record", group, FAN_NOFD, FAN_ALLOW | FAN_INFO, 32);

	struct reader reader = start_reading(group, "file");
	row_answer("write-unread", group, file, FAN_ALLOW);
	need(read(group, buffer, sizeof(buffer)) == EVENT, "read");
	int fd = event_fd_at(0), copy = dup(fd);
	row_answer("write-copy", group, copy, FAN_ALLOW);
	row_answer("write-zero", group, fd, 0);
	row_answer("write-both", group, fd, FAN_ALLOW | FAN_DENY);
	row_answer("write-unknown-bit", group, fd, FAN_ALLOW | 0x40);
	row_answer("write-audit", group, fd, FAN_ALLOW | FAN_AUDIT);
	row_answer("write-info-without-record", group, fd, FAN_ALLOW | FAN_INFO);
	row_answer("write-allow-with-errno", group, fd, FAN_ALLOW | EIO << 24);
	row_answer("write-deny-enoent", group, fd, FAN_DENY | ENOENT << 24);
	row_answer("write-deny-255", group, fd, FAN_DENY | 255u << 24);
	row_answer("write-other-group", content, fd, FAN_ALLOW);
	ROW("write-nothing", answer(group, fd, FAN_ALLOW, 0));
	ROW("write-one-byte", answer(group, fd, FAN_ALLOW, 1));
	ROW("write-half", answer(group, fd, FAN_ALLOW, 4));
	ROW("write-one-byte-short", answer(group, fd, FAN_ALLOW, 7));
	row_answer("write-deny-eio", group, fd, FAN_DENY | EIO << 24);
	row_answer("write-twice", group, fd, FAN_ALLOW);
	row_reader("write-reader", reader);

	struct reader two[] = {start_reading(group, "file"), start_reading(group, "other")};
	need(read(group, buffer, sizeof(buffer)) == 2 * EVENT, "read");
	struct fanotify_response responses[2] = {{event_fd_at(0), FAN_ALLOW}, {event_fd_at(EVENT), FAN_DENY}};
	ROW("write-two-at-once", write(group, responses, sizeof(responses)));
	parts[0] = (struct iovec){responses, 8};
	parts[1] = (struct iovec){responses + 1, 8};
	ROW("writev-answered-and-not", writev(group, parts, 2));
	ROW("writev-not-and-answered", writev(group, (struct iovec[]){parts[1], parts[0]}, 2));
	ROW("writev-no-parts", writev(group, parts, 0));
	for (int i = 0; i < 2; i++)
		row_reader("write-two-reader", two[i]);

	reader = start_reading(group, "file");
	need(read(group, buffer, sizeof(buffer)) == EVENT, "read");
	ROW("write-twelve-bytes", answer(group, event_fd_at(0), FAN_DENY | ENOSPC << 24, 12));
	row_reader("write-twelve-bytes-reader", reader);
	reader = start_reading(group, "file");
	need(read(group, buffer, sizeof(buffer)) == EVENT, "read");
	close(event_fd_at(0));
	row_answer("write-after-close", group, event_fd_at(0), FAN_DENY);
	row_reader("write-after-close-reader", reader);
	reader = start_reading(group, "file");
	need(read(group, buffer, sizeof(buffer)) == EVENT, "read");
	row_probe("write-with-record", group, event_fd_at(0), FAN_DENY | FAN_INFO | EBUSY << 24, 24);
	row_reader("write-with-record-reader", reader);
	close(copy);
	close(file);
	close(content);
	close(group);
}

void calls_descriptor(void)
{
	int group = marked_group(FAN_CLASS_PRE_CONTENT), other = new_group(PRE);
	int flags = fcntl(group, F_GETFL), ends[2];

	need(!pipe(ends), "pipe");
	ROW("flags", flags & ~O_LARGEFILE);
	ROW("flags-nonblocking", fcntl(other, F_GETFL) & ~O_LARGEFILE);
	ROW("set-nonblocking", fcntl(group, F_SETFL, flags | O_NONBLOCK));
	ROW("set-nonblocking-flags", fcntl(group, F_GETFL) & ~O_LARGEFILE);
	ROW("set-nonblocking-read", read(group, buffer, sizeof(buffer)));
	ROW("set-blocking", fcntl(group, F_SETFL, flags));
	ROW("set-blocking-flags", fcntl(group, F_GETFL) & ~O_LARGEFILE);
	int on = 1;
	ROW("fionbio", ioctl(group, FIONBIO, &on));
	ROW("fionbio-read", read(group, buffer, sizeof(buffer)));
	ROW("fionbio-flags", fcntl(group, F_GETFL) & ~O_LARGEFILE);
	ROW("close-on-exec", fcntl(group, F_GETFD));
	ROW("close-on-exec-cloexec", fcntl(other, F_GETFD));
	ROW("set-close-on-exec", fcntl(group, F_SETFD, FD_CLOEXEC));
	ROW("set-close-on-exec-flag", fcntl(group, F_GETFD));
	ROW("fcntl-unknown", fcntl(group, 9999));
	ROW("fcntl-pipe-size", fcntl(group, F_GETPIPE_SZ));
	ROW("seek-set", lseek(group, 0, SEEK_SET));
	ROW("seek-set-far", lseek(group, 100000, SEEK_SET));
	ROW("seek-current", lseek(group, 5, SEEK_CUR));
	ROW("seek-end", lseek(group, 0, SEEK_END));
	ROW("seek-unknown", lseek(group, 0, 99));
	ROW("pread", pread(group, buffer, sizeof(buffer), 0));
	ROW("pwrite", pwrite(group, buffer, 8, 0));
	ROW("mmap", mmap(NULL, 4096, PROT_READ, MAP_SHARED, group, 0) == MAP_FAILED ? -1 : 0);
	ROW("ftruncate", ftruncate(group, 0));
	ROW("fsync", fsync(group));
	ROW("fdatasync", fdatasync(group));
	ROW("fallocate", fallocate(group, 0, 0, 4096));
	ROW("fchdir", fchdir(group));
	ROW("splice", splice(group, NULL, ends[1], NULL, 4096, SPLICE_F_NONBLOCK));
	ROW("sendfile-from", sendfile(ends[1], group, NULL, 4096));
	close(group);
	close(other);
}

static void row_poll(const char *name, int group, short events)
{
	struct pollfd wanted = {.fd = group, .events = events, .revents = 0};
	char text[64];

	ROW(name, poll(&wanted, 1, 0));
	snprintf(text, sizeof(text), "%s-revents", name);
	errno = 0;
	row(text, wanted.revents);
}

static void row_select(const char *name, int group)
{
	fd_set readable, writable, other;

	FD_ZERO(&readable);
	FD_ZERO(&writable);
	FD_ZERO(&other);
	FD_SET(group, &readable);
	FD_SET(group, &writable);
	FD_SET(group, &other);
	struct timeval now = {0, 0};
	ROW(name, select(group + 1, &readable, &writable, &other, &now));
}

void calls_poll(void)
{
	int group = marked_group(PRE), epoll = epoll_create1(0);
	struct epoll_event level = {.events = EPOLLIN | EPOLLOUT}, edge = {.events = EPOLLIN | EPOLLET}, found;
	short everything = POLLIN | POLLPRI | POLLOUT | POLLRDNORM | POLLRDBAND | POLLWRNORM | POLLWRBAND;

	row_poll("poll-empty", group, everything);
	row_select("select-empty", group);
	ROW("epoll-add", epoll_ctl(epoll, EPOLL_CTL_ADD, group, &level));
	ROW("epoll-add-twice", epoll_ctl(epoll, EPOLL_CTL_ADD, group, &level));
	ROW("epoll-empty", epoll_wait(epoll, &found, 1, 0));
	struct reader reader = start_reading(group, "file");
	ROW("epoll-waits", epoll_wait(epoll, &found, 1, 5000));
	ROW("epoll-events", found.events);
	row_poll("poll-one", group, everything);
	row_poll("poll-one-output", group, POLLOUT);
	row_select("select-one", group);
	ROW("epoll-modify", epoll_ctl(epoll, EPOLL_CTL_MOD, group, &edge));
	ROW("epoll-edge", epoll_wait(epoll, &found, 1, 1000));
	ROW("epoll-edge-again", epoll_wait(epoll, &found, 1, 0));
	ROW("poll-too-small-read", read(group, buffer, 24));
	ROW("epoll-edge-after-too-small-read", epoll_wait(epoll, &found, 1, 0));
	struct reader second = start_reading(group, "other");
	ROW("epoll-edge-of-the-second", epoll_wait(epoll, &found, 1, 5000));
	need(read(group, buffer, EVENT) == EVENT, "read");
	ROW("epoll-edge-while-one-is-left", epoll_wait(epoll, &found, 1, 0));
	row_poll("poll-one-left", group, everything);
	need(read(group, buffer + EVENT, EVENT) == EVENT, "read");
	row_poll("poll-unanswered", group, everything);
	answer(group, event_fd_at(0), FAN_ALLOW, 8);
	answer(group, event_fd_at(EVENT), FAN_ALLOW, 8);
	row_reader("poll-reader", reader);
	row_reader("poll-reader", second);
	row_poll("poll-answered", group, everything);
	close(group);
	row_poll("poll-closed", group, everything);
	ROW("epoll-closed", epoll_wait(epoll, &found, 1, 0));
	ROW("epoll-closed-remove", epoll_ctl(epoll, EPOLL_CTL_DEL, group, &level));
	close(epoll);
}

void calls_copies(void)
{
	int group = marked_group(PRE), copy = dup(group), second;

	need(copy >= 0, "dup");
	ROW("copy-close-on-exec", fcntl(copy, F_GETFD));
	ROW("copy-flags", fcntl(copy, F_GETFL) & ~O_LARGEFILE);
	ROW("copy-set-blocking", fcntl(copy, F_SETFL, O_RDWR));
	ROW("copy-of-flags", fcntl(group, F_GETFL) & ~O_LARGEFILE);
	ROW("copy-set-nonblocking", fcntl(group, F_SETFL, O_RDWR | O_NONBLOCK));
	ROW("copy-read", read(copy, buffer, sizeof(buffer)));
	ROW("copy-mark", fanotify_mark(copy, FAN_MARK_ADD, P, AT_FDCWD, in("folder")));
	ROW("copy-mark-remove", fanotify_mark(group, FAN_MARK_REMOVE, P, AT_FDCWD, in("folder")));
	ROW("dup3-same", dup3(group, group, 0));
	ROW("dup3-bad-flag", dup3(group, 50, O_NONBLOCK));
	ROW("dup3-too-high", dup3(group, 1 << 30, 0));
	ROW("dup2-same", dup2(group, group) == group ? 0 : -1);
	ROW("dupfd-too-high", fcntl(group, F_DUPFD, 1 << 30));
	ROW("dupfd-place", (second = fcntl(group, F_DUPFD_CLOEXEC, 300)) >= 300 ? 0 : second);
	close(group);
	struct reader reader = start_reading(copy, "file");
	row_queued("copy-queued", copy);
	ROW("copy-read-event", read(second, buffer, sizeof(buffer)));
	close(second);
	row_answer("copy-answered", copy, event_fd_at(0), FAN_DENY | ENOSPC << 24);
	row_reader("copy-reader", reader);
	close(copy);
	ROW("closed-read", read(copy, buffer, sizeof(buffer)));
	row_answer("closed-write", copy, 5, FAN_ALLOW);
	ROW("closed-mark", fanotify_mark(copy, FAN_MARK_ADD, P, AT_FDCWD, in("file")));
	row_queued("closed-fionread", copy);
	ROW("closed-flags", fcntl(copy, F_GETFL));
	ROW("closed-dup", dup(copy));
	ROW("closed-seek", lseek(copy, 0, SEEK_SET));
	ROW("closed-close", close(copy));
	ROW("unknown-read", read(NO_DESCRIPTOR, buffer, sizeof(buffer)));
	ROW("unknown-close", close(NO_DESCRIPTOR));
}
