/*
 * A listener that fills its files through descriptors of its own, as public daemons do: one thread for each event, so that events of the listener's own
 * accesses are answered, too.
 *
 *   own event|holes|kept|path|chmod DIRECTORY FILE...
 *
 * event: through the event's descriptor. kept: through one that was opened before the mark. path: through one that is opened by path at the event.
 * holes: through the event's descriptor, if SEEK_HOLE of one that was opened before the mark finds a hole.
 * chmod: a child changes the mode, then through the event's descriptor. FILE is filled with "C".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "newer.h"

static int group, count, *kept;
static char **names;
static const char *how;

static int fill(int fd)
{
	static char full[1 << 16];
	struct stat status;
	int error = 0;
	off_t at;

	memset(full, 'C', sizeof(full));
	if (fstat(fd, &status))
		return errno;
	for (at = 0; at < status.st_size && !error; at += sizeof(full)) {
		size_t size = status.st_size - at < (off_t)sizeof(full) ? status.st_size - at : sizeof(full);

		if (pwrite(fd, full, size, at) != (ssize_t)size)
			error = errno;
	}
	return error;
}

static int through_event(void)
{
	return !strcmp(how, "event") || !strcmp(how, "chmod") || !strcmp(how, "holes");
}

static int has_hole(int fd)
{
	struct stat status;

	return !fstat(fd, &status) && lseek(fd, 0, SEEK_HOLE) < status.st_size;
}

static int by_path(const char *name)
{
	int error, fd = open(name, O_WRONLY | O_CLOEXEC);

	if (fd < 0)
		return errno;
	error = fill(fd);
	close(fd);
	return error;
}

static int in_child(const char *name)
{
	int status;
	pid_t child = fork();

	if (!child)
		_exit(chmod(name, 0600) ? errno : 0);
	waitpid(child, &status, 0);
	return WIFEXITED(status) ? WEXITSTATUS(status) : EIO;
}

/* The file of an event, found by what identifies it: -1 for none. */
static int position(int event_fd)
{
	struct stat wanted, found;
	int number;

	if (fstat(event_fd, &wanted))
		return -1;
	for (number = 0; number < count; number++)
		if (!stat(names[number], &found) && found.st_ino == wanted.st_ino &&
		    (found.st_dev == wanted.st_dev || through_event()))
			return number;
	return -1;
}

static void *serve(void *argument)
{
	struct fanotify_event_metadata *event = argument;
	struct fanotify_response response = {event->fd, FAN_ALLOW};
	int error = 0, number;

	if (event->pid != getpid() && !strcmp(how, "event")) {
		error = fill(event->fd);
	} else if (event->pid != getpid()) {
		number = position(event->fd);
		if (number < 0) {
			puts("unknown");
		} else if (!strcmp(how, "kept")) {
			error = fill(kept[number]);
		} else if (!strcmp(how, "holes")) {
			if (has_hole(kept[number]))
				error = fill(event->fd);
		} else if (!strcmp(how, "chmod")) {
			error = in_child(names[number]);
			if (!error)
				error = fill(event->fd);
		} else {
			error = by_path(names[number]);
		}
	}
	if (error)
		printf("fill: %s\n", strerror(error));
	fflush(stdout);
	write(group, &response, sizeof(response));
	close(event->fd);
	free(event);
	return NULL;
}

int main(int argc, char **argv)
{
	int number;

	if (argc < 4)
		return 2;
	how = argv[1];
	names = argv + 3;
	count = argc - 3;
	kept = calloc(count, sizeof(*kept));
	for (number = 0; number < count; number++)
		kept[number] = strcmp(how, "kept") && strcmp(how, "holes") ? -1 : open(names[number], O_RDWR | O_CLOEXEC);
	group = fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC, through_event() ? O_RDWR : O_RDONLY);
	if (group < 0 || fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_PRE_ACCESS, AT_FDCWD, argv[2])) {
		perror("mark");
		return 3;
	}
	puts("ready");
	fflush(stdout);
	for (;;) {
		struct fanotify_event_metadata *event = malloc(4096);
		pthread_t thread;

		if (read(group, event, sizeof(*event) + 24) <= 0)
			return 4;
		pthread_create(&thread, NULL, serve, event);
		pthread_detach(thread);
	}
}
