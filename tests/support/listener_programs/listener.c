/*
 * An HSM listener in the manner of fanotify(7): it waits for events, fills stubs through the event's descriptor, denies what
 * it is told to, and prints a line for each event. It knows nothing of fusehsm.
 *
 *	listener --style STYLE [--class pre|content|notif] [--deny GLOB=ERRNO] [--mark FLAGS MASK PATH]... DIRECTORY
 *
 * "ready" comes when the marks stand. An event of the file DIRECTORY/end, which is always marked, ends it with exit code 0.
 * What each style is about, its function says.
 */
#define _GNU_SOURCE
#include "listener.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct style {
	const char *name;
	unsigned int flags;	    /* of fanotify_init(2), beside the class */
	unsigned int event_f_flags; /* beside O_LARGEFILE */
	void (*wait)(int group);
} styles[] = {
	{"blocking", FAN_CLOEXEC, O_RDWR, wait_blocking},
	{"poll", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_poll},
	{"epoll", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_epoll_level},
	{"epoll-edge", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_epoll_edge},
	{"epoll-edge-one", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_epoll_edge_one},
	{"select", FAN_CLOEXEC, O_RDWR, wait_select},
	{"readv", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_readv},
	{"fionread", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_fionread},
	{"writev", FAN_CLOEXEC, O_RDWR, wait_writev},
	{"threads", FAN_CLOEXEC, O_RDWR, live_threads},
	{"workers", FAN_CLOEXEC, O_RDWR, live_workers},
	{"early", FAN_CLOEXEC, O_RDONLY, wait_blocking},
	{"copy", FAN_CLOEXEC, O_RDWR, live_copy},
	{"copy-to", FAN_CLOEXEC, O_RDWR, live_copy_to},
	{"handed", FAN_CLOEXEC, O_RDWR, number_handed},
	{"taken", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, number_taken},
	{"exec-placed", FAN_CLOEXEC, O_RDWR, number_exec_placed},
	{"from-3", FAN_CLOEXEC, O_RDWR, number_from_3},
	{"elsewhere", FAN_CLOEXEC, O_RDWR, number_elsewhere},
	{"dropped", FAN_CLOEXEC, O_RDWR, number_dropped},
	{"few-allowed", FAN_CLOEXEC, O_RDWR, wait_select},
	{"many-open", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, wait_poll},
	{"too-few-allowed", FAN_CLOEXEC, O_RDWR, wait_blocking},
	{"exec", 0, O_RDWR, live_exec},
	{"exec-away", FAN_CLOEXEC, O_RDWR | O_CLOEXEC, live_exec_away},
	{"inherited", 0, O_RDWR, wait_blocking},
	{"alarm", FAN_CLOEXEC, O_RDWR, live_alarm},
	{"alarm-restart", FAN_CLOEXEC, O_RDWR, live_alarm_restart},
	{"death", FAN_CLOEXEC, O_RDWR, live_death},
	{"pidfd", FAN_CLOEXEC | FAN_REPORT_PIDFD | FAN_REPORT_FD_ERROR, O_RDWR | O_CLOEXEC, wait_blocking},
	{"tid", FAN_CLOEXEC | FAN_REPORT_TID, O_RDWR, wait_blocking},
	{"few-descriptors", FAN_CLOEXEC, O_RDWR, live_few_descriptors},
	{"few-descriptors-reported", FAN_CLOEXEC | FAN_REPORT_FD_ERROR, O_RDWR, live_few_descriptors},
	{"groups", FAN_CLOEXEC | FAN_NONBLOCK, O_RDWR, live_groups},
	{"ignoring", FAN_CLOEXEC, O_RDWR, wait_blocking},
	{"removing", FAN_CLOEXEC, O_RDWR, wait_blocking},
};

struct options options = {.style = "blocking", .class = "pre"};

void die(const char *what)
{
	fprintf(stderr, "listener: %s: %s\n", what, strerror(errno));
	exit(1);
}

/* A line on stdout, in one write(2): lines of several threads and processes stay whole. */
void say(const char *format, ...)
{
	char line[ROOM];
	va_list arguments;

	va_start(arguments, format);
	int length = vsnprintf(line, sizeof(line) - 1, format, arguments);
	va_end(arguments);
	line[length] = '\n';
	while (write(STDOUT_FILENO, line, length + 1) < 0)
		if (errno != EINTR)
			exit(2);
}

const char *word_of(int error)
{
	return error ? strerrorname_np(error) : "OK";
}

static int errno_of(const char *word)
{
	for (int error = 1; error < 134; error++)
		if (strerrorname_np(error) && !strcmp(strerrorname_np(error), word))
			return error;
	errno = EINVAL;
	die(word);
	return 0;
}

/* Everything about the caller that the event tells. */
static void tell_caller(const struct fanotify_event_metadata *event, char *text, size_t size)
{
	const struct fanotify_event_info_pidfd *record = record_of(event, INFO_PIDFD);
	char path[64], line[256];
	const char *named = "missing";

	if (record) {
		snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", record->pidfd);
		FILE *file = fopen(path, "re");
		while (file && fgets(line, sizeof(line), file))
			if (!strncmp(line, "Pid:", 4))
				named = atoi(line + 4) == event->pid ? "same" : "another";
		if (file)
			fclose(file);
	}
	snprintf(text, size, " pidfd=%s cloexec=%d,%d", named, fcntl(event->fd, F_GETFD),
		 record ? fcntl(record->pidfd, F_GETFD) : -1);
	if (record)
		close(record->pidfd);
}

static void tell_thread(const struct fanotify_event_metadata *event, char *text, size_t size)
{
	char path[64], line[256];
	int leader = 0;

	snprintf(path, sizeof(path), "/proc/%d/status", event->pid);
	FILE *file = fopen(path, "re");
	while (file && fgets(line, sizeof(line), file))
		if (!strncmp(line, "Tgid:", 5))
			leader = atoi(line + 5);
	if (file)
		fclose(file);
	snprintf(text, size, " %s", leader == event->pid ? "leader" : leader ? "thread" : "nobody");
}

/* Everything but the marks, which are made later, in the order of the command line. Returns the group that came with an execve(2). */
static int parse(int argc, char **argv)
{
	int inherited = -1;

	options.argc = argc;
	options.argv = argv;
	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--style")) {
			options.style = argv[++i];
		} else if (!strcmp(argv[i], "--class")) {
			options.class = argv[++i];
		} else if (!strcmp(argv[i], "--inherited")) {
			inherited = atoi(argv[++i]);
		} else if (!strcmp(argv[i], "--mark")) {
			i += 3;
		} else if (!strcmp(argv[i], "--deny")) {
			char *rule = strdup(argv[++i]), *word = strchr(rule, '=');
			*word = 0;
			options.deny = rule;
			options.deny_errno = errno_of(word + 1);
		} else {
			options.directory = argv[i];
		}
	}
	return inherited;
}

int main(int argc, char **argv)
{
	int group = parse(argc, argv);
	const struct style *style = NULL;

	for (size_t i = 0; i < sizeof(styles) / sizeof(*styles); i++)
		if (!strcmp(styles[i].name, options.style))
			style = &styles[i];
	if (!style || !options.directory) {
		fputs("listener: --style STYLE DIRECTORY\n", stderr);
		return 2;
	}
	if (group >= 0)
		style->wait(group);
	if (!strcmp(style->name, "pidfd"))
		extra = tell_caller;
	if (!strcmp(style->name, "tid"))
		extra = tell_thread;
	if (!strcmp(style->name, "ignoring"))
		filled = ignore_when_filled;
	if (!strcmp(style->name, "removing"))
		filled = remove_when_filled;
	if (!strcmp(style->name, "early")) {
		open_early(options.directory);
		descriptor_to_fill = early_descriptor;
	}

	if (!strcmp(style->name, "few-allowed"))
		allow_few(256);
	if (!strcmp(style->name, "too-few-allowed"))
		allow_few(50);
	if (!strcmp(style->name, "many-open"))
		open_many(5000);

	group = open_group(options.class, style->flags, style->event_f_flags | O_LARGEFILE);
	if (group < 0)
		die("fanotify_init");
	for (int i = 1; i < argc; i++)
		if (!strcmp(argv[i], "--mark") && i + 3 < argc)
			mark_from_words(group, argv[i + 1], argv[i + 2], argv[i + 3]);
	mark_the_end(group, options.class);
	style->wait(group);
	return 3; /* none comes back */
}
