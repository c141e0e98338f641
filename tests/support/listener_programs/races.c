/*
 * Listeners and accessors that race each other, each scenario to its end:
 *
 *	races SCENARIO DIRECTORY...
 *
 * What is watched is "stub" and its like in the directories. Lines say what came of it; one that hangs is ended by an alarm. Expectations are
 * not its business.
 */
#define _GNU_SOURCE
#include "races.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define PATIENCE 60 /* seconds for a scenario; it takes one or two */
#define PAIRS 1000
#define CROWD 4
#define EACH 500

char **places;
static char buffer[8192] __attribute__((aligned(8)));

void say(const char *format, ...)
{
	char line[256];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	line[length] = '\n';
	if (write(STDOUT_FILENO, line, length + 1) < 0)
		_exit(2);
}

void must(int condition, const char *what)
{
	if (!condition) {
		say("%s: %s", what, strerrorname_np(errno) ?: "an error that no program should see");
		_exit(1);
	}
}

const char *path_in(const char *place, const char *name)
{
	static __thread char path[4096];

	snprintf(path, sizeof(path), "%s/%s", place, name);
	return path;
}

int group_on_everything(unsigned int flags)
{
	int group = fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | flags, O_RDONLY | O_LARGEFILE);

	must(group >= 0, "fanotify_init");
	mark_everything(group, places[0]);
	return group;
}

void mark_everything(int group, const char *place)
{
	must(!fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_PRE_ACCESS, AT_FDCWD, place), "mark");
}

int events_in(const char *events, ssize_t length)
{
	const struct fanotify_event_metadata *event = (const void *)events;
	int count = 0;

	for (; FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length))
		count++;
	return count;
}

int allow(int group, const char *events, ssize_t length)
{
	const struct fanotify_event_metadata *event = (const void *)events;
	int count = events_in(events, length);

	for (; FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length)) {
		struct fanotify_response response = {event->fd, FAN_ALLOW};
		must(write(group, &response, sizeof(response)) == sizeof(response), "answer");
		must(!close(event->fd), "close");
	}
	return count;
}

void start(void *(*body)(void *), intptr_t argument)
{
	pthread_t thread;

	must(!pthread_create(&thread, NULL, body, (void *)argument), "pthread_create");
	pthread_detach(thread);
}

pid_t start_child(int group, void (*body)(int), int argument)
{
	pid_t child = fork();

	must(child >= 0, "fork");
	if (child)
		return child;
	alarm(PATIENCE); /* is not inherited */
	if (group >= 0)
		close(group);
	body(argument);
	_exit(0);
}

void wait_for(pid_t child)
{
	int status;

	must(waitpid(child, &status, 0) == child, "waitpid");
	if (status)
		say("a child ended with status %d", status);
}

void *shared_memory(size_t size)
{
	void *memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	must(memory != MAP_FAILED, "mmap");
	return memory;
}

void read_often(const char *path, int times)
{
	char bytes[8];
	int file = open(path, O_RDONLY);

	must(file >= 0, path);
	while (times--)
		must(pread(file, bytes, sizeof(bytes), 0) == sizeof(bytes), "pread");
	close(file);
}

static int queued_in(int group)
{
	int queued;

	must(!ioctl(group, FIONREAD, &queued), "FIONREAD");
	return queued;
}

/* Whether a group that is said to be readable is so still, a good while later, with nothing in it. */
static int readable_for_nothing(int group)
{
	struct pollfd wanted = {.fd = group, .events = POLLIN};

	for (int i = 0; i < 1000; i++) {
		if (queued_in(group) || !poll(&wanted, 1, 0))
			return 0;
		usleep(1000);
	}
	return 1;
}

/* poll(2) and one read at a time until all who hold the other end of the pipe have ended. A silence with events waiting would last for ever:
 * those whose events they are wait for the answers. */
static void answer_by_poll(int group, int ends)
{
	struct pollfd wanted[] = {{.fd = group, .events = POLLIN}, {.fd = ends, .events = POLLIN}};
	int events = 0, stale = 0;

	for (;;) {
		must(poll(wanted, 2, -1) > 0, "poll");
		if (!wanted[0].revents)
			break;
		if (!queued_in(group) && readable_for_nothing(group)) {
			stale++;
			must(read(group, buffer, sizeof(buffer)) < 0 && errno == EAGAIN, "read");
			must(!poll(wanted, 1, 0) || queued_in(group), "readable after EAGAIN");
			continue;
		}
		ssize_t length = read(group, buffer, sizeof(buffer));
		must(length > 0 || errno == EAGAIN, "read");
		if (length > 0)
			events += allow(group, buffer, length);
	}
	say("%d events, readable for nothing %d times", events, stale);
}

static atomic_int *rounds; /* of each of a pair: how many it has begun */

/* Two that read at nearly the same moment, in every round at another distance. */
static void read_in_rounds(int which)
{
	const char *path = path_in(places[0], which ? "many-1" : "many-0");
	unsigned int seed = which;

	for (int i = 1; i <= PAIRS; i++) {
		rounds[which] = i;
		while (rounds[!which] < i)
			sched_yield();
		for (volatile int spin = rand_r(&seed) % 40000; spin > 0; spin--)
			;
		read_often(path, 1);
	}
}

static void read_in_crowd(int which)
{
	char name[] = "many-0";

	name[5] += which;
	read_often(path_in(places[0], name), EACH);
}

static void with_children(void (*body)(int), int count, void (*answer)(int group, int ends))
{
	int group = group_on_everything(FAN_NONBLOCK), pipe[2];
	pid_t children[CROWD];

	must(!pipe2(pipe, 0), "pipe2");
	for (int i = 0; i < count; i++)
		children[i] = start_child(group, body, i);
	close(pipe[1]);
	answer(group, pipe[0]);
	for (int i = 0; i < count; i++)
		wait_for(children[i]);
}

void poll_pairs(void)
{
	rounds = shared_memory(sizeof(*rounds) * 2);
	with_children(read_in_rounds, 2, answer_by_poll);
}

void poll_crowd(void)
{
	with_children(read_in_crowd, CROWD, answer_by_poll);
}

/* Edge-triggered, until EAGAIN: an edge that does not come leaves its event unread. */
static void answer_by_edges(int group, int ends)
{
	int epoll = epoll_create1(0), events = 0;
	struct epoll_event edge = {.events = EPOLLIN | EPOLLET, .data.fd = group}, level = {.events = EPOLLIN, .data.fd = ends}, found;

	must(!epoll_ctl(epoll, EPOLL_CTL_ADD, group, &edge), "epoll_ctl");
	must(!epoll_ctl(epoll, EPOLL_CTL_ADD, ends, &level), "epoll_ctl");
	do {
		ssize_t length;
		must(epoll_wait(epoll, &found, 1, -1) == 1, "epoll_wait");
		while ((length = read(group, buffer, sizeof(buffer))) > 0)
			events += allow(group, buffer, length);
		must(errno == EAGAIN, "read");
	} while (found.data.fd == group);
	say("%d events", events);
}

void epoll_edges(void)
{
	with_children(read_in_crowd, CROWD, answer_by_edges);
}

static void *ask_again_and_again(void *argument)
{
	for (;;)
		queued_in((intptr_t)argument);
	return NULL;
}

static void read_many_0(int times)
{
	read_often(path_in(places[0], "many-0"), times);
}

/* What FIONREAD has looked at in one thread is what read(2) waits for in another. */
void fionread_beside_read(void)
{
	int group = group_on_everything(0), events = 0;
	pid_t child = start_child(group, read_many_0, EACH);

	start(ask_again_and_again, group);
	while (events < EACH) {
		ssize_t length = read(group, buffer, sizeof(buffer));
		must(length > 0, "read");
		events += allow(group, buffer, length);
	}
	wait_for(child);
	say("%d events", events);
}

/* Two mounts in one group: first one is flooded and then the other, until somebody has been heard in the quiet one often enough. */

#define FEW 50
static atomic_int *flooded; /* which place is; others: none any more */

static void flood(int which)
{
	const char *path = path_in(places[which], "many-0");

	while (*flooded == which)
		read_often(path, 1);
}

static void read_beside_flood(int which)
{
	read_often(path_in(places[!which], "many-1"), FEW);
	(*flooded)++;
}

static void answer_floods(int group, int ends)
{
	struct pollfd wanted[] = {{.fd = group, .events = POLLIN}, {.fd = ends, .events = POLLIN}};

	for (;;) {
		must(poll(wanted, 2, -1) > 0, "poll");
		if (!wanted[0].revents)
			return;
		ssize_t length = read(group, buffer, sizeof(buffer));
		must(length > 0 || errno == EAGAIN, "read");
		allow(group, buffer, length > 0 ? length : 0);
	}
}

void two_mounts(void)
{
	int group = group_on_everything(FAN_NONBLOCK), pipe[2];

	mark_everything(group, places[1]);
	flooded = shared_memory(sizeof(*flooded));
	for (int which = 0; which < 2; which++) {
		must(!pipe2(pipe, 0), "pipe2");
		pid_t children[] = {start_child(group, flood, which), start_child(group, flood, which),
				    start_child(group, read_beside_flood, which)};
		close(pipe[1]);
		answer_floods(group, pipe[0]);
		close(pipe[0]);
		for (int i = 0; i < 3; i++)
			wait_for(children[i]);
		say("heard beside a flood");
	}
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*body)(void);
	} scenarios[] = {
		{"poll-pairs", poll_pairs},
		{"poll-crowd", poll_crowd},
		{"epoll-edges", epoll_edges},
		{"fionread-beside-read", fionread_beside_read},
		{"two-mounts", two_mounts},
		{"signal-while-vfork", signal_while_vfork},
		{"stop-and-go-on", stop_and_go_on},
		{"mappings-in-threads", mappings_in_threads},
		{"copies-against-closes", copies_against_closes},
		{"numbers-in-use", numbers_in_use},
		{"processes-run-out", processes_run_out},
		{"rights-dropped", rights_dropped},
		{"rights-inherited", rights_inherited},
	};

	must(argc >= 3, "races SCENARIO DIRECTORY...");
	places = argv + 2;
	alarm(PATIENCE);
	for (size_t i = 0; i < sizeof(scenarios) / sizeof(*scenarios); i++)
		if (!strcmp(argv[1], scenarios[i].name)) {
			scenarios[i].body();
			_exit(0);
		}
	if (!strncmp(argv[1], "signals-", 8)) {
		signals_restart(atoi(argv[1] + 8));
		_exit(0);
	}
	must(0, "no such scenario");
}
