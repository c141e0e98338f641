/* Groups at all kinds of descriptor numbers: few allowed, many in use, chosen by the program, come from another process. */
#define _GNU_SOURCE
#include "listener.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define ELSEWHERE 310

static char buffer[ROOM] __attribute__((aligned(8)));

/* Before fanotify_init(2). */

void allow_few(int number)
{
	struct rlimit limit = {number, number};

	if (setrlimit(RLIMIT_NOFILE, &limit))
		die("setrlimit");
}

void open_many(int number)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit))
		die("getrlimit");
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit))
		die("setrlimit");
	while (number-- > 0)
		if (open("/dev/null", O_RDONLY) < 0)
			die("open");
}

/* With a group. */

static void end_as(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child)
		die("waitpid");
	exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

static void send_descriptor(int socket, int descriptor)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr header;
	} control = {0};
	char byte = 0;
	struct iovec part = {&byte, 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

	control.header = (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
	*(int *)CMSG_DATA(&control.header) = descriptor;
	if (sendmsg(socket, &message, 0) != 1)
		die("sendmsg");
}

static int receive_descriptor(int socket)
{
	union {
		char bytes[CMSG_SPACE(sizeof(int))];
		struct cmsghdr header;
	} control = {0};
	char byte;
	struct iovec part = {&byte, 1};
	struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof(control)};

	if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != 1 || !CMSG_FIRSTHDR(&message))
		die("recvmsg");
	return *(int *)CMSG_DATA(CMSG_FIRSTHDR(&message));
}

/* Sent over a socket to a child that has no other copy: who may open a group need not be who serves it. */
void number_handed(int group)
{
	int ends[2];

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		die("socketpair");
	pid_t child = fork();
	if (child < 0)
		die("fork");
	if (!child) {
		close(group);
		wait_blocking(receive_descriptor(ends[1]));
	}
	send_descriptor(ends[0], group);
	close(group);
	end_as(child);
}

/* A child that has no copy takes it from its parent. */
void number_taken(int group)
{
	pid_t parent = getpid(), child = fork();
	int taken;

	if (child < 0)
		die("fork");
	if (!child) {
		close(group);
		taken = syscall(SYS_pidfd_getfd, (int)syscall(SYS_pidfd_open, parent, 0), group, 0);
		if (taken < 0)
			die("pidfd_getfd");
		wait_poll(taken);
	}
	end_as(child);
}

/* Goes on as the same program again, which has the group from this one. */
void become_inheritor(int group)
{
	char number[16];
	char **arguments = calloc(options.argc + 3, sizeof(char *));
	int count = 0;

	snprintf(number, sizeof(number), "%d", group);
	for (int i = 0; i < options.argc; i++)
		arguments[count++] = i && !strcmp(options.argv[i - 1], "--style") ? "inherited" : options.argv[i];
	arguments[count++] = "--inherited";
	arguments[count++] = number;
	execv("/proc/self/exe", arguments);
	die("execv");
}

/* As Go's exec.Cmd.ExtraFiles does: the program that a child becomes has the group at a low number. */
void number_exec_placed(int group)
{
	pid_t child = fork();

	if (child < 0)
		die("fork");
	if (!child) {
		if (dup3(group, 5, 0) != 5)
			die("dup3");
		become_inheritor(5);
	}
	close(group);
	end_as(child);
}

/* Copies by fcntl(2) from a low number on, each way of waiting on one of them. */
void number_from_3(int group)
{
	int copy = fcntl(group, F_DUPFD, 3), other = fcntl(group, F_DUPFD_CLOEXEC, 0);
	int outer = epoll_create1(EPOLL_CLOEXEC);
	struct epoll_event wanted = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET};
	struct pollfd polled = {.fd = other, .events = POLLIN};

	if (copy < 3 || other < 0 || epoll_ctl(outer, EPOLL_CTL_ADD, copy, &wanted))
		die("copy");
	close(group);
	say("ready");
	for (;;) {
		/* Another copy is told, too, and a second look at an edge tells nothing. */
		if (epoll_wait(outer, &wanted, 1, -1) != 1 || poll(&polled, 1, 0) != 1 || epoll_wait(outer, &wanted, 1, 0))
			die("wait");
		ssize_t length = read(other, buffer, sizeof(buffer));
		if (length < 0 || poll(&polled, 1, 0))
			die("read");
		handle(copy, buffer, length);
	}
}

static int read_by_ring(int group)
{
	struct io_uring_params parameters = {0};
	int ring = syscall(SYS_io_uring_setup, 1, &parameters);

	if (ring < 0)
		return -errno;
	char *submitted = mmap(NULL, parameters.sq_off.array + 4, PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQ_RING);
	char *completed = mmap(NULL, parameters.cq_off.cqes + 2 * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE, MAP_SHARED, ring,
			       IORING_OFF_CQ_RING);
	struct io_uring_sqe *entry = mmap(NULL, sizeof(*entry), PROT_READ | PROT_WRITE, MAP_SHARED, ring, IORING_OFF_SQES);
	if (submitted == MAP_FAILED || completed == MAP_FAILED || entry == MAP_FAILED)
		die("mmap");
	*entry = (struct io_uring_sqe){.opcode = IORING_OP_READ, .fd = group, .addr = (uintptr_t)buffer, .len = sizeof(buffer)};
	*(unsigned *)(submitted + parameters.sq_off.array) = 0;
	__atomic_store_n((unsigned *)(submitted + parameters.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) != 1)
		die("io_uring_enter");
	int result = ((struct io_uring_cqe *)(completed + parameters.cq_off.cqes))->res;
	close(ring);
	return result;
}

#define TRY(call)                                                                                                                                  \
	do {                                                                                                                                       \
		ssize_t result = (call);                                                                                                           \
		say("%.*s: %s", (int)strcspn(#call, "("), #call, result < 0 ? word_of(errno) : "OK");                                             \
	} while (0)

/* Calls on a copy at a number of the program's, while an event waits; then the event is answered through the first descriptor. */
void number_elsewhere(int group)
{
	struct iovec part = {buffer, sizeof(buffer)};
	struct pollfd wanted = {.fd = ELSEWHERE, .events = POLLIN};
	struct fanotify_response response = {.fd = 0, .response = FAN_ALLOW};
	int ends[2];

	if (pipe(ends) || dup2(group, ELSEWHERE) != ELSEWHERE)
		die("dup2");
	say("ready");
	if (poll(&wanted, 1, -1) != 1)
		die("poll");
	TRY(read(ELSEWHERE, buffer, sizeof(buffer)));
	TRY(readv(ELSEWHERE, &part, 1));
	TRY(preadv2(ELSEWHERE, &part, 1, -1, 0));
	TRY(splice(ELSEWHERE, NULL, ends[1], NULL, sizeof(buffer), 0));
	TRY(write(ELSEWHERE, &response, sizeof(response)));
	TRY(fanotify_mark(ELSEWHERE, FAN_MARK_FLUSH, 0, AT_FDCWD, NULL));
	say("io_uring: %s", word_of(-read_by_ring(ELSEWHERE)));
	say("io_uring at the first: %s", word_of(-read_by_ring(group)));
	wait_blocking(group);
}

/* On its way through a socket that is closed at last: nobody has it, and an access that waits goes on. */
void number_dropped(int group)
{
	int ends[2];
	struct pollfd wanted = {.fd = group, .events = POLLIN};

	if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends))
		die("socketpair");
	say("ready");
	if (poll(&wanted, 1, -1) != 1)
		die("poll");
	send_descriptor(ends[0], group);
	close(group);
	usleep(200000);
	say("on its way");
	close(ends[0]);
	close(ends[1]);
	for (;;)
		pause();
}
