/* What becomes of a group in a program's life: threads, forks, copies, signals, deaths. */
#define _GNU_SOURCE
#include "listener.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define MANY 4

/* For ever, one event at a time, so that others get some. */
static void *share(void *argument)
{
	int group = (int)(intptr_t)argument;
	char buffer[ONE_EVENT] __attribute__((aligned(8)));

	for (;;) {
		ssize_t length = read(group, buffer, sizeof(buffer));
		if (length < 0)
			die("read");
		handle(group, buffer, length);
	}
	return NULL;
}

void live_threads(int group)
{
	pthread_t thread;

	for (int i = 0; i < MANY; i++)
		if (pthread_create(&thread, NULL, share, (void *)(intptr_t)group))
			die("pthread_create");
	say("ready");
	for (;;)
		pause();
}

/*
 * Forked workers read and answer; the parent only waits for the one that sees the end. Answers name events by descriptor, and descriptors
 * are each process's own: two workers that hold the same number would answer for each other. So each has other numbers free.
 */
static void fill_descriptors(int height)
{
	while (dup(STDERR_FILENO) < height)
		;
}

void live_workers(int group)
{
	pid_t workers[MANY];
	int status;

	for (int i = 0; i < MANY; i++) {
		workers[i] = fork();
		if (workers[i] < 0)
			die("fork");
		if (!workers[i]) {
			fill_descriptors(20 * i);
			share((void *)(intptr_t)group);
		}
	}
	close(group); /* the workers' copies keep the group */
	say("ready");
	pid_t first = wait(&status);
	for (int i = 0; i < MANY; i++)
		if (workers[i] != first) {
			kill(workers[i], SIGKILL);
			waitpid(workers[i], NULL, 0);
		}
	exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
}

/* Reads from one copy of the group and answers through another; the descriptor that fanotify_init(2) gave is closed. */
static int answering;

static void answer_through_copy(int group, const struct fanotify_response *response)
{
	(void)group;
	if (write(answering, response, sizeof(*response)) != sizeof(*response))
		die("answer");
}

void live_copy(int group)
{
	int first = dup(group), second = fcntl(group, F_DUPFD_CLOEXEC, 100);

	if (first < 0 || second < 100)
		die("dup");
	if (fcntl(first, F_GETFD) || fcntl(second, F_GETFD) != FD_CLOEXEC)
		die("close-on-exec");
	close(group);
	answering = first;
	answer = answer_through_copy;
	wait_blocking(second);
}

/* The same with copies that have their numbers from the program: those below 3 are where daemons like to have things. */
void live_copy_to(int group)
{
	int placed = dup3(group, 200, O_CLOEXEC);

	if (placed != 200 || dup2(group, STDIN_FILENO) != STDIN_FILENO)
		die("dup");
	if (fcntl(placed, F_GETFD) != FD_CLOEXEC || fcntl(STDIN_FILENO, F_GETFD))
		die("close-on-exec");
	close(group);
	answering = placed;
	answer = answer_through_copy;
	wait_blocking(STDIN_FILENO);
}

/* Goes on as another program, which has the group from this one; events may have been queued before it does. */
void live_exec(int group)
{
	become_inheritor(group);
}

/* Becomes another program, which does not have the group, with an event read and another one queued. */
void live_exec_away(int group)
{
	char buffer[ONE_EVENT] __attribute__((aligned(8)));
	int queued = 0;

	say("ready");
	if (read(group, buffer, sizeof(buffer)) != sizeof(buffer))
		die("read");
	describe((const void *)buffer, "HELD");
	while (!queued) {
		if (ioctl(group, FIONREAD, &queued))
			die("FIONREAD");
		usleep(1000);
	}
	execlp("sleep", "sleep", "1000", NULL);
	die("execlp");
}

/* A signal every millisecond. */

static void nothing(int number)
{
	(void)number;
}

static void start_alarm(int flags)
{
	struct sigaction action = {.sa_handler = nothing, .sa_flags = flags};
	struct itimerval each = {{0, 1000}, {0, 1000}};

	if (sigaction(SIGALRM, &action, NULL) || setitimer(ITIMER_REAL, &each, NULL))
		die("setitimer");
}

static void wait_interrupted(int group, int may_be_interrupted)
{
	char buffer[ROOM] __attribute__((aligned(8)));
	int said = 0;

	say("ready");
	for (;;) {
		ssize_t length = read(group, buffer, sizeof(buffer));
		if (length >= 0) {
			handle(group, buffer, length);
		} else if (errno != EINTR || !may_be_interrupted) {
			die("read");
		} else if (!said) {
			said = 1;
			say("interrupted");
		}
	}
}

/* Under a supervisor any call can be interrupted in the moment before it is taken, not only read(2) as in the kernel. */
static void answer_until_taken(int group, const struct fanotify_response *response)
{
	ssize_t taken;

	do
		taken = write(group, response, sizeof(*response));
	while (taken < 0 && errno == EINTR);
	if (taken != sizeof(*response))
		die("answer");
}

/* Without SA_RESTART: read(2) fails with EINTR, now and then with an event on its way. */
void live_alarm(int group)
{
	answer = answer_until_taken;
	start_alarm(0);
	wait_interrupted(group, 1);
}

void live_alarm_restart(int group)
{
	start_alarm(SA_RESTART);
	wait_interrupted(group, 0);
}

/* Dies without answering the second event, with a third still queued. */
void live_death(int group)
{
	char buffer[ONE_EVENT] __attribute__((aligned(8)));
	int queued = 0;

	say("ready");
	handle(group, buffer, read(group, buffer, sizeof(buffer)));
	if (read(group, buffer, sizeof(buffer)) != sizeof(buffer))
		die("read");
	describe((const void *)buffer, "HELD");
	while (!queued) {
		if (ioctl(group, FIONREAD, &queued))
			die("FIONREAD");
		usleep(1000);
	}
	say("queued %d", queued);
	kill(getpid(), SIGKILL);
	pause();
}

/* No descriptor is left when the first event is read. */
void live_few_descriptors(int group)
{
	char buffer[ONE_EVENT] __attribute__((aligned(8)));
	struct rlimit limit, none;
	int next = dup(STDIN_FILENO);

	if (next < 0 || getrlimit(RLIMIT_NOFILE, &limit))
		die("getrlimit");
	close(next);
	none = limit;
	none.rlim_cur = next;
	say("ready");
	struct pollfd wanted = {.fd = group, .events = POLLIN};
	if (poll(&wanted, 1, -1) < 0 || setrlimit(RLIMIT_NOFILE, &none))
		die("setrlimit");
	ssize_t length = read(group, buffer, sizeof(buffer));
	if (length < 0)
		say("read: %s", word_of(errno));
	if (setrlimit(RLIMIT_NOFILE, &limit))
		die("setrlimit");
	if (length >= 0)
		handle(group, buffer, length);
	share((void *)(intptr_t)group);
}

/* A group of each class, all read by one poll(2). The one of class PRE_CONTENT has been made and marked. */
void live_groups(int group)
{
	static const char *const said[] = {"pre ", "content ", "notif "};
	static char buffer[ROOM] __attribute__((aligned(8)));
	struct pollfd groups[3] = {{.fd = group, .events = POLLIN}, {.events = POLLIN}, {.events = POLLIN}};

	groups[1].fd = open_group("content", FAN_CLOEXEC | FAN_NONBLOCK, O_RDONLY | O_LARGEFILE);
	groups[2].fd = open_group("notif", FAN_CLOEXEC | FAN_NONBLOCK, O_RDONLY | O_LARGEFILE);
	if (groups[1].fd < 0 || groups[2].fd < 0)
		die("fanotify_init");
	mark_from_words(groups[1].fd, "add|mount", "OPEN_PERM|ACCESS_PERM", options.directory);
	mark_from_words(groups[2].fd, "add|mount", "CLOSE_WRITE", options.directory);
	mark_from_words(groups[2].fd, "add|mount", "PRE_ACCESS", options.directory);
	say("ready");
	for (;;) {
		if (poll(groups, 3, -1) < 0)
			die("poll");
		for (int i = 0; i < 3; i++) {
			ssize_t length = groups[i].revents & POLLIN ? read(groups[i].fd, buffer, sizeof(buffer)) : 0;
			if (length < 0 && errno != EAGAIN)
				die("read");
			prefix = said[i];
			if (length > 0)
				handle(groups[i].fd, buffer, length);
		}
	}
}
