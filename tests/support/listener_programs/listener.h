/* What the parts of the listener share. See listener.c. */
#ifndef LISTENER_H
#define LISTENER_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "newer.h"

#define INFO_PIDFD 4
#define INFO_RANGE 6

/* Room for a PRE_ACCESS event and nothing more. */
#define ONE_EVENT 48
#define ROOM 4096

/* Events of these kinds wait for an answer. */
extern const uint64_t permission_events;

/* What the command line asked for. */
struct options {
	const char *style;
	const char *class;
	const char *deny; /* a glob that file names are held against; NULL: nobody is denied */
	int deny_errno;
	const char *directory;
	char **argv;
	int argc;
};
extern struct options options;

void die(const char *what);
void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
const char *word_of(int error);

/* events.c: an event is described on stdout, its stub filled, and the answer given. */
extern const char *prefix; /* said before every event */
extern void (*extra)(const struct fanotify_event_metadata *event, char *text, size_t size);
extern void (*filled)(int group, const struct fanotify_event_metadata *event);
extern void (*answer)(int group, const struct fanotify_response *response);
extern int (*descriptor_to_fill)(int event_fd, const char *name);
void describe(const struct fanotify_event_metadata *event, const char *decision);
int decide(int group, const struct fanotify_event_metadata *event, struct fanotify_response *response);
void settle(const struct fanotify_event_metadata *event);
void handle(int group, const char *buffer, ssize_t length);
const void *record_of(const struct fanotify_event_metadata *event, int type);
void open_early(const char *directory);
int early_descriptor(int event_fd, const char *name);

/* marking.c: groups and their marks. */
int open_group(const char *class, unsigned int flags, unsigned int event_f_flags);
void mark_from_words(int group, const char *flags, const char *mask, const char *path);
void mark_the_end(int group, const char *class);
void ignore_when_filled(int group, const struct fanotify_event_metadata *event);
void remove_when_filled(int group, const struct fanotify_event_metadata *event);

/* waiting.c: the ways of one process to wait for events. None returns. */
void wait_blocking(int group);
void wait_poll(int group);
void wait_epoll_level(int group);
void wait_epoll_edge(int group);
void wait_epoll_edge_one(int group);
void wait_select(int group);
void wait_readv(int group);
void wait_fionread(int group);
void wait_writev(int group);

/* lives.c: what becomes of a group: threads, forks, copies, signals, deaths. None returns. */
void live_threads(int group);
void live_workers(int group);
void live_copy(int group);
void live_copy_to(int group);
void live_exec(int group);
void live_exec_away(int group);
void live_alarm(int group);
void live_alarm_restart(int group);
void live_death(int group);
void live_few_descriptors(int group);
void live_groups(int group);

/* numbers.c: groups at all kinds of descriptor numbers. The first two come before the group; none of the others returns. */
void allow_few(int number);
void open_many(int number);
void become_inheritor(int group);
void number_handed(int group);
void number_taken(int group);
void number_exec_placed(int group);
void number_from_3(int group);
void number_elsewhere(int group);
void number_dropped(int group);

#endif
