/*
 * A storage manager in one page: it fills a file's content when a process touches it. It uses plain fanotify(7), as on Linux 6.14 and later. On any
 * other kernel, and as an ordinary user, run it unchanged with
 *
 *     fusehsm run --mount DIR -- ./hsmd DIR
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/fanotify.h>
#include <sys/stat.h>
#include <unistd.h>

/* The headers of stable distributions do not have these yet. */
#ifndef FAN_PRE_ACCESS
#define FAN_PRE_ACCESS 0x00100000
#endif
#define INFO_TYPE_RANGE 6
struct range {
	uint8_t type, pad;
	uint16_t length;
	uint32_t padding;
	uint64_t offset, count;
};

static const char content[] = "fetched when you looked\n";

int main(int count, char **arguments)
{
	char buffer[4096] __attribute__((aligned(8)));
	int group = fanotify_init(FAN_CLASS_PRE_CONTENT | FAN_CLOEXEC, O_RDWR | O_CLOEXEC | O_LARGEFILE);

	if (group < 0 || count != 2 || fanotify_mark(group, FAN_MARK_ADD | FAN_MARK_MOUNT, FAN_PRE_ACCESS, AT_FDCWD, arguments[1])) {
		perror("hsmd");
		return 1;
	}
	puts("listening");
	fflush(stdout);
	for (;;) {
		ssize_t length = read(group, buffer, sizeof(buffer));
		struct fanotify_event_metadata *event = (void *)buffer;

		for (; FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length)) {
			const struct range *range = (void *)(event + 1);
			struct fanotify_response response = {.fd = event->fd, .response = FAN_ALLOW};
			struct stat status;

			if (event->event_len > sizeof(*event) && range->type == INFO_TYPE_RANGE)
				printf("PRE_ACCESS %llu %llu\n", (unsigned long long)range->offset, (unsigned long long)range->count);
			fflush(stdout);
			if (fstat(event->fd, &status) == 0 && status.st_blocks == 0 && /* still a stub */
			    pwrite(event->fd, content, strlen(content), 0) < 0)
				response.response = FAN_DENY | 5 << 24; /* EIO */
			if (write(group, &response, sizeof(response)) < 0)
				perror("hsmd: answer");
			close(event->fd);
		}
	}
}
