/* What the parts of races.c share. */
#ifndef RACES_H
#define RACES_H

#include <errno.h>
#include <stdint.h>
#include <sys/types.h>

#include "newer.h"

extern char **places; /* the watched directories */

void say(const char *format, ...) __attribute__((format(printf, 1, 2)));
void must(int condition, const char *what);
const char *path_in(const char *place, const char *name);

/* A group that is marked on everything in the first place. */
int group_on_everything(unsigned int flags);
void mark_everything(int group, const char *place);
int events_in(const char *buffer, ssize_t length);
/* Allows what one read(2) gave; the number of events. */
int allow(int group, const char *buffer, ssize_t length);

void start(void *(*body)(void *), intptr_t argument);
/* A child that has no copy of the group, and its end. */
pid_t start_child(int group, void (*body)(int argument), int argument);
void wait_for(pid_t child);
/* Memory that children share. */
void *shared_memory(size_t size);
/* Reads the first bytes of a file, so many times, each of which makes an event. */
void read_often(const char *path, int times);

/* races.c: whether poll(2) and epoll(7) tell of what waits. */
void poll_pairs(void);
void poll_crowd(void);
void epoll_edges(void);
void fionread_beside_read(void);
void two_mounts(void);

/* races_signals.c: signals that meet a read(2). */
void signals_restart(int threads);
void signal_while_vfork(void);
void stop_and_go_on(void);

/* races_numbers.c: what races for descriptors, mappings, processes; and rights. */
void mappings_in_threads(void);
void copies_against_closes(void);
void numbers_in_use(void);
void processes_run_out(void);
void rights_dropped(void);
void rights_inherited(void);

#endif
