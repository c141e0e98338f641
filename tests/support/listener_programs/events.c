/* What the listener does with an event, however it came by it. */
#define _GNU_SOURCE
#include "listener.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096

/* Before it was merged, the series that brought PRE_ACCESS had it at another bit, which no kernel has given away. */
#define POSTED_PRE_ACCESS 0x00080000

const uint64_t permission_events =
	FAN_OPEN_PERM | FAN_ACCESS_PERM | FAN_OPEN_EXEC_PERM | FAN_PRE_ACCESS | POSTED_PRE_ACCESS;

static const struct {
	uint64_t bit;
	const char *name;
} names[] = {
	{FAN_PRE_ACCESS, "PRE_ACCESS"},	  {FAN_OPEN_PERM, "OPEN_PERM"},	    {FAN_ACCESS_PERM, "ACCESS_PERM"},
	{FAN_OPEN_EXEC_PERM, "OPEN_EXEC_PERM"}, {FAN_OPEN, "OPEN"},	    {FAN_ACCESS, "ACCESS"},
	{FAN_MODIFY, "MODIFY"},		  {FAN_CLOSE_WRITE, "CLOSE_WRITE"}, {FAN_CLOSE_NOWRITE, "CLOSE_NOWRITE"},
	{FAN_Q_OVERFLOW, "Q_OVERFLOW"},	  {FAN_ONDIR, "ONDIR"},		    {POSTED_PRE_ACCESS, "0x80000"},
};

struct range {
	struct fanotify_event_info_header header;
	uint32_t pad;
	uint64_t offset;
	uint64_t count;
};

/* As the series was first posted. */
struct range_v1 {
	struct fanotify_event_info_header header;
	uint32_t count;
	uint64_t offset;
};

static void write_answer(int group, const struct fanotify_response *response)
{
	if (write(group, response, sizeof(*response)) != sizeof(*response))
		die("answer");
}

static int event_descriptor(int event_fd, const char *name)
{
	(void)name;
	return event_fd;
}

const char *prefix = "";
void (*extra)(const struct fanotify_event_metadata *event, char *text, size_t size);
void (*filled)(int group, const struct fanotify_event_metadata *event);
void (*answer)(int group, const struct fanotify_response *response) = write_answer;
int (*descriptor_to_fill)(int event_fd, const char *name) = event_descriptor;

const void *record_of(const struct fanotify_event_metadata *event, int type)
{
	const char *bytes = (const char *)event;
	unsigned int place = event->metadata_len;

	while (place + sizeof(struct fanotify_event_info_header) <= event->event_len) {
		const struct fanotify_event_info_header *header = (const void *)(bytes + place);
		if (header->info_type == type)
			return header;
		if (!header->len)
			break;
		place += header->len;
	}
	return NULL;
}

/* The name of the event's file, without its directory. */
static const char *name_of(const struct fanotify_event_metadata *event, char *path, size_t size)
{
	char link[64];

	if (event->fd < 0)
		return "-";
	snprintf(link, sizeof(link), "/proc/self/fd/%d", event->fd);
	ssize_t length = readlink(link, path, size - 1);
	if (length < 0)
		die("readlink");
	path[length] = 0;
	const char *slash = strrchr(path, '/');
	return slash ? slash + 1 : path;
}

/* An event's range, in whichever dialect; 0: it has none. */
static int range_of(const struct fanotify_event_metadata *event, uint64_t *offset, uint64_t *count)
{
	const struct range *range = record_of(event, INFO_RANGE);
	const struct range_v1 *first = (const void *)range;

	if (!range)
		return 0;
	if (range->header.len == sizeof(*first)) {
		*offset = first->offset;
		*count = first->count;
	} else {
		*offset = range->offset;
		*count = range->count;
	}
	return 1;
}

void describe(const struct fanotify_event_metadata *event, const char *decision)
{
	uint64_t offset, count;
	char what[256] = "", where[64] = "- -", path[ROOM], more[256] = "";

	for (size_t i = 0; i < sizeof(names) / sizeof(*names); i++)
		if (event->mask & names[i].bit) {
			strcat(what, *what ? "|" : "");
			strcat(what, names[i].name);
		}
	if (range_of(event, &offset, &count))
		snprintf(where, sizeof(where), "%llu %llu", (unsigned long long)offset, (unsigned long long)count);
	if (extra)
		extra(event, more, sizeof(more));
	say("%s%s %s %s %s%s", prefix, what, where, name_of(event, path, sizeof(path)), decision, more);
}

/* What the file has at that place, by the file's own plan. */
static unsigned char planned(uint64_t place)
{
	return place % 251 + place / PAGE % 5;
}

/* Every page of the event's range that is a hole gets its content; what is there, somebody may have changed since. */
static void fill(const struct fanotify_event_metadata *event, const char *name)
{
	uint64_t offset, count;
	int target = descriptor_to_fill(event->fd, name);
	struct stat stat;
	unsigned char page[PAGE];

	if (!range_of(event, &offset, &count) || target < 0 || fstat(event->fd, &stat) || !S_ISREG(stat.st_mode))
		return;
	for (uint64_t place = offset; place < offset + count && place < (uint64_t)stat.st_size; place += PAGE) {
		size_t size = stat.st_size - place < PAGE ? stat.st_size - place : PAGE;
		if (lseek(event->fd, place, SEEK_DATA) == (off_t)place)
			continue;
		for (size_t i = 0; i < size; i++)
			page[i] = planned(place + i);
		if (pwrite(target, page, size, place) != (ssize_t)size)
			die("pwrite");
	}
}

/* Say what happens to an event and make it so, up to the answer; 0: it wants none. */
int decide(int group, const struct fanotify_event_metadata *event, struct fanotify_response *response)
{
	char path[ROOM], decision[64];
	const char *name = name_of(event, path, sizeof(path));

	response->fd = event->fd;
	response->response = FAN_ALLOW;
	if (!(event->mask & permission_events)) {
		describe(event, "-");
		return 0;
	}
	if (event->fd < 0) { /* nobody waits for an answer any more */
		snprintf(decision, sizeof(decision), "%s", word_of(-event->fd));
		describe(event, decision);
		return 0;
	}
	if (options.deny && !fnmatch(options.deny, name, 0)) {
		response->response = FAN_DENY | (unsigned int)options.deny_errno << 24;
		snprintf(decision, sizeof(decision), "DENY %s", word_of(options.deny_errno));
		describe(event, decision);
		return 1;
	}
	describe(event, "ALLOW");
	fill(event, name);
	if (filled && strcmp(name, "end"))
		filled(group, event);
	return 1;
}

/* After the answer: the event's descriptor is of no more use, and its file may be the end. */
void settle(const struct fanotify_event_metadata *event)
{
	char path[ROOM];
	int is_end = !strcmp(name_of(event, path, sizeof(path)), "end");

	if (event->fd >= 0)
		close(event->fd);
	if (is_end)
		exit(0);
}

void handle(int group, const char *buffer, ssize_t length)
{
	const struct fanotify_event_metadata *event = (const void *)buffer;

	for (; FAN_EVENT_OK(event, length); event = FAN_EVENT_NEXT(event, length)) {
		struct fanotify_response response;
		if (event->vers != FANOTIFY_METADATA_VERSION) {
			fputs("listener: unknown version of events\n", stderr);
			exit(1);
		}
		if (decide(group, event, &response))
			answer(group, &response);
		settle(event);
	}
}

/* Descriptors of files that were opened before anything was marked: what goes through them makes no events. */

static struct {
	char name[256];
	int fd;
} early[64];
static int early_count;

void open_early(const char *directory)
{
	DIR *listing = opendir(directory);
	struct dirent *entry;

	if (!listing)
		die(directory);
	while ((entry = readdir(listing)) && early_count < 64)
		if (entry->d_type == DT_REG) {
			strcpy(early[early_count].name, entry->d_name);
			early[early_count].fd = openat(dirfd(listing), entry->d_name, O_RDWR | O_CLOEXEC);
			if (early[early_count++].fd < 0)
				die(entry->d_name);
		}
	closedir(listing);
}

int early_descriptor(int event_fd, const char *name)
{
	(void)event_fd;
	for (int i = 0; i < early_count; i++)
		if (!strcmp(early[i].name, name))
			return early[i].fd;
	return -1;
}
