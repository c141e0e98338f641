/* What the parts of calls.c share. */
#ifndef CALLS_H
#define CALLS_H

#include <errno.h>
#include <stdint.h>
#include <sys/types.h>

#include "newer.h"

#define P FAN_PRE_ACCESS
#define BAD ((void *)1)
#define NO_DESCRIPTOR 9999

/* A call with its name, and the line of what it returned. */
#define ROW(name, call) (errno = 0, row(name, (long)(call)))
/* The same for a call that gives a descriptor, whose number is nobody's business. */
#define ROW_FD(name, call) (errno = 0, row_fd(name, (call)))

void row(const char *name, long result);
void row_fd(const char *name, int fd);
void need(int condition, const char *what);

int new_group(unsigned int flags);
const char *in(const char *name);

/* A child that reads the first byte of a file. It has no copy of the group. Its event is queued when this returns. */
struct reader {
	pid_t pid;
};
struct reader start_reading(int group, const char *name);
void row_reader(const char *name, struct reader reader);

/* calls_io.c: the events of groups that are marked on three files, and their answers. */
#define PRE (FAN_CLASS_PRE_CONTENT | FAN_NONBLOCK | FAN_CLOEXEC)
#define EVENT 48 /* bytes of a PRE_ACCESS event */
extern char buffer[4096];
int marked_group(unsigned int flags);
int event_fd_at(size_t place);
ssize_t answer(int group, int fd, unsigned int response, size_t size);
void row_answer(const char *name, int group, int fd, unsigned int response);
void row_queued(const char *name, int group);

void calls_init(void);
void calls_mark(void);
void calls_read(void);
void calls_readv(void);
void calls_write(void);
void calls_descriptor(void);
void calls_poll(void);
void calls_copies(void);
void calls_placed(void);
void calls_foreign(void);
void calls_ends(void);

#endif
