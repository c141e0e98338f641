/*
 * A listener that does what none should, beside one that does everything right:
 *
 *	hostile STYLE DIRECTORY
 *
 * The files many-0 to many-3 are its own, and their accessors may suffer. Its lines begin with "hostile".
 */
#define _GNU_SOURCE
#include "calls.h"

#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

static const char *directory;

static void say(const char *format, ...)
{
	char line[256] = "hostile ";
	va_list arguments;

	va_start(arguments, format);
	int length = strlen(line);
	length += vsnprintf(line + length, sizeof(line) - length - 1, format, arguments);
	va_end(arguments);
	line[length] = '\n';
	if (write(STDOUT_FILENO, line, length + 1) < 0)
		exit(2);
}

static void must(int condition, const char *what)
{
	if (!condition) {
		say("%s: %s", what, strerrorname_np(errno));
		exit(1);
	}
}

static const char *path_of(const char *name)
{
	static __thread char path[4096];

	snprintf(path, sizeof(path), "%s/%s", directory, name);
	return path;
}

static int group_on(unsigned int flags, const char *name)
{
	int group = fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC | flags, O_RDWR | O_LARGEFILE);

	must(group >= 0, "fanotify_init");
	must(!fanotify_mark(group, FAN_MARK_ADD, P, AT_FDCWD, path_of(name)), name);
	return group;
}

static void start(void *(*body)(void *), intptr_t argument)
{
	pthread_t thread;
	pthread_attr_t attributes;

	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, 64 << 10);
	must(!pthread_create(&thread, &attributes, body, (void *)argument), "pthread_create");
	pthread_detach(thread);
}

static void allow(int group, int fd)
{
	struct fanotify_response response = {fd, FAN_ALLOW};

	must(write(group, &response, sizeof(response)) == sizeof(response), "answer");
	close(fd);
}

/* One read, and an answer if there is something to answer. */
static void *read_once(void *argument)
{
	int group = (intptr_t)argument;
	struct fanotify_event_metadata event[16];

	if (read(group, event, sizeof(event)) > 0)
		allow(group, event->fd);
	return NULL;
}

/* The group that this one waits in is closed: it has nothing to answer through, and its number may be any file's. */
static void *read_and_keep(void *argument)
{
	int group = (intptr_t)argument;
	struct fanotify_event_metadata event[16];

	if (read(group, event, sizeof(event)) < 0)
		say("read: %s", strerrorname_np(errno));
	return NULL;
}

/* Descriptors are closed while other threads wait in them. */
static void closes(void)
{
	for (int i = 0; i < 20; i++) {
		int group = group_on(0, "many-0");
		start(read_and_keep, group);
		usleep(5000);
		must(!close(group), "close");
	}
}

/* The buffer comes and goes while the kernel writes into it. */

static char *page;
static pthread_mutex_t page_lock = PTHREAD_MUTEX_INITIALIZER;

static void protect(int protection)
{
	must(!mprotect(page, 4096, protection), "mprotect");
}

static void *toggle(void *argument)
{
	(void)argument;
	for (;;) {
		pthread_mutex_lock(&page_lock);
		protect(PROT_NONE);
		pthread_mutex_unlock(&page_lock);
		usleep(100);
		pthread_mutex_lock(&page_lock);
		protect(PROT_READ | PROT_WRITE);
		pthread_mutex_unlock(&page_lock);
		usleep(100);
	}
	return NULL;
}

static void *read_into_page(void *argument)
{
	int group = (intptr_t)argument;

	for (;;) {
		ssize_t length = read(group, page, 4096);
		must(length > 0 || errno == EFAULT, "read");
		pthread_mutex_lock(&page_lock);
		protect(PROT_READ | PROT_WRITE);
		const struct fanotify_event_metadata *event = (const void *)page;
		for (; length > 0 && FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length))
			allow(group, event->fd);
		pthread_mutex_unlock(&page_lock);
	}
	return NULL;
}

static void unmaps(void)
{
	page = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	must(page != MAP_FAILED, "mmap");
	start(read_into_page, group_on(0, "many-0"));
	start(toggle, 0);
}

/* The answer lies in a mapping of a file whose content only this listener could bring. */
static void *answer_from_mapping(void *argument)
{
	int file = open(path_of("many-1"), O_RDONLY);
	const char *mapping = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0);
	struct fanotify_event_metadata event[16];

	(void)argument;
	must(file >= 0 && mapping != MAP_FAILED, "mmap");
	int group = group_on(0, "many-0");
	must(!fanotify_mark(group, FAN_MARK_ADD, P, AT_FDCWD, path_of("many-1")), "mark");
	say("ready");
	must(read(group, event, sizeof(event)) > 0, "read");
	ssize_t written = write(group, mapping, 8);
	say("wrote %zd", written);
	allow(group, event->fd);
	return NULL;
}

/*
 * The buffer is such a mapping; another thread maps the same file meanwhile, which needs the memory's lock, and a third allows that, but
 * nothing that others want.
 */
static void *maps_again(void *argument)
{
	int file = (intptr_t)argument;

	for (;;) {
		char *again = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE, file, 0);
		if (again != MAP_FAILED)
			munmap(again, 4096);
		usleep(1000);
	}
	return NULL;
}

static void *allow_own(void *argument)
{
	int group = (intptr_t)argument;
	struct fanotify_event_metadata event[16];

	while (read(group, event, sizeof(event)) > 0) {
		if (event->pid == getpid())
			allow(group, event->fd);
	}
	return NULL;
}

static void *read_into_mapping(void *argument)
{
	int file = open(path_of("many-1"), O_RDWR);
	char *mapping = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);

	(void)argument;
	must(file >= 0 && mapping != MAP_FAILED, "mmap");
	start(allow_own, group_on(0, "many-1"));
	start(maps_again, file);
	int group = group_on(0, "many-0");
	say("ready");
	for (;;) {
		if (read(group, mapping, 4096) > 0)
			allow(group, ((struct fanotify_event_metadata *)mapping)->fd);
		else
			must(errno == EFAULT, "read");
	}
	return NULL;
}

/* A thousand threads wait for events of one group. */
static void crowds(void)
{
	int group = group_on(0, "many-0");

	for (int i = 0; i < 1000; i++)
		start(read_once, group);
	usleep(200000);
}

/* Pointers to nowhere. */
static void *points_nowhere(void *argument)
{
	static void *const nowhere[] = {(void *)1, (void *)-4096, (void *)0x800000000000, NULL};
	int group = group_on(FAN_NONBLOCK, "many-0");
	int failed = 0;

	(void)argument;
	for (int i = 0; i < 400; i++) {
		void *bad = nowhere[i % 4];
		struct iovec part = {bad, 100};
		failed += read(group, bad, 4096) < 0;
		failed += readv(group, bad, 1) < 0;
		failed += readv(group, &part, 1) < 0;
		failed += write(group, bad, 8) < 0;
		failed += writev(group, &part, 1) < 0;
		failed += ioctl(group, FIONREAD, bad) < 0;
		failed += fanotify_mark(group, FAN_MARK_ADD, P, -1, bad) < 0;
	}
	say(failed == 400 * 7 ? "done" : "%d calls failed", failed);
	return NULL;
}

/* Groups are made, marked, inherited and closed, many more than may be there at a time. */
static void makes_and_closes(int rounds)
{
	for (int i = 0; i < rounds; i++) {
		int group = group_on(FAN_NONBLOCK, "many-0"), copy = dup(group), queued;
		pid_t child = fork();
		must(child >= 0 && copy >= 0, "fork");
		if (!child)
			_exit(ioctl(copy, FIONREAD, &queued));
		int status;
		must(waitpid(child, &status, 0) == child && !status, "FIONREAD");
		close(group);
		close(copy);
	}
}

int main(int argc, char **argv)
{
	const char *style = argv[1];

	must(argc == 3, "hostile STYLE DIRECTORY");
	directory = argv[2];
	if (!strcmp(style, "closes")) {
		closes();
	} else if (!strcmp(style, "unmaps")) {
		unmaps();
	} else if (!strcmp(style, "maps")) {
		start(answer_from_mapping, 0);
		for (;;)
			pause();
	} else if (!strcmp(style, "reads-into-mapping")) {
		start(read_into_mapping, 0);
		for (;;)
			pause();
	} else if (!strcmp(style, "crowds")) {
		crowds();
	} else if (!strcmp(style, "points-nowhere")) {
		for (int i = 0; i < 4; i++)
			start(points_nowhere, 0);
	} else if (!strcmp(style, "makes")) {
		makes_and_closes(20);
		say("warm");
		must(getchar() != EOF, "stdin");
		makes_and_closes(400);
		say("done");
		must(getchar() != EOF, "stdin");
		return 0;
	}
	say("ready");
	for (;;)
		pause();
}
