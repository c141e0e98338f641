/* Groups and their marks, in words. */
#define _GNU_SOURCE
#include "listener.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct word {
	const char *name;
	uint64_t value;
};

static const struct word flag_words[] = {
	{"add", FAN_MARK_ADD},
	{"remove", FAN_MARK_REMOVE},
	{"flush", FAN_MARK_FLUSH},
	{"inode", FAN_MARK_INODE},
	{"mount", FAN_MARK_MOUNT},
	{"filesystem", FAN_MARK_FILESYSTEM},
	{"onlydir", FAN_MARK_ONLYDIR},
	{"dontfollow", FAN_MARK_DONT_FOLLOW},
	{"ignored", FAN_MARK_IGNORED_MASK},
	{"ignore", FAN_MARK_IGNORE},
	{"surv", FAN_MARK_IGNORED_SURV_MODIFY},
	{"evictable", FAN_MARK_EVICTABLE},
	{NULL, 0},
};

static const struct word mask_words[] = {
	{"PRE_ACCESS", FAN_PRE_ACCESS},
	{"OPEN_PERM", FAN_OPEN_PERM},
	{"ACCESS_PERM", FAN_ACCESS_PERM},
	{"OPEN_EXEC_PERM", FAN_OPEN_EXEC_PERM},
	{"CHILD", FAN_EVENT_ON_CHILD},
	{"ONDIR", FAN_ONDIR},
	{"OPEN", FAN_OPEN},
	{"ACCESS", FAN_ACCESS},
	{"MODIFY", FAN_MODIFY},
	{"CLOSE_WRITE", FAN_CLOSE_WRITE},
	{"-", 0},
	{NULL, 0},
};

static uint64_t value_of(const struct word *words, const char *text)
{
	char copy[256], *rest = copy, *part;
	uint64_t value = 0;

	snprintf(copy, sizeof(copy), "%s", text);
	while ((part = strsep(&rest, "|"))) {
		const struct word *word = words;
		while (word->name && strcmp(word->name, part))
			word++;
		if (!word->name && strncmp(part, "0x", 2)) {
			errno = EINVAL;
			die(part);
		}
		value |= word->name ? word->value : strtoull(part, NULL, 16);
	}
	return value;
}

int open_group(const char *class, unsigned int flags, unsigned int event_f_flags)
{
	unsigned int bits = !strcmp(class, "pre")       ? FAN_CLASS_PRE_CONTENT
			    : !strcmp(class, "content") ? FAN_CLASS_CONTENT
							: FAN_CLASS_NOTIF;
	return fanotify_init(bits | flags, event_f_flags);
}

/* What cannot be marked is part of the story, and said. */
void mark_from_words(int group, const char *flags, const char *mask, const char *path)
{
	const char *slash = strrchr(path, '/');
	int error = 0;

	if (fanotify_mark(group, value_of(flag_words, flags), value_of(mask_words, mask), AT_FDCWD, path))
		error = errno;
	say("mark %s %s %s: %s", flags, mask, slash ? slash + 1 : path, word_of(error));
}

/* Reading the file "end" is how the story ends, whatever else is marked. */
void mark_the_end(int group, const char *class)
{
	char path[ROOM];
	uint64_t mask = !strcmp(class, "pre")	    ? FAN_PRE_ACCESS
			: !strcmp(class, "content") ? FAN_ACCESS_PERM
						    : FAN_ACCESS;

	snprintf(path, sizeof(path), "%s/end", options.directory);
	if (fanotify_mark(group, FAN_MARK_ADD, mask, AT_FDCWD, path))
		die(path);
}

/* What an HSM does with a file that is all there: not to be asked again. It has the event's descriptor, and no path. */

void ignore_when_filled(int group, const struct fanotify_event_metadata *event)
{
	unsigned int flags = FAN_MARK_ADD | FAN_MARK_IGNORE | FAN_MARK_IGNORED_SURV_MODIFY;

	if (fanotify_mark(group, flags, FAN_PRE_ACCESS, event->fd, NULL))
		die("ignore");
}

void remove_when_filled(int group, const struct fanotify_event_metadata *event)
{
	if (fanotify_mark(group, FAN_MARK_REMOVE, FAN_PRE_ACCESS, event->fd, NULL))
		die("remove");
}
