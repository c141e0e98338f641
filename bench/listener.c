/*
 * The fastest listener there can be: allows every pre-content event on the files named, one at a time, in C. It is the
 * real kernel's limit in the benchmark. Prints "ready" once its marks stand; runs until it is killed.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/fanotify.h>
#include <unistd.h>

/* Linux 6.14; the headers of stable distributions do not have it yet. */
#ifndef FAN_PRE_ACCESS
#define FAN_PRE_ACCESS 0x00100000
#endif

static int fail(const char *what)
{
	fprintf(stderr, "listener: %s: %s\n", what, strerror(errno));
	return 1;
}

int main(int count, char **arguments)
{
	static char buffer[65536] __attribute__((aligned(8)));
	int group = fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC, O_RDWR | O_LARGEFILE | O_CLOEXEC);
	int index;

	if (group < 0)
		return fail("fanotify_init");
	for (index = 1; index < count; index++)
		if (fanotify_mark(group, FAN_MARK_ADD, FAN_PRE_ACCESS, AT_FDCWD, arguments[index]))
			return fail(arguments[index]);
	puts("ready");
	fflush(stdout);
	for (;;) {
		ssize_t left = read(group, buffer, sizeof(buffer));
		struct fanotify_event_metadata *event = (void *)buffer;

		if (left < 0)
			return fail("read");
		for (; FAN_EVENT_OK(event, left); event = FAN_EVENT_NEXT(event, left)) {
			struct fanotify_response response = {.fd = event->fd, .response = FAN_ALLOW};

			if (event->fd < 0)
				continue;
			if (write(group, &response, sizeof(response)) != sizeof(response))
				return fail("write");
			close(event->fd);
		}
	}
}
